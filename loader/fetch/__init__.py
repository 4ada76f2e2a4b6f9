"""Fetch: brings a checkpoint's files to every node, and each byte that the ranks of a node need once.

1. A source asks for files by `checkpoint_files.CheckpointFiles`. `files.fetch_files`: all ranks state the files that
   they need (`needs`). The lowest rank of each node, its leader, finds them, checks that there is room (`space_check`),
   and obtains each into the node's cache (`whole.obtain`). Tars are unpacked (`archive`) and compressed files expanded
   (`decompress`); local files are used where they are.
2. A torch file or safetensors file in a store that does ranges "comes in parts" (`remote_files`): at first only its
   index is fetched, into a file with holes (`remote_file`). Large torch files inside a tar come so, too (`tars`).
   Of a file that is torch files end to end, `items` fetches the indexes that a source asks for.
3. Once the index is read, `parts.early_parts` and `parts.restore_parts` collect the ranges that this rank will read.
4. `rounds.plan_round` sends them to rank 0, where `plan.plan_fetch` decides which rank fetches which bytes: from the
   store or from another node, into the node's file or directly into its own memory.
5. `FetchRound.run` fetches them in a thread, while the restore reads what has landed (`parts.fetching`).

`whole_checks` compares objects that came whole with checksums of the store or of a manifest; `progress` shows the
job's bytes on rank 0.

Not guaranteed: the bytes of a file that comes in parts are not compared with a checksum here (`verify` does that for
its storages), and the room that was checked is not reserved. A function whose docstring says so must be called by
every rank; it raises the same error on all of them.

May import `context`, `materialize`, `formats`, `cache`, `ranges`, `stores`, `http`, `saved` and what all rooms may;
``distributed``.
"""
