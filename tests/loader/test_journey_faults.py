"""Loads that must fail: the same clear error on every rank, soon, with nothing executed and nothing changed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_ranks import WITHOUT, needs_deepspeed
from http_server import Served, counting_server
from journey_runs import WORKER, run
from places import DATA
from processes import run_ranks
from zero_folders import unpack_zero

PROMISED_S = 10.0
"""Within which every rank raises after the fault."""


class Payload:
    """Runs a command where its pickle is run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


Expected = tuple[str, tuple[str, ...]]
"""A type of error, and words that its message must have."""


def check(seen: list[Any], expected: dict[str, Expected]) -> None:
    """Every rank saw the same, as expected, within the promised time; only a partial restore changed anything."""
    problems = []
    for name, (kind, words) in expected.items():
        assert len({tuple(told[name][:2]) for told, _ in seen}) == 1, seen
        found, message, _ = seen[0][0][name]
        changed = any(told[name][2] for told, _ in seen)
        slowest = max(seconds[name] for _, seconds in seen)
        fits = found == kind and all(word in message for word in words) and slowest < PROMISED_S
        if not fits or changed != (kind == "PartialRestoreError"):
            problems.append(f"{name}: {found} after {slowest:.1f} s, changed {changed}: {message}")
    assert not problems, "\n".join(problems)


