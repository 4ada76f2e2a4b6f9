"""The contract that every store keeps, plain and under faults: the right bytes, or an error of ours and no file."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_stores import Cut, Faulty, Flip, Forget, Refuse, Slow
from places import DATA
from rankload.loader.errors import AccessError, CorruptError, NotFoundError
from rankload.loader.stores.base import ObjectInfo, Store

SOURCE = DATA / "composer-monolithic-w2"
NAME = "weights-ba8-rank0.pt"
BODY = (SOURCE / NAME).read_bytes()


@dataclass(frozen=True)
class Kept:
    """A store that has the object `name` with `BODY` in it, in a folder with others."""

    store: Store
    name: str

    @property
    def missing(self) -> str:
        return f"{self.name}.not-there"

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


def downloaded(store: Store, name: str, target: Path, expected: ObjectInfo | None = None) -> int:
    """Downloads, and returns how many bytes were told."""
    seen: list[int] = []
    store.download(name, str(target), seen.append, expected)
    return sum(seen)


def keeps_the_contract(kept: Kept, store: Store, target: Path) -> None:
    """What `Store` promises of an object that is there, and of one that is not; `store` is `kept`'s, or a wrapper."""
    info = store.stat(kept.name)
    assert info is not None
    assert not info.is_folder
    assert info.size_bytes in (len(BODY), None)
    for expected in (None, info):
        assert downloaded(store, kept.name, target, expected) == len(BODY)
        assert target.read_bytes() == BODY
        assert os.listdir(target.parent) == ["x"]
        target.unlink()
    assert store.peek(kept.name, 100) in (BODY[:100], None)
    assert store.peek(kept.name, len(BODY) + 100) in (BODY, None)
    assert store.read_small(kept.name, len(BODY)) == BODY
    with pytest.raises(CorruptError):
        store.read_small(kept.name, len(BODY) - 1)
    again = store.stat(kept.name)
    assert again == info, "the same object has the same version"

    missing = store.stat(kept.missing)
    assert missing is None or not missing.certain
    for ask in (
        lambda: store.download(kept.missing, str(target), lambda n_bytes: None),
        lambda: store.read_small(kept.missing, 10),
    ):
        with pytest.raises(NotFoundError) as caught:
            ask()
        assert kept.missing.rpartition("/")[2] in str(caught.value)
    with pytest.raises(CorruptError, match=r"expected [\d,]+ bytes?"):
        store.download(kept.name, str(target), lambda n_bytes: None, ObjectInfo(kept.name, len(BODY) + 1))
    assert os.listdir(target.parent) == []
    listed = store.entries(kept.folder)
    assert listed is None or [one.size_bytes for one in listed if one.name == NAME] == [len(BODY)]
    assert store.join(kept.folder, NAME) == kept.name
    assert isinstance(store.nearby(kept.missing), str)
    assert store.describe(kept.name).endswith(NAME)


def keeps_it_plain(kept: Kept, target: Path) -> None:
    keeps_the_contract(kept, kept.store, target)
    kept.store.close()
    assert downloaded(kept.store, kept.name, target) == len(BODY)


def ends_by_the_callback(kept: Kept, target: Path) -> None:
    def give_up(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.store.download(kept.name, str(target), give_up)
    assert [name for name in os.listdir(target.parent) if name != "x"] == []


def keeps_it_in_threads(kept: Kept, target: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            own = target.with_name(f"{number}")
            told = downloaded(kept.store, kept.name, own)
            assert own.read_bytes() == BODY, "other bytes"
            assert told == len(BODY), f"{told} bytes were told, of {len(BODY)}"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures


def keeps_it_under_faults(kept: Kept, target: Path) -> None:
    keeps_the_contract(kept, Slow(kept.store, pause_s=0.005), target)
    for fault, error in ((Cut, CorruptError), (Refuse, AccessError), (Forget, NotFoundError)):
        faulty: Faulty = fault(Slow(kept.store, pause_s=0.001), times=1)
        with pytest.raises(error):
            downloaded(faulty, kept.name, target)
        assert os.listdir(target.parent) == [], fault
        assert faulty.spoiled == 1
        # The next answer is right, and so is all that follows.
        keeps_the_contract(kept, faulty, target)
    flipped = Flip(Cut(kept.store, times=1), times=1)
    with pytest.raises(CorruptError):
        downloaded(flipped, kept.name, target)
    assert downloaded(flipped, kept.name, target) == len(BODY)
    assert sum(a != b for a, b in zip(target.read_bytes(), BODY, strict=True)) == 1
    target.unlink()
    keeps_the_contract(kept, flipped, target)


CONTRACT = {
    "plain": keeps_it_plain,
    "given up": ends_by_the_callback,
    "in threads": keeps_it_in_threads,
    "under faults": keeps_it_under_faults,
}
"""Each takes a `Kept`, and a path to download to in an empty folder."""
