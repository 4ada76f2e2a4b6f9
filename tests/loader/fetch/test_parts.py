"""Remote torch files come in parts: what a node's ranks need, once, checked, pinned, and not again after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, Fault, bad_server
from places import SUPPORT
from processes import run_ranks
from rankload.distributed.channel import Channel
from rankload.loader import (
    AccessError,
    CorruptError,
    PartialRestoreError,
    RankloadError,
    Receipt,
    State,
    load,
)
from rankload.loader.cache import homes as cache_homes
from safetensors_files import as_safetensors
from wide_model import MODEL_BYTES, a_module, load_local


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("verify", ["before", "during", "off"])
def test_weights_only_leave_the_optimizer_in_the_store(saved: bytes, tmp_path: Path, verify: str) -> None:
    module = a_module(seed=1)
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        result = load(
            server.url("/model.pt"), State(module), load_weights_only=True, options={"verify": verify}
        )
        sent = server.sent_bytes
    assert (
        all(torch.equal(a, b) for a, b in zip(module.parameters(), a_module().parameters(), strict=False))
        is False
    )
    trained = load_local(saved, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained, strict=True))
    assert MODEL_BYTES <= sent <= MODEL_BYTES + (1 << 20)
    assert abs(result.receipt.fetched_bytes - sent) <= 2 * 65536
    assert result.receipt.unverified == ((server.url("/model.pt"),) if verify == "off" else ())
    assert not list((tmp_path / "cache").glob("*"))


def test_a_local_file_is_whole_whatever_lies_beside_it(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "local.pt.landed").touch()
    assert load_local(saved, tmp_path)


def test_everything_with_what_nobody_claims(saved: bytes, tmp_path: Path) -> None:
    module = a_module(seed=1)
    optimizer = torch.optim.Adam(module.parameters())
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        result = load(server.url("/model.pt"), State(module, optimizer))
    assert torch.equal(result.extra["mine"], torch.arange(100_000))
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), load_local(saved, tmp_path), strict=True)
    )
    assert len(optimizer.state) == 3


def test_a_server_without_ranges_is_streamed_once(saved: bytes, tmp_path: Path) -> None:
    module = a_module(seed=1)
    with bad_server({"/model.pt": Behaviour(saved, has_ranges=False)}) as server:
        load(server.url("/model.pt"), State(module), load_weights_only=True)
        assert len(saved) <= server.sent_bytes < 1.5 * len(saved)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), load_local(saved, tmp_path), strict=True)
    )


def test_damage_on_the_way_and_a_changed_object(saved: bytes) -> None:
    wrong = bytearray(saved)
    wrong[len(saved) // 4] ^= 1
    with bad_server({"/wrong.pt": Behaviour(bytes(wrong))}) as server:
        with pytest.raises(CorruptError, match="CRC-32"):
            load(
                server.url("/wrong.pt"),
                State(a_module()),
                load_weights_only=True,
                options={"verify": "before"},
            )
        with pytest.raises(PartialRestoreError, match="CRC-32"):
            load(server.url("/wrong.pt"), State(a_module()), load_weights_only=True)
    ok = Fault()
    faults = [ok, ok, Fault(new_etag='"v2"')]
    with (
        bad_server({"/model.pt": Behaviour(saved, faults=faults)}) as server,
        pytest.raises((CorruptError, PartialRestoreError), match=r"changed|version"),
    ):
        load(server.url("/model.pt"), State(a_module()))


# --- what stays, and where it goes -----------------------------------------------------------------------------------


def weights(url: str, **options: object) -> Receipt:
    module = a_module(seed=1)
    return load(url, State(module), load_weights_only=True, options=options).receipt


def test_what_stays_in_the_cache_is_not_fetched_again(saved: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    behaviour = Behaviour(saved)
    with bad_server({"/model.pt": behaviour}) as server:
        url = server.url("/model.pt")
        first = weights(url, cache_size="1GB")
        assert first.fetched_bytes >= MODEL_BYTES
        before = server.sent_bytes
        again = weights(url, cache_size="1GB")
        assert (again.fetched_bytes, again.cache_dir) == (0, str(folder))
        assert server.sent_bytes - before < 64
        assert "nothing fetched" in again.lines()[1]
        # The rest comes once it is asked for, and it alone.
        module = a_module(seed=1)
        load(url, State(module, torch.optim.Adam(module.parameters())), options={"cache_size": "1GB"})
        assert (
            len(saved) - MODEL_BYTES - (2 << 20)
            < server.sent_bytes - before
            < len(saved) - MODEL_BYTES + (1 << 20)
        )
        before = server.sent_bytes
        behaviour.etag = '"v2"'
        assert weights(url, cache_size="1GB").fetched_bytes >= MODEL_BYTES
        assert len(list(folder.glob("model.pt-*"))) == 2
        weights(url, cache_size=1)
    assert not list(folder.glob("model.pt-*"))


def test_too_little_room_is_told_before_anything_is_changed(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_homes, "free_bytes_of", lambda folder: MODEL_BYTES // 2)
    module = a_module(seed=1)
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        with pytest.raises(
            AccessError, match=r"node 0 .* is to fetch 8,.* bytes into .*cache, where 4,194,304 are"
        ):
            load(server.url("/model.pt"), State(module), load_weights_only=True, options={"mode": "node"})
        assert server.sent_bytes < 2 << 20
        assert all(map(torch.equal, module.parameters(), a_module(1).parameters()))
        # What goes straight into the tensors needs no room.
        load(server.url("/model.pt"), State(module), load_weights_only=True)
    assert all(map(torch.equal, module.parameters(), load_local(saved, tmp_path)))


def test_what_fits_is_fetched_into_memory_and_given_back(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKLOAD_CACHE_DIR")
    monkeypatch.setattr(cache_homes, "MEMORY_FOLDER", str(tmp_path))
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        assert weights(server.url("/model.pt"), cache_home="auto").cache_dir == str(
            tmp_path / f"rankload-{os.getuid()}"
        )
    assert os.listdir(tmp_path) == []


def test_the_whole_jobs_bytes_are_known_before_parts_move(
    saved: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, float]] = []
    progress = Channel.progress

    def listen(self: Channel, **counters: float) -> None:
        told.append(counters)
        progress(self, **counters)

    monkeypatch.setattr(Channel, "progress", listen)
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        weights(server.url("/model.pt"))
    done, plans, totals = 0.0, [], []
    for counters in told:
        if "bytes_planned" in counters:
            plans.append((done, counters["bytes_planned"]))
        done = counters.get("bytes_done", done)
        totals.append(counters.get("bytes_total", 0))
    # Index and early parts first, then one plan, which what came exceeds by the gaps that were read along.
    assert plans[-1][0] < 2 << 20
    assert MODEL_BYTES <= plans[-1][1] <= done < plans[-1][1] + (64 << 10)
    counted = [total for total in totals if total]
    assert counted == sorted(counted)


# --- in real jobs ----------------------------------------------------------------------------------------------------


def restore(url: str, kind: str) -> None:
    """One rank of two: a plain module, or a sharded one; tells whether it is right, and what was fetched.

    ``apart``: nodes that are to hand on what they fetched, and that no address leads to.
    """
    import torch.distributed as dist
    from rankload.distributed import range_server

    dist.init_process_group("gloo")
    if kind == "apart":
        os.environ["RANKLOAD_MODE"] = "job"
        range_server.network_identity = lambda: os.environ["RANK"]
        range_server.own_addresses = lambda interface: ("192.0.2.1",)
        range_server.CONNECT_S = 1.0
    module = a_module(seed=1)
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(module)
    receipt = load(url, State(module), load_weights_only=True).receipt
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in module.parameters()]
    told = {
        "sums": [float(tensor.detach().double().sum()) for tensor in whole],
        "fetched": receipt.fetched_bytes,
    }
    print(json.dumps(told), flush=True)
    # Ranks end together, and with nothing left that holds on to the group: gloo's threads may crash otherwise.
    dist.barrier()


@pytest.mark.parametrize(
    ("kind", "nodes", "times"), [("plain", (2,), 1.0), ("sharded", (1, 1), 1.0), ("apart", (1, 1), 2.0)]
)
def test_bytes_leave_the_server_once_per_node(
    saved: bytes, tmp_path: Path, kind: str, nodes: tuple[int, ...], times: float
) -> None:
    """On one node both ranks' bytes come once; on two, sharded, each node gets its own half.

    Nodes that cannot reach each other get all from the store, and say what to do.
    """
    with bad_server({"/model.pt": Behaviour(saved)}) as server:
        finished = run_ranks(
            f"{__file__}:restore", 2, args=(server.url("/model.pt"), kind), deadline_s=120, nodes=nodes,
            env=lambda rank: {"PYTHONPATH": str(SUPPORT), "RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank}")},
        )  # fmt: skip
        sent = server.sent_bytes
    assert [rank.returncode for rank in finished] == [0, 0], finished
    told = [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]
    wanted = [float(tensor.detach().double().sum()) for tensor in load_local(saved, tmp_path)]
    assert [one["sums"] for one in told] == [wanted, wanted]
    assert sent <= times * MODEL_BYTES + len(nodes) * (1 << 20), (sent, told)
    assert any("RANKLOAD_INTERFACE" in rank.stderr for rank in finished) == (kind == "apart"), finished
    assert abs(told[0]["fetched"] - sent) <= len(nodes) * 2 * 65536


def fail(url: str, victim: str) -> None:
    """One rank of two: tells how a load that cannot end did end, how soon, and what threads it left."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if victim == os.environ["RANK"]:
        threading.Timer(3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    begin = time.monotonic()
    try:
        load(url, State(a_module(seed=1)), load_weights_only=True, options={"stall_timeout_s": 6})
        told: dict[str, object] = {}
    except RankloadError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    left = [one.name for one in threading.enumerate() if one.name.startswith("rankload")]
    print(json.dumps({**told, "seconds": time.monotonic() - begin, "left": left}), flush=True)
    os._exit(0)


@pytest.mark.parametrize(
    ("fault", "victim", "kind", "cause"),
    [
        (Fault(send_only=1 << 20, ending="stall"), "", "StalledError", "nothing has arrived for"),
        (Fault(status=404), "", "NotFoundError", "not there"),
        (Fault(send_only=1 << 20, ending="stall"), "0", "PeerError", "was killed|ended"),
    ],
)
def test_what_keeps_bytes_from_coming_ends_the_load_everywhere(
    saved: bytes, tmp_path: Path, fault: Fault, victim: str, kind: str, cause: str
) -> None:
    """Both ranks read while the first one fetches: a server that falls silent or loses the file, a rank that dies."""
    # The index comes; then all answers go wrong.
    behaviour = Behaviour(saved, fault_of=lambda start, stop: fault if stop - start > 1 << 20 else None)
    with bad_server({"/model.pt": behaviour}) as server:
        finished = run_ranks(
            f"{__file__}:fail", 2, args=(server.url("/model.pt"), victim), deadline_s=90,
            env={"PYTHONPATH": str(SUPPORT), "RANKLOAD_CACHE_DIR": str(tmp_path / "cache")},
        )  # fmt: skip
    assert [rank.returncode for rank in finished] == [-signal.SIGKILL if victim == "0" else 0, 0], finished
    told = [json.loads(rank.stdout.splitlines()[-1]) for rank in finished if rank.returncode == 0]
    for one in told:
        # Nothing was changed: a load of so few bytes has all of them before.
        assert one["error"] == kind, told
        assert re.search(cause, one["message"]), told
        assert one["seconds"] < 30, told
        assert one["left"] == [], told


@pytest.mark.parametrize("home", ["given", "memory"])
def test_a_killed_load_goes_on_where_it_was(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from rankload.loader.cache import homes; "
        f"homes.MEMORY_FOLDER = {str(tmp_path)!r}; import wide_model; wide_model.alone(sys.argv[1])"
    )
    # What goes straight into a rank's tensors is fetched again.
    monkeypatch.setenv("RANKLOAD_MODE", "node")
    if home == "memory":
        monkeypatch.delenv("RANKLOAD_CACHE_DIR")
        monkeypatch.setenv("RANKLOAD_CACHE_HOME", "auto")
    # The first bytes come; the answers for later ones stall, and the process is killed then.
    stalls = Fault(send_only=1 << 20, ending="stall")
    behaviour = Behaviour(
        saved, fault_of=lambda start, stop: stalls if start >= 8 << 20 and stop - start > 1 << 20 else None
    )
    with bad_server({"/model.pt": behaviour}) as server:
        command = [sys.executable, "-c", code, server.url("/model.pt")]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        seen, since = 0, time.monotonic()
        while time.monotonic() < deadline and (seen < 3 << 20 or time.monotonic() - since < 1.5):
            if first.poll() is not None:
                raise AssertionError(first.communicate())
            if server.sent_bytes != seen:
                seen, since = server.sent_bytes, time.monotonic()
            time.sleep(0.05)
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
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("rankload-")] == []


