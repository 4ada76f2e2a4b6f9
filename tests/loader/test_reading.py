"""`read`: one file to a dict of real values, fetched once, verified, and nothing of it run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_server import Behaviour, bad_server
from http_server import Served, counting_server
from journey_runs import run
from rankload.loader import CorruptError, FormatError, NotFoundError, RankloadError, UnsafeError, read
from torch_files import same


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files that Trainer, Accelerate and Lightning save beside a model."""
    model = torch.nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    scheduler.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    torch.save(
        {"epoch": 3, "loops": {"fit_loop": {"state_dict": {}}}, "version": "2.6.6"}, tmp_path / "meta.pt"
    )
    torch.save({"python": random.getstate(), "numpy": np.random.get_state()}, tmp_path / "rng_state_0.pth")
    for rank in (0, 1):
        torch.save(random_states(rank), tmp_path / f"random_states_{rank}.pkl")
    return tmp_path


def random_states(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }


def test_a_file_is_given_as_torch_reads_it(files: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "meta.pt", "rng_state_0.pth", "random_states_0.pkl"):
        same(read(files / name), torch.load(files / name, weights_only=False))
    states = read(files / "random_states_{rank}.pkl")
    wanted = random.random()
    random.setstate(states["random_state"])
    assert random.random() == wanted
    np.random.set_state(states["numpy_random_seed"])


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_plain_pickle_is_given_as_pickle_reads_it(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    value = {
        **random_states(3),
        "views": [base[:, 1], base.T],
        "again": base.to(torch.bfloat16),
        7: ("a", None),
    }
    (tmp_path / "states.pkl").write_bytes(pickle.dumps(value, protocol))
    same(read(tmp_path / "states.pkl"), value)


def test_a_plain_pickle_with_tensors_in_an_older_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"t": torch.ones(3)}, 2))
    with pytest.raises(
        FormatError, match=r"protocol before 3, which is not supported; save it again by torch\.save"
    ):
        read(tmp_path / "old.pkl")


def test_a_cut_plain_pickle_is_corrupt(tmp_path: Path) -> None:
    data = pickle.dumps(random_states(3))
    (tmp_path / "cut.pkl").write_bytes(data[:-100])
    with pytest.raises(CorruptError, match=r"cut\.pkl"):
        read(tmp_path / "cut.pkl")


def test_a_tar_with_one_file_is_given_and_one_with_two_is_not(files: Path) -> None:
    for name, members in (("one.tar", ["optimizer.pt"]), ("two.tar", ["optimizer.pt", "scheduler.pt"])):
        with tarfile.open(files / name, "w") as archive:
            for member in members:
                archive.add(files / member, member)
    same(read(files / "one.tar"), torch.load(files / "optimizer.pt"))
    with pytest.raises(FormatError, match=r"two\.tar: expected composer_states\.pt, or one torch file"):
        read(files / "two.tar")


def test_over_http_parts_that_are_left_out_are_not_fetched(tmp_path: Path) -> None:
    large = tmp_path / "large.pt"
    torch.save({"kept": torch.arange(90_000), "left": torch.zeros(2_000_000), "epoch": 3}, large)
    options = {"cache_dir": str(tmp_path / "cache")}
    with bad_server({"/large.pt": Behaviour(large.read_bytes())}) as server:
        found = read(server.url("/large.pt"), ignore_keys=["left"], options=options)
        assert 90_000 * 8 < server.sent_bytes < 90_000 * 8 + (1 << 20)
        same(read(server.url("/large.pt"), options=options), torch.load(large))
    same(found, {"kept": torch.arange(90_000), "epoch": 3})


@pytest.mark.parametrize("remote", [False, True])
def test_damage_is_found_before_anything_is_returned(files: Path, tmp_path: Path, remote: bool) -> None:
    path = files / "optimizer.pt"
    damage(path)
    with counting_server({"/optimizer.pt": Served(path.read_bytes())}) as server:
        where = server.url("/optimizer.pt") if remote else path
        with pytest.raises(CorruptError, match=r"optimizer\.pt"):
            read(where, options={"cache_dir": str(tmp_path / "cache")})


