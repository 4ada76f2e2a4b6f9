"""What the ranks of test_composer.py do, with the real Composer. An assertion ends a rank's process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import absent_packages  # noqa: F401 - before Composer, which imports what it stands in for
import torch
from composer import Trainer, algorithms
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist, load_checkpoint, reproducibility, save_checkpoint
from composer_job import (
    RANK,
    WORLD_SIZE,
    Losses,
    ResumableImages,
    algorithm_names,
    assert_equal,
    file_optimizer_tensors,
    optimizer_tensors,
    read,
    recorded,
    squeeze_and_smooth,
    started_with,
    trainer,
    weights,
)
from rankload.loader import AlgorithmError, MismatchError, State, gather_rng, load
from rankload.loader import load_checkpoint as our_load_checkpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def full_loads(*paths: str) -> None:
    """A Trainer's own start from a whole checkpoint: weights, optimizer, schedule and time are the file's."""
    saved = read(paths[0])["state"]
    for path in paths:
        log = InMemoryLogger()
        with started_with(our_load_checkpoint):
            job, told = recorded(lambda path=path, log=log: trainer(loggers=[log], load_path=path))
        assert algorithm_names(job.state) == ["SqueezeExcite"]
        assert sum("SqueezeExcite" in text for text in told) == 1, told
        assert_equal(weights(job.state), saved["model"])
        assert_equal(optimizer_tensors(job.state), file_optimizer_tensors(saved))
        hyper = saved["optimizers"]["Adam"]["param_groups"][0]
        for key, value in job.state.optimizers[0].param_groups[0].items():
            assert key == "params" or value == hyper[key], key
        assert job.state.schedulers[0].state_dict() == saved["schedulers"]["StepLR"]
        assert job.state.timestamp.state_dict() == saved["timestamp"]["Timestamp"]
        assert job.state.timestamp.batch.value == 8
        assert job.state.rank_zero_seed == 17
        assert len(job._rng_state) == WORLD_SIZE
        assert set(job._rng_state[0]) == {"python", "numpy", "torch"}
        reproducibility.load_rng_state(job._rng_state)
        if RANK == 0:
            assert log.data["rankload/files"][0][1] == 1.0
            assert log.data["rankload/size_bytes"][0][1] > 0
        job.close()


def added_afterwards(path: str) -> None:
    """Once a job has started: an algorithm is added to a plain model, and cannot be to a wrapped one."""
    job = trainer()
    if WORLD_SIZE > 1:
        try:
            load(path, job.state, job.logger)
            raise AssertionError("expected an AlgorithmError")
        except ValueError as error:
            assert isinstance(error, AlgorithmError)
            assert "exclude_algorithms=['SqueezeExcite']" in str(error)
        return
    _, told = recorded(lambda: load(path, job.state))  # no logger: none of Composer's kind is needed
    assert algorithm_names(job.state) == ["SqueezeExcite"]
    assert sum("SqueezeExcite" in text for text in told) == 1, told
    assert_equal(weights(job.state), read(path)["state"]["model"])
    job.fit(duration="1ep")


def algorithms_given(path: str) -> None:
    """A job that has the checkpoint's algorithms gets none added, and is told nothing."""
    saved = read(path)["state"]
    job = trainer(squeeze_and_smooth())
    before = list(job.state.algorithms)
    _, told = recorded(lambda: load(path, job.state, job.logger))
    assert [a is b for a, b in zip(job.state.algorithms, before, strict=True)] == [True, True]
    assert not told, told
    assert_equal(weights(job.state), saved["model"])
    assert_equal(optimizer_tensors(job.state), file_optimizer_tensors(saved))

    other = trainer([algorithms.SqueezeExcite(latent_channels=2, min_channels=8)])
    untouched = weights(other.state)
    try:
        _, told = recorded(lambda: load(path, other.state, other.logger))
        raise AssertionError("expected a MismatchError")
    except MismatchError as error:
        assert "module.2.se.pool_and_mlp.2.weight: expected shape (2, 8), got (4, 8)" in str(error), error
    assert_equal(weights(other.state), untouched)


