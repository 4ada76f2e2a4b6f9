"""Files that no engine saved go into DeepSpeed engines of every stage, with the optimizer's state."""

from __future__ import annotations

from pathlib import Path

import whole_files_worker
from deepspeed_ranks import ENVIRONMENT, needs_deepspeed
from places import SUPPORT
from processes import run_ranks


@needs_deepspeed
def test_weights_masters_moments_steps_and_rates(tmp_path: Path) -> None:
    whole_files_worker.write(tmp_path)
    finished = run_ranks(
        f"{SUPPORT / 'whole_files_worker.py'}:restore",
        2,
        args=(tmp_path,),
        deadline_s=180,
        env={**ENVIRONMENT, "PYTHONPATH": str(SUPPORT)},
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
