"""The launch examples in configs/, run as they are: torchrun, deepspeed, mpirun, and Slurm with played commands."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY
from processes import INHERITED_LAUNCHERS, free_port
from rankload.launch.children import end
from rankload.launch.command_lines import is_open_mpi

CONFIGS = REPOSITORY / "configs"
DEADLINE_S = 120
STEPS = 3
OPEN_MPI = "--allow-run-as-root --oversubscribe --bind-to none"
"""What Open MPI wants for two ranks, of any user, on a machine of any size."""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

# What srun gives each task, for two tasks on one node.
SRUN = """#!/usr/bin/env bash
set -u
while [[ "$1" == --* ]]; do shift; done
pids=()
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
"""
SCONTROL = "#!/usr/bin/env bash\necho 127.0.0.1\n"


def environment(**extra: str) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(INHERITED_LAUNCHERS)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    scripts = str(Path(sys.executable).parent)
    variables.update(
        PYTHON=sys.executable,
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        RANKS="2",
        MASTER_PORT=str(free_port()),
        PATH=scripts + os.pathsep + variables["PATH"],
    )
    return {**variables, **extra}


def run(script: str, *arguments: object, cwd: Path, **extra: str) -> str:
    """What the launch example prints; its whole session ends with the deadline."""
    with (cwd / "output").open("w+") as output:
        process = subprocess.Popen(
            [str(CONFIGS / script), *map(str, arguments)],
            cwd=cwd,
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(DEADLINE_S)
        finally:
            end(process)
        output.seek(0)
        said = output.read()
    assert code == 0, said[-6000:]
    return said


def losses(said: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"step (\d+) loss (\S+)", said)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder saved after `STEPS` steps under torchrun, and the losses of a run that went two further.

    A loss is the mean over the ranks, each with dropout by its own random numbers.
    """
    folder = tmp_path_factory.mktemp("trained")
    save = ("--save", folder / "saved", "--save-at", STEPS)
    whole = losses(run("torchrun.sh", "--steps", STEPS + 2, *save, cwd=folder))
    assert sorted(whole) == list(range(1, STEPS + 3))
    assert (folder / "saved" / "latest").read_text() == f"global_step{STEPS}"
    return folder / "saved", whole


def check(said: str, whole: dict[int, str]) -> None:
    assert losses(said) == {step: whole[step] for step in (STEPS + 1, STEPS + 2)}, said
    assert "restored " in said  # the receipt


@pytest.mark.whole_jobs
@needs_deepspeed
def test_torchrun(trained, tmp_path):
    saved, whole = trained
    check(run("torchrun.sh", "--until", STEPS + 2, "--seed", 5, cwd=tmp_path, RESUME=str(saved)), whole)


@pytest.mark.whole_jobs
@needs_deepspeed
def test_one_checkpoint_by_its_path(trained, tmp_path):
    saved, whole = trained
    check(run("torchrun.sh", "--steps", 2, "--seed", 5, "--load", saved, cwd=tmp_path), whole)


@pytest.mark.whole_jobs
@needs_deepspeed
def test_one_checkpoint_by_its_url(trained, published, tmp_path):
    saved, whole = trained
    with published("http", saved) as place:
        said = run("torchrun.sh", "--steps", 2, "--seed", 5, "--load", place.uri, cwd=tmp_path)
    check(said, whole)


@pytest.mark.whole_jobs
@needs_deepspeed
def test_a_run_in_a_bucket(trained, published, tmp_path):
    """It goes on from what lies there, and saves there."""
    saved, whole = trained
    with published("s3", saved) as place:
        env = {**place.env, "RESUME": place.uri}
        save = ("--save", place.uri)
        first = run("torchrun.sh", "--until", STEPS + 1, "--seed", 5, *save, cwd=tmp_path, **env)
        second = run("torchrun.sh", "--until", STEPS + 2, "--seed", 6, cwd=tmp_path, **env)
    assert losses(first) == {STEPS + 1: whole[STEPS + 1]}
    assert losses(second) == {STEPS + 2: whole[STEPS + 2]}


@pytest.mark.whole_jobs
@needs_deepspeed
def test_deepspeed_launcher(trained, tmp_path):
    saved, whole = trained
    check(run("deepspeed.sh", "--steps", 2, "--seed", 5, cwd=tmp_path, RESUME=str(saved)), whole)


