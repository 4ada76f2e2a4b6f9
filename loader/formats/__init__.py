"""Reads a torch file's index: its tree, and where the bytes of every storage lie.

`torch_file.read_index` does it in this order:

1. `sniff` recognises the kind of file from its first bytes; a file that torch did not write is refused by its kind.
2. `torch_zip` reads and checks the zip's directory; `torch_legacy` reads files of the format before torch 1.6.
3. `pickle` turns the file's pickle into a tree, without importing or calling anything that it names.
4. `storage_ids` parses the id by which a tensor names its storage. Each storage becomes one `StorageRef`, each
   tensor a `SavedTensor` that lies inside it.
5. `saved.tree.check_tree` refuses a tree that contains itself, or is too large to walk.

Not guaranteed: storages are neither read nor compared with their checksums (`materialize.storages` does so when it
copies them), and what the keys of a tree mean is not known here (`sources`). Classes and functions off the
allow-list stay in the tree as names; `materialize.safe_types` refuses them.

Imports `saved`, `checksums` and `errors`; never torch or numpy.
"""
