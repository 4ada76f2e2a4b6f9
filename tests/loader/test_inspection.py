"""What a checkpoint is and holds, from its indexes alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from http_server import CountingServer, Served, counting_server
from places import DATA
from rankload.loader import OptionError
from rankload.loader.inspection import Key, inspect_checkpoint, matching
from zero_folders import unpack_zero

KINDS = [
    ("composer-zero1-w2/ep1-ba4-rank{rank}.pt.tar", "composer-zero", "composer", 1, 2, 4, 2),
    ("composer-zero3-w2/ep1-ba4-rank{rank}.pt.tar", "composer-zero", "composer", 3, 2, 4, 2),
    ("composer-monolithic-w2/ep2-ba8-rank0.pt", "monolithic", "composer", None, None, 8, 1),
    ("accelerate-zero2-w2/ckpt", "deepspeed", "accelerate", 2, 2, 4, 6),
    ("accelerate-plain-w2/ckpt", "monolithic", "accelerate", None, None, None, 5),
    ("trainer-plain-w2/ckpt", "monolithic", "trainer", None, None, 4, 6),
    ("dcp-fsdp2-w2/ckpt", "dcp", "hand-written", None, None, 3, 3),
    ("dcp-tp-fsdp-w4/ckpt", "dcp", "hand-written", None, None, 3, 5),
    ("lightning-mp-w2/ckpt", "dcp", "lightning", None, None, 3, 4),
    ("rank-shards-w2", "rank-shards", "hand-written", None, 2, None, 6),
    ("dcp-hf-sharded-w2/ckpt", "slices", "safetensors", None, 2, None, 2),
    ("safetensors-sharded-index/ckpt", "sharded", "safetensors", None, None, None, 3),
    ("safetensors-single/ckpt/model.safetensors", "monolithic", "safetensors", None, None, None, 1),
]


@pytest.mark.parametrize(("path", "kind", "layout", "stage", "world_size", "step", "files"), KINDS)
def test_every_kind(path, kind, layout, stage, world_size, step, files):
    found = inspect_checkpoint(DATA / path)
    assert (found.kind, found.layout, found.zero_stage) == (kind, layout, stage)
    assert (found.world_size, found.step, found.model_parts) == (world_size, step, 1)
    assert len(found.files) == files
    assert found.missing == ()
    for one in found.files:
        assert one.there
        assert one.size_bytes >= one.least_bytes > 0
    assert found.parameters > 0
    assert found.tensors >= sum(found.dtypes.values()) > 0
    assert found.tensor_bytes <= found.file_bytes or kind == "slices"


def served_folder(folder: Path, prefix: str) -> dict[str, Served]:
    return {
        f"{prefix}/{path.relative_to(folder)}": Served(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("path", [each[0] for each in KINDS])
def test_over_http_it_is_the_same(path, tmp_path):
    top = path.partition("/")[0]
    with counting_server(served_folder(DATA / top, f"/{top}")) as server:
        found = inspect_checkpoint(server.url(f"/{path}"), options={"cache_dir": tmp_path / "c"})
    local = inspect_checkpoint(DATA / path)
    assert [key.path for key in found.keys] == [key.path for key in local.keys]
    assert [one.size_bytes for one in found.files] == [one.size_bytes for one in local.files]
    assert (found.parameters, found.tensor_bytes) == (local.parameters, local.tensor_bytes)
    # Nothing stays in the cache.
    assert [each.name for each in (tmp_path / "c").glob("*")] in ([], [".lock"])


@pytest.fixture(scope="module", params=[1, 3])
def zero(request, tmp_path_factory):
    return request.param, unpack_zero(request.param, tmp_path_factory.mktemp("zero"))


def got(server: CountingServer) -> Counter[str]:
    """How often each file was asked for; names that are not there do not count."""
    return Counter(
        one.path.rpartition("/")[2]
        for one in server.requests
        if one.method == "GET" and one.path in server.served
    )


def test_a_zero_folder_reads_one_model_and_one_optimizer_index(zero, tmp_path):
    stage, folder = zero
    with counting_server(served_folder(folder, "/run")) as server:
        found = inspect_checkpoint(server.url("/run"), options={"cache_dir": tmp_path / "c"})
    assert (found.kind, found.zero_stage, found.world_size, found.step, found.tag) == (
        "deepspeed",
        stage,
        4,
        3,
        "step3",
    )
    assert found.parameters == 9806
    indexed = {name for name in got(server) if name.endswith("states.pt")}
    model = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    assert indexed == {model, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    assert {name.rpartition("/")[2] for name in found.files_read} == indexed
    heads = Counter(one.path.rpartition("/")[2] for one in server.requests if one.method == "HEAD")
    assert all(heads[one.name] >= 1 for one in found.files)


def test_keys_are_named_as_ignore_keys_names_them(zero):
    from rankload.loader.alone import open_alone
    from rankload.loader.saved.ignore import ignore

    _, folder = zero
    found = inspect_checkpoint(folder)
    with open_alone(folder) as opened:
        tree = opened.saved.as_tree()
        for key in found.keys[:: max(1, len(found.keys) // 20)]:
            assert ignore(tree, [key.path]).paths == (key.path,)


def test_the_ranks_files(zero):
    stage, folder = zero
    names = [one.name for one in inspect_checkpoint(folder, rank=2).files]
    own = "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    shared = "zero_pp_rank_2_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    assert sorted(names) == sorted([own, shared])
    with pytest.raises(
        OptionError, match=r"rank 4 saved no file of .*s[13]-w4/step3: expected one of 0 to 3"
    ):
        inspect_checkpoint(folder, rank=4)
    with pytest.raises(OptionError, match="rank -1"):
        inspect_checkpoint(folder, rank=-1)


def test_a_file_of_its_own_for_each_rank(tmp_path):
    for rank in range(3):
        torch.save({"model": {"weight": torch.zeros(rank + 1)}}, tmp_path / f"ep1-rank{rank}.pt")
    template = tmp_path / "ep1-rank{rank}.pt"
    assert inspect_checkpoint(template).parameters == 1
    found = inspect_checkpoint(template, rank=2)
    assert found.parameters == 3
    assert [Path(one.name).name for one in found.files] == ["ep1-rank2.pt"]


@pytest.mark.parametrize(("rank", "name"), [(0, "__0_0.distcp"), (1, "__1_0.distcp")])
def test_the_ranks_files_of_dcp(rank, name):
    assert [one.name for one in inspect_checkpoint(DATA / "dcp-fsdp2-w2/ckpt", rank=rank).files] == [
        ".metadata",
        name,
    ]


def test_files_that_are_missing_or_cut_short_are_marked(tmp_path):
    folder = unpack_zero(1, tmp_path)
    tag = folder / "step3"
    (tag / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    (tag / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt").write_bytes(b"")
    found = inspect_checkpoint(folder)
    assert [(one.name, one.there, one.size_bytes) for one in found.missing] == [
        ("bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", False, None),
        ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", True, 0),
    ]


def test_a_folder_of_1024_ranks_reads_two_indexes_and_all_sizes(tmp_path):
    ranks = 1024
    tag = unpack_zero(1, tmp_path / "real") / "step3"
    model = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)
    optim = torch.load(tag / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    model["dp_world_size"] = ranks
    states = optim["optimizer_state_dict"]
    states["partition_count"] = [ranks] * len(states["partition_count"])
    groups = states["single_partition_of_fp32_groups"]
    for index, shapes in enumerate(model["param_shapes"]):
        total = sum(-(-shape.numel() // 2) * 2 for shape in shapes.values())
        numel = -(-total // (2 * ranks)) * 2
        groups[index] = torch.zeros(numel)
        for key, value in states["base_optimizer_state"]["state"][index].items():
            if value.dim():
                states["base_optimizer_state"]["state"][index][key] = torch.zeros(numel)
    states["group_paddings"] = [0] * len(groups)
    many = tmp_path / "many" / "global_step3"
    many.mkdir(parents=True)
    torch.save(model, many / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        path = many / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        path.write_bytes(b"never read")
    torch.save(optim, many / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (many / "bf16_zero_pp_rank_700_mp_rank_00_optim_states.pt").unlink()
    with counting_server(served_folder(many, "/global_step3")) as server:
        found = inspect_checkpoint(server.url("/global_step3"), options={"cache_dir": tmp_path / "c"})
    assert (found.world_size, found.parameters, len(found.files)) == (ranks, 9806, ranks + 1)
    assert {name for name in got(server) if name.endswith("states.pt")} == {
        "mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }
    assert [one.name for one in found.missing] == ["bf16_zero_pp_rank_700_mp_rank_00_optim_states.pt"]
    assert Counter(one.size_bytes for one in found.files)[len(b"never read")] == ranks - 2
    asked = Counter(
        one.path for one in server.requests if one.method == "HEAD" and "_optim_states" in one.path
    )
    assert len(asked) == ranks
    assert sum(asked.values()) <= ranks + 4


KEYS = [
    Key(path, tuple(path.split("/")), "int")
    for path in ("state/model/a.weight", "state/model/b.bias", "rng/0/torch")
]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("weight", [0]),
        ("state/model", [0, 1]),
        ("state/model/*", [0, 1]),
        ("state", [0, 1]),
        ("*.bias", [1]),
        ("rng*", [2]),
        ("st*te", [0, 1]),
        ("[ab].*", []),
        ("*/[ab].*", [0, 1]),
        ("Weight", []),
    ],
)
def test_matching(wanted, found):
    assert matching(KEYS, wanted) == [KEYS[index] for index in found]


def test_it_imports_no_torch(zero):
    code = (
        "import sys\n"
        "from rankload.loader.inspection import inspect_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    assert inspect_checkpoint(path).keys\n"
        "assert not {'torch', 'fsspec', 'deepspeed', 'numpy'} & set(sys.modules)\n"
    )
    paths = [zero[1], *(DATA / path for path, *_ in KINDS)]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, timeout=60)
