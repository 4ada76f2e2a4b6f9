"""Turns the trees of a checkpoint's files into `Contents`: its parts, under the names that Composer gives them.

Whatever wrote the checkpoint, its parts come out as ``state/model``, ``state/optimizers/CLASS``,
``state/schedulers/CLASS`` and so on, so that ``ignore_keys`` and the targets know one vocabulary.

- `single_file.read_layout`: a file that holds everything, as Composer, Lightning or a training script saved it, or a
  bare state dict.
- `zero`: a DeepSpeed checkpoint, whose parameters lie in partitions on the ranks that saved it.

Not guaranteed: no tensor is read and no checksum compared; whether the parts fit the job's model is for the targets to
find; classes that are not known stay in the parts until `materialize.safe_types` refuses them.

Imports `formats`, `stores`, `saved`, `template` and `errors`; `zero.files` and `zero.open` also `checkpoint`, `fetch`
and `targets`, as exceptions that `tests/test_house.py` lists.
"""
