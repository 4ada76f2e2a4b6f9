"""Verify: compares what the ranks restore with its checksums, together.

In the order of a load:

1. A plan's copies tell which bytes of which storages this rank will read (`saved.copies.reads_of`).
2. `checks.deal_checks`: a zip's CRC-32 is that of a whole storage, but a rank may read only a part. On rank 0,
   `joint.JointCheck` cuts the storage into cells and assigns each to a rank that reads it, to be summed.
3. `checks.verify_after` (with ``verify="before"``: `checks.verify_before`) gathers the cells' CRC-32s on rank 0, which
   combines them and compares them with the stored one.

Not guaranteed: a file without checksums (torch's format before 1.6) is compared with nothing. With ``verify="during"``
an error is found after the first change, and the load raises a `PartialRestoreError`. These functions must be called by
every rank, and raise the same error on all of them.

May import `materialize`, `saved` and what all rooms may; ``distributed``.
"""
