"""Materialize: copies saved tensors' bytes into live tensors, and turns other saved values into real objects.

- `tensors.TensorReader.copy` fills the memory of parameters, buffers and optimizer states. Each `saved.copies.Copy`
  names elements of a storage and their place in a memory, and the caller gives the tensor that this memory is. Bytes
  that need no conversion are read into it; others are read into a buffer, and cast and moved from there.
- `storages.StorageReader` does the reading below it: each storage once and in order, from the node's file or directly
  from the store. It waits for bytes that have not landed, and sums bytes for the checksums.
- `objects.materialize` makes a whole tree real: random states, schedulers, ``extra``. `safe_types.require_safe` refuses
  the tree first if it holds a type that is neither known nor allowed (in ``extra``, such values stay inert); then its
  storages are read, by the same `saved.copies.copies_of_tree` as they were planned by, and its values made.

Not guaranteed: a rollback. When `CorruptError` is raised, destinations may have been written. A storage that several
ranks sum together is not compared here (`verify.checks` does that). A reader is for one thread; nothing here waits for
other ranks.

May import torch and numpy, `formats`, `cache`, `ranges`, `saved` and what all rooms may.
"""
