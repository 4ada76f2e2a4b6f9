"""Saved: what a checkpoint holds, as values; no storage was read for them, and no code of the file was run.

In the order of a load:

1. `formats` makes a file's tree of `values`, and of tensors: a `tensor.StorageRef` says where a storage's bytes are, a
   `tensor.SavedTensor` of which pieces it is made, and where the elements of each lie in a storage. `tree.check_tree`
   refuses a tree that no walk gets through; `tree.iterate` and `tree.tensors` walk one.
2. A target says what it wants: a `demand.Demand`. By it, `sources` read files (each a `node_file.NodeFile`), and put
   what they hold together as `contents.Saved`. A tensor that lies in several partitions has a piece in each
   (`partitions`, `model_parallel`, `shards`; where they are millions, `shares` makes them as they are asked for, and
   tensors that are cut alike share a `division.Division`);
   `regions.check_cover` tells whether they hold each element once.
3. `ignore.ignore` leaves out what ``ignore_keys`` names.
4. `targets` match names (`names.match_names`), collect what does not fit (`mismatch.Mismatch`), and plan copies:
   `copies.copies_into` asks `tensor.fill` which elements of which pieces fill a part of a tensor, and that asks
   `regions.intersect` for each piece. `runs` makes one copy of many parameters that a file and an engine's memory
   have side by side. `copies.reads_of` gives the bytes that the copies read: these are fetched.
5. `strided` cuts a tensor into boxes that `materialize` reads one after another. `dtypes` has the size of each dtype.

Not guaranteed: that the bytes of a storage are there, or right. Nothing here reads a file or waits for other ranks.

May import `errors` and `byte_ranges` only; never torch or numpy.
"""
