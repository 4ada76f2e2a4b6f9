"""Kills jobs in the middle of their saves, and has `autoresume` go on from what is left: a table in docs/resuming.md.

    python tests/support/killed_saves.py --writers deepspeed-1,dcp --points 50 --write docs/resuming.md

`make kills` does so for all writers. A job of two gloo processes saves steps 1, 2 and 3, and is killed by SIGKILL, all
ranks at once, after the first of them:

- while each file of step 2 is written, and once it is whole. The job runs in slices of a fraction of a millisecond, and
  its folder is looked at while it stands still, so that a kill lands where it shall;
- at random times of the saves of steps 2 and 3, without slices.

What is whole is not asked of rankload: a step is, where each of its files has the size that a job gave it which nobody
killed. A process then runs `find` and `autoresume` on the folder; what it restored is compared, bit for bit, with what
the killed job held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from places import REPOSITORY, SUPPORT
from processes import free_port, kill_session, rank_environment, run_ranks
from warm_ranks import WarmRank, warm_up

WORKER = SUPPORT / "killed_saves_worker.py"
BEGIN, END = "<!-- kills: begin -->", "<!-- kills: end -->"
FRAMEWORKS = REPOSITORY / ".venv-frameworks" / "bin" / "python"
WORLD_SIZE = 2
DEADLINE_S = 240.0
QUICK_S = 0.05
"""About how long a save takes, where that is not measured."""
SLICES_S = (1e-4, 3e-5, 1.5e-5, 8e-6)
"""How long a job runs between two looks, in each try of a point: some files are written faster than a slice lasts."""


@dataclass(frozen=True)
class Writer:
    """Who saves, and where."""

    title: str
    place: str
    """The file or folder of a step, relative to the run's folder."""
    needless: tuple[str, ...] = ()
    """Names of files, of a step's folder or below it, from which nothing is restored."""
    pointer: str = ""
    """The file that names the newest one."""
    imports: tuple[str, ...] = ()
    """What is imported once for all processes."""
    frameworks: bool = False
    """Whether it runs in the environment of `make frameworks`."""


_ALWAYS = (
    "torch.distributed.checkpoint.state_dict", "rankload.loader.saving", "rankload.loader.resuming",
)  # fmt: skip
_DEEPSPEED = ("deepspeed", "torch._inductor.compile_fx")
WRITERS = {
    "deepspeed-1": Writer(
        "DeepSpeed, stage 1", "global_step{}", pointer="latest", imports=_DEEPSPEED
    ),
    "deepspeed-3": Writer(
        "DeepSpeed, stage 3", "global_step{}", pointer="latest", imports=_DEEPSPEED
    ),
    "dcp": Writer("`torch.distributed.checkpoint.save`, FSDP2", "step-{}"),
    "trainer": Writer(
        "transformers' Trainer with DeepSpeed, stage 2",
        "checkpoint-{}",
        needless=("zero_to_fp32.py",),
        imports=(*_DEEPSPEED, "transformers.models.gpt2.modeling_gpt2", "transformers.trainer"),
        frameworks=True,
    ),
    "save_checkpoint": Writer("`save_checkpoint`, one file", "step{}.pt"),
}  # fmt: skip


# --- what lies in a folder -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A file, as one look at the folder saw it."""

    size: int
    inode: int
    modified_ns: int


def look(folder: str) -> dict[str, Seen]:
    """The files in a folder and below it, by their relative names; random parts of temporary names are ``*``."""
    found: dict[str, Seen] = {}
    _look(folder, "", found)
    return found


def _look(folder: str, prefix: str, found: dict[str, Seen]) -> None:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                _look(entry.path, f"{name}/", found)
                continue
            with contextlib.suppress(FileNotFoundError):
                told = os.stat(entry.path, follow_symlinks=False)
                found[_plain(name)] = Seen(told.st_size, told.st_ino, told.st_mtime_ns)


def _plain(name: str) -> str:
    return re.sub(r"\.[0-9a-f]{8}\.part", ".*.part", re.sub(r"\.tmp\w{6}$", ".tmp*", name))


def of_step(writer: Writer, files: Mapping[str, Seen], step: int) -> dict[str, int]:
    """The sizes of the files from which `step` is restored."""
    place = writer.place.format(step)
    return {
        name: seen.size
        for name, seen in files.items()
        if (name == place or name.startswith(f"{place}/")) and name.rpartition("/")[2] not in writer.needless
    }


