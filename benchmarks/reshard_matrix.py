"""Restores ZeRO checkpoints of every setting into engines of every setting, and prints the table.

    python -m benchmarks.reshard_matrix [--quick] [--work FOLDER] [--write docs/reshard.md]

Every pair of settings is tried once, at world sizes chosen so that each setting meets each size on both sides, and
each size each other. What a restore is held to is in tests/reshard_worker.py: every tensor bit for bit against what
DeepSpeed reported when it saved, the numbers, the random states, and the losses of two further steps. Results are
kept in the work folder, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from processes import run_ranks  # noqa: E402
from reshard_worker import SETTINGS, kind_of  # noqa: E402

WORKER = TESTS / "reshard_worker.py"
SIZES = (1, 2, 3, 4, 8)
QUICK_SIZES = (1, 2, 4)
QUICK_SETTINGS = ("0 fp32", "1 bf16 round-robin", "2 fp32 round-robin", "2 bf16 elastic", "3 bf16 subgroups")
JOB_CASES = 40
"""Restores in one job: starting the ranks costs most, and a failure costs the rest of the job."""
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

Case = tuple[str, int, str, int]
"""Setting that saved, its ranks, setting that restores, its ranks."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reshard_matrix", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few settings, up to 4 ranks")
    parser.add_argument("--work", default=os.path.join(tempfile.gettempdir(), "rankload-reshard-matrix"))
    parser.add_argument("--write", help="a Markdown file whose table is replaced")
    arguments = parser.parse_args()
    settings = QUICK_SETTINGS if arguments.quick else tuple(SETTINGS)
    cases = covering(settings, QUICK_SIZES if arguments.quick else SIZES)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    results = run(cases, work)
    text = table(settings, cases, results)
    print(text)
    if arguments.write:
        write(text, Path(arguments.write), BEGIN, END)
    if any(results[case]["problems"] for case in cases):
        sys.exit(1)


def write(text: str, path: Path, begin: str, end: str) -> None:
    """Puts `text` in place of what is between the marks `begin` and `end`."""
    before, _, rest = path.read_text().partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def covering(
    settings: Sequence[str], sizes: Sequence[int], kind_of: Callable[[str], str] = kind_of
) -> list[Case]:
    """Every pair of settings that can follow each other, each at the sizes that cover most of what is left.

    Those of one kind can.

    Besides the pairs of settings, every (setting, size) on both sides of both, and every (size, size) is met.
    """
    left = {
        (side, setting, end, size)
        for side in ("source", "target")
        for setting in settings
        for end in ("n", "m")
        for size in sizes
    }
    left |= {("sizes", n, "", m) for n in sizes for m in sizes}  # type: ignore[arg-type,misc]

    def met(source: str, n: int, target: str, m: int) -> set[Any]:
        return {
            ("source", source, "n", n),
            ("source", source, "m", m),
            ("target", target, "n", n),
            ("target", target, "m", m),
            ("sizes", n, "", m),
        }

    cases: list[Case] = []
    turn = itertools.cycle(itertools.product(sizes, sizes))
    for source, target in itertools.product(settings, settings):
        if kind_of(source) != kind_of(target):
            continue
        start = next(turn)
        options = [start, *itertools.product(sizes, sizes)]
        n, m = max(options, key=lambda one: len(met(source, one[0], target, one[1]) & left))
        left -= met(source, n, target, m)
        cases.append((source, n, target, m))
    return cases


def run(cases: Iterable[Case], work: Path, worker: Path = WORKER) -> dict[Case, dict[str, Any]]:
    """Results by case; those in the work folder are not run again."""
    log = work / "results.jsonl"
    results: dict[Case, dict[str, Any]] = {}
    if log.exists():
        for line in log.read_text().splitlines():
            found = json.loads(line)
            results[found["source"], found["n"], found["target"], found["m"]] = found
    todo = [case for case in cases if case not in results]
    for size in sorted({n for _, n, _, _ in todo}):
        wanted = list(dict.fromkeys(source for source, n, _, _ in todo if n == size))
        job(size, "save", {"root": str(work), "settings": wanted}, worker)
    with log.open("a") as out:
        for size in sorted({m for *_, m in todo}):
            waiting = [case for case in todo if case[3] == size]
            while waiting:
                batch = waiting[:JOB_CASES]
                request = {"root": str(work), "oracles": str(work), "cases": [case[:3] for case in batch]}
                lines, error = job(size, "restore", request, worker, may_fail=True)
                if error:
                    source, n, target, m = batch[len(lines)]
                    lines.append({"source": source, "n": n, "target": target, "m": m, "problems": [error]})
                for found in lines:
                    results[found["source"], found["n"], found["target"], found["m"]] = found
                    print(json.dumps(found), file=out, flush=True)
                    if found["problems"]:
                        print(found, file=sys.stderr)
                waiting = waiting[len(lines) :]
                print(f"{size} ranks: {len(waiting)} to go", file=sys.stderr)
    return results


def job(
    world_size: int, function: str, request: dict[str, Any], worker: Path, *, may_fail: bool = False
) -> tuple[list[dict[str, Any]], str]:
    finished = run_ranks(
        worker,
        world_size,
        args=(function, json.dumps(request)),
        deadline_s=1500,
        # DeepSpeed puts groups of experts in the order of a set of names.
        env={"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": "0"},
    )
    failed = [rank for rank in finished if rank.returncode != 0]
    if failed and not may_fail:
        raise SystemExit(repr(failed))
    lines = [json.loads(line) for line in finished[0].stdout.splitlines() if line.startswith("{")]
    return lines, failed[0].stderr.strip().splitlines()[-1] if failed else ""


def table(settings: Sequence[str], cases: Sequence[Case], results: dict[Case, dict[str, Any]]) -> str:
    """Markdown: a row for each setting that saved, a column for each that restored."""
    letters = {setting: chr(ord("A") + index) for index, setting in enumerate(settings)}
    by_pair: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        by_pair.setdefault((case[0], case[2]), []).append(case)
    lines = [
        "| saved by | " + " | ".join(letters[target] for target in settings) + " |",
        "|---|" + "---|" * len(settings),
    ]
    for source in settings:
        cells = [
            ", ".join(
                f"{case[1]}→{case[3]}" + (" **✗**" if results[case]["problems"] else "")
                for case in by_pair.get((source, target), ())
            )
            for target in settings
        ]
        lines.append(f"| {letters[source]}: stage {source} | " + " | ".join(cells) + " |")
    found = [results[case] for case in cases]
    good = [one for one in found if not one["problems"]]
    exact = [one for one in good if one["apart"] == 0]
    lines += [
        "",
        f"{len(good)} of {len(found)} restored with every tensor equal, bit for bit "
        f"({sum(one['tensors'] for one in good):,} tensors compared). The losses of two further steps were equal in "
        f"{len(exact)} of them, and at most {max((one['apart'] for one in good), default=0):.1e} apart, relative, in "
        f"the others. torch {torch.__version__}, DeepSpeed {_deepspeed()}, Python {platform.python_version()}, gloo.",
    ]
    for one in found:
        if one["problems"]:
            lines.append(
                f"- ✗ {one['source']} of {one['n']} → {one['target']} of {one['m']}: {one['problems'][0]}"
            )
    return "\n".join(lines)


def _deepspeed() -> str:
    from importlib.metadata import version

    return version("deepspeed")


if __name__ == "__main__":
    main()
