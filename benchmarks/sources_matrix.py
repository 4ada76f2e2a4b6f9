"""Restores what every other program saves into targets of every kind, and prints the table.

    python -m benchmarks.sources_matrix [--quick] [--work FOLDER] [--write docs/formats.md]

Every pair of a source and a target is tried at 2 → 2 and 4 → 2 ranks (at 2 → 4 and 4 → 4 where the target's mesh needs
four), and some pairs at every size. What a restore is held to is in tests/support/sources_worker.py: every tensor bit
for bit against the writer's own, and against torch's own reader where torch wrote, and the losses of two further steps.
With ``--work`` results are kept in that folder, and a run that was interrupted goes on where it was, as if the code had
not changed.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .reshard_matrix import SIZES, SUPPORT, Case, Matrix, command_line, cpu_seconds, run, versions
from .tables import publish, table

from sources_worker import IN_PAIRS, SOURCES, TARGETS  # isort: skip

WORKER = SUPPORT / "sources_worker.py"
MATRIX = Matrix("sources", WORKER, tuple(TARGETS), None, WORKER, letters=False)
EVERY_SIZE = ("FSDP2", "ZeRO 3 fp32")
"""Targets that are tried at each size: from one DCP folder of each size, and from one safetensors file."""


def main() -> None:
    parser = command_line("sources_matrix", __doc__)
    parser.add_argument("--quick", action="store_true", help="each source and target a few times, on 2 ranks")
    arguments = parser.parse_args()
    cases = quick() if arguments.quick else every()
    with tempfile.TemporaryDirectory(prefix="rankload-sources-") as scratch:
        work = Path(arguments.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        begin, cpu = time.monotonic(), cpu_seconds()
        results = run(MATRIX, cases, work)
    text = report(cases, results)
    minutes, cpu_minutes = (time.monotonic() - begin) / 60, (cpu_seconds() - cpu) / 60
    print(f"{text}\n\n{len(cases)} restores: {minutes:.1f} minutes, {cpu_minutes:.1f} of CPU", flush=True)
    if arguments.write:
        publish(arguments.write, "sources", text)
    sys.exit(any(results[case]["problems"] for case in cases))


def every() -> list[Case]:
    """Every source and target, at the sizes of this table; the largest last."""
    cases = [
        (source, n, target, 4 if target in IN_PAIRS else 2)
        for source, written in SOURCES.items()
        for n in ((4,) if written.kind in IN_PAIRS else (2, 4))
        for target in TARGETS
    ]
    by_name, one_file = "DCP by name of FSDP2", "safetensors, one file"
    for target in EVERY_SIZE:
        cases += [(by_name, n, target, m) for n in SIZES for m in SIZES]
        cases += [(one_file, 2, target, m) for m in SIZES]
    return sorted(dict.fromkeys(cases), key=lambda case: case[3])


def quick() -> list[Case]:
    """Each source into two targets and each target from one source or more, where 2 ranks are enough."""
    sources = [name for name, written in SOURCES.items() if written.kind not in IN_PAIRS]
    targets = [name for name in TARGETS if name not in IN_PAIRS]
    return [
        (source, 2, target, 2) for source, target in zip(2 * sources, itertools.cycle(targets), strict=False)
    ]


def report(cases: Sequence[Case], results: Mapping[Case, Mapping[str, Any]]) -> str:
    """Markdown: a row for each target, a column for each source."""
    letters = {source: chr(ord("A") + position) for position, source in enumerate(SOURCES)}
    sizes: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        sizes.setdefault((case[0], case[2]), []).append(case)

    def cell(source: str, target: str) -> str:
        met = sorted(sizes.get((source, target), []))
        failed = [case for case in met if results[case]["problems"]]
        if {(n, m) for _, n, _, m in met} == {(n, m) for n in SIZES for m in SIZES} and not failed:
            return "all"
        shown = [f"{case[1]}→{case[3]}" + " **✗**" * (case in failed) for case in met]
        return ", ".join(shown)

    rows = [[target, *(cell(source, target) for source in SOURCES)] for target in TARGETS]
    found = [results[case] for case in cases]
    good = [one for one in found if not one["problems"]]
    fp32 = [one["apart"] for case, one in zip(cases, found, strict=True) if "bf16" not in case[2]]
    lines = [
        *(
            f"- {letter}: {source}{' (weights only)' if SOURCES[source].weights_only else ''}"
            for source, letter in letters.items()
        ),
        "",
        table(["restored into", *letters.values()], rows),
        "",
        f"{len(good)} of {len(found)} restored with every tensor equal, bit for bit "
        f"({sum(one['tensors'] for one in good):,} tensors compared, {sum(one['seconds'] for one in good):.0f} s of "
        f"loading). The losses of two further steps were equal in {sum(one['apart'] == 0 for one in good)} of them, "
        f'and at most {max(fp32, default=0):.1e} apart, relative, in fp32. "all" is each of '
        f"{', '.join(map(str, SIZES))} → each of them. {versions()}",
    ]
    for case, one in zip(cases, found, strict=True):
        if one["problems"]:
            lines.append(f"- ✗ {case[0]} of {case[1]} → {case[2]} of {case[3]}: {'; '.join(one['problems'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