# --- a job, in slices ------------------------------------------------------------------------------------------------


class Job:
    """A job that saves; it stands before its second save once this is made. What lay at `root` is removed."""

    def __init__(self, writer: str, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        self.folder, self.aside = root / "run", root / "aside"
        self._streams = root / "streams"
        for made in (self.folder, self.aside, self._streams):
            made.mkdir(parents=True)
        port = free_port()
        self._ranks = [self._started(writer, rank, port) for rank in range(WORLD_SIZE)]
        try:
            self.wait_for("ready")
        except BaseException:
            self.kill()
            raise
        self.before = look(str(self.folder))

    def _started(self, writer: str, rank: int, port: int) -> WarmRank:
        env = rank_environment(
            rank, WORLD_SIZE, local_rank=rank, local_world_size=WORLD_SIZE, node=0, n_nodes=1, port=port
        )
        env |= {"PYTHONPATH": str(SUPPORT), "DS_ACCELERATOR": "cpu"}
        command = [SUPPORT / "processes.py", WORKER, "save", writer, self.folder, self.aside]
        out, err = (self._streams / f"{rank}.{end}" for end in ("out", "err"))
        out.touch()
        err.touch()
        return WarmRank(list(map(str, command)), env=env, cwd=str(self._streams), out=str(out), err=str(err))

    def wait_for(self, mark: str) -> None:
        """Waits until each rank has made its file of this name."""
        deadline = time.monotonic() + DEADLINE_S
        while not all((self.aside / f"{mark}-{rank}").exists() for rank in range(WORLD_SIZE)):
            self.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{mark}: {self.told()}")
            time.sleep(0.002)

    def check_alive(self) -> None:
        if any(rank.poll() is not None for rank in self._ranks):
            raise RuntimeError(f"a rank ended by itself: {self.told()}")

    def told(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self._streams.iterdir()))

    def go(self) -> None:
        (self.aside / "go").touch()

    def wait_for_first_file(self) -> None:
        """Waits until the save that `go` began shows."""
        deadline = time.monotonic() + DEADLINE_S
        while look(str(self.folder)) == self.before:
            self.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no file appeared: {self.told()}")
            time.sleep(0.0003)

    def has_saved(self, step: int) -> bool:
        return all((self.aside / f"saved-{step}-{rank}").exists() for rank in range(WORLD_SIZE))

    def slices(self, slice_s: float = SLICES_S[0]) -> Iterator[dict[str, Seen]]:
        """Lets the job run for `slice_s` at a time; what its folder holds while it stands still."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self._signal(signal.SIGSTOP)
            for rank in self._ranks:
                _wait_until_stopped(rank.pid)
            yield look(str(self.folder))
            self.resume()
            self.check_alive()
            if slice_s < SLICES_S[0]:
                until = time.perf_counter() + slice_s
                while time.perf_counter() < until:
                    pass
            else:
                time.sleep(slice_s)
        raise TimeoutError(f"the saves did not end: {self.told()}")

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """All ranks at once, by SIGKILL."""
        self._signal(signal.SIGKILL)
        for rank in self._ranks:
            kill_session(rank)


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "TtZX":
            return
        time.sleep(0)


# --- what a save writes, where nobody kills it -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a writer writes, if it is let."""

    sizes: Mapping[int, Mapping[str, int]]
    """By step, of each file that the step is restored from."""
    written: Mapping[str, int]
    """The files of step 2, in the order in which they appeared, temporary ones and pointers too, with their sizes."""
    whole_at_once: frozenset[str]
    """Those that got their name once they were whole."""
    writing_s: float
    """How long the save of step 2 takes, from its first file on."""


def reference(name: str, root: Path, *, quick: bool = False) -> Reference:
    """Runs a job in slices, and, unless `quick`, one without, whose files must be the same.

    `root` is where killed jobs run later: files may have its name.
    """
    observed = _observed(name, root)
    if quick:
        return observed
    free = Job(name, root)
    free.go()
    free.wait_for_first_file()
    begin = time.monotonic()
    free.wait_for("saved-2")
    seconds = time.monotonic() - begin
    free.wait_for("saved-3")
    free.kill()
    if _sizes(name, root) != observed.sizes:
        raise RuntimeError(f"{name} writes files of other sizes each time: they do not tell what is whole")
    return replace(observed, writing_s=seconds)


