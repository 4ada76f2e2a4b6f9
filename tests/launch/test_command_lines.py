"""The launchers' command lines, and how that of ``rankload run`` is taken apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rankload.distributed.launchers import read_claim
from rankload.launch import command_lines
from rankload.launch.command_lines import (
    Job,
    Place,
    agents_everywhere,
    command_line,
    first_of_hosts,
    split_words,
)
from rankload.launch.ranked import first_host, name_variables
from rankload.launch.ranked import main as ranked_main
from rankload.loader.errors import OptionError

OWN = {"--resume": True, "--json": False, "--help": False}
PLACE = Place(Path("/records"), 4000)
RANKED = ["-m", "rankload.launch.ranked"]


@pytest.mark.parametrize(
    ("words", "own", "launcher", "script"),
    [
        ("train.py --json x", "", "", "train.py --json x"),
        ("--json train.py", "--json", "", "train.py"),
        (
            "--nnodes 1:2 --resume run --standalone train.py",
            "--resume run",
            "--nnodes 1:2 --standalone",
            "train.py",
        ),
        ("--resume=run.py -n 2 train.py -- a.py", "--resume=run.py", "-n 2", "train.py -- a.py"),
        ("--resume run.py train.py", "--resume run.py", "", "train.py"),
        ("-n 2 -m package.job --resume x", "", "-n 2", "-m package.job --resume x"),
        ("--module package.job", "", "", "-m package.job"),
        ("-x FILE=a.py.txt -- ./train --json", "", "-x FILE=a.py.txt", "./train --json"),
        ("-- -m package.job", "", "", "-m package.job"),
        ("--json ./train", "--json", "./train", ""),
        ("--resume", "--resume", "", ""),
    ],
)
def test_a_command_line_taken_apart(words: str, own: str, launcher: str, script: str) -> None:
    found = split_words(words.split(), OWN)
    assert [" ".join(part) for part in (found.own, found.launcher, found.script)] == [own, launcher, script]


def line(launcher: Any, *options: str, **fields: Any) -> list[str]:
    return command_line(Job(launcher=launcher, script=["train.py", "x"], options=options, **fields), PLACE)


def test_torchrun() -> None:
    told = ["--records", "/records", "--", "train.py", "x"]
    start = [sys.executable, "-m", "rankload.launch.elastic", "/records"]
    alone = ["--standalone", "--local-addr", "127.0.0.1"]
    assert line("torchrun", nproc_per_node="8", resume="run") == [
        *start, *alone, "--nproc-per-node", "8", *RANKED, *told,
    ]  # fmt: skip
    assert line("torchrun", "--max-restarts", "3") == [*start, *alone, "--max-restarts", "3", *RANKED, *told]
    for option in ("--nnodes=1:2", "--rdzv_endpoint=a:1", "--node-rank=1", "--master_addr=a", "--standalone"):
        assert line("torchrun", option) == [*start, option, *RANKED, *told]


def test_deepspeed() -> None:
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    told = ["--module", RANKED[1], "--records", "/records"]
    assert line("deepspeed", nproc_per_node="8", resume="run") == [
        *start, "--master_port", "4000", "--num_gpus", "8", *told, "--", "train.py", "x",
    ]  # fmt: skip
    by_ssh = ("--hostfile", "hosts")
    assert line("deepspeed", *by_ssh, resume="run") == [
        *start, *by_ssh, *told, "--resume", "run", "--", "train.py", "x",
    ]  # fmt: skip
    alone = (*by_ssh, "--no_ssh", "--node_rank", "1")
    assert line("deepspeed", *alone, resume="run") == [*start, *alone, *told, "--", "train.py", "x"]


def test_srun() -> None:
    python = [sys.executable, "-u", *RANKED, "--master-port", "4000", "--records", "/records"]
    assert line("slurm", "-n", "16", nproc_per_node="8", resume="run") == [
        "srun", "-n", "16", "--kill-on-bad-exit=1", "--ntasks-per-node=8", *python, "--resume", "run",
        "--", "train.py", "x",
    ]  # fmt: skip
    for option in ("-K0", "--kill-on-bad-exit=0"):
        assert line("slurm", option)[:3] == ["srun", option, python[0]]


@pytest.mark.parametrize("open_mpi", [True, False])
def test_mpirun(open_mpi: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command_lines, "is_open_mpi", lambda: open_mpi)
    python = [sys.executable, "-u", *RANKED, "--master-port", "4000"]
    told = ["--records", "/records", "--", "train.py", "x"]
    assert line("mpi", "--quiet", nproc_per_node="2") == ["mpirun", "-n", "2", "--quiet", *python, *told]
    each = ["--map-by", "ppr:2:node"] if open_mpi else ["-ppn", "2"]
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\n\na:4 slots=2\nb\n")
    for options in (
        ("--host", "a:8,b:8"),
        ("-H", "a,b"),
        ("--hostfile", str(hosts)),
        (f"--hostfile={hosts}",),
    ):
        assert line("mpi", *options, nproc_per_node="2") == [
            "mpirun", *each, *options, *python, "--master-addr", "a", *told,
        ]  # fmt: skip
    assert first_of_hosts(["--hostfile", "/not/here"]) is None


def test_the_loads_variables_reach_the_nodes_that_a_launcher_reaches_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun and ssh leave most of the environment behind."""
    chosen = {"RANKLOAD_CACHE_DIR": "/fast/a=b", "RANKLOAD_MODE": "direct"}
    told = ["--variable", "RANKLOAD_CACHE_DIR=/fast/a=b", "--variable", "RANKLOAD_MODE=direct"]
    for launcher, options in (("slurm", ()), ("mpi", ()), ("deepspeed", ("--hostfile", "hosts"))):
        words = line(launcher, *options, variables=chosen)
        assert words[words.index("--records") + 2 :] == [*told, "--", "train.py", "x"]
    for launcher in ("torchrun", "deepspeed"):
        assert "--variable" not in line(launcher, variables=chosen)
    script = tmp_path / "script.py"
    script.write_text(f"import os\nassert {chosen!r}.items() <= os.environ.items()\n")
    monkeypatch.setattr("rankload.launch.ranked.read_claim", lambda *_: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in chosen:
        monkeypatch.setenv(name, "")
    ranked_main(["--records", str(tmp_path), *told, "--", str(script)])


def test_what_is_no_python_is_refused() -> None:
    with pytest.raises(OptionError, match="--no-python: rankload run starts a Python script"):
        line("torchrun", "--no-python")


def test_who_fetches() -> None:
    for launcher, options, everywhere in (
        ("torchrun", (), True),
        ("deepspeed", (), True),
        ("deepspeed", ("--hostfile", "h"), False),
        ("deepspeed", ("-H", "h", "--no_ssh"), True),
        ("slurm", (), False),
        ("mpi", (), False),
    ):
        job: Any = Job(launcher=launcher, script=["x.py"], options=options)
        assert agents_everywhere(job) == everywhere


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("a[1-3,7],b", "a1"),
        ("a[003-005]", "a003"),
        ("a[7,9]-ib", "a7-ib"),
        ("rack-1-node2,rack-1-node3", "rack-1-node2"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_variables_that_torch_reads() -> None:
    slurm = {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "n[05-06]",
    }  # fmt: skip
    environ = dict(slurm)
    name_variables(environ, read_claim(environ, ()), address=None, port="4000")
    assert {name: environ[name] for name in environ.keys() - slurm.keys()} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n05", "MASTER_PORT": "4000",
    }  # fmt: skip
    assert read_claim(environ, ()) is not None, "they agree with Slurm's own"

    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": "5000"}  # fmt: skip
    name_variables(mpi, read_claim(mpi, ()), address="a", port="4000")
    assert (mpi["MASTER_ADDR"], mpi["MASTER_PORT"]) == ("127.0.0.1", "5000")
    mpi |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "LOCAL_RANK": "0"}
    del mpi["MASTER_ADDR"]
    name_variables(mpi, read_claim(mpi, ()), address="a", port="4000")
    assert mpi["MASTER_ADDR"] == "a"

    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
                "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "1"}  # fmt: skip
    before = dict(torchrun)
    name_variables(torchrun, read_claim(torchrun, ()), address=None, port=None)
    assert torchrun == before
