"""Whole loads of real checkpoints by real processes, each with a deadline, every rank's exit checked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_ranks import ENVIRONMENT, WITHOUT, needs_deepspeed
from http_server import CountingServer, Served, counting_server
from journey_runs import WORKER, run
from places import DATA
from processes import free_port, kill_session, run_ranks
from rankload.loader import NotFoundError, State, UnsafeError, load
from squeezing_model import Squeezing
from zero_folders import unpack_zero


def serve_folder(folder: Path, pattern: str = "*") -> dict[str, Served]:
    return {f"/{path.name}": Served(path.read_bytes()) for path in folder.glob(pattern)}


def serve_archives() -> dict[str, Served]:
    return {
        f"/{path.relative_to(DATA)}": Served(path.read_bytes())
        for path in DATA.glob("composer-zero*/ep1*.tar")
    }


def check_archives(receipts: list[dict[str, Any]], server: CountingServer, *, n_nodes: int) -> None:
    """Each archive crossed once for each node that has a rank which needs it, fully and again weights only."""
    for stage, receipt in zip((1, 3), receipts, strict=True):
        assert receipt["kind"] == "composer-zero"
        assert (receipt["n_nodes"], receipt["saved_world_size"]) == (n_nodes, 2)
        sizes = []
        for rank in (0, 1):
            path = f"/composer-zero{stage}-w2/ep1-ba4-rank{rank}.pt.tar"
            size = len(server.served[path].body)
            # The first archive goes to every node. Weights only, stage 1 needs nothing of the second.
            full = n_nodes if rank == 0 else 1
            weights = full if rank == 0 or stage == 3 else 0
            assert server.gets(path) == full + weights
            assert server.bytes_sent[path] == (full + weights) * size
            sizes.append(full * size)
        assert [file["fetched_bytes"] for file in receipt["files"]] == sizes


@needs_deepspeed
def test_composers_archives_over_http_are_fetched_once(tmp_path: Path) -> None:
    with counting_server(serve_archives()) as server:
        receipts = run(
            "composer_zero",
            2,
            server.url(""),
            DATA,
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / "cache")},
        )
        check_archives(receipts[0], server, n_nodes=1)
    assert receipts[0] == receipts[1]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]


@needs_deepspeed
@pytest.mark.whole_jobs
def test_composers_archives_under_two_torchrun_agents(tmp_path: Path) -> None:
    """Two nodes of one rank, each with a cache of its own: each fetches the first rank's archive too."""
    port = free_port()
    with counting_server(serve_archives()) as server:
        agents = [
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}",
                "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}",
                WORKER, "composer_zero", server.url(""), str(DATA),
            ]
            for node in (0, 1)
        ]  # fmt: skip
        caches = [{"RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{node}")} for node in (0, 1)]
        outputs = run_commands(agents, tmp_path, caches)
        for output in outputs:
            receipts = json.loads([line for line in output.splitlines() if line.startswith("[{")][-1])
            check_archives(receipts, server, n_nodes=2)


@needs_deepspeed
@pytest.mark.whole_jobs
def test_composers_archives_under_the_deepspeed_launcher(tmp_path: Path) -> None:
    output = deepspeed_launcher(2, tmp_path, "composer_zero", str(DATA), str(DATA))
    # The ranks share one output, so that two of them may print on one line.
    decode = json.JSONDecoder().raw_decode
    told = [decode(output, found.start())[0] for found in re.finditer(r'\[\{"path"', output)]
    assert len(told) == 2
    assert [receipt["world_size"] for receipt in told[0]] == [2, 2]


def deepspeed_launcher(world_size: int, tmp_path: Path, *arguments: str) -> str:
    # The module that the deepspeed command runs: the command itself cannot start from a folder with a space.
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(world_size),
        "--master_port",
        str(free_port()),
        WORKER,
        *arguments,
    ]
    return run_commands(
        [command], tmp_path, [{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}]
    )[0]


