"""What pickles say of one rank's shard, in the forms of several torches, and in forms that no torch has."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DATA
from rankload.loader.errors import FormatError, UnsafeError
from rankload.loader.formats.pickle.budget import Budget
from rankload.loader.formats.pickle.shards import is_shard_class, read_shard
from rankload.loader.formats.torch_file import read_index
from rankload.loader.saved.shards import Placement, Spread
from rankload.loader.saved.strided import Box
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.tree import find_unknown, tensors
from rankload.loader.saved.values import GlobalName, InertObject, InertShard
from rankload.loader.sources.single_file import read_layout

DTENSOR = "torch.distributed.tensor.DTensor"
SHARDED = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
FLOAT = GlobalName("torch.float32", known=True)


def tensor(*shape: int, dtype: str = "float32") -> SavedTensor:
    stride = tuple(torch.empty(shape).stride())
    return SavedTensor.in_storage(StorageRef("f", "data/0", 0, 4000, None), dtype, shape, stride)


def thing(name: str, **state: Any) -> InertObject:
    return InertObject(f"torch.distributed.{name}", state=state)


def new_mesh(**more: Any) -> InertObject:
    axes = (thing("_FlatLayout", shape=(2,), stride=(3,)), thing("_FlatLayout", shape=(3,), stride=(1,)))
    fields = {
        "_layout": thing("_mesh_layout._MeshLayout", axes=axes),
        "_flatten_rank_map": tuple(range(6)),
        "_rank": 4,
        "_coordinate_on_dim": (1, 1),
    }
    return thing("device_mesh.DeviceMesh", **{**fields, **more})


def older_layout() -> InertObject:
    return new_mesh(_layout=thing("_mesh_layout._MeshLayout", shape=(2, 3), stride=(3, 1)))


def flattened_mesh() -> InertObject:
    """Two dimensions of a larger mesh as one: ranks 1, 3, 5, 7 and so on."""
    axes = (thing("_FlatLayout", shape=(2, 3), stride=(6, 2)), thing("_FlatLayout", shape=(), stride=()))
    return new_mesh(_layout=thing("_mesh_layout._MeshLayout", axes=axes), _rank=9, _coordinate_on_dim=(4, 0))


def old_mesh(**more: Any) -> InertObject:
    fields = {
        "mesh": tensor(2, 3, dtype="int32"),
        "_flatten_mesh_list": tuple(range(6)),
        "_coordinate_on_dim": [1, 1],
    }
    return thing("device_mesh.DeviceMesh", **{**fields, **more})


def spec(mesh: Any, placements: Any = None) -> InertObject:
    default = (thing("placement_types.Replicate"), thing("placement_types.Shard", dim=0))
    return thing("tensor._dtensor_spec.DTensorSpec", mesh=mesh, placements=placements or default)


def dtensor(mesh: Any, *, slots: bool = True, placements: Any = None, **more: Any) -> InertShard:
    fields = {"_local_tensor": tensor(2, 4), "_spec": spec(mesh, placements), **more}
    args = (GlobalName(DTENSOR), FLOAT, (5, 4), (4, 1))
    return read_shard(Budget(10_000), DTENSOR, args, (None, fields) if slots else fields)


@pytest.mark.parametrize("mesh", [new_mesh, older_layout, old_mesh])
@pytest.mark.parametrize("slots", [True, False])
def test_a_dtensor_says_where_its_shard_lies(mesh: Any, slots: bool) -> None:
    shard = dtensor(mesh(), slots=slots)
    assert not shard.problem
    assert (shard.dtype, shard.shape, shard.world_size, shard.known) == ("float32", (5, 4), 6, False)
    placements = (Placement("Replicate"), Placement("Shard", 0))
    assert shard.spread == Spread((2, 3), (1, 1), placements, 0)
    assert shard.local is not None
    assert shard.local.shape == (2, 4)


def test_a_mesh_of_several_dimensions_in_one_and_a_rank_outside_of_it() -> None:
    shard = dtensor(flattened_mesh())
    assert shard.spread is not None
    # The fifth of ranks 1, 3, 5, 7, 9, 11 of which the first three are six from the others.
    assert (shard.spread.mesh, shard.spread.origin) == ((6, 1), 9 - 6 - 2)
    outside = dtensor(new_mesh(_coordinate_on_dim=None))
    assert not outside.problem
    assert outside.spread is not None
    assert (outside.spread.coordinate, outside.spread.origin) == (None, None)


def test_a_mesh_of_one_dimension_may_have_numbers() -> None:
    one = new_mesh(_layout=thing("_mesh_layout._MeshLayout", shape=6, stride=1), _coordinate_on_dim=(4,))
    shard = dtensor(one, placements=(thing("placement_types.Shard", dim=1),))
    assert shard.spread == Spread((6,), (4,), (Placement("Shard", 1),), 0)


def test_strided_and_unknown_placements_keep_their_names() -> None:
    placements = [
        thing("tensor.placement_types._StridedShard", dim=-1, split_factor=4),
        thing("_tensor.placement_types.Partial", reduce_op="sum"),
    ]
    shard = dtensor(old_mesh(), placements=placements)
    assert shard.spread is not None
    assert shard.spread.placements == (Placement("_StridedShard", -1, 4), Placement("Partial"))
    assert str(shard.spread) == "(_StridedShard(-1, split_factor=4), Partial(0)) on a mesh of (2, 3)"


@pytest.mark.parametrize(
    ("shard", "part"),
    [
        (lambda: dtensor(old_mesh(), _local_tensor=3), "_local_tensor is a int"),
        (lambda: dtensor(old_mesh(), _spec=None), "_spec is a NoneType"),
        (lambda: dtensor(old_mesh(), placements=3), "_spec has no placements"),
        (lambda: dtensor(old_mesh(), placements=(None,) * 17), "_spec has no placements"),
        (lambda: dtensor(3), "the mesh of its _spec is a int"),
        (lambda: dtensor(thing("DeviceMesh")), "DeviceMesh has no _coordinate_on_dim"),
        (lambda: dtensor(thing("DeviceMesh", _coordinate_on_dim=(0,))), "no tensor mesh; the _layout there is a"),
        (lambda: dtensor(new_mesh(_coordinate_on_dim=(1 << 70,))), "_coordinate_on_dim .* something else than sizes"),
        (lambda: dtensor(new_mesh(_layout=thing("_MeshLayout"))), "neither axes nor shape and stride"),
        (lambda: dtensor(new_mesh(_layout=thing("_MeshLayout", axes=3))), "axes of its DeviceMesh are no tuple"),
        (
            lambda: dtensor(new_mesh(_layout=thing("_MeshLayout", shape=(1,) * 17, stride=(1,) * 17))),
            "has 17 dimensions",
        ),
        (
            lambda: dtensor(old_mesh(), placements=(thing("placement_types.Shard"),)),
            "a placement Shard has no dim",
        ),
        (lambda: read_shard(Budget(5000), DTENSOR, (), {}), "wrapper has no dtype"),
        (lambda: read_shard(Budget(5000), DTENSOR, (None, FLOAT, (-1,)), {}), "size of its wrapper"),
        (lambda: read_shard(Budget(5000), SHARDED, (None, FLOAT, (4,)), {}), "state does not begin with a list"),
        (
            lambda: read_shard(Budget(5000), SHARDED, (None, FLOAT, (4,)), ([], thing("Metadata"))),
            "no shards_metadata",
        ),
        (
            lambda: read_shard(
                Budget(5000), SHARDED, (None, FLOAT, (4,)), ([thing("Shard")], thing("M", shards_metadata=[]))
            ),
            "the metadata of a shard is a NoneType",
        ),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(shard: Any, part: str) -> None:
    found = shard()
    assert found.problem
    with pytest.raises(AssertionError, match=part):
        raise AssertionError(found.problem)


def test_a_sharded_tensor_says_where_each_of_its_shards_lies() -> None:
    metadata = thing("ShardMetadata", shard_offsets=[3, 0], shard_sizes=[2, 4])
    local = thing("shard.Shard", tensor=tensor(2, 4), metadata=metadata)
    state = ([local], thing("ShardedTensorMetadata", shards_metadata=[metadata, metadata]), None, None, None)
    shard = read_shard(Budget(5000), SHARDED, (None, FLOAT, (5, 4), (4, 1)), state)
    assert not shard.problem
    assert shard.boxes == ((Box((3, 0), (2, 4)), local.state["tensor"]),)
    assert (shard.shape, shard.world_size, shard.spread) == ((5, 4), 2, None)


def test_many_shards_of_one_state_take_a_bounded_amount_of_memory() -> None:
    budget = Budget(100_000)
    for _ in range(100):
        read_shard(budget, DTENSOR, (None, FLOAT, (5, 4), (4, 1)), {})
    with pytest.raises(UnsafeError, match="100,000 bytes"):
        read_shard(budget, DTENSOR, (None, FLOAT, (5, 4), (4, 1)), {})


def test_only_torchs_own_classes_are_shards() -> None:
    assert is_shard_class(DTENSOR)
    assert is_shard_class("torch.distributed._tensor.api.DTensor")
    assert is_shard_class(SHARDED)
    assert not is_shard_class("my.DTensor")
    assert not is_shard_class("torch.distributed.tensor.DTensorSpec")


def test_a_real_file_of_one_rank_is_refused_alone_and_its_shards_cannot_be_changed() -> None:
    path = DATA / "rank-shards-w2" / "model_world_size_2_rank_1.pt"
    tree = read_index(path).tree
    shard = tree["odd"]
    assert type(shard).__name__ == "PickledShard"
    assert [name for name, _ in tensors(tree)] == ["seen", "count"]
    assert ("odd", "DTensor, one rank's shard of a tensor") in find_unknown(tree)
    with pytest.raises(FormatError, match=r"path with \{rank\}.*full_state_dict=True"):
        read_layout({"model": {"odd": shard}}, file="f")
    with pytest.raises(UnsafeError, match="sets the state of a tensor"):
        shard.__setstate__({})
    for other in (copy.copy(shard), pickle.loads(pickle.dumps(shard))):
        assert type(other) is InertShard
        assert (other.kind, other.shape, other.spread, other.world_size) == (
            shard.kind,
            (7,),
            shard.spread,
            2,
        )


def test_a_parameter_is_read_as_its_tensor(tmp_path: Path) -> None:
    placed = pytest.importorskip("torch.distributed.tensor")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (3,))
        whole = placed.DTensor.from_local(torch.ones(2), mesh, [placed.Shard(0)], shape=(5,), stride=(1,))
        torch.save({"w": torch.nn.Parameter(whole), "b": whole}, tmp_path / "f.pt")
    finally:
        torch.distributed.destroy_process_group()
    tree = read_index(tmp_path / "f.pt").tree
    assert tree["w"].spread == tree["b"].spread == Spread((3,), (1,), (Placement("Shard", 0),), 0)
    assert tree["w"].shape == (5,)
