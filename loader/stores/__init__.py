"""Stores: whole objects by name, in local files, http(s), fsspec's file systems, and objects that the user passes.

1. `open.open_store` picks the store that a path belongs to: `given`, `http`, `fsspec` or `local`. Each offers the
   interface `base.Store`, and maps its backend's errors to ``loader.errors``.
   What is needed first of an object is asked for first, instead of what there is of it (`first_answers`): over http(s),
   and where `signing` signs URLs.
2. `locate.locate` finds the checkpoint that the path names: a file, or a DeepSpeed folder by its ``latest``. It makes
   names by `names`, and asks for each by `probes`, which tells what is not there from what is refused.
3. `symlinks.resolve` follows ``NAME.symlink`` objects.
4. `manifest.find_manifests` reads files of checksums that lie next to the checkpoint.
5. `Store.download` brings an object into a file. `transfer` reports its progress, and checks its size before the file
   gets its name.
6. `sums` reads the checksums that stores keep, and `digests` computes checksums of the same kinds.

Not promised: no store lists names (`nearby` lists a local folder, for a message alone). A download is checked
for its size, and for its version over http(s) only; its checksum is compared by the caller (`fetch.whole_checks`).
What may pass is tried again as ``loader.retries`` decides, whatever the backend; many try again themselves before that.

May import `http`, `retries`, `workers`, `checksums`, `redaction`, `errors` and `store_errors`; fsspec inside functions.
"""
