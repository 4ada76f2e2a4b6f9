"""Reads the header of a safetensors file: its tensors' dtypes and shapes, and where their bytes lie. Free of torch.

The file is the header's length in 8 bytes, little-endian, the header as JSON, and the tensors' bytes, one after the
other without a gap. It has no checksums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError, FormatError
from ..saved.dtypes import ITEMSIZE
from ..saved.regions import row_major_stride
from ..saved.tensor import SavedTensor, StorageRef
from .strict_json import parse_json
from .torch_zip import OpenFile

LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MOST_DIMENSIONS = 64
_LARGEST = (1 << 63) - 1
"""Of a size, and of a tensor's elements: torch counts in signed 64 bits."""
_DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The format's codes to names that follow ``torch.``."""
CODES: dict[str, str] = {dtype: code for code, dtype in _DTYPES.items()}
"""The reverse, for whoever writes such a file."""
_BELOW_A_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Codes of dtypes whose elements are not whole bytes."""


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file states of itself."""

    tensors: dict[str, SavedTensor]
    """By name, in the header's order."""
    storages: tuple[StorageRef, ...]
    """One for each tensor, by offset; its key is the tensor's name."""
    metadata: Mapping[str, str]
    """Texts of whoever wrote the file; empty where it has none."""


def index_bytes(head: bytes, size: int) -> int:
    """How many bytes hold the index of a file of `size` bytes that begins with `head`; its length alone where that is
    more than the file or the format allows."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return _LENGTH_BYTES + (length if length <= min(LARGEST_HEADER, size - _LENGTH_BYTES) else 0)


def read_safetensors(path: str, size: int, *, name: str, open_file: OpenFile) -> SafetensorsHeader:
    """The header of the safetensors file at `path`, which has `size` bytes; messages call it `name`.

    Only the header is read. Raises `CorruptError` where the file is truncated, or its header contradicts itself or the
    format, `UnsafeError` where that has too many values, and `FormatError` for a dtype that torch has not.
    """
    with open_file(path) as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        end = _LENGTH_BYTES + length
        if length > LARGEST_HEADER:
            raise CorruptError(
                f"{name}: its header would have {length:,} bytes; the format allows {LARGEST_HEADER:,}.",
                path=name,
            )
        data = file.read(length) if end <= size else b""
    if len(data) != length:
        raise CorruptError(
            f"{name}: truncated: its header ends at byte {end:,}, and the file has {size:,} bytes. Take "
            "another copy of it.",
            path=name,
        )
    header = parse_json(data, name=name, what="its header")
    if not isinstance(header, dict):
        raise CorruptError(f"{name}: its header is no JSON object.", path=name)
    metadata = _metadata(header.pop(_METADATA, {}), name)
    entries = {key: _entry(key, value, name) for key, value in header.items()}
    _check_places(entries, size - end, name)
    storages = {
        key: StorageRef(path, key, end + one.start, one.stop - one.start, None)
        for key, one in entries.items()
    }
    tensors = {
        key: SavedTensor.in_storage(storages[key], one.dtype, one.shape, row_major_stride(one.shape))
        for key, one in entries.items()
    }
    return SafetensorsHeader(tensors, tuple(sorted(storages.values(), key=lambda one: one.offset)), metadata)


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """In bytes from the header's end; so with ``stop``."""
    stop: int


def _metadata(value: Any, name: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise CorruptError(f"{name}: its header's {_METADATA} is no object of texts.", path=name)
    return value


def _entry(key: str, value: Any, name: str) -> _Entry:
    shown = f"{name}: tensor {key[:200]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(
            f"{shown}: expected dtype, shape and data_offsets in the header, got {_short(value)}", path=name
        )
    code, sizes, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        # Not by hashing: a dtype may be a list in a damaged header.
        why = "has elements that are not whole bytes" if code in [*_BELOW_A_BYTE] else "is not known"
        raise FormatError(
            f"{shown} is of dtype {_short(code)}, which {why}: it cannot be read. Save it in another dtype.",
            path=name,
        )
    if not _are_counts(sizes) or len(sizes) > _MOST_DIMENSIONS:
        raise CorruptError(
            f"{shown}: expected the sizes of at most {_MOST_DIMENSIONS} dimensions, got {_short(sizes)}",
            path=name,
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptError(
            f"{shown}: expected where its bytes begin and end, got {_short(offsets)}", path=name
        )
    dtype, shape, (start, stop) = _DTYPES[code], tuple(sizes), offsets
    # The elements of an empty tensor are bounded too: its strides are made of the other sizes.
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if math.prod(filter(None, shape)) > _LARGEST or stop - start != nbytes:
        raise CorruptError(
            f"{shown}: {code} of shape {_short(list(shape))} takes {nbytes:,} bytes; the header gives it "
            f"{stop - start:,}. The file is damaged; take another copy of it.",
            path=name,
        )
    return _Entry(dtype, shape, start, stop)


def _are_counts(value: Any) -> bool:
    """Whether `value` is a list of whole numbers from 0 to `_LARGEST`."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= _LARGEST for one in value)


def _check_places(entries: Mapping[str, _Entry], nbytes: int, name: str) -> None:
    """Raises `CorruptError` unless the tensors' bytes follow one another from the header's end to the file's."""
    end = 0
    for key, one in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if one.start != end:
            what = (
                f"{one.start - end:,} bytes that are no tensor's come before"
                if one.start > end
                else "overlaps with another:"
            )
            raise CorruptError(
                f"{name}: {what} tensor {key[:200]!r}, which begins at byte {one.start:,} of the data, expected "
                f"{end:,}. The file is damaged; take another copy of it.",
                path=name,
            )
        end = one.stop
    if end != nbytes:
        problem = (
            f"truncated: {end - nbytes:,} bytes are missing at its end"
            if end > nbytes
            else (f"{nbytes - end:,} bytes follow its last tensor")
        )
        raise CorruptError(f"{name}: {problem}. Take another copy of it.", path=name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
