"""A load that fails says whether anything was changed, what, and on which ranks; the same on all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_server import Behaviour, Fault, bad_server
from deepspeed_ranks import ENVIRONMENT, needs_deepspeed
from places import SUPPORT
from processes import run_ranks
from wide_model import save_trained

WORKER = SUPPORT / "partial_worker.py"
LARGE = 150_000
"""Requests of more bytes are for tensors, unless they are for the beginning or the end of a file. All others come
before the restore, and are answered rightly."""
ENDS = 300_000
SOME = 100_000
GATE_S = 30.0

FaultOf = Callable[[int, int], Fault | None]


def run(function: str, tmp_path: Path, *args: object) -> list[Any]:
    environment = {**ENVIRONMENT, "RANKLOAD_CACHE_DIR": str(tmp_path / "cache")}
    finished = run_ranks(f"{WORKER}:{function}", 2, args=args, deadline_s=200, env=environment)
    assert [rank.returncode for rank in finished] == [0, 0], finished
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


def for_tensors(start: int, stop: int, size: int) -> bool:
    return stop - start > LARGE and start > ENDS and stop < size - ENDS


def in_the_body(name: str, size: int, fired: set[str]) -> FaultOf:
    """Of the requests for tensors, the first one is answered in part, and what follows fails for good."""
    kind = name.rpartition("-")[2]

    def fault_of(start: int, stop: int) -> Fault | None:
        if not for_tensors(start, stop, size):
            return None
        first = name not in fired
        fired.add(name)
        if kind == "stalled":
            return Fault(send_only=SOME, ending="stall")
        if first and kind != "changed":
            return Fault(send_only=SOME)
        return Fault(new_etag='"v2"') if kind == "changed" else Fault(status=404)

    return fault_of


def once_changed(gate: Path, size: int, fired: set[str], from_byte: int) -> FaultOf:
    """Requests for tensors from a byte on wait until some rank has changed something, and fail then."""

    def fault_of(start: int, stop: int) -> Fault | None:
        if not for_tensors(start, stop, size) or start < from_byte:
            return None
        until = time.monotonic() + GATE_S
        while not gate.exists() and time.monotonic() < until:
            time.sleep(0.01)
        fired.add(gate.name)
        return Fault(status=404)

    return fault_of


IN_THE_BODY = {"cut": "NotFoundError", "changed": "CorruptError", "stalled": "StalledError"}
Case = tuple[str, str, dict[str, Any], bool, bool]


def outcomes(
    tmp_path: Path,
    files: dict[str, dict[str, bytes]],
    kinds: list[str],
    late: Callable[[str, str], int | None],
) -> tuple[list[dict[str, Any]], set[str]]:
    """Loads of every kind of job by every mode, with a fault before the first change or after it, in one job of ranks.

    `files` are a kind's, by the path below its own; `late(kind, path)` is from which byte on a file fails once
    something was changed, None where it does not.
    """
    gates = tmp_path / "gates"
    gates.mkdir()
    served: dict[str, Behaviour] = {}
    cases: dict[str, Case] = {}
    fired: set[str] = set()
    for kind in kinds:
        for mode in ("node", "direct"):
            faults = [*IN_THE_BODY, "late"] if mode == "direct" or kind == "ddp" else ["cut", "late"]
            for fault in faults:
                name = f"{kind}-{mode}-{fault}"
                for path, body in files[kind].items():
                    fault_of: FaultOf | None = in_the_body(name, len(body), fired)
                    if fault == "late":
                        at = late(kind, path)
                        fault_of = None if at is None else once_changed(gates / name, len(body), fired, at)
                    served[f"/{name}/{path}"] = Behaviour(body, fault_of=fault_of)
                first = next(iter(files[kind])) if len(files[kind]) == 1 else "tag"
                weights_only = fault == "late" and not kind.startswith("zero")
                cases[name] = (
                    kind,
                    f"/{name}/{first}",
                    {"mode": mode, "stall_timeout_s": 2 if fault == "stalled" else 60},
                    weights_only,
                    fault != "late",
                )
    with bad_server(served) as server:
        listed = {name: (kind, server.url(path), *rest) for name, (kind, path, *rest) in cases.items()}
        (tmp_path / "cases.json").write_text(json.dumps(listed))
        seen = run("fail", tmp_path, tmp_path / "cases.json", gates)
    return seen, fired


def check(seen: list[dict[str, Any]], fired: set[str]) -> None:
    problems = []
    for name in seen[0]:
        told = [rank[name] for rank in seen]
        fault = name.rpartition("-")[2]
        alike = len({(one["error"], one["message"]) for one in told}) == 1
        if fault == "late":
            by_rank = told[0].get("by_rank", {})
            right = told[0]["error"] == "PartialRestoreError" and told[0]["cause"] == "NotFoundError"
            right = right and by_rank.keys() == {"0", "1"} and any(by_rank.values())
            # What was changed is listed, and what is listed was changed; on each rank its own.
            right = right and all(
                sorted(by_rank[str(rank)]) == one["changed"] for rank, one in enumerate(told)
            )
        else:
            right = told[0]["error"] == IN_THE_BODY[fault] and not any(one["changed"] for one in told)
        if not (alike and right and name in fired):
            problems.append(f"{name}: {told}")
    assert not problems, "\n".join(problems)


def test_modules_are_changed_on_all_ranks_or_the_error_says_where(tmp_path: Path) -> None:
    save_trained(tmp_path / "model.pt")
    body = (tmp_path / "model.pt").read_bytes()
    kinds = ["plain", "ddp", "fsdp2"]
    files = {kind: {"model.pt": body} for kind in kinds}
    # The second layer of two, of 4 MiB each.
    check(*outcomes(tmp_path, files, kinds, lambda kind, path: 5 << 20))


@needs_deepspeed
def test_engines_are_changed_on_all_ranks_or_the_error_says_where(tmp_path: Path) -> None:
    assert run("save_engines", tmp_path, tmp_path) == ["saved", "saved"]
    kinds = ["zero1", "zero3"]
    files = {
        kind: {
            str(path.relative_to(tmp_path / kind)): path.read_bytes()
            for path in sorted((tmp_path / kind).rglob("*"))
            if path.is_file()
        }
        for kind in kinds
    }
    # The partition of rank 1 alone.
    check(
        *outcomes(tmp_path, files, kinds, lambda kind, path: 0 if "rank_1_mp_rank_00_optim" in path else None)
    )
