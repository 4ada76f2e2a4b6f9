"""Turns a pickle into plain values, saved tensors and inert objects; imports and calls nothing that the pickle names.

1. `scan.scan_pickle` follows the opcodes (tables: `opcodes`) before any object exists. It refuses a pickle that would
   take undue memory, nesting or hashing, or that uses opcodes which reach outside the file. Of what a checkpoint says
   of each of its tensors, it follows the opcodes once (`repeats`).
2. `read.read_pickle` runs Python's unpickler with a ``find_class`` of its own: each global (a class or function that
   the pickle names) becomes a `PickledGlobal`, which is its name and whether the allow-list in `known` has it.
3. Where the pickle calls a global, `build.make` finds a stand-in for it by name: `tensors` for torch's functions,
   `arrays` for NumPy's, `build` for Python's. A call without a stand-in becomes a `PickledObject`, which records it,
   and a tensor that is not the bytes of one storage a `PickledInertTensor`, or a `PickledShard` (`shards`).
   `inert` holds these types; `budget` limits what the stand-ins of one file copy and hash.

Where a global is refused: in `materialize.safe_types.require_safe`, which raises `UnsafeError` for every name off the
allow-list in what a load would restore, unless ``LoadOptions.safe_types`` allows it. It cannot be earlier, since the
part that holds it may be ignored, or have no place in the job. This room refuses a global only where its name is too
long (`read`) or the pickle sets its state (`scan`, and `inert` for what the scan cannot see).

Not guaranteed: the memory that the scan counts is an estimate, and the tree may contain itself or share parts without
end where `PickleScan.shares`; `saved.tree.check_tree` refuses that. Imports `saved` and `errors`; never torch or numpy.
"""