# --- safetensors files, whose index is at their beginning ------------------------------------------------------------


@pytest.mark.parametrize("long", [0, 700_000])
def test_a_safetensors_file_takes_one_request_more_where_its_header_is_long(long: int) -> None:
    weights = a_module(seed=7).state_dict()
    wanted = sum(tensor.nbytes for tensor in weights.values())
    unwanted = {"other": torch.ones(2, 1024, 1024)}
    data = as_safetensors({**unwanted, **weights}, {"a": "x" * long})
    header = 8 + int.from_bytes(data[:8], "little")
    module = a_module(seed=1)
    with bad_server({"/model.safetensors": Behaviour(data)}) as server:
        receipt = load(
            server.url("/model.safetensors"),
            State(module),
            load_weights_only=True,
            ignore_keys=["state/model/other"],
        ).receipt
        sent = server.sent_bytes
        first_bytes = [
            int(one.range.removeprefix("bytes=").split("-")[0]) for one in server.asked if one.range
        ]
    assert all(torch.equal(one, weights[name]) for name, one in module.state_dict().items())
    # The first 256 KiB, which tell the object's version too, and then what is left of the header.
    assert [start for start in first_bytes if start < header] == [0, *([256 << 10] * bool(long))]
    assert wanted + long <= sent <= wanted + long + (384 << 10)
    assert abs(receipt.fetched_bytes - sent) <= 2 * 65536
    assert receipt.unverified == (server.url("/model.safetensors"),)


def test_a_safetensors_file_whose_header_is_too_long_is_not_fetched() -> None:
    data = (99_000_000).to_bytes(8, "little") + b"{" + b" " * (2 << 20)
    with bad_server({"/model.safetensors": Behaviour(data)}) as server:
        with pytest.raises(CorruptError, match="truncated: its header ends at byte 99,000,008"):
            weights(server.url("/model.safetensors"))
        assert server.sent_bytes <= 512 << 10