def weights_only(full: str, bare: str) -> None:
    """From a whole checkpoint, and from one that Composer saved with weights only (which lists no algorithms)."""
    wanted = read(bare)["state"]["model"]
    with started_with(our_load_checkpoint):
        job = trainer(load_path=full, load_weights_only=True)
    assert algorithm_names(job.state) == ["SqueezeExcite"]
    assert_equal(weights(job.state), wanted)
    assert job.state.timestamp.batch.value == 0
    assert job._rng_state is None
    assert not job.state.optimizers[0].state

    job = trainer(squeeze_and_smooth())
    assert our_load_checkpoint(bare, job.state, load_weights_only=True) is None
    assert_equal(weights(job.state), wanted)

    job = trainer()
    before = weights(job.state)
    try:
        our_load_checkpoint(bare, job.state, load_weights_only=True)
        raise AssertionError("expected a MismatchError")
    except MismatchError as error:
        assert "model/module.2.conv.weight" in error.details["unexpected"]
    assert_equal(weights(job.state), before)


def excluded(path: str) -> None:
    """Without the algorithm the names differ: refused before anything is changed, or let pass and reported."""
    saved = read(path)["state"]
    for only_weights in (False, True):
        job = trainer()
        before, states = weights(job.state), optimizer_tensors(job.state)
        options: dict[str, Any] = {"exclude_algorithms": ["SqueezeExcite"], "load_weights_only": only_weights}
        try:
            load(path, job.state, job.logger, **options)
            raise AssertionError("expected a MismatchError")
        except MismatchError as error:
            assert "model/module.2.weight" in error.details["missing"], error.details
            assert "model/module.2.conv.weight" in error.details["unexpected"], error.details
            if not only_weights:
                assert "optimizers/Adam/module.2.weight" in error.details["missing"], error.details
        assert_equal(weights(job.state), before)
        assert_equal(optimizer_tensors(job.state), states)
        assert job.state.timestamp.batch.value == 0
        assert algorithm_names(job.state) == []

        result = load(path, job.state, job.logger, strict_model_weights=False, **options)
        assert "model/module.2.weight" in result.receipt.missing
        assert "model/module.2.conv.weight" in result.receipt.unexpected
        found = weights(job.state)
        for name, value in before.items():
            assert torch.equal(found[name], saved["model"].get(name, value)), name
        assert algorithm_names(job.state) == []
        if not only_weights:
            assert job.state.timestamp.batch.value == 8
            found = optimizer_tensors(job.state)
            assert torch.equal(
                found["module.0.weight/exp_avg"],
                saved["optimizers"]["Adam"]["state"]["module.0.weight"]["exp_avg"],
            )
            assert "optimizers/Adam/module.2.weight" in result.receipt.missing
            job.fit(duration="1ep")
        job.close()


def hostile_texts(path: str, folder: str) -> None:
    """Text that is not one call of a known constructor with literals runs nowhere."""
    canary = Path(folder, "CANARY")
    run = f"__import__('os').system('touch {canary}')"
    checkpoint = read(path)
    for number, entry in enumerate(
        [
            ("SqueezeExcite", {"repr": f"SqueezeExcite(latent_channels={run})"}),
            ("SqueezeExcite", {"repr": f"SqueezeExcite(4) or {run}"}),
            ("NobodyKnows", {"repr": run}),
            ("utils", {"repr": run}),
        ]
    ):
        checkpoint["state"]["algorithms"] = [entry]
        spoiled = str(Path(folder, f"spoiled{number}.pt"))
        if RANK == 0:
            torch.save(checkpoint, spoiled)
        dist.barrier()
        for only_weights in (False, True):
            job = trainer(squeeze_and_smooth())
            handed_on: list[Any] = []
            theirs = job.state.load_model_state

            def watched(
                state: Any, *args: Any, _theirs: Any = theirs, _to: list[Any] = handed_on, **kw: Any
            ) -> Any:
                _to.append(state.get("algorithms"))
                return _theirs(state, *args, **kw)

            job.state.load_model_state = watched
            _, told = recorded(
                lambda job=job, only=only_weights, name=spoiled: load(name, job.state, load_weights_only=only)
            )
            assert [name for entries in handed_on for name, _ in entries or ()] == [], handed_on
            assert any(entry[0] in text for text in told), told
            assert_equal(weights(job.state), checkpoint["state"]["model"])

        job = trainer()
        before = weights(job.state)
        try:
            recorded(lambda job=job, name=spoiled: load(name, job.state))
            raise AssertionError("expected a MismatchError")
        except MismatchError:
            assert_equal(weights(job.state), before)
    dist.barrier()
    assert not canary.exists()


