"""A path that names a file for each rank, where every rank is restored from the first."""

from __future__ import annotations

import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from http_server import Served, counting_server
from places import DATA
from rankload.loader import State, load
from rankload.loader.template import expand_for_second_rank
from torch import nn


@pytest.mark.parametrize(
    ("template", "second"),
    [
        ("ck{rank}.pt", "ck1.pt"),
        ("ck-<rank>.pt", "ck-1.pt"),
        ("ck{rank:05d}.pt", "ck00001.pt"),
        ("ck{local_rank}.pt", "ck1.pt"),
        ("n{node_rank}/ck{local_rank}.pt", "n0/ck1.pt"),
        ("n{node_rank}/ck.pt", "n1/ck.pt"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_file_of_another_rank_that_nobody_reads_is_told(
    tmp_path: Path, template: str, second: str, there: bool
) -> None:
    assert expand_for_second_rank(template, run_name=None) == second
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    first = second.replace("n1", "n0").replace("1.pt", "0.pt")
    for name, model in zip((first, second)[: 1 + there], models, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), tmp_path / name)
    target = nn.Linear(2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = load(tmp_path / template, State(target), progress_bar=False)
    assert torch.equal(target.weight, models[0].weight)
    # Garbage of earlier tests may be warned of meanwhile: a ResourceWarning for a socket, say.
    said = [str(one.message) for one in caught if one.category is UserWarning]
    told = said + list(result.receipt.notes)
    expected = (
        f"every rank is restored from {tmp_path / first}, which is no part of a set; {tmp_path / second} is"
    )
    assert len(told) == 2 * there, told
    assert all(sentence.startswith(expected) for sentence in told)
    assert all(
        "read it with rankload.read" in sentence and f"pass {tmp_path / first}" in sentence
        for sentence in told
    )


def test_archives_that_are_no_set_are_told_and_a_set_is_not(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    for rank in (0, 1):
        with tarfile.open(tmp_path / f"rank{rank}.tar", "w") as archive:
            archive.add(tmp_path / "weights.pt", "weights.pt")
    with pytest.warns(UserWarning, match=r"rank1\.tar is there too, and is not read"):
        load(tmp_path / "rank{rank}.tar", State(nn.Linear(2, 2)), progress_bar=False)
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    path = DATA / "composer-zero1-w2" / "ep1-ba4-rank{rank}.pt.tar"
    result = load(path, State(model), load_weights_only=True, progress_bar=False)
    assert not [note for note in result.receipt.notes if "is there too" in note]


@pytest.mark.parametrize("refused", [False, True])
def test_a_store_is_asked_once_and_what_it_refuses_to_say_is_no_error(tmp_path: Path, refused: bool) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "ck0.pt")
    body = (tmp_path / "ck0.pt").read_bytes()
    second = Served(b"", status=403) if refused else Served(body)
    with counting_server({"/ck0.pt": Served(body), "/ck1.pt": second}) as server:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(server.url("/ck{rank}.pt"), State(nn.Linear(2, 2)), progress_bar=False)
        said = [str(one.message) for one in caught if one.category is UserWarning]
        assert ["is there too" in sentence for sentence in said] == [True] * (not refused)
        # Where HEAD is refused, the store asks once more by GET.
        methods = [one.method for one in server.requests if one.path == "/ck1.pt"]
        assert methods == ["HEAD", "GET"][: 1 + refused]


def test_a_page_for_every_name_is_no_file_of_another_rank(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "ck0.pt")
    page = Served(b"<!DOCTYPE html><html>not here</html>", content_type="text/html")
    with counting_server({"/ck0.pt": Served((tmp_path / "ck0.pt").read_bytes()), "/ck1.pt": page}) as server:
        result = load(server.url("/ck{rank}.pt"), State(nn.Linear(2, 2)), progress_bar=False)
    assert not [note for note in result.receipt.notes if "is there too" in note]


def test_a_file_of_another_rank_is_not_downloaded_to_know_of_it(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "ck0.pt")
    shutil.copy(tmp_path / "ck0.pt", tmp_path / "ck1.pt")
    asked: list[str] = []

    class Given:
        def download_file(self, remote: str, destination: str, **_: object) -> None:
            asked.append(remote)
            shutil.copy(tmp_path / remote, destination)

    load("ck{rank}.pt", State(nn.Linear(2, 2)), object_store=Given(), progress_bar=False)
    assert "ck0.pt" in asked
    assert "ck1.pt" not in asked
