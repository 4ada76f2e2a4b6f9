"""Planning: what a load of some job would do on each node and rank, from the checkpoint's indexes, without the job.

1. `jobs.job_of` makes up a job of a kind (`jobs.TARGETS`) that has the checkpoint's own names and shapes; `Job.demand`
   is what one rank of it asks of a source.
2. `loads.plan_load` opens the checkpoint for each rank by the sources that a load has, and notes by
   `recording.RankFiles` which files and indexes each asks for.
3. `restores.restore_of` gives the copies that the rank's restore makes, by the rules of ``targets``.
4. `nodes.deal` lets all ranks agree as those of a load do (weights that a node shares, checksums, who fetches which
   ranges), by the same functions.

It needs no torch, so it knows no live model: a job's dtypes are those that were saved, and its optimizer is the one
that was saved. The files that indexes come with go into a folder of their own, which is removed.
"""
