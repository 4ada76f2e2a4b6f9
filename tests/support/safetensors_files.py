"""Writes safetensors files by hand, so that tests do not depend on the writer that they compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def with_header(header: Any, data: bytes = b"") -> bytes:
    """A file of that header, as JSON unless it is bytes, and that data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def as_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, pad: int = 0
) -> bytes:
    """A file of `tensors` in their order, with `pad` blanks after the header."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = bytearray()
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = entry(CODES[tensor.dtype], list(tensor.shape), len(data), len(data) + len(raw))
        data += raw
    return with_header(json.dumps(header).encode() + b" " * pad, bytes(data))


def save_in_files(folder: Path, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """Saves a model as files, by name, with the index that lists them; the index."""
    for name, tensors in parts.items():
        (folder / name).write_bytes(as_safetensors(tensors))
    path = folder / "model.safetensors.index.json"
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path
