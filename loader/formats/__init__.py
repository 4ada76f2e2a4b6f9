"""Reads the index of a torch file or a safetensors file: its tree, and where the bytes of every storage lie.

`torch_file.read_index` does it in this order:

1. `sniff` recognises the kind of file from its first bytes; a file that holds no tensors is refused by its kind.
2. `torch_zip` reads and checks the zip's directory; `torch_legacy` reads files of the format before torch 1.6.
   `safetensors` reads a safetensors file's header, which is all of its index.
3. `pickle` turns the file's pickle into a tree, without importing or calling anything that it names.
4. `storage_ids` parses the id by which a tensor names its storage. Each storage becomes one `StorageRef`, each
   tensor a `SavedTensor` that lies inside it.
5. Where the pickle uses anything twice, `saved.tree.check_tree` refuses a tree that contains itself, or is too large to
   walk.

`torch_items` reads the indexes of torch files inside of larger files, of many that are alike by the bytes of one.
`plain_pickle` reads what ``pickle.dump`` wrote, whose pickle is its whole index. `dcp_metadata` reads the ``.metadata``
of a DCP folder, by `dcp_pickle` where it is as torch writes it. `model_index` reads the index of a model in several
files; `strict_json` parses JSON for it and for `safetensors`.

Not guaranteed: storages are neither read nor compared with their checksums (`materialize.storages` does so when it
copies them), and what the keys of a tree mean is not known here (`sources`). Classes and functions off the
allow-list stay in the tree as names; `materialize.safe_types` refuses them.

Imports `saved`, `checksums` and `errors`; never torch or numpy.
"""
