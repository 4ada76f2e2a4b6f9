"""``rankload run`` with real launchers: jobs that are killed go on where they were, and nothing is left running.

The losses of each job are compared with those of one that was never stopped. mpirun and Slurm are tried where they are
installed; Slurm's own daemons then run on this machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import REPOSITORY, SUPPORT
from processes import INHERITED_LAUNCHERS, free_port
from rankload.launch.children import descendants
from rankload.launch.command_lines import Job, is_open_mpi
from rankload.launch.running import run as run_job
from server_process import or_skip
from slurm_cluster import slurm_cluster

JOB = SUPPORT / "launched_job.py"
TRAIN = REPOSITORY / "configs" / "train.py"
DEADLINE_S = 150.0
STEPS = 6
OPEN_MPI = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


@dataclass
class Started:
    """A process of ``rankload run``."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def report(self) -> list[str]:
        return [
            line.removeprefix("rankload run: ")
            for line in self.said.splitlines()
            if line.startswith("rankload run: ")
        ]

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def wait_until(self, seen: Callable[[], bool]) -> None:
        until = time.monotonic() + DEADLINE_S
        while not seen():
            assert self.process.poll() is None, self.said[-6000:]
            assert time.monotonic() < until, self.said[-6000:]
            time.sleep(0.05)


def environment(**extra: str) -> dict[str, str]:
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(INHERITED_LAUNCHERS)
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    variables.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", RANKLOAD_CACHE_HOME="disk"
    )
    return {**variables, **extra}


@contextlib.contextmanager
def started(
    folder: Path, *words: object, name: str = "job", env: Mapping[str, str] | None = None
) -> Iterator[Started]:
    """``rankload run WORDS``; at the end of the block it must have ended, and all that it started with it."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rankload", "run", *map(str, words)],
            cwd=folder,
            env=environment() if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Started(process, log)
        assert process.poll() is not None, "the test left it running"
        assert processes_in(folder) == []
    finally:
        family = descendants(process.pid) if process.poll() is None else []
        for pid in {process.pid, *family, *processes_in(folder)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def run(
    folder: Path, *words: object, name: str = "job", env: Mapping[str, str] | None = None
) -> tuple[int, Started]:
    with started(folder, *words, name=name, env=env) as job:
        return job.wait(), job


def processes_in(folder: Path) -> list[int]:
    """The processes whose current folder it is: those of the jobs that were started there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "cwd").readlink() == folder:
                    found.append(int(entry.name))
    return found


def losses(folder: Path, run_name: str = "run") -> dict[int, list[float]]:
    """Those of each step, in the order in which they were computed."""
    found: dict[int, list[float]] = {}
    path = folder / f"{run_name}.losses"
    for line in path.read_text().splitlines() if path.exists() else ():
        step, loss = line.split()
        found.setdefault(int(step), []).append(float(loss))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of two ranks that were never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    code, job = run(folder, "--nproc-per-node", 2, JOB, folder / "run", "--steps", STEPS)
    assert code == 0, job.said[-6000:]
    assert job.report == []
    assert "COLD START" in job.said
    return {step: one[0] for step, one in losses(folder).items()}


@pytest.mark.whole_jobs
def test_torchrun_restarts_and_the_losses_go_on(whole: dict[int, float], tmp_path: Path) -> None:
    saved = tmp_path / "run"
    code, job = run(
        tmp_path, "--nproc-per-node", 2, "--max-restarts", 1, "--resume", saved,
        JOB, saved, "--steps", STEPS, "--kill-at", 3,
    )  # fmt: skip
    assert code == 0, job.said[-6000:]
    seen = losses(tmp_path)
    assert {step: len(one) for step, one in seen.items()} == {1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1}
    assert all(loss == whole[step] for step, one in seen.items() for loss in one)
    assert job.said.count("of 2 resumes after step 2") == 2
    assert len(job.report) == 2
    assert re.fullmatch(
        r"restart 1: rank 1 failed first \(host .+, pid \d+, after [\d.]+ s\): killed by SIGKILL",
        job.report[0],
    )
    assert job.report[1] == "torchrun ended with exit code 0"


