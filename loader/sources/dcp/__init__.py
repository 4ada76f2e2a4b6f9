"""Turns a folder of ``torch.distributed.checkpoint`` (DCP) into one `Saved`.

`open.Dcp` reads the ``.metadata`` (`formats.dcp_metadata`), and what lies beside it, such as Lightning's ``meta.pt``.
Of that it makes an outline of the checkpoint, in which nothing was read, by which `needs` says which items this rank
reads. Of their indexes (`Files.items`), `values` makes saved tensors and objects, `tree` the nested state dict that
was saved, and `layout` the parts under the names that Composer gives them. `optimizers` knows the three forms in
which programs save an optimizer's state.

    .metadata       keys, shapes and chunks; of each chunk and object the file and the bytes: an item
    __0_0.distcp    items, end to end: each a torch file of its own, with strides and a CRC-32 of its own
    __1_0.distcp    ...

Not guaranteed: that the files are of one save. Nothing in them says so; a manifest of checksums does.
"""