def _sizes(name: str, root: Path) -> dict[int, dict[str, int]]:
    files = look(str(root / "run"))
    return {step: of_step(WRITERS[name], files, step) for step in (1, 2, 3)}


def _observed(name: str, root: Path) -> Reference:
    job = Job(name, root)
    written: dict[str, int] = {}
    inodes: dict[int, str] = {}
    renamed: set[str] = set()
    job.go()
    for files in job.slices():
        for each, seen in files.items():
            if job.before.get(each) == seen:
                continue
            if each not in written and inodes.get(seen.inode, each) != each:
                renamed.add(each)
            inodes[seen.inode] = each
            written[each] = seen.size
        if job.has_saved(2):
            break
    job.resume()
    job.wait_for("saved-3")
    job.kill()
    third = WRITERS[name].place.format(3)
    written = {each: size for each, size in written.items() if not each.startswith(third)}
    return Reference(_sizes(name, root), written, frozenset(renamed), QUICK_S)


# --- points, and kills -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where a job is killed."""

    where: str
    """``in``: while `file` is written; ``after``: once it is whole; ``random``."""
    file: str = ""
    delay_s: float = 0.0
    from_go: bool = False
    """Whether the delay begins with the save, rather than with its first file."""

    def __str__(self) -> str:
        if self.file:
            return f"{self.where} {self.file}"
        return f"{self.delay_s * 1000:.0f} ms after {'its begin' if self.from_go else 'the first file'}"


def points_of(known: Reference, n: int, seed: int) -> list[Point]:
    """`n` points: in and after each file, and the rest at random; fewer of the former where `n` is small."""
    in_files = [
        point
        for name in known.written
        for point in (Point("in", name), Point("after", name))
        if not (point.where == "in" and name in known.whole_at_once)
    ]
    chance = random.Random(seed)
    if len(in_files) >= n:
        in_files = chance.sample(in_files, max(n - 1, 1))
    rest = n - len(in_files)
    spans = (known.writing_s, known.writing_s, 3 * known.writing_s)
    return [
        *in_files,
        *(
            Point("random", delay_s=chance.uniform(0, spans[number % 3]), from_go=number % 6 == 5)
            for number in range(rest)
        ),
    ]


def killed_at(name: str, point: Point, known: Reference, root: Path, slice_s: float) -> bool:
    """Kills a job there; whether the kill landed where it should."""
    job = Job(name, root)
    try:
        job.go()
        if point.where == "random":
            if not point.from_go:
                job.wait_for_first_file()
            time.sleep(point.delay_s)
            return True
        for files in job.slices(slice_s):
            seen = files.get(point.file)
            if seen is not None and job.before.get(point.file) != seen:
                whole = seen.size == known.written[point.file]
                if point.where == "in":
                    return not whole
                if whole:
                    return True
            if job.has_saved(2):
                return False  # a temporary file came and went between two looks
        return False
    finally:
        job.kill()


# --- what was left, and what was made of it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One kill, and what followed."""

    point: str
    landed: bool
    left: str
    """The newest step's state, in words."""
    whole: tuple[int, ...]
    """The steps that are whole."""
    took: int | None
    took_newest: int | None
    """With ``newest=True``."""
    passed: tuple[tuple[str, str], ...]
    """What was passed over, each with the reason."""
    problems: tuple[str, ...] = field(default=())
    """What must not be; none where all is well."""


def outcome(name: str, point: Point, known: Reference, root: Path, *, tries: int) -> Outcome:
    """Kills a job at a point, looks at what is left, resumes from it, and compares."""
    landed = False
    for slice_s in SLICES_S[:tries]:
        landed = killed_at(name, point, known, root, slice_s)
        if landed:
            break
    writer, folder = WRITERS[name], root / "run"
    files = look(str(folder))
    bad = {
        step: {each for each, size in sizes.items() if files.get(each, Seen(-1, 0, 0)).size != size}
        for step, sizes in known.sizes.items()
    }
    whole = tuple(step for step in known.sizes if not bad[step])
    begun = [step for step in known.sizes if (folder / writer.place.format(step)).exists()]
    (rank,) = run_ranks(
        f"{WORKER}:resume", 1, args=(name, folder, root / "aside"), deadline_s=DEADLINE_S,
        env={"PYTHONPATH": str(SUPPORT)}, fork=True,
    )  # fmt: skip
    if rank.returncode != 0:
        return Outcome(str(point), landed, "", whole, None, None, (), (f"it could not resume: {rank}",))
    told = json.loads(rank.stdout.strip().splitlines()[-1])
    pointed = told["resumed"]["pointed"]
    newest = told["resumed"].get("newest", pointed)
    pointer = _pointed_at(writer, folder)
    return Outcome(
        str(point),
        landed,
        _left(writer, known, files, begun, bad, pointer),
        whole,
        pointed["step"],
        newest["step"],
        tuple((one, reason) for one, reason in pointed["passed"]),
        tuple(_problems(writer, told, begun, bad, pointer)),
    )