def damage(path: Path) -> None:
    """Changes one bit of the largest storage."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: "/data/" in info.filename and info.file_size)
    data = bytearray(path.read_bytes())
    head = data[largest.header_offset + 26 : largest.header_offset + 30]
    begin = (
        largest.header_offset + 30 + int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
    )
    data[begin + largest.file_size // 2] ^= 1
    path.write_bytes(data)


def test_a_manifest_covers_files_without_checksums(tmp_path: Path) -> None:
    (tmp_path / "states.pkl").write_bytes(pickle.dumps({"step": 3}))
    (tmp_path / "states.pkl.sha256").write_text(f"{'0' * 64}  states.pkl\n")
    with pytest.raises(CorruptError, match=r"states\.pkl"):
        read(tmp_path / "states.pkl")
    assert read(tmp_path / "states.pkl", options={"verify": "off"}) == {"step": 3}


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_of_a_file_is_run(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "hostile.pkl"
    save({"step": 3, "more": Payload(tmp_path / "canary")}, path)
    with pytest.raises(UnsafeError, match=r"ignore_keys=\['more'\]"):
        read(path)
    assert read(path, ignore_keys=["more"]) == {"step": 3}
    assert not (tmp_path / "canary").exists()


def test_what_is_no_file_with_a_dict_is_named(files: Path, checkpoint_folder: Path) -> None:
    torch.save([1, 2], files / "list.pt")
    for path, kind, words in (
        (files / "list.pt", FormatError, r"holds a list.*, expected a dict"),
        (files / "missing.pt", NotFoundError, "missing.pt"),
        (
            checkpoint_folder,
            FormatError,
            r"is a checkpoint's folder, expected one file of it, such as \S+mp_rank_00_model_states\.pt: load\(\)",
        ),
    ):
        with pytest.raises(kind, match=words):
            read(path)


@pytest.fixture
def checkpoint_folder(tmp_path: Path) -> Path:
    from zero_folders import unpack_zero

    unpack_zero(1, tmp_path)
    return next(path.parent for path in tmp_path.rglob("latest"))


def test_arguments_are_refused_in_words_of_this_call(files: Path) -> None:
    for arguments, words in (
        ({"path": 3}, "path is 3: expected a string or an os.PathLike of one"),
        ({"path": "x", "options": {"cache": 1}}, "unknown option cache"),
        ({"path": "{run_name}/x"}, "as read's argument run_name"),
    ):
        with pytest.raises(RankloadError, match=words):
            read(**arguments)
    same(
        read(files.parent / "{run_name}" / "scheduler.pt", run_name=files.name), read(files / "scheduler.pt")
    )


def test_a_file_comes_to_each_node_once_and_one_ranks_error_is_every_ranks(
    files: Path, tmp_path: Path
) -> None:
    """Four ranks on two nodes; the last rank's files are damaged, hostile and missing."""
    common = "checkpoint-8/optimizer.pt"
    own = [f"checkpoint-8/rng_state_{rank}.pth" for rank in range(4)]
    (tmp_path / "checkpoint-8").mkdir()
    shutil.copy(files / "optimizer.pt", tmp_path / common)
    for rank, name in enumerate(own):
        torch.save({"python": rank, "cpu": torch.get_rng_state()}, tmp_path / name)
        for kind in ("damaged", "hostile", "gone"):
            torch.save({"step": torch.arange(99)}, tmp_path / f"{kind}_{rank}.pt")
    damage(tmp_path / "damaged_3.pt")
    torch.save({"more": Payload(tmp_path / "canary")}, tmp_path / "hostile_3.pt")
    (tmp_path / "gone_3.pt").unlink()
    served = {
        f"/{path.relative_to(tmp_path)}": Served(path.read_bytes())
        for path in tmp_path.rglob("*.pt*")
        if path.is_file()
    }
    with counting_server(served) as server:
        told = run(
            "read_files",
            4,
            server.url(""),
            tmp_path,
            nodes=(2, 2),
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank // 2}")},
        )
        sent = {name: server.bytes_sent[f"/{name}"] for name in (common, *own)}
    size = {name: (tmp_path / name).stat().st_size for name in sent}
    assert sent == {**size, common: 2 * size[common]}
    assert told[0] == told[1] == told[2] == told[3]
    damaged, hostile, gone = told[0]
    assert (damaged[0], damaged[2], "damaged_3.pt" in damaged[1]) == ("CorruptError", 3, True)
    assert (hostile[0], hostile[2], "ignore_keys=['more']" in hostile[1]) == ("UnsafeError", 3, True)
    assert (gone[0], gone[2]) == ("NotFoundError", 3)
    assert "gone_3.pt: not there, needed by rank 3" in gone[1]
    assert "read each saved rank's file on all ranks" in gone[1]
    assert not (tmp_path / "canary").exists()


def test_what_is_left_out_leaves_the_rest_as_it_was_saved(tmp_path: Path) -> None:
    """A state dict stays an OrderedDict with its versions, in its order; shared memory stays shared."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    weights = model.state_dict()
    weights["again"] = weights["0.weight"].T
    torch.save({"net": weights, 3: ("a", None), "opt": {}}, tmp_path / "a.pt")
    torch.save(weights, tmp_path / "weights.pt")
    for found in (
        read(tmp_path / "weights.pt"),
        read(tmp_path / "a.pt")["net"],
        read(tmp_path / "a.pt", ignore_keys=["opt"])["net"],
        read(tmp_path / "a.pt", ignore_keys=lambda tree: tree.pop("opt"))["net"],
        read(tmp_path / "a.pt", ignore_keys=["net/0.bias"])["net"],
    ):
        assert isinstance(found, OrderedDict)
        assert found._metadata == weights._metadata
        kept = [name for name in weights if name in found]
        assert list(found) == kept
        found["0.weight"][0, 1] = 7
        assert found["again"][1, 0] == 7
    assert read(tmp_path / "a.pt", ignore_keys=["3"]).keys() == {"net", "opt"}
    with pytest.warns(UserWarning, match=r"'nett' matches nothing in \S+a\.pt; the nearest keys: 'net'"):
        read(tmp_path / "a.pt", ignore_keys="nett")


def test_it_runs_in_torchs_own_modes(files: Path) -> None:
    with torch.inference_mode(), torch.device("meta"):
        found = read(files / "optimizer.pt")
    moment = found["state"][0]["exp_avg"]
    assert (moment.device.type, moment.is_inference()) == ("cpu", False)
