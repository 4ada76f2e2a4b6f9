"""Writes what ``torch.save`` would write of a tree, while its tensors are read a piece at a time.

The file is a zip of stored records, in torch's form: the pickle, which names each tensor's storage, and the storages.
A record's size and CRC-32 follow its bytes, so that nothing is written twice, and the file may be part of a longer one.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import sys
import zipfile
from typing import Any

import torch

from ..materialize.tensors import torch_dtype
from ..saved.dtypes import STORAGE_DTYPE
from ..saved.regions import row_major_stride
from .pieces import Pieces, Write
from .select import OutTensor

_TOP = "archive"
_ALIGNMENT = 64
_HEADER_BYTES, _LARGE_BYTES = 30, 20
"""Of a record's header before its name, and what it has more for a large record."""
_PADDING = struct.Struct("<HH")
_PADDING_ID = 0x4246
"""Of the field by which torch pads a record's header (caffe2/serialize/inline_container.cc)."""
_CLASSES = {dtype: name for name, dtype in STORAGE_DTYPE.items() if name != "UntypedStorage"}
OVERHEAD_BYTES = 2048
"""About what such a file has beside its storages."""


def write_torch(tree: Any, pieces: Pieces, write: Write) -> None:
    """Writes `tree`, whose tensors are `OutTensor`, by calls of `write` from one thread at a time.

    All is written when this returns. Raises as `Pieces.write`; what else `tree` holds must be what pickle can save.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(tree)
    sink = _Sink(write)
    with zipfile.ZipFile(sink, "w") as archive:  # type: ignore[call-overload]
        _record(archive, sink, "data.pkl", pickled.getvalue())
        _record(archive, sink, "byteorder", sys.byteorder.encode())
        for number, storage in enumerate(pickler.storages):
            if isinstance(storage, torch.UntypedStorage):
                _record(archive, sink, f"data/{number}", _bytes_of(storage))
                continue
            entry = _entry(sink, f"data/{number}", storage.nbytes)
            with archive.open(entry, "w", force_zip64=_is_large(storage.nbytes)) as record:
                pieces.write(storage, record.write)
                pieces.settle()
        _record(archive, sink, "version", b"3\n")


class _Storage:
    """Stands for the storage of a tensor in the pickle."""

    def __init__(self, tensor: OutTensor) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Pickles `OutTensor` as torch pickles tensors. Keeps them, and the storages of real tensors, by their numbers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[OutTensor | torch.UntypedStorage] = []
        self._number_of: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            name = _CLASSES.get(obj.tensor.dtype)
            kind = torch.UntypedStorage if name is None else getattr(torch, name)
            count = obj.tensor.nbytes if name is None else obj.tensor.source.numel
            return "storage", kind, self._number(obj.tensor), "cpu", count
        if isinstance(obj, torch.storage.TypedStorage):
            kind = getattr(torch, obj._pickle_storage_type())  # type: ignore[no-untyped-call]
            count = obj._size()  # type: ignore[no-untyped-call]
            return "storage", kind, self._number(obj._untyped_storage), "cpu", count
        if isinstance(obj, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, self._number(obj), "cpu", obj.nbytes()
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, OutTensor):
            return NotImplemented
        shape = tuple(obj.shape)
        stride, grad = row_major_stride(shape), obj.source.requires_grad
        args: tuple[Any, ...] = (_Storage(obj), 0, shape, stride, grad, collections.OrderedDict())
        if obj.dtype in _CLASSES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, torch_dtype(obj.dtype))

    def _number(self, storage: OutTensor | torch.UntypedStorage) -> str:
        # Tensors that share memory have one storage, of which each gives another object.
        place = id(storage)
        if isinstance(storage, torch.UntypedStorage) and storage.nbytes():
            place = storage.data_ptr()
        if place not in self._number_of:
            self._number_of[place] = len(self.storages)
            self.storages.append(storage)
        return str(self._number_of[place])


class _Sink:
    """A file that can only be written on, as zipfile takes it: it then writes sizes after the bytes."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self.written = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._write(view)
        self.written += len(view)
        return len(view)

    def flush(self) -> None:
        """Has nothing to do."""


def _record(archive: zipfile.ZipFile, sink: _Sink, name: str, data: bytes) -> None:
    with archive.open(_entry(sink, name, len(data)), "w") as record:
        record.write(data)


def _bytes_of(storage: torch.UntypedStorage) -> bytes:
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def _entry(sink: _Sink, name: str, nbytes: int) -> zipfile.ZipInfo:
    """The record's header, padded so that its data begin at a multiple of 64 bytes, as torch's do."""
    entry = zipfile.ZipInfo(f"{_TOP}/{name}")
    entry.file_size = nbytes
    start = sink.written + _HEADER_BYTES + len(entry.filename) + _PADDING.size
    start += _LARGE_BYTES if _is_large(nbytes) else 0
    padding = -start % _ALIGNMENT
    entry.extra = _PADDING.pack(_PADDING_ID, padding) + b"\0" * padding
    return entry


def _is_large(nbytes: int) -> bool:
    """Whether zipfile gives the record sizes of 8 bytes."""
    return nbytes * 1.05 > zipfile.ZIP64_LIMIT