@pytest.mark.whole_jobs
def test_torchrun_goes_on_at_a_smaller_size(tmp_path: Path) -> None:
    steps = ("--steps", STEPS, "--dropout", 0)
    code, job = run(tmp_path, "--nproc-per-node", 2, JOB, tmp_path / "one", *steps, name="one")
    assert code == 0, job.said[-6000:]
    expected = losses(tmp_path, "one")

    saved = tmp_path / "run"
    conf = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    words = (
        "--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-id", "one",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-conf", conf, "--local-addr", "127.0.0.1",
        "--resume", saved, JOB, saved, *steps, "--cold-size", 2,
    )  # fmt: skip
    with started(tmp_path, *words, name="first") as first:
        # The agent that comes first hosts what agents meet in: it is the one that stays.
        first.wait_until(lambda: "COLD START" in first.said)
        second_folder = tmp_path / "second"
        second_folder.mkdir()
        with started(second_folder, *words, "--wait-at", 4) as second:
            first.wait_until(lambda: "waits, pid" in second.said)
            second.process.send_signal(signal.SIGTERM)
            assert second.wait() != 0
        assert "SIGTERM was passed to torchrun" in second.report
        assert first.wait() == 0, first.said[-6000:]
    assert "rank 0 of 1 resumes after step 4" in first.said
    seen = losses(tmp_path)
    assert sorted(seen) == list(range(1, STEPS + 1))
    for step, one in seen.items():
        assert one == pytest.approx(expected[step] * len(one), abs=1e-5)


@pytest.mark.whole_jobs
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path, "--nproc-per-node", 2, JOB, tmp_path / "run", "--steps", 2, "--wait-at", 1) as job:
        job.wait_until(lambda: job.said.count("waits, pid") == 2)
        pids = [int(pid) for pid in re.findall(r"waits, pid (\d+)", job.said)]
        job.process.send_signal(number)
        assert job.wait() == 1
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert job.report == [f"{number.name} was passed to torchrun", "torchrun ended with exit code 1"]


@pytest.mark.whole_jobs
def test_what_ignores_the_signal_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    with started(tmp_path, "--nproc-per-node", 2, "--grace", 1, script) as job:
        job.wait_until(lambda: job.said.count("ready") == 2)
        begin = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGKILL
        assert time.monotonic() - begin < 25, "torchrun itself waits for 30 s"
    assert job.report[0] == "SIGTERM was passed to torchrun"


@pytest.mark.whole_jobs
def test_sigusr1_reaches_the_ranks(tmp_path: Path) -> None:
    with started(tmp_path, "--nproc-per-node", 2, JOB, tmp_path / "run", "--steps", 2, "--wait-at", 1) as job:
        job.wait_until(lambda: job.said.count("waits, pid") == 2)
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait() == 0
    assert sorted(re.findall(r"rank \d got SIGUSR1", job.said)) == [
        "rank 0 got SIGUSR1",
        "rank 1 got SIGUSR1",
    ]


@pytest.mark.whole_jobs
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpi", marks=needs_mpirun)])
def test_the_rank_that_failed_first_is_named(launcher: str, tmp_path: Path) -> None:
    options = OPEN_MPI if launcher == "mpi" and is_open_mpi() else ()
    code, job = run(
        tmp_path, "--launcher", launcher, "--nproc-per-node", 2, *options, JOB, tmp_path / "run", "--steps", 4,
        "--raise-at", 3,
    )  # fmt: skip
    assert code != 0
    assert re.fullmatch(
        rf"rank 1 failed first \(host {re.escape(socket.gethostname())}, pid \d+, after [\d.]+ s\): ValueError: x",
        job.report[0],
    )
    assert re.fullmatch(rf"  at {re.escape(str(JOB))}:\d+ in disturb", job.report[1])
    assert all(line.startswith("  after it rank 0: ") for line in job.report[2:-1])
    program = {"mpi": "mpirun"}.get(launcher, launcher)
    assert job.report[-1] == f"{program} ended with exit code {code}"
    # The traceback begins with the script, as without rankload run.
    assert "ranked.py" not in job.said
    assert "runpy" not in job.said


@pytest.mark.whole_jobs
def test_the_report_as_json(tmp_path: Path) -> None:
    code, job = run(
        tmp_path, "--json", "--nproc-per-node", 2, JOB, tmp_path / "run", "--steps", 2, "--raise-at", 1
    )
    assert code == 1
    report = json.loads(job.said.splitlines()[-1])
    assert (report["command"], report["launcher"], report["exit_code"], report["ranks"]) == (
        "run",
        "torchrun",
        1,
        2,
    )
    assert (report["failures"][0]["rank"], report["failures"][0]["reason"]) == (1, "ValueError: x")
    assert report["restarts"] == []


@pytest.mark.whole_jobs
def test_a_module_and_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "job_of_tests.py").write_text(
        "import os, sys\nprint('seen', os.environ['RANK'], __name__, sys.argv[1:], sys.path[0], flush=True)\n"
    )
    code, job = run(tmp_path, "--nproc-per-node", 2, "-m", "job_of_tests", "--json", "--", "x")
    assert code == 0, job.said[-6000:]
    for rank in range(2):
        assert f"seen {rank} __main__ ['--json', '--', 'x'] {tmp_path}" in job.said


