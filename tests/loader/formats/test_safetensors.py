from __future__ import annotations

import json
import random
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, FormatError, RankloadError, UnsafeError
from rankload.loader.formats.safetensors import LARGEST_HEADER
from rankload.loader.formats.torch_file import FileIndex, read_index
from rankload.loader.materialize.tensors import TensorReader, read_tensor
from rankload.loader.saved.dtypes import ITEMSIZE
from safetensors_files import CODES, as_safetensors, entry, with_header

SHAPES = st.lists(st.integers(0, 4), max_size=4)
MODELS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(CODES)), SHAPES),
    max_size=5,
)


def index_of(folder: Path, data: bytes) -> FileIndex:
    path = folder / "a.safetensors"
    path.write_bytes(data)
    return read_index(path)


def refused(folder: Path, data: bytes, kind: type[RankloadError], part: str) -> None:
    with pytest.raises(kind, match=part) as caught:
        index_of(folder, data)
    assert "a.safetensors: " in str(caught.value)


def some_tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    nbytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).itemsize
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.bool)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).view(dtype).reshape(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal to the bit, NaN included."""
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


@settings(max_examples=60)
@given(
    model=MODELS,
    metadata=st.none() | st.dictionaries(st.text(), st.text(), max_size=2),
    pad=st.integers(0, 9),
)
def test_every_dtype_and_shape_at_any_alignment(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], metadata: dict[str, str] | None, pad: int
) -> None:
    tensors = {name: some_tensor(*kind) for name, kind in model.items()}
    index = index_of(tmp_path_factory.mktemp("a"), as_safetensors(tensors, metadata, pad=pad))
    assert index.tree.keys() == tensors.keys()
    assert index.metadata == (metadata or {})
    assert (index.format, index.verifiable) == ("safetensors", False)
    reader = TensorReader(verify="during")
    for name, tensor in tensors.items():
        assert same(read_tensor(index.tree[name], reader=reader, name=name), tensor), name


def test_files_of_the_formats_own_writer(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {
        code: some_tensor(dtype, [3, 2]) for dtype, code in CODES.items() if dtype != torch.float8_e8m0fnu
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    index = read_index(tmp_path / "a.safetensors")
    reader = TensorReader(verify="during")
    assert index.metadata == {"format": "pt"}
    assert index.tree.keys() == tensors.keys()
    assert all(
        same(read_tensor(index.tree[name], reader=reader, name=name), tensors[name]) for name in tensors
    )


def test_every_dtype_that_a_code_names_has_a_size() -> None:
    assert {str(dtype).removeprefix("torch.") for dtype in CODES} <= ITEMSIZE.keys()


ONE = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "part"),
    [
        ({"a": ONE}, b"1234567", "truncated: 1 bytes are missing"),
        ({"a": ONE}, b"123456789", "1 bytes follow its last tensor"),
        ({}, b"1", "1 bytes follow"),
        ({"a": entry("F32", [2], 4, 12)}, b"x" * 12, "4 bytes that are no tensor's come before.*'a'"),
        ({"a": ONE, "b": entry("F32", [2], 12, 20)}, b"x" * 20, "4 bytes that are no tensor's.*'b'"),
        ({"a": ONE, "b": entry("F32", [2], 4, 12)}, b"x" * 12, "overlaps.*'b'.*byte 4 .*expected 8"),
        ({"a": ONE, "b": ONE}, b"x" * 8, "overlaps"),
        ({"a": entry("F32", [2], 8, 0)}, b"x" * 8, "where its bytes begin and end"),
        ({"a": entry("F32", [2], -8, 0)}, b"x" * 8, "where its bytes begin and end"),
        ({"a": entry("F32", [-2], 0, 8)}, b"x" * 8, "sizes of at most"),
        ({"a": entry("F32", [2.0], 0, 8)}, b"x" * 8, "sizes of at most"),  # type: ignore[list-item]
        ({"a": entry("F32", [True, 2], 0, 8)}, b"x" * 8, "sizes of at most"),
        ({"a": entry("F32", [1] * 65, 0, 4)}, b"x" * 4, "at most 64 dimensions"),
        ({"a": entry("F32", [3], 0, 8)}, b"x" * 8, r"F32 of shape \[3\] takes 12 bytes; the header gives it 8"),
        ({"a": entry("U8", [2**62, 2**62], 0, 8)}, b"x" * 8, "takes .* bytes"),
        ({"a": entry("U8", [2**62, 4, 0], 0, 0)}, b"", "takes 0 bytes"),
        ({"a": entry("U8", [2**62], 0, 2**62)}, b"x", "truncated"),
        ({"a": entry("U8", [2**64], 0, 2**64)}, b"x", "sizes of at most"),
        ({"a": {**ONE, "more": 1}}, b"x" * 8, "expected dtype, shape and data_offsets"),
        ({"a": 3}, b"", "expected dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 3}}, b"", "no object of texts"),
        ({"__metadata__": []}, b"", "no object of texts"),
        (b'{"a\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"x" * 8, "surrogates not allowed"),
        (b'{"__metadata__": {"a": "\\udfff"}}', b"", "surrogates not allowed"),
        (b'{"__metadata__": {"\\uDC00\\uD800": ""}}', b"", "surrogates not allowed"),
        (b'{"a": 1, "a": 1}', b"", "'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "'dtype' occurs twice"),
        (b'{"a": NaN}', b"", "NaN is no number of JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "no JSON that can be read"),
        (b'{"a\xff": 1}', b"", "no JSON that can be read"),
        (b"{", b"", "no JSON that can be read"),
        (b'{"a": 1} x', b"", "no JSON that can be read"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nests too deep"),
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves(tmp_path: Path, header: Any, data: bytes, part: str) -> None:
    refused(tmp_path, with_header(header, data), CorruptError, part)


@pytest.mark.parametrize(
    ("code", "part"),
    [("F4", "not whole bytes"), ("F6_E2M3", "not whole bytes"), ("X9", "is not known"), (3, "not known"),
     ([], "not known"), ({}, "not known"), (None, "not known")],
)  # fmt: skip
def test_dtypes_that_torch_has_not_are_named(tmp_path: Path, code: Any, part: str) -> None:
    data = with_header({"a": ONE, "odd": entry(code, [2], 8, 9)}, b"x" * 9)
    refused(tmp_path, data, FormatError, f"tensor 'odd' is of dtype {re.escape(repr(code))}.*{part}")


def test_lengths_beyond_the_file_and_beyond_the_format(tmp_path: Path) -> None:
    refused(
        tmp_path, struct.pack("<Q", 1000) + b"{}", CorruptError, "truncated: its header ends at byte 1,008"
    )
    refused(
        tmp_path, struct.pack("<Q", LARGEST_HEADER + 1) + b"{}", CorruptError, "the format allows 100,000,000"
    )


def test_a_header_of_countless_values_takes_no_memory(tmp_path: Path) -> None:
    data = with_header(b'{"a":[' + b"[]," * 8_000_000 + b"[]]}")
    tracemalloc.start()
    try:
        refused(tmp_path, data, UnsafeError, "more than 4,000,000 values")
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()


def test_flipped_bytes_of_a_header_never_lead_further_than_our_own_errors(tmp_path: Path) -> None:
    data = as_safetensors(
        {"a.weight": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"}
    )
    length = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(5)
    read = 0
    for _ in range(3000):
        wrong = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            wrong[rng.randrange(length)] = rng.randrange(256)
        try:
            index = index_of(tmp_path, bytes(wrong))
        except RankloadError as error:
            assert "a.safetensors" in str(error)
            continue
        read += 1
        for tensor in index.tree.values():
            (storage,) = tensor.storages
            assert storage.offset >= length - 4
            assert storage.offset + tensor.nbytes <= len(data)
    # A changed letter of a name is another name.
    assert 0 < read < 1500


@settings(max_examples=200)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    data=st.binary(max_size=16),
)
def test_any_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("a")
    for one in (
        header,
        {"a": header},
        {"a": {"dtype": "F32", "shape": header, "data_offsets": [0, len(data)]}},
    ):
        try:
            index_of(folder, with_header(json.dumps(one).encode(), data))
        except (CorruptError, FormatError, UnsafeError):
            continue
