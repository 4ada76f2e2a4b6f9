"""Puts saved values into live objects: modules, optimizers, DeepSpeed engines, and states that load themselves.

A restore is planned in full before anything changes. `restore` is the way in:

1. `restore.prepare_restore` picks the target and asks for its plan: `state.plan_state` for a `State`,
   `foreign.plan_foreign` for an object that loads itself, `deepspeed.engine.plan_engine` for an engine inside either.
   Each matches names, checks shapes, dtypes and layouts, and collects what does not fit in one `Mismatch`.
2. The caller raises the mismatch; then every rank goes on, or none.
3. `restore.apply_restore` carries the plans out: `algorithms` that change the model first, then the model, optimizers
   and the other parts, each read straight into the memory that it is for.

`module` and `optimizer` plan and fill torch's own objects, `dtensor` finds the shard of each that this rank keeps.

Not guaranteed: a rollback. From the first call of ``note_change`` on, a failure leaves the target partly restored, and
the caller raises `PartialRestoreError`. Planning reads no tensor but an optimizer's numbers; no function here waits for
another rank, but `deepspeed.engine.finish_engine` and a foreign state's own loading.

May import torch, and the rooms of a later line in ``docs/map.md``; imports of ``sources`` and ``verify`` are exceptions
that the import table lists.
"""
