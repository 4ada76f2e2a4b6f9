"""Restores a DeepSpeed checkpoint, or the weights of a single file, into a live DeepSpeed engine.

Words: "low" are the weights that the module computes with, often in bf16 or fp16; a "master" is the fp32 tensor that
the optimizer updates in their place. A "flat" is any tensor that the optimizer updates on this rank; a "slot" is where
a run of a parameter's elements lies in it. A "share" is a rank's part of a parameter that stage 3 partitioned.

1. `target.engine_target` lists what this rank's tensors hold: `flats` reads the optimizers, `parallel` the layout.
2. `target.wanted_slots` says which saved elements this rank needs, from which ``sources.zero`` picks the files.
3. `engine.plan_engine` matches names and intersects saved pieces with wanted slots (`plan`), for any two world sizes.
4. `weights` takes out of the plan those weights that a node reads once and its ranks share (``verify.weights``).
5. `engine.apply_engine` reads into the engine's tensors and sets counters, scaler and scheduler (`apply`).
6. `engine.finish_engine`, on every rank once all have agreed that they applied: the only collectives.

Not guaranteed: a rollback once `apply_engine` has begun. State on NVMe, AutoEP, experts with pipeline or tensor
parallelism, and partitions other than one share for each data-parallel rank (MiCS) raise `LayoutError`.

May import what ``targets`` may. Never imports deepspeed: an engine exists only where the caller has imported it.
"""
