"""Saved: what a checkpoint holds, as values; no storage was read for them, and no code of the file was run.

In the order of a load:

1. `formats` makes a file's tree of `values`: a `StorageRef` says where a storage's bytes are, a `LazyTensor` which of
   them are its elements, an `InertObject` what the pickle would have called. `tree.check_tree` refuses a tree that no
   walk gets through; `tree.iterate` and `tree.tensors` walk one.
2. `sources` puts a checkpoint's parts together as `contents.Contents`. A tensor that lies in several partitions is an
   `assembled.AssembledTensor`; `intervals.intersect` computes which saved elements fill which wanted ones.
3. `ignore.ignore` leaves out what ``ignore_keys`` names.
4. `targets` match names (`names.match_names`), collect what does not fit (`mismatch.Mismatch`), and ask
   `assembled.parts_of` for what fills a shard.
5. `strided` cuts a tensor into boxes that `materialize` reads one after another. `dtypes` has the size of each dtype.

Not guaranteed: that the bytes of a storage are there, or right. Nothing here reads a file or waits for other ranks.

May import `errors` only; never torch or numpy.
"""