def left_out(path: str, folder: str) -> None:
    """What ``ignore_keys`` names stays as it was; a tensor that the file lacks is an error in a full load too."""
    saved = read(path)["state"]
    job = trainer(squeeze_and_smooth())
    states = optimizer_tensors(job.state)
    result = load(path, job.state, ignore_keys=["state/optimizers*", "rng"])
    assert result.rng_states is None
    assert_equal(optimizer_tensors(job.state), states)
    assert_equal(weights(job.state), saved["model"])
    assert job.state.timestamp.batch.value == 8

    job = trainer(squeeze_and_smooth())
    before = weights(job.state)
    load(path, job.state, ignore_keys=["state/model/module.0.*", "state/optimizers/Adam/state/module.6.bias"])
    found = weights(job.state)
    for name, value in saved["model"].items():
        assert torch.equal(found[name], before[name] if name.startswith("module.0.") else value), name

    job = trainer()
    before = weights(job.state)
    load(path, job.state, ignore_keys=["state/algorithms", "state/model", "state/optimizers"])
    assert_equal(weights(job.state), before)
    assert job.state.timestamp.batch.value == 8

    checkpoint = read(path)
    del checkpoint["state"]["model"]["module.6.bias"]
    lacking = str(Path(folder, "lacking.pt"))
    if RANK == 0:
        torch.save(checkpoint, lacking)
    dist.barrier()
    job = trainer(squeeze_and_smooth())
    before = weights(job.state)
    load_checkpoint(lacking, job.state, job.logger)  # Composer itself says nothing
    job = trainer(squeeze_and_smooth())
    try:
        load(lacking, job.state)
        raise AssertionError("expected a MismatchError")
    except MismatchError as error:
        assert error.details["missing"] == ["model/module.6.bias"]
    assert_equal(weights(job.state), before)


def continues(path: str) -> None:
    """Training goes on as it does after Composer's own load of the same file."""
    runs = []
    for loader in (our_load_checkpoint, load_checkpoint):
        losses = Losses()
        with started_with(loader):
            job = trainer(callbacks=[losses], load_path=path, seed=len(runs))
        # Composer hands back the states of all ranks that saved, of which it uses this world's.
        rng = [
            (state["python"], state["numpy"][1].tolist(), state["numpy"][2], state["torch"].tolist())
            for state in job._rng_state[:WORLD_SIZE]
        ]
        job.fit(duration="1ep")
        assert job.state.timestamp.batch.value == 8 + 8 // WORLD_SIZE
        runs.append((losses.seen, weights(job.state), optimizer_tensors(job.state), rng))
        job.close()
    ours, theirs = runs
    assert len(ours[0]) == 8 // WORLD_SIZE
    assert ours[0] == theirs[0]
    assert_equal(ours[1], theirs[1])
    assert_equal(ours[2], theirs[2])
    assert ours[3] == theirs[3]
    assert len(ours[3]) == WORLD_SIZE


