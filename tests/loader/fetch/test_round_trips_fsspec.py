"""How many answers a load waits for before the bulk, from S3 and from a file system of fsspec's: counted, not timed."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import real_servers
import torch
from dcp_folders import save
from fsspec.implementations.memory import MemoryFileSystem
from many_files import write_zero
from paced_server import Asked, PacedServer, answers_in_a_row, paced_front
from rankload.loader import RankloadError, State, gather_rng, load
from server_process import or_skip

LATE_S = 0.15
BULK = 256 << 10
RANKS, SHARE = 8, 1 << 16
FORMS = {"whole.pt": 3, "dcp": 4, "zero": 4}
"""Each with the answers that it takes at most."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(RANKS * SHARE))


def a_model() -> torch.nn.Module:
    """Of 16 MiB: it has zeros once it is restored, and ones before."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(OneWeight() for _ in range(8))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a checkpoint of each form in its folder ``bucket``."""
    root = tmp_path_factory.mktemp("forms")
    bucket = root / "bucket"
    zero = write_zero(bucket / "zero" / "step3", ranks=RANKS, parameters=8, share=SHARE)
    (bucket / "zero" / "latest").write_text(zero.name)
    saved = {name: torch.zeros_like(value) for name, value in a_model().state_dict().items()}
    torch.save({"state": {"model": saved}, "rng": gather_rng()}, bucket / "whole.pt")
    save(bucket / "dcp", {"model": saved})
    return root


def restored(path: str, **arguments: Any) -> None:
    model = a_model()
    load(path, State(model), load_weights_only=True, progress_bar=False, **arguments)
    assert not any(value.any() for value in model.state_dict().values())


@pytest.fixture(scope="module")
def s3(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PacedServer, dict[str, Any]]]:
    """A real S3 server behind a front that delays its answers, and s3fs's options for that."""
    pytest.importorskip("s3fs")
    with (
        or_skip(real_servers.hadro(folder, tmp_path_factory.mktemp("hadro"))) as server,
        paced_front(server.endpoint, LATE_S) as front,
    ):
        yield front, dataclasses.replace(server, endpoint=front.url("")).options


@pytest.mark.parametrize("name", FORMS)
def test_s3_takes_as_few_answers_as_http(s3: tuple[PacedServer, dict[str, Any]], name: str) -> None:
    """And no HEAD but for checksums of files that come whole, which S3 states in no answer to a GET for a range."""
    front, options = s3
    front.forget()
    restored(f"s3://bucket/{name}", options={"storage_options": options})
    assert any(one.n_bytes > BULK for one in front.asked), front.told()
    assert front.answers_in_a_row(bulk_bytes=BULK) <= FORMS[name], front.told()
    heads = [one.path for one in front.asked if one.method == "HEAD"]
    assert not any(path.endswith(("whole.pt", "optim_states.pt", "latest")) for path in heads), front.told()
    # No bucket is listed.
    assert all(one.path.strip("/") != "bucket" for one in front.asked), front.told()


class LateFiles(MemoryFileSystem):
    """A file system whose answers come late, and which notes what it was asked; its URLs cannot be signed."""

    cachable = False
    protocol = "late"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.after: dict[str, Callable[[], None]] = {}
        """What is done once an object's size was asked for, by its name."""

    def _late(self, what: str, path: str, answer: Callable[[], Any]) -> Any:
        asked = Asked(what, path, "", time.monotonic())
        time.sleep(LATE_S)
        try:
            found = answer()
            asked.n_bytes = len(found) if isinstance(found, bytes) else 0
            return found
        finally:
            asked.end = time.monotonic()
            with self.lock:
                self.asked.append(asked)

    def info(self, path: str, **options: Any) -> Any:
        found = self._late("info", path, lambda: super(LateFiles, self).info(path, **options))
        self.after.pop(path.strip("/"), lambda: None)()
        return found

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        read = super().cat_file
        return self._late("cat", path, lambda: read(path, start=start, end=end, **options))


_number = itertools.count()


@pytest.fixture
def late(folder: Path) -> Iterator[tuple[LateFiles, str]]:
    """The file system, and where in it the checkpoints are."""
    files, root = LateFiles(), f"/round-trips-{next(_number)}"
    for path in (folder / "bucket").rglob("*"):
        if path.is_file():
            MemoryFileSystem().pipe_file(f"{root}/{path.relative_to(folder / 'bucket')}", path.read_bytes())
    yield files, root
    MemoryFileSystem().rm(root, recursive=True)


@pytest.mark.parametrize(("name", "most"), [("whole.pt", 3), ("dcp", 4), ("zero", 6)])
def test_a_file_system_is_asked_for_the_version_first(
    late: tuple[LateFiles, str], name: str, most: int
) -> None:
    """``cat_file`` tells no version, so ``info`` comes before: of ``latest``, of rank 0's files, of all others."""
    files, root = late
    restored(f"{root}/{name}", object_store=files)
    told = "\n".join(f"{one.begin:.3f}-{one.end:.3f} {one}" for one in files.asked)
    assert answers_in_a_row(files.asked, BULK) <= most, told


def test_an_object_that_changes_between_its_version_and_its_bytes_is_refused(
    late: tuple[LateFiles, str],
) -> None:
    files, root = late
    name = f"{root}/whole.pt".strip("/")
    data = MemoryFileSystem().cat_file(name)
    files.after[name] = lambda: MemoryFileSystem().pipe_file(name, data + bytes(64))
    with pytest.raises(RankloadError, match="changed while it was loaded"):
        restored(f"{root}/whole.pt", object_store=files)
