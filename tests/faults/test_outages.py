"""Four ranks against a server that is down for a while, at each stage of a load: they restore, and say what they
waited. One that was never there ends all of them, soon.

Outages of 1 s run always; those of 5 s and 30 s with TEST_FAULTS set.
"""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour
from outage_server import BEGIN, Outage, outage_server
from processes import run_ranks
from zero_folders import unpack_zero

THIS = __file__
RANKS = 4
SLACK_S = 12.0
"""The longest pause between two attempts, and what a busy machine adds."""

OF_A_FILE = {
    "manifest": ("HEAD", "/SHA256SUMS", ""),
    "index": ("GET", "/larger.pt", r"bytes=0-\d{5,}$"),
    "tail": ("GET", "/larger.pt", r"bytes=[4-9]\d{6}-"),
    "body": ("GET", "/larger.pt", r"bytes=[1-9]\d{5,6}-"),
}
"""The requests of a load of a file that comes in parts, by stage."""
OF_A_FOLDER = {
    "latest": ("GET", "/latest", ""),
    "whole file": ("GET", "/mp_rank_00_model_states.pt", ""),
    "optimizer file": ("GET", "/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", ""),
    "side files": ("GET", "/trainer_state.json", ""),
}
"""Those of a load of DeepSpeed's folder."""


def restores(url: str, names: str, what: str) -> None:
    """Restores once for each outage; prints of each the seconds that were waited, the notes, and how long it took."""
    told = []
    for name in names.split(","):
        if os.environ["RANK"] == "0":
            urllib.request.urlopen(f"{url}/{BEGIN.lstrip('/')}{urllib.request.quote(name)}").close()
        begin = time.monotonic()
        receipt = (restore_folder if what == "folder" else restore_file)(url)
        told.append([receipt.waited_s, list(receipt.notes), time.monotonic() - begin, list(receipt.lines())])
    print(json.dumps(told))


def trained():  # type: ignore[no-untyped-def]
    """A layer after a step of its optimizer, and both as a `State`: large enough to come in parts."""
    from rankload import State

    torch.manual_seed(3)
    module = torch.nn.Linear(512, 1024)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 512)).sum().backward()
    optimizer.step()
    return module, State(module, optimizer)


def restore_file(url: str):  # type: ignore[no-untyped-def]
    from rankload import State, load

    module = torch.nn.Linear(512, 1024)
    receipt = load(f"{url}/larger.pt", State(module, torch.optim.Adam(module.parameters()))).receipt
    assert torch.equal(module.weight, trained()[0].weight)
    return receipt


def restore_folder(url: str):  # type: ignore[no-untyped-def]
    from zero_model import TinyModel

    from rankload import State, load

    module = TinyModel(7)
    before = module.gain.detach().clone()
    options = {"hyperparameters": "job"}
    receipt = load(
        f"{url}/s1-w4", State(module, torch.optim.AdamW(module.parameters())), options=options
    ).receipt
    assert not torch.equal(module.gain, before)
    return receipt


def objects_of(folder: Path) -> dict[str, Behaviour]:
    return {
        f"/{path.relative_to(folder)}": Behaviour(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


long = pytest.mark.skipif(not os.environ.get("TEST_FAULTS"), reason="takes minutes: set TEST_FAULTS")
SECONDS = [1.0, pytest.param(5.0, marks=long), pytest.param(30.0, marks=long)]


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_outage_at_any_stage_is_waited_out(what: str, seconds: float, tmp_path: Path) -> None:
    if what == "file":
        torch.save({"state": trained()[1].state_dict()}, tmp_path / "larger.pt")
        stages, objects = OF_A_FILE, objects_of(tmp_path)
    else:
        unpack_zero(1, tmp_path)
        stages, objects = OF_A_FOLDER, objects_of(tmp_path)
    kinds = [(stage, kind) for stage in stages for kind in ("503", "reset")]
    if seconds == 1.0:
        kinds = [each for each in kinds if each[1] == "503" or each[0] in ("index", "body")]
    outages = {
        f"{stage} - {kind}": Outage(*stages[stage][:2], seconds, kind, stages[stage][2])
        for stage, kind in kinds
    }
    with outage_server(objects, outages) as server:
        finished = run_ranks(
            f"{THIS}:restores",
            RANKS,
            args=(server.url(""), ",".join(outages), what),
            env={"RANKLOAD_STALL_TIMEOUT_S": "90", "RANKLOAD_CACHE_DIR": str(tmp_path / "cache")},
            deadline_s=60 + len(outages) * (seconds + SLACK_S + 10),
        )
        assert [rank.returncode for rank in finished] == [0] * RANKS, finished
        refused = server.refused
    told = [json.loads(rank.stdout.strip().splitlines()[-1]) for rank in finished]
    problems = []
    for number, name in enumerate(outages):
        if not refused.get(name):
            problems.append(f"{name}: no request met the outage")
            continue
        waited, notes, took, lines = told[0][number]
        truth = refused[name][-1] - refused[name][0]
        said = [note for note in notes if " for the store: " in note]
        fits = (
            truth <= waited <= took
            and waited <= seconds + SLACK_S
            and all(each[number][0] == waited for each in told)
        )
        # Below a tenth of a second nothing is told.
        if not fits or (waited >= 0.1) != bool(said) or (waited >= 0.1) != ("waited" in lines[1]):
            problems.append(
                f"{name}: down for {truth:.2f} s, {waited:.2f} s told, {took:.2f} s taken; {notes}"
            )
    assert not problems, "\n".join(problems)


def fails(url: str) -> None:
    """A load that must fail; prints how, and after how long."""
    from rankload import RankloadError, State, load

    begin = time.monotonic()
    try:
        load(f"{url}/a.pt", State(torch.nn.Linear(2, 2)))
    except RankloadError as error:
        print(json.dumps([type(error).__name__, str(error), time.monotonic() - begin]))


def test_a_server_that_was_never_there_ends_all_ranks_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    finished = run_ranks(
        f"{THIS}:fails",
        RANKS,
        args=(f"http://127.0.0.1:{port}",),
        env={"RANKLOAD_CACHE_DIR": str(tmp_path)},
        deadline_s=90,
    )
    told = [json.loads(rank.stdout.strip().splitlines()[-1]) for rank in finished]
    assert {(kind, message) for kind, message, _ in told} == {(told[0][0], told[0][1])}
    assert told[0][0] == "AccessError"
    assert "refused" in told[0][1]
    assert max(seconds for *_, seconds in told) < 15, told
    # Long enough for a server that is just being started.
    assert min(seconds for *_, seconds in told) > 8, told
