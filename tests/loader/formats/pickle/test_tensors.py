"""Tensors that are not the bytes of one storage: those that are made as torch makes them, and those that are named."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankload.loader.errors import FormatError, RankloadError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.tree import find_unknown
from rankload.loader.saved.values import InertTensor
from torch_files import read_whole, zip_with


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


class Plain(torch.Tensor):
    """A subclass whose values are its storage's."""


def subclass(**attributes: Any) -> torch.Tensor:
    made = torch.arange(3.0).as_subclass(Plain)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def coo() -> torch.Tensor:
    indices = torch.tensor([[0, 2, 0], [1, 0, 1]])
    return torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 3.0]), (3, 4))


def channels() -> torch.Tensor:
    scales, zeros = torch.tensor([0.5, 0.25, 0.125]).double(), torch.tensor([0, 3, 5])
    return torch.quantize_per_channel(torch.randn(2, 3), scales, zeros, 1, torch.quint8)


FLOAT4 = "float4_e2m1fn_x2"
MADE = {
    "coo": coo,
    "coalesced": lambda: coo().coalesce(),
    "hybrid": lambda: torch.sparse_coo_tensor([[0, 2]], torch.arange(4.0).view(2, 2), (3, 2)),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "parameter of coo": lambda: torch.nn.Parameter(coo(), requires_grad=False),
    "per tensor": lambda: torch.quantize_per_tensor(torch.randn(2, 3), 0.25, 2, torch.qint8),
    "view of quantized": lambda: torch.quantize_per_tensor(torch.randn(4, 3), 0.25, 2, torch.qint32)[1:, 1],
    "per channel": channels,
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "float4": lambda: torch.arange(6, dtype=torch.uint8).view(getattr(torch, FLOAT4)),
    "bits16": lambda: torch.arange(6, dtype=torch.uint8).view(torch.bits16),
    "subclass": lambda: subclass(note="mine", count=3),
    "xla": lambda: Call(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.arange(3.0), torch.float32, "cpu", False
    ),
    "older xla": lambda: Call(
        torch._utils._rebuild_xla_tensor, np.arange(3, dtype="f4"), torch.bfloat16, "cpu", False
    ),
}


