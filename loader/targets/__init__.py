"""Puts saved values into live objects: modules, optimizers, DeepSpeed engines, and states that load themselves.

`base` says what a target is: it states its `Demand`, and turns a `Saved` into a `Plan`, made of steps. The way in is
`choose.target_of`:

1. It picks the target by what the caller passed: `state.StateTarget` for a `State`, `foreign.ForeignTarget` for an
   object that loads itself, joined with `deepspeed.engine.EngineTarget` for an engine inside either.
2. ``plan`` matches names, checks shapes, dtypes and layouts, and collects what does not fit in one `Mismatch`, which
   the caller raises; then every rank goes on, or none.
3. `base.carry_out` carries the plan out: algorithms that change the model first, then the model, optimizers and the
   other parts, each read straight into the memory that it is for.

`module` and `optimizer` plan and fill torch's own objects, `dtensor` finds the shard of each that this rank keeps.
`made_tensors` fills those that are made as a whole, such as sparse ones; `buffers` tells whether the values of a buffer
survive its cast. `optimizer_kinds` says which saved state and hyperparameters an optimizer takes, an engine's too,
`optimizer_names` what its parameters are called, `optimizer_entries` what an entry is. `parts` tells which schedulers,
scalers and callbacks have a counterpart of their kind.

Guaranteed: what is read is what the plan's copies said beforehand; all steps read what goes to new memory before the
first one changes anything (`Step.prepare`), and ``note_change`` is called before each part is first changed. Not
guaranteed: a rollback. From the first such call on, a failure leaves the target partly restored, and the load raises a
`PartialRestoreError`. Planning reads no tensor but an optimizer's numbers, and buffers that are cast to another kind of
dtype, where their file is whole on the node; no function here waits for another rank, but `Plan.finish`, a foreign
state's own loading and `deepspeed.shared_weights`.

May import torch, and the rooms of a later line in ``docs/map.md``.
"""
