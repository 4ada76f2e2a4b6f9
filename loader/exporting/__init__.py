"""Exporting: a checkpoint of any kind becomes safetensors, or a DCP folder, by one process and in little memory.

1. `select` decides what is written: which weights, in which dtype, from which saved values; and what is not, and why.
2. `safetensors` or `dcp` lays that out in files, before any of it is read.
3. `pieces` reads a tensor a few MiB at a time, casts them, and has them written while the next ones are read.
4. `places` puts the files where they go: under temporary names on this node, or as uploads; what a reader begins with
   (the index, ``.metadata``) comes last, and the manifest after it.

`export.export_checkpoint` does all four.

Not promised: that tensors which were tied only in the running job, and were saved as two, are found to be one.
"""
