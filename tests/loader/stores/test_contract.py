"""Every store keeps one contract, plain and under faults; so do real servers (``test_stores_real``)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from faulty_stores import Cut, Faulty, Flip, Forget, Refuse, Slow
from http_server import Served, counting_server
from hub_server import hub_server
from object_stores import Destination, ObjectStore
from rankload.loader import State, load, opening, retries
from rankload.loader.errors import AccessError, CorruptError, NotFoundError, RankloadError
from rankload.loader.stores.base import Store
from rankload.loader.stores.open import open_store
from store_contract import BODY, CONTRACT, NAME, SOURCE, Kept

Make = Callable[[pytest.FixtureRequest, Path], Any]


def local(request: pytest.FixtureRequest, folder: Path) -> Kept:
    shutil.copy(SOURCE / NAME, folder / NAME)
    return Kept(*open_store(str(folder / NAME)))


def http(request: pytest.FixtureRequest, folder: Path) -> Iterator[Kept]:
    with counting_server({f"/run/{NAME}": Served(BODY)}) as server:
        yield Kept(*open_store(server.url(f"/run/{NAME}")))


def http_without_head(request: pytest.FixtureRequest, folder: Path) -> Iterator[Kept]:
    with counting_server({f"/run/{NAME}": Served(BODY, head_status=405)}) as server:
        yield Kept(*open_store(server.url(f"/run/{NAME}")))


def http_in_chunks(request: pytest.FixtureRequest, folder: Path) -> Iterator[Kept]:
    with counting_server({f"/run/{NAME}": Served(BODY, chunked=True, chunk=1000)}) as server:
        yield Kept(*open_store(server.url(f"/run/{NAME}")))


def memory(request: pytest.FixtureRequest, folder: Path) -> Kept:
    fsspec.filesystem("memory").pipe(f"/contract/{NAME}", BODY)
    return Kept(*open_store(f"memory://contract/{NAME}"))


def zipped(request: pytest.FixtureRequest, folder: Path) -> Kept:
    """A chain of fsspec's file systems."""
    import zipfile

    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr(f"run/{NAME}", BODY)
    return Kept(*open_store(f"zip://run/{NAME}::file://{folder}/z.zip"))


def given_file_system(request: pytest.FixtureRequest, folder: Path) -> Kept:
    (folder / "run").mkdir()
    shutil.copy(SOURCE / NAME, folder / "run" / NAME)
    given = fsspec.filesystem("dir", path=str(folder), fs=fsspec.filesystem("file"))
    return Kept(*open_store(f"run/{NAME}", given))


def object_store(request: pytest.FixtureRequest, folder: Path) -> Kept:
    return Kept(*open_store(f"run/{NAME}", ObjectStore({f"run/{NAME}": BODY})))


def silent_object_store(request: pytest.FixtureRequest, folder: Path) -> Kept:
    return Kept(*open_store(f"run/{NAME}", ObjectStore({f"run/{NAME}": BODY}, announce=False)))


def destination(request: pytest.FixtureRequest, folder: Path) -> Kept:
    return Kept(*open_store(f"run/{NAME}", Destination({f"run/{NAME}": BODY})))


def hub(request: pytest.FixtureRequest, folder: Path) -> Iterator[Kept]:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    request.getfixturevalue("monkeypatch").setenv("HF_HOME", str(folder / "home"))
    with hub_server("somebody/run", {NAME: BODY}) as server:
        options = {"endpoint": server.url, "token": False, "skip_instance_cache": True}
        yield Kept(*open_store(f"hf://somebody/run/{NAME}", None, options))


STORES: dict[str, Make] = {
    "local": local,
    "http": http,
    "http without HEAD": http_without_head,
    "http in chunks": http_in_chunks,
    "fsspec memory": memory,
    "fsspec chain": zipped,
    "given file system": given_file_system,
    "object store": object_store,
    "silent object store": silent_object_store,
    "destination": destination,
    "hub": hub,
}


@pytest.fixture(params=STORES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    (tmp_path / "kept").mkdir()
    made = STORES[request.param](request, tmp_path / "kept")
    if isinstance(made, Kept):
        yield made
        made.store.close()
        return
    one = next(made)
    yield one
    one.store.close()
    next(made, None)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x"


@pytest.mark.parametrize("part", CONTRACT)
def test_it_keeps_the_contract(kept: Kept, target: Path, part: str, request: pytest.FixtureRequest) -> None:
    if part == "in threads" and "fsspec memory" in request.node.callspec.id:
        pytest.skip("fsspec's memory has one cursor for an object, which all threads move")
    CONTRACT[part](kept, target)


# --- a whole load over them ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.nn.Linear, bytes]:
    torch.manual_seed(1)
    model = torch.nn.Linear(30, 40)
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "saved.pt")
    return model, (tmp_path / "saved.pt").read_bytes()


FAULTS: dict[str, tuple[Callable[[Store], Faulty], type[RankloadError] | None]] = {
    "slow": (lambda store: Slow(store), None),
    "one flipped bit": (lambda store: Flip(store, times=1), None),
    "flipped bits": (lambda store: Flip(store), CorruptError),
    "cut": (lambda store: Cut(store), CorruptError),
    "refused": (lambda store: Refuse(store, names=(".pt",)), AccessError),
    "forgotten": (lambda store: Forget(store, names=(".pt",)), NotFoundError),
    "slow, and one flipped bit": (lambda store: Flip(Slow(store), times=1), None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_is_right_or_changes_nothing(
    tmp_path: Path, saved: tuple[torch.nn.Linear, bytes], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    model, body = saved
    fsspec.filesystem("memory").pipe("/faulty/f.pt", body)
    wrap, error = FAULTS[fault]
    made: list[Faulty] = []

    def open_faulty(path: str, *options: Any) -> tuple[Store, str]:
        store, name = open_store(path, *options)
        made.append(wrap(store))
        return made[-1], name

    monkeypatch.setattr(opening, "open_store", open_faulty)
    other = torch.nn.Linear(30, 40)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    options = {"cache_dir": str(tmp_path / "cache"), "verify": "before", "stall_timeout_s": 20.0}
    if error is None:
        load("memory://faulty/f.pt", State(other), load_weights_only=True, options=options)
    else:
        with pytest.raises(error):
            load("memory://faulty/f.pt", State(other), load_weights_only=True, options=options)
    assert sum(one.spoiled for one in made) > 0, "the fault was not met"
    expected = model.state_dict() if error is None else before
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