def _pointed_at(writer: Writer, folder: Path) -> int | None:
    """The step that a pointer names; None where there is none."""
    if not writer.pointer:
        return None
    text = (folder / writer.pointer).read_text()
    return next((step for step in (1, 2, 3) if text == writer.place.format(step)), None)


def _left(
    writer: Writer,
    known: Reference,
    files: Mapping[str, Seen],
    begun: Sequence[int],
    bad: Mapping[int, set[str]],
    pointer: int | None,
) -> str:
    newest = begun[-1]
    if newest == 1:
        part = any(name.endswith(".part") for name in files)
        return "only a temporary file" if part else "nothing new"
    if bad[newest]:
        there = [name for name in known.sizes[newest] if name in files]
        missing = any(name not in files for name in bad[newest])
        short = any(name in files for name in bad[newest])
        if not there:
            return "an empty folder"
        return f"files {' and '.join(['missing'] * missing + ['cut short'] * short)}"
    if writer.pointer and pointer != newest:
        return f"whole, `{writer.pointer}` {'on the older' if pointer is not None else 'empty'}"
    return "whole"


_PROOFS = ("was not finished", "no checkpoint", "has no optimizer file", "latest is empty")
"""What a reason says of the proof that is lacking, where it names no file that is missing or short."""


def _problems(
    writer: Writer,
    told: Mapping[str, Any],
    begun: Sequence[int],
    bad: Mapping[int, set[str]],
    pointer: int | None,
) -> Iterator[str]:
    """What `find` and `autoresume` made otherwise than it is."""
    newest_whole = max(step for step in bad if not bad[step])
    expected = {"newest": newest_whole, "pointed": newest_whole}
    if pointer is not None and not bad[pointer]:
        expected["pointed"] = pointer
    for way, resumed in told["resumed"].items():
        if resumed["step"] != expected[way]:
            yield f"{way}: took step {resumed['step']}, expected {expected[way]}"
        if resumed["differs"] or not resumed.get("compared"):
            yield f"{way}: restored otherwise than it was held: {resumed['differs'][:3]}"
        passed = dict(resumed["passed"])
        for step in begun:
            place = writer.place.format(step)
            if bad[step] and step > expected[way] and place not in passed:
                yield f"{way}: nothing is said of {place}"
            if not bad[step] and place in passed:
                yield f"{way}: {place} is whole, and passed over: {passed[place]}"
    proven = {name: ok for name, _, ok, _ in told["found"]}
    for step in begun:
        place = writer.place.format(step)
        if proven.get(place, False) != (not bad[step]):
            yield f"{place} is {'not ' if bad[step] else ''}whole, and find says {told['found']}"
    by_place = {writer.place.format(step): bad[step] for step in bad}
    for name, _, ok, reason in told["found"]:
        if ok:
            continue
        named = [each.rpartition("/")[2] for each in by_place.get(name, ())]
        if not any(each in reason for each in (*named, *_PROOFS)):
            yield f"{name} is passed over with a reason that names no file and no proof: {reason!r}"


# --- the table -------------------------------------------------------------------------------------------------------


