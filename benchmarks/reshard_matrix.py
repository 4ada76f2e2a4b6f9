"""Restores ZeRO checkpoints of every setting into engines and modules of every kind, and prints the tables.

    python -m benchmarks.reshard_matrix [--quick] [--only engines|modules] [--work FOLDER] [--write docs/benchmarks.md]

Every pair of a setting and a target is tried once, at world sizes chosen so that each setting meets each size on both
sides, and each size each other. What a restore is held to is in tests/support/reshard_worker.py and
tests/support/reshard_modules_worker.py: every tensor bit for bit against what DeepSpeed reported when it saved, the
numbers, the random states, and the losses of two further steps. With ``--work`` results are kept in that folder, and a
run that was interrupted goes on where it was, as if the code had not changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .tables import publish

SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from processes import run_ranks  # noqa: E402
from reshard_modules_worker import TARGETS  # noqa: E402
from reshard_worker import SETTINGS, kind_of  # noqa: E402

SIZES = (1, 2, 3, 4, 8)
QUICK_SIZES = (1, 2, 4)
QUICK_SETTINGS = ("0 fp32", "1 bf16 round-robin", "2 fp32 round-robin", "2 bf16 elastic", "3 bf16 subgroups")
JOB_CASES = 40
"""Restores in one job: starting the ranks costs most, and a failure costs the rest of the job."""

Case = tuple[str, int, str, int]
"""Setting that saved, its ranks, setting or kind that restores, its ranks."""


@dataclass(frozen=True)
class Matrix:
    """What is tried: each of `sources` into each of `targets` that `pairs` allows, by `worker`'s ``restore``."""

    name: str
    worker: Path
    targets: tuple[str, ...]
    kind_of: Callable[[str], str] | None = kind_of
    """Settings can only be restored into those of the same kind; None: into all of the targets."""
    saver: Path = SUPPORT / "reshard_worker.py"
    """Whose ``save`` makes the checkpoints."""
    letters: bool = True
    """Whether columns go by the letters of the rows."""

    def fits(self, source: str, target: str) -> bool:
        return self.kind_of is None or self.kind_of(source) == self.kind_of(target)


def main() -> None:
    parser = command_line("reshard_matrix", __doc__)
    parser.add_argument("--quick", action="store_true", help="a few settings, up to 4 ranks")
    parser.add_argument("--only", choices=("engines", "modules"))
    arguments = parser.parse_args()
    settings = QUICK_SETTINGS if arguments.quick else tuple(SETTINGS)
    sizes = QUICK_SIZES if arguments.quick else SIZES
    matrices = (
        Matrix("engines", SUPPORT / "reshard_worker.py", settings),
        Matrix("modules", SUPPORT / "reshard_modules_worker.py", TARGETS, None, letters=False),
    )
    wanted = [matrix for matrix in matrices if arguments.only in (None, matrix.name)]
    tell([(matrix, settings, covering(matrix, settings, sizes)) for matrix in wanted], arguments)


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """What all of these tables' commands take."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--work", help="a folder that is kept, with what was saved and what was found")
    parser.add_argument("--write", help="a Markdown file whose tables are replaced")
    return parser


def tell(
    matrices: Iterable[tuple[Matrix, Sequence[str], Sequence[Case]]], arguments: argparse.Namespace
) -> None:
    """Runs the cases of each matrix, prints its table, and keeps it in the document that `arguments` names.

    The sequences are settings that saved, and cases. Exits with 1 where something was not restored as it was saved.
    """
    failed = False
    with tempfile.TemporaryDirectory(prefix="rankload-reshard-") as scratch:
        work = Path(arguments.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        for matrix, settings, cases in matrices:
            begin, cpu = time.monotonic(), cpu_seconds()
            results = run(matrix, cases, work)
            text = table(matrix, settings, cases, results)
            minutes, cpu_minutes = (time.monotonic() - begin) / 60, (cpu_seconds() - cpu) / 60
            print(
                f"{text}\n\n{len(cases)} restores: {minutes:.0f} minutes, {cpu_minutes:.0f} of CPU\n",
                flush=True,
            )
            if arguments.write:
                publish(arguments.write, matrix.name, text)
            failed = failed or any(results[case]["problems"] for case in cases)
    sys.exit(failed)


def cpu_seconds() -> float:
    """What the ranks that have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def covering(matrix: Matrix, sources: Sequence[str], sizes: Sequence[int]) -> list[Case]:
    """Every source and target that can follow each other, each at the sizes that cover most of what is left.

    Besides the pairs, every (setting, size) on both sides of both, and every (size, size) is met.
    """
    left: set[Any] = {
        (side, setting, end, size)
        for side, settings in (("source", sources), ("target", matrix.targets))
        for setting in settings
        for end in ("n", "m")
        for size in sizes
    }
    left |= {("sizes", n, "", m) for n in sizes for m in sizes}

    def met(source: str, n: int, target: str, m: int) -> set[Any]:
        return {
            ("source", source, "n", n),
            ("source", source, "m", m),
            ("target", target, "n", n),
            ("target", target, "m", m),
            ("sizes", n, "", m),
        }

    pairs = [pair for pair in itertools.product(sources, matrix.targets) if matrix.fits(*pair)]
    cases: list[Case] = []
    turn = itertools.cycle(itertools.product(sizes, sizes))
    for source, target in pairs:
        options = [next(turn), *itertools.product(sizes, sizes)]
        n, m = max(options, key=lambda one, s=source, t=target: len(met(s, one[0], t, one[1]) & left))
        left -= met(source, n, target, m)
        cases.append((source, n, target, m))
    # Where a setting has few partners, some of them come twice.
    more = [(source, n, target, m) for source, target in pairs for n in sizes for m in sizes]
    while any(met(*case) & left for case in more):
        best = max(more, key=lambda case: len(met(*case) & left))
        left -= met(*best)
        cases.append(best)
    return cases


