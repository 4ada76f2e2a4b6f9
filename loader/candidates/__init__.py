"""Lists what may be checkpoints of one run: in a folder, or in the files that a template names.

1. `listing.list_candidates` asks the store what lies in the folder, one request a folder. A store that cannot list is
   asked for its pointer alone, the ``latest`` of a DeepSpeed folder.
2. `names` says of each name whether a checkpoint is called so, and which step it tells. Pure.
3. What names a newest one (``latest``, a link) becomes the candidate's `pointer`.

Not guaranteed: that a candidate is a checkpoint, let alone whole: that is for `finding` to prove.
"""
