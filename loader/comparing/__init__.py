"""Comparing: where two checkpoints of any kinds differ, by one process and in little memory.

1. `leaves` makes of each checkpoint its places and what is there, and pairs those of both, across renamed parameters.
2. `elements` counts where two pieces of tensors differ, and by how much.
3. `compare.compare_checkpoints` opens both, and reads their tensors a few MiB at a time; bytes of remote stores are
   kept nowhere. `results` has what comes of it.

Not promised: that bytes are those that were written. Checksums are what `wholeness` compares.

May import `alone` and all that that may; torch in `elements` and `compare`.
"""