def run(matrix: Matrix, cases: Iterable[Case], work: Path) -> dict[Case, dict[str, Any]]:
    """Results by case; those in the work folder are not run again."""
    log = work / f"{matrix.name}.jsonl"
    results: dict[Case, dict[str, Any]] = {}
    if log.exists():
        for line in log.read_text().splitlines():
            found = json.loads(line)
            results[found["source"], found["n"], found["target"], found["m"]] = found
    todo = [case for case in cases if case not in results]
    for size in sorted({n for _, n, _, _ in todo}):
        wanted = list(dict.fromkeys(source for source, n, _, _ in todo if n == size))
        job(matrix.saver, size, "save", {"root": str(work), "settings": wanted})
    with log.open("a") as out:
        for size in sorted({m for *_, m in todo}):
            waiting = [case for case in todo if case[3] == size]
            while waiting:
                batch = waiting[:JOB_CASES]
                request = {"root": str(work), "oracles": str(work), "cases": [case[:3] for case in batch]}
                lines, error = job(matrix.worker, size, "restore", request, may_fail=True)
                if error:
                    source, n, target, m = batch[len(lines)]
                    lines.append({"source": source, "n": n, "target": target, "m": m, "problems": [error]})
                for found in lines:
                    results[found["source"], found["n"], found["target"], found["m"]] = found
                    print(json.dumps(found), file=out, flush=True)
                    if found["problems"]:
                        print(found, file=sys.stderr)
                waiting = waiting[len(lines) :]
                print(f"{matrix.name}, {size} ranks: {len(waiting)} to go", file=sys.stderr)
    return results


def job(
    worker: Path, world_size: int, function: str, request: dict[str, Any], *, may_fail: bool = False
) -> tuple[list[dict[str, Any]], str]:
    finished = run_ranks(
        worker,
        world_size,
        args=(function, json.dumps(request)),
        deadline_s=1500,
        # DeepSpeed orders groups of experts as a set of strings: ranks must agree on it to train at all.
        env={"DS_ACCELERATOR": "cpu", "PYTHONHASHSEED": "0", "PYTHONPATH": str(SUPPORT)},
        fork=False,
    )
    failed = [rank for rank in finished if rank.returncode != 0]
    if failed and not may_fail:
        raise SystemExit(repr(failed))
    lines = [json.loads(line) for line in finished[0].stdout.splitlines() if line.startswith("{")]
    return lines, failed[0].stderr.strip().splitlines()[-1] if failed else ""


def table(
    matrix: Matrix, sources: Sequence[str], cases: Sequence[Case], results: dict[Case, dict[str, Any]]
) -> str:
    """Markdown: a row for each setting that saved, a column for each that restored."""
    letters = {setting: chr(ord("A") + index) for index, setting in enumerate(sources)}
    by_pair: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        by_pair.setdefault((case[0], case[2]), []).append(case)
    columns = [letters[target] if matrix.letters else target for target in matrix.targets]
    lines = [f"| saved by | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for source in sources:
        cells = []
        for target in matrix.targets:
            met = by_pair.get((source, target), [])
            shown = (f"{case[1]}→{case[3]}" + " **✗**" * bool(results[case]["problems"]) for case in met)
            cells.append(", ".join(shown))
        lines.append(f"| {letters[source]}: stage {source} | " + " | ".join(cells) + " |")
    found = [results[case] for case in cases]
    good = [one for one in found if not one["problems"]]
    exact = [one for one in good if one["apart"] == 0]
    lines += [
        "",
        f"{len(good)} of {len(found)} restored with every tensor equal, bit for bit "
        f"({sum(one['tensors'] for one in good):,} tensors compared). The losses of two further steps were equal in "
        f"{len(exact)} of them, and at most {max((one['apart'] for one in good), default=0):.1e} apart, relative, in "
        f"the others. {versions()}",
    ]
    for one in found:
        if one["problems"]:
            lines.append(
                f"- ✗ {one['source']} of {one['n']} → {one['target']} of {one['m']}: {one['problems'][0]}"
            )
    return "\n".join(lines)


def versions() -> str:
    """What a table was made with."""
    from importlib.metadata import version

    return f"torch {torch.__version__}, DeepSpeed {version('deepspeed')}, Python {platform.python_version()}, gloo."


if __name__ == "__main__":
    main()
