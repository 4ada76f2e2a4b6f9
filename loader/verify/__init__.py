"""Verify: compares what the ranks restore with its checksums, together; and brings shared weights to a node once.

Checksums, in the order of a load:

1. `wanted_reads.wanted_reads`: which bytes of which storages this rank's restore will read.
2. `checks.deal_checks`: a zip's CRC-32 is that of a whole storage, but a rank may read only a part. On rank 0,
   `joint.JointCheck` cuts the storage into cells and assigns each to a rank that reads it, to be summed.
3. `checks.verify_after` (with ``verify="before"``: `checks.verify_before`) gathers the cells' CRC-32s on rank 0, which
   combines them and compares them with the stored one.

Weights, which below stage 3 every rank of a DeepSpeed job needs whole:

1. `weights.plan_weights`: rank 0 assigns parts of them to each node's ranks (`weight_regions.deal_regions`).
2. `weights.share_weights`, after the masters are restored: each rank puts its parts, cast from masters or read, into
   memory that the node's ranks share (`shared_memory`); once their CRC-32 is right, each copies the whole from there.

Not guaranteed: a file without checksums (torch's format before 1.6) is compared with nothing. With ``verify="during"``
an error is found after the first change, and raised as `PartialRestoreError`. These functions must be called by every
rank, and raise the same error on all of them; `wanted_reads` works on one rank alone.

May import torch, `materialize`, `cache`, `saved` and what all rooms may; ``distributed``. Imports of `check`,
`checkpoint` and `targets` are exceptions in the import table.
"""
