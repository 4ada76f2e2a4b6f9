"""How many answers a load waits for, one after another, before it asks for bulk bytes: counted, not timed.

The server answers so late that what is asked for after another answer certainly came after it.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from dcp_folders import save
from many_files import write_zero
from paced_server import PacedServer, paced_server
from rankload.loader import State, gather_rng, load
from rankload.loader.alone import open_alone
from rankload.loader.stores.http import HttpStore
from safetensors_files import as_safetensors
from zero_folders import unpack_zero

LATE_S = 0.15
WIDTH, LAYERS = 512, 4
BULK = 256 << 10
"""What is asked for first is no longer than this."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def served(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    return tmp_path / "served"


def a_model(seed: int, width: int = WIDTH, layers: int = LAYERS) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


class OneWeight(torch.nn.Module):
    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(elements))


def restored(server: PacedServer, name: str, saved: torch.nn.Module, *, weights_only: bool = True) -> int:
    """Loads what is served as `name`, and returns how many answers were waited for before the bulk."""
    model = copy.deepcopy(saved)
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    load(server.url(name), State(model), load_weights_only=weights_only, progress_bar=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert any(one.n_bytes > BULK for one in server.asked), server.told()
    return server.answers_in_a_row(bulk_bytes=BULK)


@pytest.mark.parametrize("suffixes", [True, False])
def test_one_file_takes_three_answers_and_no_head(served: Path, suffixes: bool) -> None:
    """The second row is of the names that manifests may have, which the two ends of the file come with."""
    saved = a_model(1)
    torch.save({"state": {"model": saved.state_dict()}, "rng": gather_rng()}, served / "whole.pt")
    (served / "model.safetensors").write_bytes(as_safetensors(saved.state_dict()))
    with paced_server(served, LATE_S, suffixes=suffixes) as server:
        assert restored(server, "whole.pt", saved, weights_only=False) <= 3, server.told()
        assert [one.method for one in server.of("whole.pt")].count("HEAD") == 0, server.told()
        server.forget()
        assert restored(server, "model.safetensors", saved) <= 3, server.told()


def test_a_manifest_takes_one_answer_more_at_most(served: Path) -> None:
    saved = a_model(1)
    torch.save({"state": {"model": saved.state_dict()}}, served / "whole.pt")
    digest = hashlib.sha256((served / "whole.pt").read_bytes()).hexdigest()
    (served / "whole.pt.sha256").write_text(f"{digest}  whole.pt\n")
    with paced_server(served, LATE_S) as server:
        assert restored(server, "whole.pt", saved) <= 3, server.told()


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_dcp_folder_takes_four_answers(served: Path, weights_only: bool) -> None:
    """However many items it has: the ends of all of them are asked for at once."""
    saved = a_model(1, WIDTH * 2, LAYERS * 2)
    save(served / "dcp", {"model": saved.state_dict()})
    with paced_server(served, LATE_S) as server:
        assert restored(server, "dcp", saved, weights_only=weights_only) <= 4, server.told()
        # Nothing is asked for once all bytes have come.
        last = max(server.asked, key=lambda one: one.end)
        assert last.method == "GET", server.told()


@pytest.mark.parametrize(("ranks", "weights_only"), [(2, True), (16, False)])
def test_files_of_zero_take_four_answers_however_many(served: Path, ranks: int, weights_only: bool) -> None:
    """``latest``, the first model file with the first optimizer file, and both ends of all files."""
    share = 1 << 16
    folder = write_zero(served / "zero" / "step3", ranks=ranks, parameters=2, share=share)
    (served / "zero" / "latest").write_text(folder.name)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(OneWeight(ranks * share) for _ in range(2))
    with paced_server(served, LATE_S) as server:
        load(
            server.url("zero"),
            State(model),
            load_weights_only=weights_only,
            ignore_keys=None if weights_only else ["state/optimizers/*", "state/schedulers/*"],
            progress_bar=False,
        )
        assert not any(value.any() for value in model.state_dict().values())
        assert server.answers_in_a_row(bulk_bytes=BULK) <= 4, server.told()


def test_files_of_other_sizes_than_the_first_are_read_right(served: Path) -> None:
    """The ends of further ranks' files are looked for where the first one ends: some are shorter, some longer."""
    folder = write_zero(served / "zero", ranks=5, parameters=1, share=1 << 18)
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(5)]
    tree = torch.load(folder / names[0], weights_only=False)
    for name, more in zip(names, (300 << 10, 304 << 10, 1 << 20, 200 << 10, 0), strict=True):
        (folder / name).unlink()
        torch.save({**tree, "unknown": torch.zeros(more // 4)}, folder / name)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([OneWeight(5 << 18)])
    with paced_server(served) as server:
        load(server.url("zero"), State(model), load_weights_only=True, progress_bar=False)
    assert not any(value.any() for value in model.state_dict().values())


@pytest.mark.parametrize("stage", [1, 3])
def test_small_files_of_zero_are_one_request_each(served: Path, stage: int) -> None:
    folder = unpack_zero(stage, served)
    with paced_server(served, LATE_S) as server:
        with open_alone(server.url(folder.name)) as opened:
            assert opened.saved.zero_stage == stage
        # All of these files are small: nothing is bulk.
        assert server.answers_in_a_row() <= 4, server.told()
        assert len(server.asked) == len({one.path for one in server.asked}), server.told()


def test_small_files_and_servers_without_ranges_send_each_byte_once(served: Path, tmp_path: Path) -> None:
    """A file that all comes with the first answer is not asked for again; nor is one that a server streams."""
    (served / "small.bin").write_bytes(b"s" * 1000)
    (served / "large.bin").write_bytes(bytes(range(256)) * 4096)
    for ranges, name in ((True, "small.bin"), (False, "small.bin"), (False, "large.bin")):
        with paced_server(served, ranges=ranges) as server:
            store = HttpStore()
            url = server.url(name)
            store.ask_ahead(url, 256 << 10, lambda head: False)
            info = store.stat(url)
            assert info is not None
            assert info.size_bytes == (served / name).stat().st_size
            store.download(url, str(tmp_path / "got"), lambda n_bytes: None, info)
            assert (tmp_path / "got").read_bytes() == (served / name).read_bytes()
            (tmp_path / "got").unlink()
            assert len(server.asked) == 1, server.told()
            store.close()


def test_what_was_asked_ahead_is_dropped(served: Path) -> None:
    (served / "a.bin").write_bytes(b"a" * 1000)
    with paced_server(served) as server:
        store = HttpStore()
        url, missing = server.url("a.bin"), server.url("b.bin")
        for one in (url, missing):
            store.ask_ahead(one, 100, lambda head: True)
        first = store.first_bytes(url)
        assert first is not None
        assert [(start, len(data)) for start, data in first.parts] == [(0, 100), (900, 100)]
        assert store.peek(url, 5) == b"aaaaa"
        assert store.stat(missing) is None
        n_asked = len(server.asked)
        assert n_asked == 3
        # That it is not there was told once: it may be there by now.
        (served / "b.bin").write_bytes(b"b")
        assert store.stat(missing) is not None
        store.forget(url)
        assert store.read_small(url, 2000) == b"a" * 1000
        assert len(server.asked) == n_asked + 2
        store.close()
