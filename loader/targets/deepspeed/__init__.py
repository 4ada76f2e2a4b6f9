"""Restores a checkpoint into a live DeepSpeed engine.

Words: "low" are the weights that the module computes with, often in bf16 or fp16; a "master" is the fp32 tensor that
the optimizer updates in their place. A "flat" is any tensor that the optimizer updates on this rank; a "slot" is where
a run of a parameter's elements lies in it. A "share" is a rank's part of a parameter that stage 3 partitioned.

`engine.EngineTarget` is the way in; `ownership` finds the engine where the caller passed its module:

1. `live.live_engine` lists what this rank's tensors hold: `flats` reads the optimizers, `parallel` the layout.
2. `EngineTarget.demand` tells a source which elements of each parameter this rank keeps, and how the model is split.
3. `EngineTarget.plan` matches the checkpoint with the engine by parameters' names: `plan` weights, buffers and masters
   (`parameter_sources` chooses between saved weights and masters), `states` the optimizer's state. Saved pieces are
   intersected with the engine's slots, for any two world sizes.
4. `shared_weights.plan_weights` takes out of the plan those weights that a node reads once and its ranks share: the
   ranks offer what they can cast or read (`weights`), and rank 0 assigns it to them (`weight_regions`).
5. `step.EngineStep.apply` reads into the engine's tensors, and sets counters, scaler and scheduler; `links` renews
   DeepSpeed's own views of state that was made.
6. `shared_weights.share_weights` brings the shared weights to each node once, through `shared_memory`.
7. The plan's ``finish``, on every rank once all have agreed that they applied: the only collectives.

Steps 4, 6 and 7 must be called by every rank, and raise the same error on all of them; the others work on one alone.

Not guaranteed: a rollback once `EngineStep.apply` has begun. State on NVMe, AutoEP, experts with pipeline or tensor
parallelism, and partitions other than one share for each data-parallel rank (MiCS) raise `LayoutError`.

May import what ``targets`` may. Never imports deepspeed: an engine exists only where the caller has imported it.
"""