@pytest.mark.whole_jobs
def test_what_a_job_resumes_from_is_fetched_before_it_loads(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    served = tmp_path_factory.mktemp("served")
    shutil.copy(
        REPOSITORY / "tests" / "data" / "composer-monolithic-w2" / "ep2-ba8-rank0.pt", served / "ba8.pt"
    )
    size = (served / "ba8.pt").stat().st_size
    script = tmp_path / "waiting.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "folder, size = pathlib.Path(os.environ['RANKLOAD_CACHE_DIR']), int(sys.argv[1])\n"
        "until = time.monotonic() + 60\n"
        "while not any(one.is_file() and one.stat().st_size >= size for one in folder.rglob('*')):\n"
        "    assert time.monotonic() < until, sorted(folder.rglob('*'))\n"
        "    time.sleep(0.1)\n"
        "print('fetched', os.environ['RANKLOAD_RESUME'], flush=True)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "rankload.launch.demo_server", str(served)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/ba8.pt"
        code, job = run(tmp_path, "--resume", url, "--cache-dir", tmp_path / "cache", script, size)
        assert code == 0, job.said[-6000:]
        assert f"fetched {url}" in job.said
    finally:
        server.communicate(timeout=20)


@pytest.mark.whole_jobs
def test_a_fetch_that_fails_is_told_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, time\n"
        "log, until = pathlib.Path(__file__).with_name('job.log'), time.monotonic() + 60\n"
        "while 'fetched ahead' not in log.read_text():\n"
        "    assert time.monotonic() < until\n"
        "    time.sleep(0.1)\n"
    )
    url = f"http://user:secret@127.0.0.1:{free_port()}/run/last.pt?signature=secret"
    code, job = run(tmp_path, "--resume", url, script)
    assert code == 0, job.said[-6000:]
    assert "secret" not in job.said


def test_a_launcher_that_cannot_be_started_leaves_no_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    longer_than_linux_takes = "a" * 200_000
    job = Job(launcher="torchrun", script=["x.py", longer_than_linux_takes], resume="http://127.0.0.1:1/run")
    with pytest.raises(OSError, match="too long"):
        run_job(job)
    assert processes_in(tmp_path) in ([], [os.getpid()])


def test_wrong_command_lines(tmp_path: Path) -> None:
    for words, code, said in (
        (("--nproc-per-node", 2, "train"), 2, "no script"),
        (("-m",), 2, "no script"),
        (("--no-python", "train.py"), 2, "--no-python"),
        (("--launcher", "pdsh", "train.py"), 2, "pdsh"),
    ):
        ended, job = run(tmp_path, *words)
        assert (ended, "Traceback" in job.said) == (code, False), job.said
        assert said in job.said
    ended, job = run(tmp_path, "--launcher", "slurm", "train.py", env=environment(PATH="/nowhere"))
    assert ended == 3
    assert "NotFoundError: the command srun is not on this node's PATH" in job.said


@pytest.mark.whole_jobs
@needs_deepspeed
def test_deepspeed_on_two_nodes_goes_on(tmp_path: Path) -> None:
    """Two made-up nodes on this machine, a launcher on each, as without ssh."""
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")

    def run_nodes(name: str, *arguments: object, kill: bool = False) -> str:
        port = free_port()
        with contextlib.ExitStack() as stack:
            nodes = [
                stack.enter_context(
                    started(
                        tmp_path,
                        "--launcher",
                        "deepspeed",
                        "--hostfile",
                        hosts,
                        "--no_ssh",
                        "--node_rank",
                        node,
                        "--master_addr",
                        "127.0.0.1",
                        "--master_port",
                        port,
                        "--resume",
                        tmp_path / "run",
                        TRAIN,
                        "--save-every",
                        2,
                        *arguments,
                        name=f"{name}{node}",
                    )
                )
                for node in range(2)
            ]
            if kill:
                nodes[0].wait_until(lambda: "step 3 loss" in nodes[0].said)
                # Of the second node, the rank: not its launchers.
                ranks = [pid for pid in processes_in(tmp_path) if is_rank(pid, "1")]
                assert len(ranks) == 1
                os.kill(ranks[0], signal.SIGKILL)
                assert [node.wait() != 0 for node in nodes] == [True, True]
                assert "rank 1 failed first" in nodes[1].report[0]
                # DeepSpeed's launcher may ask how the rank ended before rankload has looked.
                assert re.search(
                    r"killed by SIGKILL|ended without an exception: killed\?", nodes[1].report[0]
                )
            else:
                assert [node.wait() for node in nodes] == [0, 0], [node.said[-4000:] for node in nodes]
            return nodes[0].said

    def shown(said: str) -> dict[int, str]:
        return {int(step): loss for step, loss in re.findall(r"step (\d+) loss (\S+)", said)}

    expected = shown(run_nodes("whole", "--until", 6))
    assert sorted(expected) == list(range(1, 7))
    save = ("--save", tmp_path / "run")
    before = shown(run_nodes("killed", "--until", 1000000, *save, kill=True))
    last = int((tmp_path / "run" / "latest").read_text().removeprefix("global_step"))
    assert last >= 2
    after = shown(run_nodes("resumed", "--until", max(6, last + 1), *save))
    assert min(after) == last + 1
    for seen in (before, after):
        assert all(loss == expected[step] for step, loss in seen.items() if step in expected)


