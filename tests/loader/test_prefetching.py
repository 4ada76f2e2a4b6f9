"""A node's cache that is filled before a load: it stays until the first load has used it, and goes with that."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_server import BadServer, Behaviour, Fault, bad_server
from places import DATA, SUPPORT
from processes import run_ranks
from rankload.loader import MismatchError, NotFoundError, OptionError, State, load
from rankload.loader.alone import open_alone
from rankload.loader.cache import homes, records
from rankload.loader.cache.holes import Landed
from rankload.loader.cache.node import NodeCache
from rankload.loader.prefetching import prefetch
from rankload.loader.stores.transfer import bytes_on_disk
from wide_model import ALL_BYTES, a_module
from zero_folders import unpack_zero

SPOKEN = 64 << 10
"""What a load may still ask for: which version there is, and the first byte of each file."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from wide_model import save_trained

    path = tmp_path_factory.mktemp("saved") / "model.pt"
    save_trained(path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def served_folder(folder: Path, at: str) -> dict[str, Behaviour]:
    """The folder's files, by their paths on a server."""
    return {
        f"{at}/{path.relative_to(folder)}": Behaviour(path.read_bytes(), headers={"ETag": '"v1"'})
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def spent(server: BadServer, action: Callable[[], object]) -> int:
    """The bytes that `server` sends while `action` runs."""
    before = server.sent_bytes
    action()
    return server.sent_bytes - before


def test_the_first_load_finds_all_of_it_and_leaves_nothing(saved: bytes, cache: Path) -> None:
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        found = prefetch(server.url("/model.pt"))
        assert found.bytes == found.held_bytes == server.sent_bytes == len(saved)
        assert (found.files, found.folder, found.taken_over) == (1, str(cache), False)

        def look() -> None:
            with open_alone(server.url("/model.pt")) as opened:
                assert opened.saved.step is None

        assert spent(server, look) < SPOKEN
        module = a_module(seed=1)
        assert spent(server, lambda: load(server.url("/model.pt"), State(module))) < SPOKEN
        assert not list(cache.iterdir())
        anew = spent(server, lambda: load(server.url("/model.pt"), State(module), load_weights_only=True))
        assert anew > ALL_BYTES / 4


@pytest.mark.parametrize("mode", ["direct", "auto"])
def test_nothing_of_it_is_fetched_past_it(saved: bytes, cache: Path, mode: str) -> None:
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        prefetch(server.url("/model.pt"))
        options = {"mode": mode}
        assert (
            spent(server, lambda: load(server.url("/model.pt"), State(a_module()), options=options)) < SPOKEN
        )


def test_with_a_bound_auto_fills_the_cache(saved: bytes, cache: Path) -> None:
    options = {"mode": "auto", "cache_size": "1GB"}
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        url = server.url("/model.pt")
        first = spent(server, lambda: load(url, State(a_module()), load_weights_only=True, options=options))
        assert first > ALL_BYTES / 4
        again = spent(server, lambda: load(url, State(a_module()), load_weights_only=True, options=options))
        assert again < SPOKEN


def test_what_a_load_leaves_of_it_goes_too(cache: Path) -> None:
    files = served_folder(DATA / "dcp-fsdp2-w2/ckpt", "/ckpt")
    with bad_server(files) as server:
        found = prefetch(server.url("/ckpt/.metadata"))
        assert found.held_bytes == found.bytes == sum(len(one.body) for one in files.values())
        assert (found.files, found.not_kept, found.missing) == (3, (), ())
        with NodeCache(str(cache)) as other:
            other.of_checkpoint("another")
            other.entry("another", "1")
        assert len([one for one in cache.iterdir() if one.is_dir()]) == 3
        with open_alone(server.url("/ckpt/.metadata")) as opened:
            assert not any(file.fetched_bytes for file in opened.files.fetched)
        assert len([one for one in cache.iterdir() if one.is_dir()]) == 3
        # It fails, and has used it all the same.
        with pytest.raises(MismatchError):
            load(server.url("/ckpt/.metadata"), State(a_module()), load_weights_only=True)
        assert not list(cache.iterdir())


def test_two_ranks_find_it(saved: bytes, tmp_path: Path, cache: Path) -> None:
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        prefetch(server.url("/model.pt"))
        before = server.sent_bytes
        url = server.url("/model.pt")
        for rank in run_ranks(
            f"{SUPPORT / 'prefetch_worker.py'}:restore",
            2,
            args=(url,),
            deadline_s=60,
            env={"RANKLOAD_CACHE_DIR": str(cache)},
        ):
            assert rank.returncode == 0, rank
        assert server.sent_bytes - before < SPOKEN
    assert not list(cache.iterdir())


SLOWLY = """
import sys
from rankload.loader.prefetching import prefetch
from rankload.loader.stores.transfer import bytes_on_disk
print(prefetch(sys.argv[1]), flush=True)
"""


def in_the_middle(cache: Path, least_bytes: int) -> None:
    """Waits until a file in `cache` has `least_bytes` on the disk."""
    until = time.monotonic() + 30
    while bytes_on_disk(str(cache)) < least_bytes:
        assert time.monotonic() < until, "nothing arrived"
        time.sleep(0.01)


def test_killed_in_the_middle_it_goes_on_where_it_was(saved: bytes, cache: Path) -> None:
    # Both ends of the file, two parts of it, and of the others nothing.
    faults = [*(Fault() for _ in range(4)), *(Fault(send_only=1, ending="stall") for _ in range(8))]
    model = Behaviour(saved, faults=faults)
    with bad_server({"/model.pt": model}) as server:
        child = subprocess.Popen([sys.executable, "-c", SLOWLY, server.url("/model.pt")])
        until = time.monotonic() + 30
        while landed_bytes(cache, len(saved)) < 10 << 20:
            assert time.monotonic() < until, "nothing has landed"
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        model.faults.clear()
        landed = landed_bytes(cache, len(saved))
        found = prefetch(server.url("/model.pt"))
        assert found.held_bytes == len(saved)
        assert found.bytes == len(saved) - landed
        module = a_module(seed=1)
        assert spent(server, lambda: load(server.url("/model.pt"), State(module))) < SPOKEN
    assert not list(cache.iterdir())


def landed_bytes(cache: Path, size: int) -> int:
    """How many bytes of the one file that is fetched there have landed."""
    return sum(
        size - sum(one.length for one in Landed(str(record).removesuffix(".landed")).missing([(0, size)]))
        for record in cache.rglob("*.landed")
    )


def test_a_load_that_comes_meanwhile_takes_over(saved: bytes, cache: Path) -> None:
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        server.pause_s = 0.01
        child = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, server.url("/model.pt")], stdout=subprocess.PIPE, text=True
        )
        in_the_middle(cache, len(saved) // 4)
        load(server.url("/model.pt"), State(a_module(seed=1)))
        assert "taken_over=True" in child.communicate(timeout=30)[0]
        assert child.returncode == 0
        # All but the chunks that were under way came once.
        assert server.sent_bytes < 1.7 * len(saved)
    assert not list(cache.iterdir())


def test_beside_a_load_it_fetches_nothing_twice(saved: bytes, cache: Path) -> None:
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        server.pause_s = 0.01
        url = server.url("/model.pt")
        # With another mode, what one rank alone needs does not lie in the cache at all.
        job = threading.Thread(target=lambda: load(url, State(a_module(seed=1)), options={"mode": "node"}))
        job.start()
        in_the_middle(cache, len(saved) // 4)
        found = prefetch(url)
        assert found.taken_over
        assert found.bytes < 1 << 20
        job.join()
    assert not list(cache.iterdir())


def test_it_is_no_prey_of_other_loads(saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of their bounds, nor of the sweeping of memory; only of time."""
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(homes, "MEMORY_FOLDER", str(memory))
    monkeypatch.setattr(homes, "available_bytes", lambda: 1 << 40)
    monkeypatch.delenv("RANKLOAD_CACHE_DIR")
    monkeypatch.setenv("RANKLOAD_CACHE_HOME", "memory")
    other = Behaviour(saved)
    with bad_server({"/model.pt": Behaviour(saved), "/other.pt": other}) as server:
        found = prefetch(server.url("/model.pt"))
        assert found.folder is not None
        assert found.folder.startswith(str(memory))
        load(server.url("/other.pt"), State(a_module()), load_weights_only=True)
        assert len([one for one in Path(found.folder).iterdir() if one.is_dir()]) == 1
        monkeypatch.setattr(records, "AWAITED_IN_MEMORY_S", -1.0)
        load(server.url("/other.pt"), State(a_module()), load_weights_only=True)
        assert not Path(found.folder).exists()
        monkeypatch.undo()


def test_with_a_bound_it_stays_until_it_was_used(saved: bytes, cache: Path) -> None:
    options = {"cache_size": 1}
    with bad_server({"/model.pt": Behaviour(saved), "/other.pt": Behaviour(saved)}) as server:
        prefetch(server.url("/model.pt"), options=options)
        load(server.url("/other.pt"), State(a_module()), load_weights_only=True, options=options)
        module = a_module(seed=1)
        assert spent(server, lambda: load(server.url("/model.pt"), State(module), options=options)) < SPOKEN
        assert not list(cache.iterdir())


def test_what_has_no_version_is_not_kept(saved: bytes, cache: Path) -> None:
    with bad_server({"/model.pt": Behaviour(saved, etag=None)}) as server:
        found = prefetch(server.url("/model.pt"))
        assert found.not_kept == (server.url("/model.pt"),)
        assert found.bytes < 1 << 20
    assert not cache.exists() or not list(cache.iterdir())


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    files = served_folder(unpack_zero(1, tmp_path), "/zero")
    del files["/zero/step3/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"]
    with bad_server(files) as server:
        found = prefetch(server.url("/zero"))
        assert [Path(one).name for one in found.missing] == ["bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"]
        assert found.files == 4
        with pytest.raises(NotFoundError):
            prefetch(server.url("/nothing"))


def test_of_a_node_what_its_ranks_restore(tmp_path: Path, cache: Path) -> None:
    """Rank 1 of an engine's two has the second half of each parameter group."""
    url_of = unpack_zero(1, tmp_path)
    files = served_folder(url_of, "/zero")
    with bad_server(files) as server:
        of = {"target": "stage1", "world_size": 2, "n_nodes": 2}
        found = prefetch(server.url("/zero"), **of, node_rank=1)
        assert found.files == 4  # the model's, two of the optimizer's, and rank 0's, which tells the layout
        server.sent.clear()
        prefetch(server.url("/zero"), **of, node_rank=1)
        assert sum(server.sent.values()) < SPOKEN
        with pytest.raises(OptionError, match="node_rank=2"):
            prefetch(server.url("/zero"), **of, node_rank=2)


def test_of_a_local_path_there_is_nothing_to_fetch(cache: Path) -> None:
    found = prefetch(DATA / "dcp-fsdp2-w2/ckpt")
    assert (found.bytes, found.held_bytes, found.folder) == (0, 0, None)
    assert not cache.exists()


def test_it_imports_no_torch(saved: bytes) -> None:
    code = SLOWLY + "assert 'torch' not in sys.modules\n"
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        subprocess.run([sys.executable, "-c", code, server.url("/model.pt")], check=True, timeout=60)
