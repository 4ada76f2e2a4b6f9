"""What torchrun knows of ranks that failed, in each of its rounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rankload.launch.elastic import FAILURES

RANK = """
import os, signal, sys
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
print(os.getpid(), flush=True)
sys.exit(int(sys.argv[1]))
"""


def run(folder: Path, exit_code: int) -> tuple[int, list[int], list[dict[str, int]]]:
    """A rank that is killed, and once more ends with `exit_code`: torchrun's own, the process ids, the failures."""
    script = folder / "rank.py"
    script.write_text(RANK)
    words = [
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "1",
        "--monitor-interval",
        "0.1",
        str(script),
        str(exit_code),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "rankload.launch.elastic", str(folder), *words],
        stdout=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    return (
        done.returncode,
        [int(pid) for pid in done.stdout.split()],
        json.loads((folder / FAILURES).read_text()),
    )


def test_the_failures_of_a_round_that_was_restarted_are_kept(tmp_path: Path) -> None:
    code, (killed, _), failures = run(tmp_path, 0)
    assert (code, failures) == (0, [{"pid": killed, "exit_code": -9}])


def test_each_round_adds_its_own(tmp_path: Path) -> None:
    code, (killed, ended), failures = run(tmp_path, 3)
    assert (code, failures) == (1, [{"pid": killed, "exit_code": -9}, {"pid": ended, "exit_code": 3}])
