"""Adapters: the frameworks' own loads, done by `rankload.load`, so that a job resumes at any world size.

Each module needs its own framework alone, and is imported by its name: ``from rankload.integrations import deepspeed``.

- `deepspeed`: ``engine.load_checkpoint``, for one engine or for all that a block loads.
- `transformers`: Trainer's ``train(resume_from_checkpoint=...)``, in a block.
- `accelerate`: ``accelerator.load_state``, with schedules that count processes (`schedules`).
- `data`: a sampler that counts samples of all ranks; torchdata's loaders at another number of ranks.
- `lightning`: a strategy for DeepSpeed's folders and a ``CheckpointIO`` for ``.ckpt`` files, for its Trainer.
- `fabric`: a strategy for DeepSpeed's folders, for its ``Fabric``.
- `torchtitan`: its ``CheckpointManager``.
- `composer`: a callback that loads before training.

Where the checkpoint tells the batch of one step over all ranks, an adapter warns of another one (`batches`): the
frameworks count in steps, and would train on other samples without a word. Where it does not (Lightning's ``.ckpt``
files; Accelerate's without DeepSpeed, unless the saving job was attached), it warns of another number of ranks, as far
as that is told. Every adapter warns of a version of its framework that it was not tried with (`versions`).

Not guaranteed: what a framework does not hand out. docs/frameworks.md lists it.

May import `rankload.loader` and `rankload.distributed`.
"""