def run_commands(
    commands: Sequence[Sequence[str]], tmp_path: Path, env: Sequence[Mapping[str, str]]
) -> list[str]:
    """Runs launchers side by side until all have ended well; what each printed."""
    started = []
    try:
        for node, command in enumerate(commands):
            with open(tmp_path / f"{node}.log", "wb") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **ENVIRONMENT, **env[node]},
                        cwd=tmp_path,
                        start_new_session=True,
                    )
                )
        for process in started:
            process.wait(timeout=240)
    finally:
        for process in started:
            kill_session(process)
    outputs = [(tmp_path / f"{node}.log").read_text(errors="replace") for node in range(len(commands))]
    assert [process.returncode for process in started] == [0] * len(commands), outputs
    return outputs


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_deepspeed_folder_bit_for_bit_and_training_goes_on(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    receipts = run("deepspeed_folder", 4, unpack_zero(stage, tmp_path), stage, deadline_s=240)
    assert receipts[0]["kind"] == "deepspeed"
    assert len(receipts[0]["files"]) == (5 if stage == 1 else 8)
    assert all(file["verified"] and file["fetched_bytes"] == 0 for file in receipts[0]["files"])
    assert {row["rank"] for row in receipts[0]["stages"]} == {0, 1, 2, 3}


@needs_deepspeed
@pytest.mark.takes_long
@pytest.mark.parametrize("stage", [1, 3])
def test_a_deepspeed_folder_under_the_deepspeed_launcher(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    output = deepspeed_launcher(
        4, tmp_path, "deepspeed_folder", str(unpack_zero(stage, tmp_path)), str(stage)
    )
    assert sum(line.startswith("{") for line in output.splitlines()) == 4


def test_a_single_file_on_two_nodes_of_two_ranks(plain: Path, tmp_path: Path) -> None:
    with counting_server(serve_folder(plain.parent, "step1.pt")) as server:
        receipts = run(
            "restores",
            4,
            server.url("/step1.pt"),
            plain,
            nodes=(2, 2),
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank // 2}")},
        )
        assert server.gets("/step1.pt") == 2
        assert server.bytes_sent["/step1.pt"] == 2 * plain.stat().st_size
    assert [receipt.pop("cache_dir") for receipt in receipts] == [
        str(tmp_path / f"cache{n}") for n in (0, 0, 1, 1)
    ]
    assert len({json.dumps(receipt) for receipt in receipts}) == 1
    assert receipts[0]["files"][0]["fetched_bytes"] == 2 * plain.stat().st_size


def test_a_cache_that_nodes_share_fetches_once(plain: Path, tmp_path: Path) -> None:
    with counting_server(serve_folder(plain.parent, "step1.pt")) as server:
        run(
            "restores",
            2,
            server.url("/step1.pt"),
            plain,
            nodes=(1, 1),
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / "cache")},
        )
        assert server.gets("/step1.pt") == 1


