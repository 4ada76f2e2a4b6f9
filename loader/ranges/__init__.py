"""Ranges: any bytes of one or several objects, over as many connections as bring more, into memory or a file.

1. `open.open_range_source` opens an object at one version as a `base.RangeSource`: by `http`, by a URL that the
   backend signs (`signed`), or by the backend's own reads (`fsspec`). `peer` reads from another rank's node, and
   `window` makes a source of an archive's member.
2. `engine.read_ranges` joins ranges that are near each other, cuts them into chunks, and queues them.
3. `workers.run_jobs` runs its threads; `concurrency.Concurrency` decides how many of them read at once.
4. Each thread takes adjacent chunks, reads them with one request, and puts the bytes into a `destinations.Destination`.
5. Where a read fails with `TryAgainError`, ``loader.retries`` decides whether it is tried again, and when.
6. `RangeSource.confirm` compares the version once more where answers do not state it.

`direct.DirectReads` reads this way into a rank's own tensors. `objects.open_bytes` is for whoever looks into many
objects, a little into each; `seekable` gives what is read anywhere the form of a file.

Not promised: chunks land in any order, and what has landed stays where it is if the rest fails. No checksum is
compared. A server without ranges is read from its first byte, once.

May import `stores`, `http`, `retries`, `workers`, `byte_ranges`, `redaction`, `store_errors` and `errors`; `peer` also
``distributed.range_server``.
"""
