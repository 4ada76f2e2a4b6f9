"""Turns a checkpoint's files into one `Saved`: its parts, under the names that Composer gives them.

`base` defines both sides: `Files` is what a source is handed, `Source` what it must do. `kinds.source_of` finds the
source that a checkpoint is for, and `Source.open` fetches the files that a `Demand` asks for and reads their indexes.
Whatever wrote the checkpoint, its parts come out as ``state/model``, ``state/optimizers/CLASS``,
``state/schedulers/CLASS`` and so on, so that ``ignore_keys`` and the targets know one vocabulary.

- `zero`: a DeepSpeed checkpoint, whose parameters lie in partitions on the ranks that saved it.
- `dcp`: a folder of ``torch.distributed.checkpoint``, whose tensors lie in chunks.
- `sharded`: a model in several files, of safetensors or of torch, which an index lists.
- `slices`: safetensors files of each rank's slices of a model, as torch's writer saves them.
- `rank_shards`: one file of each rank, with its shards of tensors that are spread over a mesh of ranks.
- `single_file`: a file that holds everything, as Composer, Lightning or a training script saved it, or a bare state
  dict, also of safetensors. It takes what no other source recognises.

What transformers' Trainer and Accelerate save beside the model is no source of its own: `kinds.open_saved` has
`side_files` add it to what any of these gives.

A further kind of checkpoint is a class with `recognises` and `open` in a module of its own, and an entry in
`kinds.SOURCES`.

Not guaranteed: no tensor is read and no checksum compared; whether the parts fit the job's model is for the targets to
find; elements that lie in files which were not fetched are in the tensors all the same, as `Unread`; classes that are
not known stay in the parts until `materialize.safe_types` refuses them.

Imports `formats`, `saved`, `errors` and the names of files in `stores.locate`; neither torch nor how files are fetched.
"""