def test_a_download_ten_times_longer_than_the_groups_time_out(plain: Path, tmp_path: Path) -> None:
    served = {"/step1.pt": Served(plain.read_bytes(), chunk=plain.stat().st_size // 24, pause_s=0.5)}
    with counting_server(served) as server:
        finished = run_ranks(
            f"{WORKER}:slow_with_a_hasty_group",
            2,
            args=(server.url("/step1.pt"), plain, 1),
            deadline_s=90,
            env={**WITHOUT, "RANKLOAD_CACHE_DIR": str(tmp_path / "cache")},
        )
    assert [rank.returncode for rank in finished] == [0, 0], finished


@pytest.mark.parametrize("form", ["symlink", "compressed", "tar.gz", "templates"])
def test_other_ways_to_name_and_pack_a_file(plain: Path, tmp_path: Path, form: str) -> None:
    import gzip

    path = str(plain)
    if form == "symlink":
        (tmp_path / "latest.pt.symlink").write_text("step1.pt")
        path = str(tmp_path / "latest.pt")
    elif form == "compressed":
        path = str(tmp_path / "step1.pt.gz")
        Path(path).write_bytes(gzip.compress(plain.read_bytes()))
    elif form == "tar.gz":
        path = str(tmp_path / "step1.tar.gz")
        with tarfile.open(path, "w:gz") as archive:
            archive.add(plain, "step1.pt")
    else:
        shutil.copy(plain, tmp_path / "n0-l0-00000.pt")
        path = str(tmp_path / "n<node_rank>-l{local_rank}-{rank:05d}.pt")
    run("restores", 2, path, plain)


def test_what_we_save_we_restore_and_go_on(tmp_path: Path) -> None:
    receipts = run("round_trip", 2, tmp_path)
    assert {"scheduler StepLR", "timestamp"} <= set(receipts[0]["restored"])
    assert receipts[0]["derived"] == []
    alone = run("another_world", 1, tmp_path / "step1.pt")
    assert alone[0]["derived"] == []
    more = run("another_world", 3, tmp_path / "step1.pt")
    assert more[0]["derived"] == ["rng of rank 2 (from seed 17)"]


@needs_deepspeed
def test_every_stage_that_deepspeed_saves(tmp_path: Path) -> None:
    receipts = run("saves_and_restores", 2, tmp_path, "0,2,3", deadline_s=240)
    assert receipts[0]["saved_world_size"] == 2


@needs_deepspeed
def test_an_engine_is_restored_without_its_optimizer_and_scheduler(tmp_path: Path) -> None:
    (refused,) = run("left_out_of_engine", 1, tmp_path, deadline_s=240)
    assert "leave_out=['model'] with a DeepSpeed engine" in refused


@pytest.mark.parametrize(
    "name", ["ep2-ba8-rank0.pt", "ep2-ba8-rank{rank}.pt", "manual-ep2-ba8-rank0.tar", "weights-ba8-rank0.pt"]
)
def test_composers_single_files_into_a_plain_module(name: str) -> None:
    folder = DATA / "composer-monolithic-w2"
    whole = torch.load(folder / "ep2-ba8-rank0.pt", weights_only=False)
    weights_only = name.startswith("weights")
    model = Squeezing()
    optimizer = torch.optim.Adam(model.parameters())
    state = State(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    result = load(str(folder / name), state, load_weights_only=weights_only)
    for key, value in whole["state"]["model"].items():
        assert torch.equal(model.state_dict()[key.removeprefix("module.")], value), key
    if weights_only:
        assert result.rng_states is None
        return
    assert state.timestamp["batch"] == 8
    assert state.schedulers[0].last_epoch == 2
    names = dict(model.named_parameters())
    for key, entries in whole["state"]["optimizers"]["Adam"]["state"].items():
        for entry, value in entries.items():
            assert torch.equal(optimizer.state[names[key.removeprefix("module.")]][entry], value)
    assert result.rng_states is not None
    for entry in ("python", "torch"):
        assert str(result.rng_states[0][entry]) == str(whole["rng"][0][entry])
    assert result.receipt.unverified == ()


def test_files_without_checksums_are_said_to_be_unverified(plain: Path) -> None:
    from journey_worker import plain_state

    contents = torch.load(plain, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(contents, plain)
    finally:
        torch.serialization.set_crc32_options(True)
    result = load(str(plain), plain_state())
    assert result.receipt.unverified == (str(plain),)
    torch.save(contents, plain, _use_new_zipfile_serialization=False)
    assert load(str(plain), plain_state()).receipt.unverified == (str(plain),)
    torch.save(contents, plain)
    assert load(str(plain), plain_state()).receipt.unverified == ()
    assert load(str(plain), plain_state(), options={"verify": "off"}).receipt.unverified == (str(plain),)


def test_an_entry_of_the_files_own_called_state_hides_no_unknown_type(tmp_path: Path) -> None:
    """A hand-written file may hold an entry of this name, which is no part of the state."""
    model = torch.nn.Linear(2, 2)
    target = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(target.parameters())
    moments = {"exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2)}
    unknown = {
        "state": {0: {"step": Unknown(), **moments}},
        "param_groups": [{"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8}],
    }
    torch.save(
        {"model": model.state_dict(), "optimizer": unknown, "state": {"ready": True}}, tmp_path / "a.pt"
    )
    before = target.weight.detach().clone()
    with pytest.raises(UnsafeError, match="Unknown"):
        load(tmp_path / "a.pt", State(target, optimizer), progress_bar=False)
    assert torch.equal(target.weight, before)


class Unknown:
    """A type that is neither known nor declared safe."""


def test_any_fsspec_uri_and_an_object_store(plain: Path) -> None:
    import fsspec
    from journey_worker import plain_state

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/run/step1.pt", plain.read_bytes())
    result = load("memory://bucket/run/step1.pt", plain_state())
    assert result.receipt.files[0].fetched_bytes == plain.stat().st_size
    assert result.extra == {"epoch": 1}
    load("bucket/run/step1.pt", plain_state(), object_store=memory)

    class Bucket:
        def get_object_size(self, object_name: str) -> int:
            if object_name != "run/step1.pt":
                raise FileNotFoundError(object_name)
            return plain.stat().st_size

        def download_object(
            self, object_name: str, filename: str, overwrite: bool = False, callback: Any = None
        ) -> None:
            shutil.copy(plain, filename)

    class Destination:
        def download_file(
            self, remote_file_name: str, destination: str, overwrite: bool = False, progress_bar: bool = True
        ) -> None:
            if remote_file_name != "run/step1.pt":
                raise FileNotFoundError(remote_file_name)
            shutil.copy(plain, destination)

    for store in (Bucket(), Destination()):
        result = load("run/step{rank}.pt".replace("{rank}", "1"), plain_state(), object_store=store)
        assert result.receipt.files[0].size_bytes == plain.stat().st_size
    with pytest.raises(NotFoundError):
        load("run/step2.pt", plain_state(), object_store=Bucket())
