"""Runs cases of the matrix one after another on two nodes of its own, and says what was seen and what was not promised.

    lane.py [--engines]     reads names of cases, one a line, and answers each with a `Row` as JSON

Ranks go on from case to case where none of them has died and nothing of theirs is broken: what a failed load leaves
behind would then fail the next one. After each such case the same journey is run once more without a fault, and must
come to its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from cases import ALL, WATCHDOG, Case
from faulty_store import ARM, FaultyStore, faulty_store
from injector import FILLER, JOINING, Injection
from nodes import Nodes, two_nodes
from places import SUPPORT
from processes import rank_environment
from rank_worker import SETTLED_S, Ending, Step

HERE = Path(__file__).resolve().parent
WORKER = HERE / "rank_worker.py"
WORLD_SIZE, RANKS_OF_NODE = 4, 2
PATIENCE_S = 45.0
"""How much longer than promised a rank is waited for before it counts as hanging."""
WAKES_S = 20.0
"""Within which a rank ends that is woken after the others have gone."""
ENDS_S = 15.0
AGENTS_S = 180.0
FIRST_PORT = 29600
PRELOAD = (
    "numpy", "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "rankload",
    "rankload.loader.journey", "rankload.loader.saving", "rankload.loader.exporting", "rankload.loader.resuming",
    "rankload.loader.stores.http", "rankload.loader.fetch.parts", "fsspec",
)  # fmt: skip
WITHOUT_TRACES = ("raises", "sys.exit(0)", "clock")
"""After these the next case is proof enough that nothing was left behind that matters to it."""
ALLOWED = re.compile(r".*/(\.lock|lock)$")
"""Files that stay on purpose: what processes lock is removed by none of them."""


@dataclass
class Row:
    """What was seen of one case."""

    name: str
    seen: str
    seconds: float
    problems: list[str]
    seed: int
    fired: bool
    """Whether its fault did happen."""

    @property
    def as_promised(self) -> bool:
        return not self.problems


@dataclass
class Job:
    """The ranks of one job, and the folder over which they are told what to do."""

    folder: Path
    ranks: list[int]
    steps: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    exited_at: dict[int, float] = field(default_factory=dict)
    """When the exit of a rank was seen, by `time.monotonic`."""


class Lane:
    """Both nodes, the store, the checkpoints, and the job under way."""

    def __init__(self, nodes: Nodes, store: FaultyStore, folder: Path) -> None:
        self._nodes = nodes
        self._store = store
        self._folder = folder
        self._job: Job | None = None
        self._jobs = 0
        self._suits = ""
        self._cases = 0

    def run(self, case: Case) -> Row:
        if case.needs_nodes and not self._nodes.real:
            return Row(case.name, "not run: it needs root and iproute2", 0.0, [], seed_of(case), False)
        self._cases += 1
        if case.restarted:
            return self._run_restarted(case)
        return self._run(case)

    def end(self) -> list[str]:
        """Ends the job under way; what is wrong with how it ended."""
        job, self._job = self._job, None
        if job is None:
            return []
        self._write(job, Step())
        until = time.monotonic() + ENDS_S
        while len(self._exits(job)) < len(job.ranks) and time.monotonic() < until:
            time.sleep(0.02)
        wrong = [f"rank {rank}'s process did not end" for rank in job.ranks if rank not in job.exits]
        wrong += [
            f"rank {rank}'s process ended with {code}"
            for rank, code in sorted(job.exits.items())
            if code not in (0, -signal.SIGKILL, WATCHDOG)
        ]
        wrong += () if wrong else self._still_there()
        for node in self._nodes.nodes:
            node.clear()
        shutil.rmtree(job.folder)
        return wrong

    def _still_there(self) -> list[str]:
        """Processes and sockets on the nodes, where no job is."""
        found = []
        for node in self._nodes.nodes:
            told = node.left()
            if told["processes"]:
                found.append(f"{node.name} still runs {', '.join(told['processes'])[:200]}")
            if told["sockets"]:
                found.append(f"{node.name} has sockets {', '.join(told['sockets'])[:200]}")
        return found

    # --- one case ------------------------------------------------------------------------------------------------

    def _run(self, case: Case) -> Row:
        job = self._job_for(case)
        journal = self._folder / f"journal-{self._cases}"
        seed = seed_of(case)
        place = Place(self._folder / f"case-{self._cases}", self._nodes, self._store)
        place.prepare(case)
        self._store.plan(None if case.store is None else self._aimed(case))
        injection = self._injection(case, place, journal, seed)
        step = Step(case.journey, place.path(case), place.out(case), place.options(case), injection)
        begin = time.monotonic()
        number = self._write(job, step)
        endings = self._await(job, number, case, journal, begin)
        fired_at = fired(journal) if case.store is None else self._store.fired_at
        problems = [] if fired_at is not None else ["the fault did not fire"]
        retire = self._woken(case, job, number, endings)
        seen = self._judge(case, job, endings, fired_at or begin, problems)
        ends = [one.at for one in endings.values() if one.at]
        ends += [
            at
            for rank, at in job.exited_at.items()
            if rank not in case.role.ranks and job.exits[rank] == WATCHDOG
        ]
        seconds = max(ends, default=fired_at or begin) - (fired_at or begin)
        if case.fault == "network cut":
            self._nodes.join()
        problems += place.problems(case)
        if not retire:
            problems += self._left_files(case)
            # What an export has written stands there.
            goes_again = case.journey != "export" or bool(case.promise.errors)
            place.mend(case)
            if goes_again and (problems or case.fault not in WITHOUT_TRACES):
                problems += self._again(job, step)
            retire = bool(problems)
        if retire:
            files = self._left_files(case)
            problems += [*self.end(), *(one for one in files if one not in problems)]
        place.remove(case)
        return Row(case.name, seen, round(seconds, 1), problems, seed, fired_at is not None)

    def _again(self, job: Job, step: Step) -> list[str]:
        """What is wrong with the same journey without a fault."""
        self._store.plan(None)
        number = self._write(job, replace(step, fault="", options={**step.options, "stall_timeout_s": 30}))
        endings = self._await(job, number, None, None, time.monotonic())
        return [
            f"the next one on rank {rank}: {self._ended_as(job, rank, endings)}"
            for rank in job.ranks
            if rank not in endings or endings[rank].error
        ]

    def _woken(self, case: Case, job: Job, number: int, endings: dict[int, Ending]) -> bool:
        """Wakes a stopped rank, waits for what it makes of it; whether the job is of no further use."""
        if case.fault == "SIGSTOP":
            (rank,) = case.role.ranks
            self._node_of(rank).signal(f"rank{rank}", signal.SIGCONT)
            woken = self._endings_until(job, number, {rank}, time.monotonic() + WAKES_S)
            # When it ends is another question than when the others do.
            endings.update({rank: replace(one, at=0.0) for rank, one in woken.items()})
        return len(endings) < len(job.ranks) or case.promise.watchdog or case.fault == "network cut"

    def _judge(
        self, case: Case, job: Job, endings: dict[int, Ending], fired_at: float, problems: list[str]
    ) -> str:
        """Adds what was not promised to `problems`; what was seen in short."""
        promise = case.promise
        faulty = set(case.role.ranks) if case.store is None and case.fault != "network cut" else set()
        if case.fault in ("clock", "full disk") or case.fault.endswith("file"):
            faulty = set()
        changed = any(one.changed for one in endings.values())
        for rank in job.ranks:
            ending = endings.get(rank)
            if rank in faulty:
                problems += faulty_rank(case, rank, ending, self._exits(job).get(rank))
                # Before it has joined, a rank's own exception is its own.
                if case.fault != "raises" or case.stage.pattern == JOINING:
                    continue
            if ending is None:
                if promise.watchdog and job.exits.get(rank) == WATCHDOG:
                    problems += self._watchdog(case, job, rank)
                    took_s = job.exited_at[rank] - fired_at
                    if took_s > promise.within_s:
                        problems.append(
                            f"rank {rank}: exit after {took_s:.1f} s, promised {promise.within_s:.0f} s"
                        )
                else:
                    problems.append(f"rank {rank}: {self._ended_as(job, rank, endings)}")
                continue
            problems += [f"rank {rank}: {one}" for one in unlike(case, ending, fired_at, faulty, changed)]
        kinds = {endings[rank].error for rank in job.ranks if rank in endings and rank not in faulty}
        # Nothing can be agreed on with those who are cut off: what they have changed, or not, is their own.
        if len(kinds) > 1 and not promise.either and case.fault != "network cut":
            problems.append(f"ranks differ: {', '.join(sorted(kinds))}")
        told = [one for rank, one in endings.items() if rank not in faulty or case.fault == "raises"]
        seen = sorted({one.error or "done" for one in told})
        if any(code == WATCHDOG for code in job.exits.values()):
            seen.append(f"exit {WATCHDOG}")
        return ", ".join(seen) or "nothing"

    def _watchdog(self, case: Case, job: Job, rank: int) -> list[str]:
        said = Path(job.folder, f"rank{rank}.err").read_text(errors="replace")
        faulty = case.role.ranks[0]
        if f"ends with exit code {WATCHDOG}" in said and f"rank {faulty}" in said.rpartition("The cause")[2]:
            return []
        return [f"rank {rank}: exit code {WATCHDOG} without the cause: {said[-300:]}"]

    def _ended_as(self, job: Job, rank: int, endings: dict[int, Ending]) -> str:
        if rank in endings:
            return f"{endings[rank].error}: {endings[rank].message[:300]}"
        code = self._exits(job).get(rank)
        said = Path(job.folder, f"rank{rank}.err")
        if code is not None:
            return f"ended with exit code {code}: {said.read_text(errors='replace')[-300:]}"
        # Python then writes where each thread is.
        self._node_of(rank).signal(f"rank{rank}", signal.SIGABRT)
        until = time.monotonic() + ENDS_S
        while rank not in self._exits(job) and time.monotonic() < until:
            time.sleep(0.05)
        # The main thread's come last, the innermost first.
        main_thread = said.read_text(errors="replace").rpartition("(most recent call first)")[2]
        frames = re.findall(r'File "[^"]*/(\S+)", line (\d+) in (\S+)', main_thread)
        return "hangs in " + " < ".join(f"{file}:{line} {name}" for file, line, name in frames[:20])

    def _left_files(self, case: Case) -> list[str]:
        """What the case left on the nodes' own disks. What is kept in a cache on purpose is no such thing."""
        if "cache_size" in case.options or (case.journey == "export" and case.fault == "SIGKILL"):
            return []  # Kept on purpose; or nobody is left to remove it.
        until = time.monotonic() + SETTLED_S
        while True:
            found = [path for node in self._nodes.nodes for path in node.left()["files"]]
            left = [path for path in found if not ALLOWED.match(path) and not is_given(path)]
            if not left or time.monotonic() > until:
                return [f"left behind: {path}" for path in left]
            time.sleep(0.05)

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _job_for(self, case: Case) -> Job:
        suits = f"{case.journey} {case.source == 'small file'}"
        if suits != self._suits:
            self.end()
        if self._job is None:
            self._job = self._start(alone=case.journey == "export")
            self._suits = suits
        return self._job

    def _start(self, *, alone: bool) -> Job:
        self._jobs += 1
        folder = self._folder / f"job-{self._jobs}"
        folder.mkdir()
        world_size = 1 if alone else WORLD_SIZE
        job = Job(folder, list(range(world_size)))
        for rank in job.ranks:
            node = self._node_of(rank)
            env = self.environment(rank, world_size)
            node.start(f"rank{rank}", [str(WORKER), str(folder)], env, str(folder / f"rank{rank}"))
        return job

    def environment(self, rank: int, world_size: int) -> dict[str, str]:
        node = self._node_of(rank)
        alone = world_size == 1
        env = rank_environment(
            rank, world_size, local_rank=rank % RANKS_OF_NODE, local_world_size=1 if alone else RANKS_OF_NODE,
            node=rank // RANKS_OF_NODE, n_nodes=1 if alone else 2, port=FIRST_PORT + self._jobs,
        )  # fmt: skip
        env |= {
            "MASTER_ADDR": self._nodes[0].address,
            "PYTHONPATH": self._python_path(),
            "TMPDIR": node.disks["tmp"],
            "DS_ACCELERATOR": "cpu",
            "FAULTS_EXPECTED": str(self._folder / "expected.pt"),
            "FAULTS_SMALL": node.disks["small"],
        }
        if self._nodes.real:
            env.pop("RANKLOAD_CACHE_HOME")  # In memory, as by default: nobody else's is there.
        return env

    def _python_path(self) -> str:
        return os.pathsep.join(filter(None, (str(HERE), str(SUPPORT), os.environ.get("PYTHONPATH", ""))))

    def _node_of(self, rank: int) -> Any:
        return self._nodes[rank // RANKS_OF_NODE]

    def _exits(self, job: Job) -> dict[int, int]:
        ended = {name: code for node in self._nodes.nodes for name, code in node.ended().items()}
        job.exits = {rank: ended[f"rank{rank}"] for rank in job.ranks if f"rank{rank}" in ended}
        for rank in job.exits:
            job.exited_at.setdefault(rank, time.monotonic())
        return job.exits

    def _write(self, job: Job, step: Step) -> int:
        number, job.steps = job.steps, job.steps + 1
        part = job.folder / "step.part"
        part.write_text(json.dumps(asdict(step)))
        part.rename(job.folder / f"step-{number}.json")
        return number

    def _await(
        self, job: Job, number: int, case: Case | None, journal: Path | None, begin: float
    ) -> dict[int, Ending]:
        """How the ranks ended that end by themselves; cuts the network when the case asks for it."""
        waits = set(job.ranks)
        if case is not None and case.fault == "SIGSTOP":
            waits -= set(case.role.ranks)
        within = PATIENCE_S + (case.promise.within_s if case is not None else 0.0)
        if case is not None and case.fault == "network cut" and journal is not None:
            while fired(journal) is None and time.monotonic() < begin + within and not self._exits(job):
                time.sleep(0.005)
            self._nodes.partition(case.role.node)
            Path(f"{journal}.done").touch()
        return self._endings_until(job, number, waits, time.monotonic() + within)

    def _endings_until(self, job: Job, number: int, ranks: set[int], until: float) -> dict[int, Ending]:
        endings: dict[int, Ending] = {}
        while time.monotonic() < until:
            gone = self._exits(job)
            for rank in ranks - endings.keys():
                answer = job.folder / f"step-{number}.rank-{rank}.json"
                if answer.exists():
                    endings[rank] = Ending(**json.loads(answer.read_text()))
            if ranks <= endings.keys() | gone.keys():
                break
            time.sleep(0.02)
        return endings

    # --- faults --------------------------------------------------------------------------------------------------

    def _aimed(self, case: Case) -> Any:
        assert case.store is not None
        if case.role.name == "both nodes":
            return case.store
        return replace(case.store, clients=frozenset({self._nodes[case.role.node].address}))

    def _injection(self, case: Case, place: Place, journal: Path, seed: int) -> str:
        kind, target = case.fault, ""
        if case.store is not None:
            if case.store.at_once:
                return ""
            kind, target = "store", self._store.url(ARM)
        elif case.fault == "network cut":
            kind = "harness"
        elif case.fault == "full disk":
            target = self._nodes[case.role.node].disks["small"]
        elif case.fault.endswith("file"):
            target = place.path(case)
        ranks = (case.role.ranks[0],) if case.store is None else (0,)
        return Injection(
            kind, case.stage.pattern, ranks, str(journal), seed, case.stage.moved, target
        ).encode()

    # --- torchrun's agents ---------------------------------------------------------------------------------------

    def _run_restarted(self, case: Case) -> Row:
        """The same under an agent on each node, which starts its ranks again."""
        problems = self.end()
        self._jobs += 1
        self._suits = ""
        folder = self._folder / f"job-{self._jobs}"
        folder.mkdir()
        job, journal, seed = Job(folder, [0, 1]), folder / "journal", seed_of(case)
        place = Place(self._folder / f"case-{self._cases}", self._nodes, self._store)
        place.prepare(case)
        self._store.plan(None)
        injection = self._injection(case, place, journal, seed)
        self._write(job, Step(case.journey, place.path(case), "", place.options(case), injection))
        for number, node in enumerate(self._nodes.nodes):
            env = {**self.environment(number * RANKS_OF_NODE, WORLD_SIZE), "PYTHONPATH": self._python_path()}
            for name in (
                "RANK",
                "LOCAL_RANK",
                "WORLD_SIZE",
                "LOCAL_WORLD_SIZE",
                "GROUP_RANK",
                "GROUP_WORLD_SIZE",
            ):
                del env[name]
            command = [
                str(HERE / "agent.py"), "--nnodes=2", f"--nproc-per-node={RANKS_OF_NODE}", "--max-restarts=2",
                "--rdzv-backend=c10d", f"--rdzv-endpoint={self._nodes[0].address}:{FIRST_PORT + self._jobs}",
                "--rdzv-id=faults", "--monitor-interval=0.2", str(WORKER), str(folder), "once",
            ]  # fmt: skip
            node.start(f"rank{number}", command, env, str(folder / f"rank{number}"))
        until = time.monotonic() + AGENTS_S
        while len(self._exits(job)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        fired_at = fired(journal)
        endings = {
            rank: Ending(**json.loads(told.read_text()))
            for rank in range(WORLD_SIZE)
            if (told := folder / f"rank-{rank}.json").exists()
        }
        problems += [] if fired_at is not None else ["the fault did not fire"]
        for rank in range(WORLD_SIZE):
            if rank not in endings:
                problems.append(f"rank {rank} did not come to its end")
            else:
                problems += [
                    f"rank {rank}: {one}" for one in unlike(case, endings[rank], fired_at or 0, set(), False)
                ]
        for number in (0, 1):
            if job.exits.get(number) != 0:
                said = (folder / f"rank{number}.err").read_text(errors="replace")[-300:]
                problems.append(f"the agent of node {number} ended with {job.exits.get(number)}: {said}")
        seconds = max((one.at - (fired_at or one.at) for one in endings.values()), default=0.0)
        problems += [*self._left_files(case), *(() if problems else self._still_there())]
        for node in self._nodes.nodes:
            node.clear()
        shutil.rmtree(folder)
        place.remove(case)
        seen = ", ".join(sorted({one.error or "restored" for one in endings.values()}))
        return Row(case.name, seen, round(seconds, 1), problems, seed, fired_at is not None)


def seed_of(case: Case) -> int:
    """Of what is left to chance in a case: the same in each run."""
    return int(hashlib.sha256(case.name.encode()).hexdigest()[:6], 16)


def fired(journal: Path) -> float | None:
    """When the fault of a process did happen, by `time.monotonic`."""
    with contextlib.suppress(FileNotFoundError):
        lines = journal.read_text().splitlines()
        if lines:
            return float(json.loads(lines[0])["at"])
    return None


def faulty_rank(case: Case, rank: int, ending: Ending | None, exit_code: int | None) -> list[str]:
    """What is wrong with how the rank ended that had the fault."""
    wanted = {"SIGKILL": -signal.SIGKILL, "os._exit(0)": 0}.get(case.fault)
    if wanted is not None:
        if ending is None and exit_code == wanted:
            return []
        return [f"the faulty rank {rank} ended with exit code {exit_code}, not {wanted}"]
    if case.fault == "SIGSTOP" and ending is None and case.promise.watchdog and exit_code == WATCHDOG:
        return []
    if ending is None:
        return [f"the faulty rank {rank} {'hangs' if exit_code is None else f'ended with {exit_code}'}"]
    if case.fault == "sys.exit(0)" and ending.error != "SystemExit":
        return [f"the faulty rank {rank} ended by {ending.error}: {ending.message[:200]}"]
    if case.fault == "raises" and case.promise.keeps_cause and not ending.injected:
        return [f"rank {rank}'s own exception is no cause of {ending.error}: {ending.message[:200]}"]
    if case.fault == "SIGSTOP" and case.promise.errors and not ending.error and not case.promise.either:
        return [f"the woken rank {rank} believes that all went well"]
    return [f"rank {rank} left behind: {', '.join(ending.left)}"] if ending.left else []


def unlike(case: Case, ending: Ending, fired_at: float, faulty: set[int], changed: bool) -> Iterator[str]:
    """What is not as promised in how one rank ended."""
    promise = case.promise
    said = f"{ending.error}: {ending.message[:300]}" if ending.error else "went well"
    if ending.at - fired_at > promise.within_s:
        yield f"after {ending.at - fired_at:.1f} s, promised {promise.within_s:.0f} s"
    if ending.left:
        yield f"left behind: {', '.join(ending.left)}"
    if promise.either and not ending.error:
        if not ending.restored:
            yield "what was restored is not the checkpoint's"
        return
    if not promise.errors:
        if ending.error:
            yield said
        elif case.journey.startswith(("load", "autoresume")) and not ending.restored:
            yield "what was restored is not the checkpoint's"
        return
    allowed = promise.errors | ({"PartialRestoreError"} if promise.partial else frozenset())
    if ending.error not in allowed:
        yield f"{said}, promised {' or '.join(sorted(promise.errors))}"
        return
    if ending.changed and ending.error != "PartialRestoreError":
        yield f"was changed, and does not say so: {said}"
    if ending.error == "PartialRestoreError" and not changed and not case.stage.moved:
        yield f"no rank was changed: {said}"
    for rank in faulty if promise.names_rank else ():
        if f"rank {rank}" not in ending.message and ending.met_by != rank:
            yield f"does not name rank {rank}: {said}"
    for word in promise.words:
        if word not in ending.message:
            yield f"does not say {word!r}: {said}"


def is_given(path: str) -> bool:
    """Whether the harness itself put the file on a node's disk."""
    return os.path.basename(path) in (FILLER, "big.pt", "big.pt.sha256") and "/cache/" not in path


class Place:
    """Where a case reads and writes: a folder that both nodes see."""

    def __init__(self, folder: Path, nodes: Nodes, store: FaultyStore) -> None:
        self._folder = folder
        self._nodes = nodes
        self._store = store
        self._before: dict[str, str] = {}
        self._made = folder.parent / "made"

    def prepare(self, case: Case) -> None:
        self._folder.mkdir()
        big = self._made / "big.pt"
        if case.source in ("local", "file"):
            for side in ("", ".sha256"):
                shutil.copy(f"{big}{side}", self._folder)
        elif case.source == "runs":
            shutil.copytree(self._made / "runs", self._folder / "runs")
        elif case.source == "folder":
            shutil.copytree(self._made / "s3-w4", self._folder / "run")
        elif case.source == "small file":
            for side in ("", ".sha256"):
                shutil.copy(f"{big}{side}", self._small())
        self._before = self._sums(case)

    def path(self, case: Case) -> str:
        return {
            "http": self._store.url("/big.pt"),
            "local": str(self._folder / "big.pt"),
            "file": str(self._folder / "big.pt"),
            "runs": str(self._folder / "runs"),
            "engine folder": str(self._made / "s3-w4"),
            "folder": str(self._folder / "run"),
            "small file": f"{self._nodes[0].disks['small']}/big.pt",
        }[case.source]

    def out(self, case: Case) -> str:
        if case.journey == "export":
            small = self._nodes[0].disks["small"]
            return f"{small}/exported" if case.fault == "full disk" else str(self._folder / "exported")
        return "new" if case.journey == "save of an engine" else ""

    def options(self, case: Case) -> dict[str, Any]:
        return {"stall_timeout_s": case.stall_timeout_s, **case.options}

    def problems(self, case: Case) -> list[str]:
        """What is wrong with what lies there after a save or an export that failed."""
        if not case.promise.errors and case.fault != "SIGKILL":
            return []
        if case.journey == "export":
            out = self._nodes[0].inside(self.out(case)) if case.fault == "full disk" else Path(self.out(case))
            found = sorted(path.name for path in out.rglob("*") if path.is_file())
            # One that is whole has its name; its index and manifest come after all files.
            whole = [name for name in found if not name.endswith(".part")]
            left = [] if case.fault == "SIGKILL" else found
            return [f"looks like an export: {name}" for name in whole] + [f"left: {name}" for name in left]
        if not case.journey.startswith("save"):
            return []
        after = self._sums(case)
        gone = [name for name, value in self._before.items() if after.get(name) != value]
        if (
            case.fault == "SIGSTOP"
            and (self._folder / "big.pt.sha256").exists()
            and after.get("big.pt", "no") in (self._folder / "big.pt.sha256").read_text()
        ):
            gone = []  # Once it woke, it has put the new one there, which is whole.
        problems = [f"the checkpoint before is not as it was: {', '.join(gone)}"] if gone else []
        parts = [name for name in after if ".part" in name]
        if parts and case.fault not in ("SIGKILL", "SIGSTOP", "network cut"):
            problems.append(f"left: {', '.join(parts[:3])}")
        return problems

    def mend(self, case: Case) -> None:
        """Makes good what the fault has done to files and disks."""
        if case.source == "local":
            shutil.copy(self._made / "big.pt", self._folder)
        for node in self._nodes.nodes:
            small = node.inside(node.disks["small"])
            (small / FILLER).unlink(missing_ok=True)
            shutil.rmtree(small / "exported", ignore_errors=True)

    def remove(self, case: Case) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if "cache_size" in case.options:
            # What is kept on purpose would spare the next case its fault.
            for node in self._nodes.nodes:
                for kept in node.inside(node.disks["tmp"]).glob("rankload-*"):
                    shutil.rmtree(kept)

    def _small(self) -> Path:
        return self._nodes[0].inside(self._nodes[0].disks["small"])

    def _sums(self, case: Case) -> dict[str, str]:
        root = self._small() if case.source == "small file" else self._folder
        found = {}
        for path in root.rglob("*"):
            if path.is_file() and path.name not in (FILLER, "latest"):
                # A rank that was woken may still tidy up.
                with contextlib.suppress(FileNotFoundError):
                    found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def make_checkpoints(folder: Path) -> None:
    """Those that cases read, and what they must restore to."""
    import torch
    from rank_worker import plain_state, tensors_of
    from zero_folders import unpack_zero

    from rankload import save_checkpoint

    made = folder / "made"
    (made / "runs").mkdir(parents=True)
    expected = {}
    for name, seed in (("big.pt", 2), ("runs/step1.pt", 3), ("runs/step2.pt", 4)):
        state = plain_state(seed)
        save_checkpoint(made / name, state, extra={"epoch": seed, "step": seed})
        expected[Path(name).name] = tensors_of(state)
    torch.save(expected, folder / "expected.pt")
    unpack_zero(3, made)


@contextlib.contextmanager
def lane(*, engines: bool = True) -> Iterator[Lane]:
    """A lane of its own. Without `engines`, the nodes start sooner, and those of DeepSpeed start late."""
    # Not in the temporary folder: a node's own is another one.
    with tempfile.TemporaryDirectory(prefix="faults-", dir=os.environ.get("FAULTS_FOLDER")) as made:
        folder = Path(made)
        make_checkpoints(folder)
        with two_nodes(folder, preload=(*PRELOAD, *(("deepspeed",) if engines else ()))) as nodes:
            objects = {
                f"/{name}": (folder / "made" / name).read_bytes() for name in ("big.pt", "big.pt.sha256")
            }
            with faulty_store(nodes.outside, objects) as store:
                made_lane = Lane(nodes, store, folder)
                try:
                    yield made_lane
                finally:
                    made_lane.end()


def main() -> None:
    cases = {case.name: case for case in ALL}
    with lane(engines="--engines" in sys.argv) as running:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            row = running.run(cases[line.rstrip("\n")])
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
