"""Remote tars come in parts: members as tarfile tells them, the same refusals as on the disk, and only what is read."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from bad_server import BadServer, Behaviour, Fault, bad_server
from file_source import FileSource
from hostile_tars import HOSTILE, PLAIN, SIZE, TYPE, entry, patched_header, tar_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import SUPPORT
from processes import run_ranks
from rankload.loader import CorruptError, State, load
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.errors import RankloadError
from rankload.loader.fetch.archive import unpack
from rankload.loader.fetch.remote_file import RemoteFile
from rankload.loader.fetch.tars import SMALL_MEMBER_BYTES, open_archive, read_members
from rankload.loader.http.answers import Arrived
from rankload.loader.ranges.destinations import MemoryDestination
from rankload.loader.ranges.engine import ObjectRead, read_ranges
from rankload.loader.ranges.open import RangeServers, open_range_source
from rankload.loader.ranges.window import WindowSource
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.http import HttpStore
from wide_model import MODEL_BYTES, a_module, load_local

LARGE = SMALL_MEMBER_BYTES + 1000


class Counting(FileSource):
    """A file as if it were far away."""

    requests = 0

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        self.requests += 1
        super().read_into(start, stop, views, arrived)


def remote(folder: Path, data: bytes) -> RemoteFile:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a.tar"
    path.write_bytes(data)
    source = Counting(str(path), ObjectInfo(str(path), None))
    for name in ("far", "far.landed"):
        (folder / name).unlink(missing_ok=True)
    return RemoteFile(source, str(folder / "far"))


def quiet(n_bytes: int) -> None:
    pass


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


# --- headers ---------------------------------------------------------------------------------------------------------

NAMES = st.lists(
    st.text(alphabet="abé", min_size=1, max_size=60), min_size=1, max_size=5
).map("/".join)  # fmt: skip
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1024, 70_000, SMALL_MEMBER_BYTES, LARGE])
FORMS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, SIZES, st.booleans()), max_size=8, unique_by=lambda one: one[0]), FORMS)
def test_members_are_those_that_tarfile_tells(
    tmp_path: Path, wanted: list[tuple[str, int, bool]], form: int
) -> None:
    entries = [
        entry(name, type=tarfile.DIRTYPE)
        if is_folder
        else entry(name, b"x" * size, pax_headers={"comment": "y" * (size % 900)})
        for name, size, is_folder in wanted
    ]
    try:
        data = tar_bytes(*entries, form=form)
    except ValueError:
        return  # a name that is too long for this form
    file = remote(tmp_path, data)
    try:
        got = [
            (one.name, one.offset, one.size_bytes, one.is_folder) for one in read_members(file, "a", quiet)
        ]
    except RankloadError as error:
        with pytest.raises(type(error)):
            unpack_local(tmp_path, data)
        return
    finally:
        file.close()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert got == [(one.name, one.offset_data, one.size, one.isdir()) for one in archive]


def unpack_local(folder: Path, data: bytes) -> None:
    import shutil

    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    (folder / "a.tar").write_bytes(data)
    unpack(str(folder / "a.tar"), str(folder / "out"), described="a", limit=len(data))


LIES = {
    "size": patched_header(PLAIN, 0, SIZE, b"00007777777\0"),
    "no number": patched_header(PLAIN, 0, SIZE, b"\xff" * 12),
    "huge pax": patched_header(patched_header(PLAIN, 0, SIZE, b"00077777777\0"), 0, TYPE, b"x"),
    "huge name": patched_header(patched_header(PLAIN, 0, SIZE, b"00077777777\0"), 0, TYPE, b"L"),
    "cut in a member": PLAIN[:1200],
    "cut before a header": PLAIN[:1536],
    "garbage": PLAIN[:1536] + b"garbage!" * 64 + PLAIN[2048:],
}
ATTACKS = {**{name: tar_bytes(*entries) for name, entries in HOSTILE.items()}, **LIES}
ATTACKS["late"] = tar_bytes(entry("a", b"x" * LARGE), entry("../x", b"x"))
ATTACKS["folder, later cut"] = tar_bytes(entry("a", b"1"), entry("a/b", b"2" * 9000))[:4096]


@pytest.mark.parametrize("what", ATTACKS)
def test_what_is_refused_here_is_refused_there(tmp_path: Path, what: str) -> None:
    with pytest.raises(RankloadError) as here:
        unpack_local(tmp_path, ATTACKS[what])
    file = remote(tmp_path / "remote", ATTACKS[what])
    with pytest.raises(RankloadError) as there:
        open_archive(file, "a", "a", 1000, quiet)
    file.close()
    assert type(there.value) is type(here.value)
    assert str(there.value) == str(here.value)
    assert sorted(os.listdir(tmp_path / "remote")) == ["a.tar", "far", "far.landed"]


@pytest.mark.parametrize(("size", "most"), [(1000, 12), (20_000, 34)])
def test_ten_thousand_members_take_a_few_requests(tmp_path: Path, size: int, most: int) -> None:
    data = tar_bytes(*(entry(f"m{index}", b"x" * size) for index in range(10_000)), form=tarfile.USTAR_FORMAT)
    file = remote(tmp_path, data)
    assert len(read_members(file, "a", quiet)) == 10_000
    assert file.source.requests <= most  # type: ignore[attr-defined]
    file.close()


def test_large_members_are_hopped_over_and_the_rest_comes_whole(tmp_path: Path) -> None:
    """Of what is no torch file everything comes, of what only begins like a zip too; none of it twice."""
    contents = {
        "a/big": os.urandom(3 << 20),
        "a/zip": b"PK\3\4" + os.urandom(2 << 20),
        "b": b"small",
        "empty": b"",
    }
    data = tar_bytes(*(entry(name, body) for name, body in contents.items()))
    file = remote(tmp_path, data)
    members = read_members(file, "a", quiet)
    assert [one.name for one in members] == list(contents)
    assert file.fetched_bytes <= 4 * 65536 + 1024
    archive = open_archive(file, "a", "a", 256 << 10, quiet)
    assert archive is not None
    assert archive.parts == ()
    assert {name: Path(archive.path, name).read_bytes() for name in archive.members} == contents
    assert archive.fetched_bytes <= len(data)
    for one in [file, *archive.files.values()]:
        one.close()


def test_names_that_records_need_make_an_archive_come_whole(tmp_path: Path) -> None:
    data = tar_bytes(entry("x.pt", b"PK\3\4" + bytes(LARGE)), entry("x.pt.landed", b"lies"))
    file = remote(tmp_path, data)
    assert open_archive(file, "a", "a", 1000, quiet) is None
    file.close()


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(saved: bytes) -> bytes:
    """As Composer writes them: the root, the states, and something small behind them."""
    return tar_bytes(
        entry("/", type=tarfile.DIRTYPE), entry("composer_states.pt", saved), entry("latest", b"x")
    )


@pytest.mark.parametrize("verify", ["before", "during"])
def test_weights_only_leave_the_optimizer_in_the_archive(
    saved: bytes,
    archive: bytes,
    tmp_path: Path,
    verify: str,
) -> None:
    module = a_module(seed=1)
    with bad_server({"/model.tar": Behaviour(archive)}) as server:
        options = {"verify": verify}
        result = load(server.url("/model.tar"), State(module), load_weights_only=True, options=options)
        sent = server.sent_bytes
    assert same(module, load_local(saved, tmp_path))
    assert MODEL_BYTES <= sent <= MODEL_BYTES + (1 << 20) < len(archive) // 2
    assert abs(result.receipt.fetched_bytes - sent) <= 4 * 65536
    assert result.receipt.unverified == ()
    assert [file.size_bytes for file in result.receipt.files] == [len(archive)]
    assert not list((tmp_path / "cache").glob("*"))


def same(module: torch.nn.Module, wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), wanted, strict=True))


def test_damage_and_ends_in_the_middle(saved: bytes, archive: bytes) -> None:
    wrong = bytearray(archive)
    wrong[len(archive) // 6] ^= 1
    objects = {"/wrong.tar": Behaviour(bytes(wrong)), "/cut.tar": Behaviour(archive[: len(archive) // 2])}
    with bad_server(objects) as server:
        with pytest.raises(CorruptError, match="CRC-32"):
            load(
                server.url("/wrong.tar"),
                State(a_module()),
                load_weights_only=True,
                options={"verify": "before"},
            )
        with pytest.raises(CorruptError, match=r"cut\.tar: the archive ends early"):
            load(server.url("/cut.tar"), State(a_module()), load_weights_only=True)
        assert server.sent_bytes < len(archive)


def test_a_killed_load_of_an_archive_goes_on_where_it_was(
    archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What goes straight into a rank's tensors is fetched again.
    monkeypatch.setenv("RANKLOAD_MODE", "node")
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import wide_model; wide_model.alone(sys.argv[1])"
    )
    silent = Fault(send_only=1 << 20, ending="stall")
    # The ends of what is packed are short, and come whole.
    behaviour = Behaviour(
        archive, fault_of=lambda start, stop: silent if start >= 8 << 20 and stop - start > 1 << 20 else None
    )
    with bad_server({"/model.tar": behaviour}) as server:
        command = [sys.executable, "-c", code, server.url("/model.tar")]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and server.sent_bytes < 4 << 20:
            if first.poll() is not None:
                raise AssertionError(first.communicate())
            time.sleep(0.05)
        time.sleep(1)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        before = server.sent_bytes
        behaviour.fault_of = None
        second = subprocess.run(command, capture_output=True, timeout=120, check=False, text=True)
        assert second.returncode == 0, second.stderr
        again = server.sent_bytes - before
    landed = 3 * MODEL_BYTES + 800_000 - json.loads(second.stdout)["fetched"]
    assert landed > 1 << 20, "nothing of the first load was used"
    assert again <= 3 * MODEL_BYTES + 800_000 - landed + (1 << 20)


# --- Composer's archives of a ZeRO job, with real DeepSpeed ----------------------------------------------------------

WIDE = 512
HIDDEN_BYTES = (2 * WIDE * WIDE + 2 * WIDE) * 4


def zero_archives(folder: str, url: str) -> None:
    """Two ranks save a ZeRO-1 engine as DeepSpeed does, wait for the archives, and restore them into another."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch.distributed as dist
    from journey_worker import start_deepspeed

    deepspeed = start_deepspeed()
    rank = dist.get_rank()

    def engine(seed: int) -> object:
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, WIDE))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        }
        return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]

    trained = engine(1)
    trained.backward(trained(torch.ones(1, WIDE)).sum())  # type: ignore[operator,attr-defined]
    trained.step()  # type: ignore[attr-defined]
    trained.save_checkpoint(folder, tag="deepspeed")  # type: ignore[attr-defined]
    dist.barrier()
    pack(Path(folder), rank)
    dist.barrier()
    told = []
    for weights_only in (True, False):
        other = engine(2)
        result = load(f"{url}/ep0-ba4-rank{{rank}}.tar", State(other), load_weights_only=weights_only)
        pairs = zip(other.module.parameters(), trained.module.parameters(), strict=True)  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in pairs)
        told.append(result.receipt.fetched_bytes)
        dist.barrier()
    print(json.dumps(told), flush=True)
    dist.barrier()