def callbacks_metrics_and_data(folder: str) -> None:
    """A checkpoint that Composer writes here, with all that it can hold, as Composer itself restores it."""
    job = trainer(callbacks=[Losses()], data=ResumableImages(), save_metrics=True)
    job.fit(duration="6ba")
    job.eval()
    path = save_checkpoint(job.state, str(Path(folder, "all-ba{batch}.pt")))
    path = dist.all_gather_object(path)[0]
    dist.barrier()
    found = []
    for loader in (our_load_checkpoint, load_checkpoint):
        data, losses = ResumableImages(), Losses()
        with started_with(loader):
            other = trainer(callbacks=[losses], data=data, save_metrics=True, seed=8, load_path=path)
        assert_equal(weights(other.state), weights(job.state))
        metrics = {
            "train": other.state.train_metrics["MulticlassAccuracy"],
            **other.state.eval_metrics["eval"],
        }
        found.append(
            (
                losses.count,
                data.resumed,
                other.state.dataset_state,
                {k: float(m.compute()) for k, m in metrics.items()},
            )
        )
    assert found[0] == found[1]
    assert found[0][0] == 6
    assert found[0][1]["from_beginning"]
    assert found[0][3]["CrossEntropy"] > 0


def ours_to_theirs(folder: str) -> None:
    """What `State.state_dict` makes is a checkpoint whose weights Composer loads."""
    job = trainer()
    state = State(job.state.model, job.state.optimizers, run_name="ours", timestamp={"batch": 3})
    path = str(Path(folder, "ours.pt"))
    checkpoint = {"state": state.state_dict(), "rng": gather_rng()}
    if RANK == 0:
        torch.save(checkpoint, path)
    dist.barrier()
    other = trainer(seed=8)
    load_checkpoint(path, other.state, other.logger, load_weights_only=True)
    assert_equal(weights(other.state), weights(job.state))


def zero_archives(template: str, stage: str, expected_json: str) -> None:
    """Composer's archives of a ZeRO job, into a State of the last Composer with DeepSpeed, whose model is an engine."""
    import deepspeed

    # Otherwise a kernel that nobody needs here is compiled first, for two minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    expected = torch.tensor(json.loads(Path(expected_json).read_text())["forward_of_linspace"])
    batch = (torch.linspace(-1, 1, 64).reshape(8, 8), torch.zeros(8, dtype=torch.long))

    def job() -> Trainer:
        torch.manual_seed(5)
        model = ComposerClassifier(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), num_classes=2
        )
        data = TensorDataset(torch.randn(32, 8), torch.randint(0, 2, (32,)))
        return Trainer(
            model=model,
            optimizers=torch.optim.Adam(model.parameters(), lr=1e-2),
            train_dataloader=DataLoader(data, batch_size=4, sampler=dist.get_sampler(data)),
            max_duration="1ep",
            device="cpu",
            precision="fp32",
            seed=5,
            progress_bar=False,
            deepspeed_config={
                "zero_optimization": {"stage": int(stage)},
                "zero_allow_untested_optimizer": True,
            },
        )

    def forward(state: Any) -> torch.Tensor:
        state.model.eval()
        with torch.no_grad():
            return state.model(batch).clone()

    for only_weights in (False, True):
        one = job()
        assert not torch.allclose(forward(one.state), expected)
        result = load(template, one.state, one.logger, load_weights_only=only_weights)
        found = forward(one.state)
        assert torch.allclose(found, expected), (found - expected).abs().max()
        if only_weights:
            assert result.rng_states is None
            assert one.state.timestamp.batch.value == 0
        else:
            assert result.rng_states is not None
            assert len(result.rng_states) == 2
            assert one.state.timestamp.batch.value == 4
            assert one.state.timestamp.epoch.value == 1
            assert one.state.model.global_steps == 4
            one.fit(duration="1ep")
            assert one.state.timestamp.batch.value == 8
        print(json.dumps(result.receipt.as_dict()))
        one.close()
