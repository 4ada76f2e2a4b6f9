"""A kill at any point of a save, and a full disk: the old file or the new one is there, whole."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rankload.loader.writing import local, summed

from rankload import AccessError, State, load, save_checkpoint

CALLS = ("fsync", "replace", "unlink", "scandir", "makedirs", "open", "close")
"""What a save asks the system for; a point lies before each call and after it."""


class Points:
    """Counts the points that a save passes, and ends the process at the one numbered `kill_at`."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.passed = 0
        self._kill_at = kill_at
        self._pid = os.getpid()

    def _pass(self) -> None:
        self.passed += 1
        if self.passed == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            self._pass()
            result = call(*args, **more)
            self._pass()
            return result

        return wrapped

    def some_writes(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Points around each eighth write: there are many, and they differ in nothing."""
        count = itertools.count()
        watched = self.around(write)
        return lambda *args: (write if next(count) % 8 else watched)(*args)

    def patched(self) -> Any:
        return mock.patch.multiple(os, **{name: self.around(getattr(os, name)) for name in CALLS})


def state_of(value: float) -> State:
    model = torch.nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.fill_(value)
    return State(model)


def save(path: Path, value: float, points: Points) -> None:
    write = summed.SummedFile.write
    with (
        points.patched(),
        mock.patch.object(summed, "open", points.around(open), create=True),
        mock.patch.object(summed.SummedFile, "write", points.some_writes(write)),
    ):
        save_checkpoint(path, state_of(value))


def killed_at(path: Path, value: float, point: int) -> bool:
    """Whether a child that saves was killed there, rather than done before."""
    child = os.fork()
    if child == 0:
        try:
            save(path, value, Points(point))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def held(path: Path) -> float:
    state = state_of(0)
    load(path, state)
    return float(state.model.weight.detach().mean())


def test_sigkill_at_every_point_leaves_the_old_or_the_new_file(tmp_path: Path):
    path = tmp_path / "last.pt"
    counted = Points()
    save(path, 1, counted)
    assert counted.passed > 30
    old, without_manifest, points = 1.0, 0, 0
    every = 1 if os.environ.get("TEST_ALL") else 8
    for point in range(1, counted.passed + 1 + every, every):
        if not killed_at(path, point + 1, point):
            break
        points = point
        found = held(path)
        assert found in (old, point + 1), point
        without_manifest += not (tmp_path / "last.pt.sha256").exists()
        old = found
        if (tmp_path / "last.pt.sha256").exists():
            subprocess.run(["sha256sum", "--quiet", "--check", "last.pt.sha256"], cwd=tmp_path, check=True)
    assert points > counted.passed - every
    assert 0 < without_manifest < points / 2 / every
    save_checkpoint(path, state_of(0.5))
    assert held(path) == 0.5
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.sha256"]


def test_other_files_of_such_names_stay(tmp_path: Path):
    others = ["last.pt.part", "best.pt.0123abcd.part", "last.pt.0123abcd.parts"]
    for name in [*others, "last.pt.0123abcd.part", "last.pt.sha256.0123abcd.part"]:
        (tmp_path / name).write_bytes(b"x")
    save_checkpoint(tmp_path / "last.pt", state_of(1))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "last.pt", "last.pt.sha256"])


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path: Path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state_of(1))
    with (
        mock.patch.object(local, "free_bytes_of", return_value=70_000),
        mock.patch.object(local, "write_summed", side_effect=AssertionError),
        pytest.raises(
            AccessError, match=r"last\.pt needs at least \d\d,\d{3} bytes, and the disk of .* has 70,000 left"
        ),
    ):
        save_checkpoint(path, state_of(2))
    assert held(path) == 1
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.sha256"]


@pytest.mark.parametrize(
    ("number", "match"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "may not write"), (errno.EIO, "written")],
)
def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path: Path, number: int, match: str):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state_of(1))
    opened = builtins.open

    def open_failing(*args: Any) -> Any:
        file = mock.MagicMock(wraps=opened(*args))
        file.__enter__.return_value = file
        file.write.side_effect = [1, OSError(number, os.strerror(number))]
        return file

    with (
        mock.patch.object(summed, "open", open_failing, create=True),
        pytest.raises(AccessError, match=match),
    ):
        save_checkpoint(path, state_of(2))
    assert held(path) == 1
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.sha256"]


def test_a_disk_that_fills_up(tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk needs root")
    try:
        save_checkpoint(small / "last.pt", state_of(1))
        large = State(torch.nn.Linear(256, 256))
        with pytest.raises(AccessError, match="left: make room"):
            save_checkpoint(small / "last.pt", large)
        with (
            mock.patch.object(local, "check_room"),
            pytest.raises(AccessError, match="the disk is full"),
        ):
            save_checkpoint(small / "last.pt", large)
        assert held(small / "last.pt") == 1
        assert sorted(os.listdir(small)) == ["last.pt", "last.pt.sha256"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