@pytest.mark.whole_jobs
@needs_deepspeed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_mpirun(trained, tmp_path):
    saved, whole = trained
    options = {"OPTIONS": OPEN_MPI} if is_open_mpi() else {}
    said = run("mpi.sh", "--steps", 2, "--seed", 5, cwd=tmp_path, RESUME=str(saved), **options)
    check(said, whole)


@pytest.mark.whole_jobs
@needs_deepspeed
def test_slurm(trained, tmp_path):
    saved, whole = trained
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "PATH": str(commands) + os.pathsep + environment()["PATH"],
    }
    said = run("slurm.sbatch", "--steps", 2, "--seed", 5, cwd=tmp_path, RESUME=str(saved), **slurm)
    check(said, whole)


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.takes_long), pytest.param(3, marks=pytest.mark.takes_long)],
    ids="stage-{}".format,
)
def followed(request, tmp_path_factory):
    """The examples, with a training script that notes its samples; a folder that two ranks saved, and their whole run.

    In fp32 and without dropout, so that the losses of other numbers of ranks can be compared.
    """
    folder = tmp_path_factory.mktemp("followed")
    shutil.copytree(CONFIGS, folder / "configs")
    script = folder / "configs" / "train.py"
    head = "    def __getitem__(self, index):\n"
    assert script.read_text().count(head) == 1
    note = '        print(index, file=open(f"samples-{os.environ[\'RANK\']}", "a"))\n'
    script.write_text(script.read_text().replace(head, head + note))
    config = json.loads((CONFIGS / f"zero{request.param}.json").read_text())
    del config["bf16"]
    config["train_batch_size"] = 12
    (folder / "configs" / "zero1.json").write_text(json.dumps(config))
    return folder, follow(folder, folder, 2, "--save", "saved", "--save-at", 6)


def follow(folder: Path, cwd: Path, ranks: int, *arguments: object, **extra: str) -> tuple[list[int], dict]:
    """Trains until step 12: the samples in the order of the global batches, and each step's loss and learning rate."""
    script = folder / "configs" / "torchrun.sh"
    said = run(script, "--until", 12, "--dropout", 0, *arguments, cwd=cwd, RANKS=str(ranks), **extra)
    of_ranks = [(cwd / f"samples-{rank}").read_text().split() for rank in range(ranks)]
    samples = [int(sample) for row in zip(*of_ranks, strict=True) for sample in row]
    numbers = re.findall(r"step (\d+) loss (\S+) lr (\S+)", said)
    return samples, {int(step): (float(loss), float(rate)) for step, loss, rate in numbers}


@pytest.mark.whole_jobs
@needs_deepspeed
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_another_number_of_ranks_goes_on_with_the_next_samples(followed, ranks, tmp_path):
    folder, (samples, numbers) = followed
    assert sorted(samples[:96]) == list(range(96))  # an epoch; the next one begins after step 8
    assert samples[96:] != samples[:48]
    went_on, found = follow(folder, tmp_path, ranks, "--seed", 5, RESUME=str(folder / "saved"))
    assert went_on == samples[72:]
    assert sorted(found) == list(range(7, 13))
    for step, (loss, rate) in found.items():
        assert rate == numbers[step][1]
        assert abs(loss - numbers[step][0]) <= (0.0 if ranks == 2 else 1e-5)


@needs_deepspeed
@pytest.mark.takes_long
@pytest.mark.parametrize("stage", [2, 3])
def test_other_stages(stage, tmp_path):
    config = {"CONFIG": str(CONFIGS / f"zero{stage}.json")}
    save = ("--save", "saved", "--save-at", STEPS)
    whole = losses(run("torchrun.sh", "--steps", STEPS + 2, *save, cwd=tmp_path, **config))
    said = run("torchrun.sh", "--steps", 2, "--seed", 5, "--load", "saved", cwd=tmp_path, **config)
    check(said, whole)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_configurations_are_of_their_stage(stage):
    config = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert config["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "mpi.sh", "slurm.sbatch"])
def test_scripts_are_sound(script):
    assert os.access(CONFIGS / script, os.X_OK)
    checked = subprocess.run(
        ["bash", "-n", str(CONFIGS / script)], capture_output=True, text=True, timeout=20
    )
    assert checked.returncode == 0, checked.stderr
