"""Runs the fault matrix, prints it as a table, and writes it into docs/reliability.md.

    python tests/faults/matrix.py --write docs/reliability.md         `make faults`: every case
    python tests/faults/matrix.py --only 'restore / .* / SIGKILL'     those whose names fit
    python tests/faults/matrix.py --core                              those that `make test` runs
    python tests/faults/matrix.py --again rows.json --json rows.json  those that were not as promised in an earlier run

Cases run in lanes, each a process with two nodes of its own. The exit code says whether all were as promised.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from cases import ALL, CORE, IMPOSSIBLE, LONG_STALL_TIMEOUT_S, STALL_TIMEOUT_S, Case  # noqa: E402
from lane import Row  # noqa: E402
from nodes import can_be_real, end_with_parent, isolated_command  # noqa: E402

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
CHUNK = 12
"""Cases that a lane takes at once: those of one journey go on in the same processes."""


def run_cases(
    cases: Sequence[Case],
    lanes: int,
    *,
    tell: bool = False,
    keep: Callable[[dict[str, Row]], None] | None = None,
) -> dict[str, Row]:
    """What was seen of each, by name. `keep` gets it as it grows."""
    waiting: queue.SimpleQueue[list[Case]] = queue.SimpleQueue()
    for chunk in chunks(cases):
        waiting.put(chunk)
    rows: dict[str, Row] = {}
    workers = [threading.Thread(target=_run_lane, args=(waiting, rows, cases, tell)) for _ in range(lanes)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(1)
        if keep is not None:
            keep(dict(rows))
    for worker in workers:
        worker.join()
    if keep is not None:
        keep(rows)
    return rows


def chunks(cases: Sequence[Case]) -> Iterable[list[Case]]:
    by_journey: dict[str, list[Case]] = {}
    for case in cases:
        by_journey.setdefault(f"{case.journey} {case.restarted}", []).append(case)
    for those in by_journey.values():
        # Those after which processes go on come first.
        ordered = sorted(
            those, key=lambda case: case.fault in ("SIGKILL", "SIGSTOP", "os._exit(0)", "network cut")
        )
        for start in range(0, len(ordered), CHUNK):
            yield ordered[start : start + CHUNK]


def _run_lane(
    waiting: queue.SimpleQueue[list[Case]], rows: dict[str, Row], cases: Sequence[Case], tell: bool
) -> None:
    engines = ["--engines"] if any("engine" in case.journey for case in cases) else []
    command = isolated_command([sys.executable, str(HERE / "lane.py"), *engines])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
    ) as lane:
        assert lane.stdin is not None
        assert lane.stdout is not None
        lane.stdout.readline()
        while True:
            try:
                chunk = waiting.get_nowait()
            except queue.Empty:
                break
            for case in chunk:
                lane.stdin.write(f"{case.name}\n")
                lane.stdin.flush()
                answer = lane.stdout.readline()
                if not answer:
                    rows[case.name] = Row(case.name, "", 0.0, ["the lane has ended"], 0, False)
                    return
                row = Row(**json.loads(answer))
                rows[case.name] = row
                if tell:
                    mark = "as promised" if row.as_promised else "NOT AS PROMISED"
                    print(
                        f"{len(rows)}/{len(cases)} {row.name}: {row.seen}, {row.seconds:.1f} s: {mark}",
                        flush=True,
                    )
                    for problem in row.problems:
                        print(f"        {problem}", flush=True)
        lane.stdin.close()


# --- the table -----------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Row]) -> list[str]:
    """What was promised of each case, and what was seen; roles of which the same is promised and seen share a line."""
    lines = [
        "| journey | stage | fault | who | promised | seen | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    roles: dict[tuple[str, ...], list[str]] = {}
    for case in ALL:
        row = rows.get(case.name)
        if row is None:
            continue
        key = (case.title, case.stage.name, case.fault, case.promise.text, seen_of(row))
        groups.setdefault(key, []).append(row)
        roles.setdefault(key, []).append(case.role.name)
    for key, those in groups.items():
        title, stage, fault, promised, seen = key
        lines.append(
            f"| {title} | {stage} | {fault} | {named(roles[key])} | {promised} | {seen} | {seconds_of(those)} |"
        )
    return lines


def seen_of(row: Row) -> str:
    if row.as_promised:
        return row.seen
    # Without the folder of the run, which is another one each time.
    problem = re.sub(r"/\S*/faults-\w+/", "", row.problems[0])[:160]
    return f"**not as promised**: {row.seen}: {problem}".replace("|", "\\|").replace("\n", " ")


def named(roles: Sequence[str]) -> str:
    """Each role once; `all` where there are all four."""
    return "each of the four" if len(set(roles)) == 4 else ", ".join(dict.fromkeys(roles))


def seconds_of(rows: Sequence[Row]) -> str:
    found = sorted(row.seconds for row in rows)
    return f"{found[0]:.1f}" if found[0] == found[-1] else f"{found[0]:.1f} to {found[-1]:.1f}"


def summary(rows: Mapping[str, Row]) -> list[str]:
    kept = sum(row.as_promised and row.fired for row in rows.values())
    fired = sum(row.fired for row in rows.values())
    left = [row for row in rows.values() if row.as_promised and not row.fired]
    lines = [
        f"{len(rows)} cases ran; in {fired} the fault was seen to fire, and {kept} of these were as promised."
    ]
    if left:
        lines.append(f"{len(left)} did not run: they need root and iproute2.")
    return lines


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    nodes = "in network namespaces" if can_be_real() else "played on one network"
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release().partition('-')[0]}, Python "
        f"{platform.python_version()}; two nodes {nodes}, of two ranks each; stall_timeout_s is {STALL_TIMEOUT_S:g} "
        f"where something stalls, else {LONG_STALL_TIMEOUT_S:g}"
    )


def page(rows: Mapping[str, Row], took_s: float, lanes: int) -> str:
    """The part of the page that is made."""
    lines = [
        *summary(rows),
        "",
        f"Machine: {machine()}. {lanes} lanes at a time, {took_s / 60:.0f} minutes.",
        "",
    ]
    lines += [*table(rows), "", "### What cannot happen", "", "| case | why |", "|---|---|"]
    lines += [f"| {one.what} | {one.why} |" for one in IMPOSSIBLE]
    return "\n".join(lines)


def write_page(path: Path, made: str) -> None:
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


def chosen(arguments: argparse.Namespace) -> tuple[list[Case], dict[str, Row]]:
    """The cases to run, and what is known of others."""
    cases = list(CORE if arguments.core else ALL)
    if arguments.only:
        cases = [case for case in cases if re.search(arguments.only, case.name)]
    known: dict[str, Row] = {}
    if arguments.again:
        told = json.loads(Path(arguments.again).read_text())
        known = {name: Row(**row) for name, row in told["rows"].items()}
        cases = [case for case in cases if case.name not in known or not known[case.name].as_promised]
    return cases, known


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--only", help="a pattern that is searched for in the names of cases")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--again", help="rows of an earlier run")
    parser.add_argument("--json", help="where the rows are written")
    parser.add_argument("--write", help="the page whose table is replaced")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    cases, known = chosen(arguments)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    begin = time.monotonic()
    rows: dict[str, Row] = {}

    def keep(found: dict[str, Row]) -> None:
        rows.update({case.name: row for case in ALL if (row := {**known, **found}.get(case.name))})
        if arguments.json:
            told = {"rows": {name: asdict(row) for name, row in rows.items()}}
            Path(arguments.json).write_text(json.dumps(told, indent=1))

    run_cases(cases, arguments.lanes, tell=True, keep=keep)
    took_s = time.monotonic() - begin
    if arguments.write:
        write_page(Path(arguments.write), page(rows, took_s, arguments.lanes))
    print("\n".join(["", *table(rows), "", *summary(rows)]))
    return 0 if all(row.as_promised for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
