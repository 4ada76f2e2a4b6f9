"""The values that the stages of a load hand on, as docs/journey.md prints them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from local_files import LocalFiles
from places import REPOSITORY
from rankload.loader import State
from rankload.loader.saved.copies import reads_of
from rankload.loader.saved.ignore import ignore
from rankload.loader.sources.kinds import source_of
from rankload.loader.targets.base import RestoreOptions
from rankload.loader.targets.choose import target_of


def a_job() -> State:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return State(model, optimizer)


def values_of_each_stage() -> str:
    """What each stage hands on, for a file of this folder, as text."""
    job = a_job()
    target = target_of(job, RestoreOptions(file="model.pt"))
    demand = target.demand(0, 1)
    files = LocalFiles(Path("model.pt"))
    saved = source_of(files).open(files, demand)
    ignored = ignore(saved.as_tree(), ["state/model/bias"])
    plan = target.plan(saved.with_tree(ignored.tree))
    lines = [f"NodeFile   {files.first.kind} {files.first.name}", f"Demand     {demand.position}"]
    lines += [f"           optimizers {demand.optimizers}, parameters {demand.parameters}: all of them"]
    lines += [f"Saved      {saved.kind}, {saved.layout}"]
    state = saved.state["optimizers"]["SGD"]["state"]
    lines += [f"           model {dict(saved.state['model'])}", f"           optimizers SGD state {state}"]
    lines += [f"Ignored    {ignored.paths}"]
    for index, line in enumerate(str(plan).splitlines()):
        lines.append(f"{'' if index else 'Plan':10} {line}")
    for index, (storage, reads) in enumerate(reads_of(plan.copies).items()):
        ranges = ", ".join(f"{start} to {stop}" for start, stop in reads.ranges)
        lines.append(f"{'' if index else 'reads':10} {storage.key} bytes {ranges}, for {reads.names[0]}")
    return "\n".join(lines)


def test_the_docs_show_what_each_stage_hands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = a_job()
    torch.save({"model": job.model.state_dict(), "optimizer": job.optimizers[0].state_dict()}, "model.pt")
    text = (REPOSITORY / "docs" / "journey.md").read_text()
    shown = re.search(r"<!-- values: begin -->\n```\n(.*?)\n```\n<!-- values: end -->", text, flags=re.S)
    assert shown is not None
    assert values_of_each_stage() == shown[1]