def pack(folder: Path, rank: int) -> None:
    """This rank's archive, with what Composer puts into it."""
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]
    names += ["mp_rank_00_model_states.pt"] * (rank == 0)
    found = [
        one for one in sorted((folder / "deepspeed").iterdir()) if one.name.removeprefix("bf16_") in names
    ]
    assert len(found) == len(names), sorted(os.listdir(folder / "deepspeed"))
    with tarfile.open(folder / f"ep0-ba4-rank{rank}.tar", "w") as archive:
        if rank == 0:
            torch.save(
                {"state": {"run_name": "x", "timestamp": {}, "rank_zero_seed": 7}, "rng": None},
                folder / "composer_states.pt",
            )
            archive.add(folder / "composer_states.pt", "composer_states.pt")
        for one in found:
            archive.add(one, f"deepspeed/{one.name}")


class Folder(dict[str, Behaviour]):
    """A folder's files as a server's objects, as soon as they are there."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def get(self, path: str, default: Behaviour | None = None) -> Behaviour | None:  # type: ignore[override]
        file = self._folder / path.lstrip("/")
        if path not in self and file.is_file():
            self[path] = Behaviour(file.read_bytes())
        return super().get(path, default)


def test_two_ranks_fetch_zero_archives_in_parts_once(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    with bad_server(Folder(tmp_path)) as server:
        finished = run_ranks(
            f"{__file__}:zero_archives", 2, args=(tmp_path, server.url("")), deadline_s=200,
            env={"PYTHONPATH": str(SUPPORT), "RANKLOAD_CACHE_DIR": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu",
                 "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        sent = server.sent_bytes
    assert [rank.returncode for rank in finished] == [0, 0], finished
    told = [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]
    assert told[0] == told[1]
    weights, everything = told[0]
    sizes = [(tmp_path / f"ep0-ba4-rank{rank}.tar").stat().st_size for rank in (0, 1)]
    assert HIDDEN_BYTES <= weights <= HIDDEN_BYTES + (1 << 20) < sum(sizes) / 2
    assert weights + everything <= sent <= weights + everything + 4 * 65536
    assert everything <= sum(sizes)


def asked(server: BadServer, path: str) -> int:
    return sum(one.path == path for one in server.asked)


@pytest.mark.parametrize("name", ["model.tar", "model.pt"])
def test_a_server_without_ranges_is_asked_once(
    saved: bytes,
    archive: bytes,
    tmp_path: Path,
    name: str,
) -> None:
    body = archive if name.endswith(".tar") else saved
    with bad_server({f"/{name}": Behaviour(body, has_ranges=False)}) as server:
        module = a_module(seed=1)
        result = load(f"{server.url('/' + name)}?key=secret", State(module), load_weights_only=True)
        # An archive is asked for its first byte before it is streamed.
        assert asked(server, f"/{name}") == (2 if name.endswith(".tar") else 1)
    assert same(module, load_local(saved, tmp_path))
    assert result.receipt.notes == (
        f"server without ranges: {server.url('/' + name)} was read as one stream",
    )


def test_only_the_first_object_of_a_server_is_asked_for_ranges() -> None:
    bodies = {f"/{name}": Behaviour(bytes(1000), has_ranges=False) for name in "abc"}
    with bad_server(bodies) as server:
        servers, store = RangeServers(), HttpStore()
        for path in bodies:
            info = ObjectInfo(f"{server.url(path)}?key=secret", 1000)
            assert servers.open(store, info, lambda info=info: open_range_source(store, info)) is None  # type: ignore[misc]
        assert [asked(server, path) for path in bodies] == [1, 0, 0]
        assert servers.streamed == [server.url(path) for path in bodies]


class Alone(Counting):
    """Safe for one read at a time."""

    max_connections = 1
    at_once = most_at_once = 0

    def read_into(
        self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived = lambda n_bytes: None
    ) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.01)
        super().read_into(start, stop, views, arrived)
        self.at_once -= 1


def test_windows_share_the_connections_of_the_whole(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    source = Alone(str(tmp_path / "a"), ObjectInfo("a", None))
    readings, got = [], []
    for base in (0, 100_000, 200_000):
        window = WindowSource(source, base, 100_000, object_name="a", described=f"a:{base}")
        got.append(bytearray(100_000))
        target = MemoryDestination([(0, memoryview(got[-1]))])
        readings.append(ObjectRead(window, [ByteRange(0, 100_000)], target))
    read_ranges(readings, quiet, chunk_bytes=10_000)
    assert b"".join(got) == data
    assert source.most_at_once == 1
    source.close()
