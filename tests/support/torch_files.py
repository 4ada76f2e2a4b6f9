"""What several tests of reading need: comparing trees with torch's own reading, writing hostile files."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from places import DATA
from rankload.loader.errors import RankloadError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.values import InertObject


def fixture_files(folder: Path) -> Iterator[Path]:
    """Every torch file of the real checkpoints, unpacked into `folder`; none of one rank's shards alone."""
    for source in sorted(DATA.rglob("*")):
        if source.name.startswith("latest") or not source.is_file() or "rank-shards" in source.parent.name:
            continue
        if source.suffix == ".pt":
            yield source
        elif source.suffix == ".tar":
            with tarfile.open(source) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".pt"):
                        target = folder / source.parent.name / source.name / member.name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.extractfile(member).read())
                        yield target


def read_whole(path: Path | str, **options: Any) -> Any:
    return materialize(read_index(str(path)).tree, reader=TensorReader(), file=str(path), **options)


def same(got: Any, want: Any, where: str = "") -> None:
    """Fails unless `got` is what torch.load makes of the same file."""
    if isinstance(got, InertObject):
        name = f"{type(want).__module__}.{type(want).__qualname__}"
        assert got.global_name == name, where
        same(got.state, vars(want), where)
    elif isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor), where
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), where
        assert got.requires_grad == want.requires_grad, where
        assert as_bytes(got) == as_bytes(want), where
    elif isinstance(want, (np.ndarray, np.generic)):
        assert type(got) is type(want), where
        # torch.load may swap an array to native order; the values are what counts.
        assert got.dtype.newbyteorder("=") == want.dtype.newbyteorder("="), where
        assert np.array_equal(got, want, equal_nan=want.dtype.kind in "fc"), where
    elif isinstance(want, dict):
        assert isinstance(got, dict), where
        assert list(got) == list(want), where
        for key in want:
            same(got[key], want[key], f"{where}/{key}")
        same(getattr(got, "_metadata", None), getattr(want, "_metadata", None), f"{where}._metadata")
    elif isinstance(want, (list, tuple)):
        assert isinstance(got, type(want) if type(want) in (list, tuple, torch.Size) else tuple), where
        assert len(got) == len(want), where
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            same(a, b, f"{where}/{index}")
    else:
        assert got == want or (got != got and want != want), where


def as_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def zip_with(pickled: bytes, path: Path, *, storages: dict[str, bytes] | None = None) -> Path:
    """A torch zip around `pickled`, as torch.save lays it out."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


def legacy_with(pickled: bytes, path: Path, *, keys: list[str] | None = None, tail: bytes = b"") -> Path:
    """A torch file of the old format around `pickled`."""
    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        stream.write(pickle.dumps(part, 2))
    stream.write(pickled)
    stream.write(pickle.dumps(keys or [], 2))
    stream.write(tail)
    path.write_bytes(stream.getvalue())
    return path


def outcome(path: Path) -> str:
    """``read`` or the name of the error that reading all of the file raises; any other exception passes."""
    try:
        read_whole(path)
    except RankloadError as error:
        return type(error).__name__
    return "read"