def is_rank(pid: int, rank: str) -> bool:
    """Whether a process is the rank itself, by the variables that its launcher gave it."""
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return f"RANK={rank}".encode() in variables and b"rankload.launch.ranked" in Path(
            f"/proc/{pid}/cmdline"
        ).read_bytes().split(b"\0")
    return False


@pytest.mark.whole_jobs
@needs_mpirun
def test_mpirun_goes_on(whole: dict[int, float], tmp_path: Path) -> None:
    options = OPEN_MPI if is_open_mpi() else ()
    saved = tmp_path / "run"
    words = (
        "--launcher", "mpi", "--nproc-per-node", 2, *options, "--resume", saved, JOB, saved, "--steps", STEPS,
        "--kill-at", 3,
    )  # fmt: skip
    code, job = run(tmp_path, *words, name="killed")
    assert code != 0
    assert "rank 1 failed first" in job.report[0]
    code, job = run(tmp_path, *words, name="resumed")
    assert code == 0, job.said[-6000:]
    check_gone_on(tmp_path, whole)


def check_gone_on(folder: Path, whole: dict[int, float]) -> None:
    """A job of two ranks, killed after step 3, went on after step 2, with the losses of one that never stopped."""
    seen = losses(folder)
    assert {step: len(one) for step, one in seen.items()} == {1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1}
    assert all(loss == whole[step] for step, one in seen.items() for loss in one)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with or_skip(slurm_cluster(tmp_path_factory.mktemp("slurm"))) as variables:
        yield environment(SLURM_CONF=variables["SLURM_CONF"])


@pytest.mark.whole_jobs
def test_srun_goes_on(whole: dict[int, float], slurm: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "run"
    words = (
        "--launcher", "slurm", "-n", 2, "--resume", saved, JOB, saved, "--steps", STEPS, "--kill-at", 3,
    )  # fmt: skip
    code, job = run(tmp_path, *words, name="killed", env=slurm)
    assert code != 0
    assert "rank 1 failed first" in job.report[0]
    code, job = run(tmp_path, *words, name="resumed", env=slurm)
    assert code == 0, job.said[-6000:]
    check_gone_on(tmp_path, whole)


@pytest.mark.whole_jobs
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_tasks(number: signal.Signals, slurm: dict[str, str], tmp_path: Path) -> None:
    words = ("--launcher", "slurm", "-n", 2, JOB, tmp_path / "run", "--steps", 2, "--wait-at", 1)
    with started(tmp_path, *words, env=slurm) as job:
        job.wait_until(lambda: job.said.count("waits, pid") == 2)
        job.process.send_signal(number)
        assert job.wait() != 0
    assert f"{number.name} was passed to srun" in job.report


@pytest.mark.whole_jobs
def test_a_job_of_slurms_that_is_requeued_goes_on(
    whole: dict[int, float], slurm: dict[str, str], tmp_path: Path
) -> None:
    saved = tmp_path / "run"
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/usr/bin/env bash\n#SBATCH --ntasks=2\n#SBATCH --requeue\n#SBATCH --open-mode=append\n"
        f"#SBATCH --output={tmp_path}/slurm.out\n"
        f"'{sys.executable}' -m rankload run --launcher slurm --resume '{saved}' -- '{JOB}' '{saved}' "
        f"--steps {STEPS} --kill-at 3 || scontrol requeue $SLURM_JOB_ID\n"
    )
    output = tmp_path / "slurm.out"
    asked = subprocess.run(
        ["sbatch", "--parsable", script], env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0, asked.stderr
    number = asked.stdout.strip()
    try:
        until = time.monotonic() + DEADLINE_S
        while not output.exists() or output.read_text(errors="replace").count("is done") < 2:
            assert time.monotonic() < until, (
                output.read_text(errors="replace")[-6000:] if output.exists() else ""
            )
            time.sleep(0.2)
    finally:
        subprocess.run(["scancel", number], env=slurm, timeout=60, check=False)
    assert "killed" in output.read_text()
    check_gone_on(tmp_path, whole)