def comparable(tensor: torch.Tensor) -> Any:
    """What tells whether two tensors are the same in kind and values."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        return tensor.layout, tensor.dtype, tensor.shape, tensor.to_dense().tolist()
    if tensor.is_quantized:
        return tensor.dtype, tensor.qscheme(), tensor.int_repr().tolist(), tensor.dequantize().tolist()
    if (tensor.dtype.is_floating_point or tensor.dtype.is_complex) and str(tensor.dtype) != f"torch.{FLOAT4}":
        return tensor.dtype, tensor.is_conj(), tensor.is_neg(), tensor.tolist()
    return tensor.dtype, tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", list(MADE))
def test_a_tensor_is_made_as_torch_makes_it(tmp_path: Path, kind: str, zipped: bool) -> None:
    if kind == "float4" and not hasattr(torch, FLOAT4):
        pytest.skip("this torch has no such dtype")
    value = MADE[kind]()
    if not zipped and kind in ("float4", "bits16"):
        pytest.skip("torch saves no untyped storage in the older format alike")
    torch.save({"a": value}, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    want = torch.load(tmp_path / "f.pt", weights_only=False)["a"]
    assert comparable(read_whole(tmp_path / "f.pt")["a"]) == comparable(want)


def two_tensor() -> torch.Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(2), torch.ones(2))


def shard() -> Call:
    from torch.distributed.tensor import DTensor

    args = (DTensor, torch.float32, (4,), (1,), 0, torch.strided, torch.device("cpu"), False)
    state = {"_local_tensor": torch.ones(2), "_spec": None}
    return Call(
        torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_wrapper_subclass, DTensor, args, state
    )


NAMED = {
    "DTensor, one rank's shard": shard,
    "tensor of the class torch.testing._internal.two_tensor.TwoTensor": two_tensor,
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "tensor on the meta device": lambda: torch.ones(2, device="meta"),
    "Plain, which has further tensors": lambda: subclass(scale=torch.ones(1)),
    "parameter that was not initialised": lambda: torch.nn.UninitializedParameter(),
}


@pytest.mark.parametrize("kind", list(NAMED))
def test_what_is_not_made_is_named_and_does_no_harm_elsewhere(tmp_path: Path, kind: str) -> None:
    torch.save({"a": NAMED[kind](), "b": torch.ones(2)}, tmp_path / "f.pt")
    check_named(tmp_path / "f.pt", kind)


def check_named(path: Path, kind: str) -> None:
    tree = read_index(path).tree
    assert isinstance(tree["a"], InertTensor)
    ((where, what),) = find_unknown(tree)
    assert (where, kind in what) == ("a", True), what
    with pytest.raises(FormatError, match="save them as ordinary ones") as caught:
        materialize(tree, reader=TensorReader(), file="f.pt")
    assert kind in str(caught.value)
    assert "ignore_keys=['a']" in str(caught.value)
    assert "safe_types" not in str(caught.value)
    assert materialize(tree, reader=TensorReader(), keep_unknown=True)["a"] is tree["a"]
    del tree["a"]
    assert materialize(tree, reader=TensorReader()) is not None


def test_a_storage_of_an_unknown_class(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.arange(2)}, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        data = archive.read("f/data.pkl").replace(b"FloatStorage", b"OtherStorage")
    path = zip_with(data, tmp_path / "g.pt", storages={"0": bytes(8), "1": bytes(16)})
    check_named(path, "tensor in a storage of class torch.OtherStorage")


def test_an_unknown_storage_of_the_older_format_hides_where_the_next_begins(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "f.pt").read_bytes().replace(b"FloatStorage", b"OtherStorage")
    (tmp_path / "f.pt").write_bytes(data)
    with pytest.raises(FormatError, match=r"class torch\.OtherStorage, whose bytes per element"):
        read_index(tmp_path / "f.pt")


def test_a_newer_torch_may_call_a_function_with_more(tmp_path: Path) -> None:
    torch.save({"a": Call(torch._utils._rebuild_tensor_v2, *range(9))}, tmp_path / "f.pt")
    tree = read_index(tmp_path / "f.pt").tree
    assert "only torch._utils._rebuild_tensor_v2 can rebuild" in find_unknown(tree)[0][1]


def test_files_in_memory_keep_their_place(tmp_path: Path) -> None:
    stream = io.BytesIO(b"abcdef")
    stream.seek(2)
    torch.save({"a": stream, "b": io.BytesIO()}, tmp_path / "f.pt")
    got = read_whole(tmp_path / "f.pt")
    assert (got["a"].read(), got["a"].getvalue(), got["b"].getvalue()) == (b"cdef", b"abcdef", b"")


def test_tensors_of_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    odd = Call(
        torch._utils._rebuild_tensor_v3, torch.ones(2).untyped_storage(), 0, (2,), (1,), False, {}, "new"
    )
    torch.save({"a": odd}, tmp_path / "f.pt")
    check_named(tmp_path / "f.pt", "tensor of the dtype str, which is not known")


def test_no_kind_is_an_error_of_another_type(tmp_path: Path) -> None:
    for kind, make in {**MADE, **NAMED}.items():
        if kind == "float4" and not hasattr(torch, FLOAT4):
            continue
        torch.save({"a": make()}, tmp_path / "f.pt")
        data = (tmp_path / "f.pt").read_bytes()
        for cut in (len(data) // 3, len(data) - 40):
            (tmp_path / "g.pt").write_bytes(data[:cut])
            with pytest.raises(RankloadError):
                pytest.fail(f"{kind}: {read_whole(tmp_path / 'g.pt')}")
