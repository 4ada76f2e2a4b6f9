"""README's lines to save and to resume, run as they stand there by two ranks on gloo."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks

README = Path(__file__).resolve().parent.parent / "README.md"
RANKS = 2
DEADLINE_S = 120
SAVE = {"plain": 0, "fsdp2": 0, "deepspeed": 1}
RESUME = {"plain": 0, "fsdp2": 0, "deepspeed": 1}
"""Which block of the section each kind of job runs."""
BY_ITSELF = 2
"""The block that resumes by itself, and saves."""


def blocks(section: str) -> list[str]:
    """The Python blocks of a section of the README, in order."""
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)


def imports(section: str) -> str:
    """The import lines of a section: its blocks share them, as a reader who reads on does."""
    lines = (line for block in blocks(section) for line in block.splitlines())
    return "\n".join(line for line in lines if line.startswith(("import ", "from ")))


def make_job(kind: str, seed: int) -> dict[str, Any]:
    """The names that the README's lines take for given."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(8, 33), nn.GELU(), nn.Dropout(0.1), nn.Linear(33, 3))
    if kind == "deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "zero_optimization": {"stage": 1},
        }
        engine, *_ = deepspeed.initialize(model=model, config=config)
        return {"engine": engine}
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train(job: dict[str, Any], steps: int) -> list[float]:
    """Random batches, dropout and a learning rate that changes: what is not restored shows in the losses."""
    import torch

    losses = []
    for _ in range(steps):
        if engine := job.get("engine"):
            loss = engine(torch.randn(4, 8)).square().mean()
            engine.backward(loss)
            engine.step()
        else:
            loss = job["model"](torch.randn(4, 8)).square().mean()
            job["optimizer"].zero_grad()
            loss.backward()
            job["optimizer"].step()
            job["scheduler"].step()
        losses.append(loss.item())
    return losses


def save_and_resume(folder: str, kind: str) -> None:
    """One rank's part."""
    import torch

    os.chdir(folder)
    job = make_job(kind, seed=0)
    torch.manual_seed(10 + int(os.environ["RANK"]))
    train(job, 3)
    exec(f"{imports('Save')}\n{blocks('Save')[SAVE[kind]]}", names := {**job, "epoch": 3})
    expected = train(job, 3)

    job = make_job(kind, seed=1)
    exec(f"{imports('Resume')}\n{blocks('Resume')[RESUME[kind]]}", names := {**job})
    assert names["epoch"] == 3
    assert names["result"].receipt.not_restored == ()
    assert train(job, 3) == expected


def resume_by_itself(folder: str) -> None:
    """One rank's part: a run begins, saves, and is begun again."""
    import torch

    os.chdir(folder)
    Path("run").mkdir(exist_ok=True)
    block = blocks("Resume")[BY_ITSELF]
    job = make_job("plain", seed=0)
    torch.manual_seed(10 + int(os.environ["RANK"]))
    exec(block, names := {**job})
    assert (names["result"], names["step"]) == (None, 0)
    train(job, 3)
    exec(block.splitlines()[-1], {**names, "step": 3})
    expected = train(job, 3)

    job = make_job("plain", seed=1)
    exec(block, names := {**job})
    assert names["step"] == 3
    assert names["result"].receipt.not_restored == ()
    assert train(job, 3) == expected


def test_a_job_that_resumes_by_itself_goes_on_exactly(tmp_path: Path) -> None:
    finished = run_ranks(
        f"{__file__}:resume_by_itself", RANKS, args=(tmp_path,), deadline_s=DEADLINE_S, python=sys.executable
    )
    assert [rank.returncode for rank in finished] == [0] * RANKS, finished


@pytest.mark.parametrize("kind", SAVE)
def test_a_job_that_resumes_by_these_lines_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    finished = run_ranks(
        f"{__file__}:save_and_resume",
        RANKS,
        args=(tmp_path, kind),
        deadline_s=DEADLINE_S,
        env={"DS_ACCELERATOR": "cpu"},
        python=sys.executable,
    )
    assert [rank.returncode for rank in finished] == [0] * RANKS, finished


def test_every_block_is_run() -> None:
    assert len(blocks("Save")) == len(set(SAVE.values()))
    assert len(blocks("Resume")) == len({*RESUME.values(), BY_ITSELF})


def test_the_lines_for_frameworks_are_those_of_their_page_which_are_run():
    section = README.read_text().split("\n## From your framework\n")[1].split("\n## ")[0]
    lines = [
        line for row in section.splitlines() if row.startswith("| ") for line in re.findall(r"`(.*?)`", row)
    ]
    lines = [line for line in lines if line != ".ckpt"]
    assert len(lines) > 20
    page = (README.parent / "docs" / "frameworks.md").read_text()
    run = "\n".join(re.findall(r"^<!-- lines: [\w-]+ -->\n```python\n(.*?)^```$", page, flags=re.S | re.M))
    assert [line for line in lines if line not in run] == []