def measure(name: str, n: int, seed: int, *, quick: bool, say: Callable[[str], None]) -> list[Outcome]:
    """All points of one writer. With `quick` each is tried once: fewer kills land where they should."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(folder, "job")
        known = reference(name, root, quick=quick)
        say(
            f"{name}: {len(known.written)} files, {known.writing_s:.3f} s from the first on: {dict(known.written)}"
        )
        for number, point in enumerate(points_of(known, n, seed)):
            one = outcome(name, point, known, root, tries=1 if quick else len(SLICES_S))
            outcomes.append(one)
            say(
                f"{time.strftime('%X')} {name} {number + 1}: {one.point}{'' if one.landed else ' (missed)'}: "
                f"{one.left}; whole {one.whole}, took {one.took}, {one.took_newest} with newest=True; "
                f"{one.passed or ''} {one.problems or ''}"
            )
    return outcomes


def plain_reason(reason: str) -> str:
    """A reason without what differs between kills: folders, numbers of ranks and steps, sizes."""
    text = re.split(r";|\. |, as a | \(it holds|, which is not|: expected (?:some|at least)", reason)[0]
    text = re.sub(r"\S*/(?=[^/\s]+)", "", text)
    text = re.sub(r"(step|checkpoint|rank|state)([-_]?)\d+", r"\1\2N", text)
    return re.sub(r"[\d,]*\d{3}\b|(?<=__)\d+(?=_)", "N", text).replace("|", "\\|").strip()


def row(name: str, outcomes: Sequence[Outcome]) -> str:
    in_files = [one for one in outcomes if one.point.startswith(("in ", "after "))]
    landed = sum(one.landed for one in in_files)
    left = Counter(one.left for one in outcomes)
    took = Counter(
        "the newest whole one" if one.took == max(one.whole) else "what `latest` names" for one in outcomes
    )
    reasons = Counter(plain_reason(reason) for one in outcomes for _, reason in one.passed)
    cells = (
        WRITERS[name].title,
        f"{len(in_files)} in and after files ({landed} landed there), {len(outcomes) - len(in_files)} at random",
        *("<br>".join(f"{text}: {n}" for text, n in found.most_common()) for found in (left, took, reasons)),
    )
    return f"| {' | '.join(cells)} |"


def write(page: Path, rows: Mapping[str, str]) -> None:
    """Puts the rows into the page; those of other writers stay."""
    before, begin, rest = page.read_text().partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the table: {BEGIN} and {END}")
    old = {line.split(" | ")[0].removeprefix("| "): line for line in inside.splitlines() if line[:2] == "| "}
    titled = {**old, **{WRITERS[name].title: line for name, line in rows.items()}}
    lines = [titled[one.title] for one in WRITERS.values() if one.title in titled]
    titles = "| writer | points | what was left | what was taken | reasons for what was passed over |"
    page.write_text("\n".join([before + begin, titles, "|---" * 5 + "|", *lines, end + after]))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--writers", default=",".join(WRITERS))
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="each point is tried once")
    parser.add_argument("--write", type=Path, help="the page whose table is written")
    parser.add_argument("--json", type=Path, help="where all outcomes are written")
    arguments = parser.parse_args(argv)
    found: dict[str, list[Outcome]] = {}
    names = arguments.writers.split(",")
    mine = [name for name in names if not WRITERS[name].frameworks or _has_frameworks()]
    warm_up(*_ALWAYS, *dict.fromkeys(each for name in mine for each in WRITERS[name].imports))
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # so that slices are not longer than they shall be
    for name in names:
        if name in mine:
            found[name] = measure(
                name,
                arguments.points,
                arguments.seed,
                quick=arguments.quick,
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )
        else:
            found[name] = _by_frameworks(name, arguments)
    if arguments.json:
        told = {name: [asdict(one) for one in outcomes] for name, outcomes in found.items()}
        arguments.json.write_text(json.dumps(told))
    rows = {name: row(name, outcomes) for name, outcomes in found.items()}
    print("\n".join(rows.values()))
    problems = [
        f"{name}, {one.point}: {text}" for name in found for one in found[name] for text in one.problems
    ]
    print("\n".join(problems), file=sys.stderr)
    if arguments.write and not problems:
        write(arguments.write, rows)
    return int(bool(problems))


def _has_frameworks() -> bool:
    return Path(sys.prefix).resolve() == FRAMEWORKS.parent.parent.resolve()


def _by_frameworks(name: str, arguments: argparse.Namespace) -> list[Outcome]:
    if not FRAMEWORKS.exists():
        raise SystemExit(f"{name} needs the environment of `make frameworks`")
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        told = Path(folder, "told.json")
        numbers = ["--points", str(arguments.points), "--seed", str(arguments.seed)]
        command = [str(FRAMEWORKS), __file__, "--writers", name, *numbers, "--json", str(told)]
        subprocess.run(command, check=False, timeout=7200)
        return [
            Outcome(**{**one, "passed": tuple(map(tuple, one["passed"]))})
            for one in json.loads(told.read_text())[name]
        ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