def written(tmp_path: Path, cases: dict[str, tuple[object, dict[str, Any] | None]]) -> Path:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({name: [str(where), options] for name, (where, options) in cases.items()}))
    return path


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A tar with its members changed."""
    with tarfile.open(path) as archive:
        members = {
            info.name: archive.extractfile(info).read()  # type: ignore[union-attr]
            for info in archive.getmembers()
            if info.isfile()
        }
    change(members)
    path.unlink()
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def flip_a_storage_byte(data: bytes) -> bytes:
    """Flips a byte in the middle of the largest storage of a torch zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(
            (info for info in archive.infolist() if "/data/" in info.filename),
            key=lambda info: info.file_size,
        )
        content = archive.read(largest)
    at = data.index(content) + len(content) // 2
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def poisoned(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": {"model": {"w": torch.zeros(2)}, "timestamp": Payload(canary)}, "rng": None}, buffer)
    return buffer.getvalue()


def copied(stage: int, tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / f"zero{stage}"
    shutil.copytree(DATA / f"composer-zero{stage}-w2", folder)
    return folder, str(folder / "ep1-ba4-rank{rank}.pt.tar")


def test_faults_of_a_single_file(plain: Path, tmp_path: Path) -> None:
    """All in one job, one after another: a failed load leaves nothing that would spoil the next."""
    data = plain.read_bytes()
    canary = tmp_path / "canary"
    contents = torch.load(plain, weights_only=True)

    def variant(name: str, content: bytes) -> Path:
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        return path

    hostile = tmp_path / "hostile.pt"
    groups = [{**contents["optimizer"]["param_groups"][0], "foreach": [Payload(canary)]}]
    torch.save({**contents, "optimizer": {**contents["optimizer"], "param_groups": groups}}, hostile)
    flipped = variant("flipped", flip_a_storage_byte(data))
    served = {
        "/short.pt": Served(data, truncate_to=len(data) // 2),
        "/forbidden.pt": Served(data, status=403),
        "/absent.pt": Served(data, status=404),
        "/stalled.pt": Served(data, chunk=500, stall_after=1000),
    }
    with counting_server(served) as server:
        secret = "?X-Signature=verysecret"
        cases: dict[str, tuple[object, dict[str, Any] | None]] = {
            "missing": (tmp_path / "missing.pt", None),
            "empty": (variant("empty", b""), None),
            "cut in the index": (variant("cut1", data[:-100]), None),
            "cut in half": (variant("cut2", data[: len(data) // 2]), None),
            "cut early": (variant("cut3", data[:100]), None),
            "hostile": (hostile, None),
            "flipped, before": (flipped, {"verify": "before"}),
            "flipped, during": (flipped, None),
            "short download": (server.url("/short.pt"), {"stall_timeout_s": 2}),
            "forbidden": (server.url("/forbidden.pt") + secret, None),
            "absent": (server.url("/absent.pt") + secret, None),
            "stalled": (server.url("/stalled.pt"), {"stall_timeout_s": 2}),
        }
        seen = run("failing_plain", 2, written(tmp_path, cases), deadline_s=200)
    check(
        seen,
        {
            "missing": ("NotFoundError", ("missing.pt", "rank 0")),
            "empty": ("CorruptError", ("empty.pt",)),
            "cut in the index": ("CorruptError", ("cut1.pt",)),
            "cut in half": ("CorruptError", ("cut2.pt",)),
            "cut early": ("CorruptError", ("cut3.pt",)),
            "hostile": (
                "UnsafeError",
                ("hostile.pt", "param_groups/0/foreach/0", "posix.system", "safe_types"),
            ),
            "flipped, before": ("CorruptError", ("flipped.pt", "CRC")),
            "flipped, during": ("PartialRestoreError", ("flipped.pt", "CRC", "changed: model")),
            "short download": ("CorruptError", ("short.pt", f"{len(data):,}")),
            "forbidden": ("AccessError", ("/forbidden.pt",)),
            "absent": ("NotFoundError", ("/absent.pt",)),
            "stalled": ("StalledError", ("stalled.pt", "rank 0")),
        },
    )
    assert "verysecret" not in json.dumps(seen)
    assert not canary.exists()


def test_a_hostile_part_that_is_ignored_or_not_restored_does_no_harm(plain: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    contents = torch.load(plain, weights_only=True)
    torch.save({**contents, "callbacks": [Payload(canary)]}, plain)
    run("restores_ignoring", 1, plain, "callbacks")
    run("restores_ignoring", 1, plain, "")
    run("restores_ignoring", 1, plain, "", "weights")
    assert not canary.exists()


def test_ranks_that_ask_for_different_things(plain: Path) -> None:
    finished = run_ranks(f"{WORKER}:disagreeing", 2, args=(plain,), deadline_s=90, env=WITHOUT)
    assert [rank.returncode for rank in finished] == [0, 0], finished


@needs_deepspeed
def test_faults_of_archives(tmp_path: Path) -> None:
    inner = "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    canary = tmp_path / "canary"

    def cut(members: dict[str, bytes]) -> None:
        members[inner] = members[inner][:2000]

    def flip(members: dict[str, bytes]) -> None:
        members[inner] = flip_a_storage_byte(members[inner])

    cases: dict[str, tuple[object, dict[str, Any] | None]] = {}
    for name in ("missing", "cut archive", "cut inside", "hostile", "no template", "flipped"):
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(DATA / "composer-zero1-w2", folder)
        first, second = (folder / f"ep1-ba4-rank{rank}.pt.tar" for rank in (0, 1))
        cases[name] = (folder / "ep1-ba4-rank{rank}.pt.tar", None)
        if name == "missing":
            second.unlink()
        elif name == "cut archive":
            second.write_bytes(second.read_bytes()[:3000])
        elif name == "cut inside":
            rewritten(second, cut)
        elif name == "hostile":
            rewritten(first, lambda members: members.update({"composer_states.pt": poisoned(canary)}))
        elif name == "no template":
            cases[name] = (first, None)
        else:
            rewritten(second, flip)
    check(
        run("failing_archives", 2, written(tmp_path, cases), deadline_s=200),
        {
            "missing": ("NotFoundError", ("ep1-ba4-rank1.pt.tar", "needed by rank 1")),
            "cut archive": ("CorruptError", ("ep1-ba4-rank1.pt.tar",)),
            "cut inside": ("CorruptError", ("ep1-ba4-rank1.pt.tar", "optim_states")),
            "hostile": ("UnsafeError", ("composer_states.pt", "state/timestamp", "safe_types")),
            "no template": ("LayoutError", ("ep1-ba4-rank0.pt.tar", "{rank}")),
            "flipped": ("PartialRestoreError", ("optim_states", "CRC")),
        },
    )
    assert not canary.exists()


@needs_deepspeed
def test_faults_of_a_folder_and_another_world_size(tmp_path: Path) -> None:
    folder = unpack_zero(3, tmp_path)
    tag = folder / "step3"
    model = "zero_pp_rank_2_mp_rank_00_model_states.pt"
    optimizer = "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"
    canary = tmp_path / "canary"
    buffer = io.BytesIO()
    torch.save({"optimizer_state_dict": Payload(canary)}, buffer)
    cases: dict[str, tuple[object, dict[str, Any] | None]] = {}
    for name, file, data in (
        ("missing", optimizer, None),
        ("cut", model, (tag / model).read_bytes()[:4000]),
        ("hostile", optimizer, buffer.getvalue()),
        ("flipped", optimizer, flip_a_storage_byte((tag / optimizer).read_bytes())),
    ):
        copy = tmp_path / name
        shutil.copytree(tag, copy)
        if data is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(data)
        cases[name] = (copy, None)
    check(
        run("failing_folder", 4, written(tmp_path, cases), 3, deadline_s=240),
        {
            "missing": ("NotFoundError", (optimizer, "needed by rank 3")),
            "cut": ("CorruptError", (model,)),
            "hostile": ("FormatError", (optimizer,)),
            "flipped": ("PartialRestoreError", (optimizer, "CRC")),
        },
    )
    assert not canary.exists()
    # At another world size rank 1 takes the files of ranks 2 and 3; the latter it asks for in a second step.
    other = {name: cases[name] for name in ("missing", "flipped")}
    check(
        run("failing_folder", 2, written(tmp_path, other), 3),
        {
            "missing": ("NotFoundError", (optimizer, "needed by rank 1")),
            "flipped": ("PartialRestoreError", (optimizer, "CRC")),
        },
    )


# --- interruptions -------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_in_the_restore_leaves_the_others_told(tmp_path: Path) -> None:
    finished = run_ranks(
        f"{WORKER}:a_peer_dies_in_the_restore", 3, args=(tmp_path,), deadline_s=60, env=WITHOUT
    )
    assert [rank.returncode for rank in finished] == [0, 7, 0], finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_rank_ends_all_and_leaves_nothing(plain: Path, tmp_path: Path, number: int) -> None:
    # More than comes with the first answer.
    torch.save({**torch.load(plain), "more": torch.zeros(100_000)}, plain)
    data = plain.read_bytes()
    cache = tmp_path / "cache"
    with counting_server({"/step1.pt": Served(data, chunk=len(data) // 100, pause_s=0.5)}) as server:
        finished = run_ranks(
            f"{WORKER}:interrupted",
            3,
            args=(server.url("/step1.pt"), int(number)),
            deadline_s=60,
            env={**WITHOUT, "RANKLOAD_CACHE_DIR": str(cache)},
        )
    assert finished[0].returncode == (-number if number == signal.SIGTERM else 130), finished
    assert [rank.returncode for rank in finished[1:]] == [0, 0], finished
    left = [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == [], left
