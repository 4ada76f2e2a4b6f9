"""What is fuzzed: each parser of bytes that come from storage, with real inputs to begin from, and what it promises."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as mutations
import torch
from file_source import FileSource
from fuzz_guard import FindingError
from fuzz_http import KINDS, ScriptedServer, scripted
from hostile_pickles import payloads
from hostile_tars import HOSTILE, PLAIN, entry, tar_bytes
from places import DATA
from rankload.distributed import range_server
from rankload.distributed.range_server import PeerAddress, PeerConnection, RangeServer, Served
from rankload.loader import State, load, retries
from rankload.loader.alone import EVERYTHING, open_alone
from rankload.loader.cache import records
from rankload.loader.cache.holes import Landed, PartialFile
from rankload.loader.errors import (
    AccessError,
    AlgorithmError,
    CorruptError,
    FormatError,
    InternalError,
    LayoutError,
    MismatchError,
    NotFoundError,
    OptionError,
    RankloadError,
    TimestampError,
    TopologyError,
    UnsafeError,
)
from rankload.loader.fetch.archive import is_tar, unpack
from rankload.loader.fetch.files import FetchedFile
from rankload.loader.fetch.plan import FetchPlan, FetchRequest
from rankload.loader.fetch.remote_file import RemoteFile
from rankload.loader.fetch.tars import read_members
from rankload.loader.formats.dcp_metadata import read_metadata
from rankload.loader.formats.model_index import read_model_index
from rankload.loader.formats.safetensors import read_safetensors
from rankload.loader.formats.sniff import sniff
from rankload.loader.formats.strict_json import parse_json
from rankload.loader.formats.torch_file import read_index
from rankload.loader.formats.torch_zip import open_local
from rankload.loader.http import answers
from rankload.loader.http.addresses import redirected
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.receipt import RankReport
from rankload.loader.rng import decode as decode_rng
from rankload.loader.saved.tensor import StorageId
from rankload.loader.saved.tree import check_tree
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.local import LocalStore
from rankload.loader.stores.locate import Located, locate, read_tag
from rankload.loader.stores.manifest import is_manifest, manifest_of, parse_manifest
from rankload.loader.stores.sums import in_headers
from rankload.loader.stores.symlinks import resolve
from rankload.loader.wire import decode, encode
from torch_files import legacy_with, zip_with

Parse = Callable[[bytes], object]
BAD_BYTES: tuple[type[BaseException], ...] = (CorruptError, UnsafeError, FormatError)
"""What parsers of files promise."""
SPARE = 32 << 20
"""Bytes of memory that a process takes besides, such as modules that it imports."""
LEAST = 64 << 20
"""Bytes that reading the smallest file may take, by docs/safety.md."""


@dataclass(frozen=True)
class Target:
    """One parser, or several that the same bytes come to."""

    what: str
    """For the table."""
    seeds: Callable[[Path], Sequence[bytes]]
    """Real inputs; may write into the folder that it is given."""
    parse: Callable[[Path], contextlib.AbstractContextManager[Parse]]
    """Gives what reads an input; may write below the folder that it is given, which is empty before."""
    mutate: mutations.Mutator
    cases: int
    """How many executions ``make test`` has."""
    promised: tuple[type[BaseException], ...] = BAD_BYTES
    most_bytes: int = LEAST + SPARE
    per_byte: int = 26
    """Of memory, for each byte of the input."""
    most_s: float = 5.0
    """Of the processor's time, or by the clock, whichever is less."""


def parsing(
    one: Callable[[bytes, Path], object],
) -> Callable[[Path], contextlib.AbstractContextManager[Parse]]:
    """A parser that needs nothing but a folder."""

    @contextlib.contextmanager
    def parse(folder: Path) -> Iterator[Parse]:
        yield lambda data: one(data, folder)

    return parse


def put(data: bytes, folder: Path, name: str = "f") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def read_whole(path: str) -> Any:
    """What is in a torch file, with real tensors, as a load of everything makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return materialize(read_index(path).tree, reader=TensorReader(), file=path)


# --- torch files and pickles -----------------------------------------------------------------------------------------


class Odd:
    """An object of a class that no file reader knows."""

    def __init__(self) -> None:
        self.value = 3


def _values() -> list[Any]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(6.0)
    return [
        {"model": linear.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1, "lr": 0.1},
        {
            "a": base.reshape(2, 3).T,
            "b": base[2:],
            "c": torch.tensor([1, 2], dtype=torch.int8),
            "d": [(None, True, "é")],
        },
        {"s": torch.eye(3).to_sparse(), "q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        {
            "z": torch.ones(2, dtype=torch.complex64).conj(),
            "p": torch.nn.Parameter(torch.ones(1)),
            "n": base.numpy(),
        },
        {
            "r": torch.get_rng_state()[:64],
            "size": torch.Size([1, 2]),
            "dev": torch.device("cpu"),
            "t": torch.bfloat16,
        },
        {"odd": Odd(), "io": io.BytesIO(b"abc"), "set": {1, 2}, "x": 1 << 70, "y": b"\0\1"},
    ]


def _saved(value: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _zip_seeds(folder: Path) -> list[bytes]:
    real = [
        DATA / "lightning-mp-w2" / "ckpt" / "meta.pt",
        DATA / "trainer-plain-w2" / "ckpt" / "scheduler.pt",
    ]
    return [*map(_saved, _values()), *(path.read_bytes() for path in real)]


def _pickles(folder: Path) -> list[bytes]:
    found = []
    for data in _zip_seeds(folder):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found.append(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))
    return [*found, *payloads(folder / "canary").values()]


def _torch_file(data: bytes, folder: Path) -> object:
    return read_whole(put(data, folder))


_STORAGES = {str(n): b"\0" * 512 for n in range(8)}


def _pickle_in_zip(data: bytes, folder: Path) -> object:
    path = str(zip_with(data, folder / "f.pt", storages=_STORAGES))
    tree = read_index(path).tree
    try:
        check_tree(tree, name=path)
    except RankloadError as error:
        raise FindingError(f"a tree was let pass that cannot be walked: {error}") from error
    return read_whole(path)


def _pickle_in_legacy(data: bytes, folder: Path) -> object:
    return read_whole(str(legacy_with(data, folder / "f.pt")))


def _pickle(data: bytes, folder: Path) -> object:
    with contextlib.suppress(*BAD_BYTES):
        _pickle_in_legacy(data, folder)
    return _pickle_in_zip(data, folder)


def _plain_pickles(folder: Path) -> list[bytes]:
    values = [
        *_values()[:2],
        {"state": (3, tuple(range(9)), None), "f": 1.5, "k": {"a": [1, {2}]}},
        _values()[3],
    ]
    return [
        *(pickle.dumps(value, protocol) for value in values for protocol in (3, 4, 5)),
        (DATA / "accelerate-plain-w2" / "ckpt" / "scheduler.bin").read_bytes()[:0]
        or pickle.dumps({"a": 1}, 4),
    ]


# --- archives --------------------------------------------------------------------------------------------------------


def _tars(folder: Path) -> list[bytes]:
    made = [
        PLAIN,
        *(tar_bytes(*one) for one in HOSTILE.values()),
        *(
            tar_bytes(
                entry("./", type=tarfile.DIRTYPE),
                entry("composer_states.pt", b"c" * 700),
                entry("deepspeed/é" * 30, b"x" * 10, pax_headers={"comment": "y" * 300}),
                form=form,
            )
            for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
        ),
    ]
    return [*made, *(pack(PLAIN) for pack in mutations.COMPRESSORS.values()), *_zstd(PLAIN)]


def _zstd(data: bytes) -> list[bytes]:
    try:
        import zstandard
    except ImportError:
        return []
    return [zstandard.ZstdCompressor().compress(data)]


def _tar(data: bytes, folder: Path) -> object:
    path, inside = put(data, folder, "a.tar"), folder / "out"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    file = RemoteFile(FileSource(path, ObjectInfo(path, None)), str(folder / "far"))
    try:
        with contextlib.suppress(*BAD_BYTES):
            read_members(file, "a.tar", lambda n_bytes: None)
    finally:
        file.close()
    is_tar(path)
    return unpack(path, str(inside), limit=1 << 22)


def _packed(folder: Path) -> list[bytes]:
    datas = (b"x" * 1000, os.urandom(600) * 2, bytes(1 << 16), PLAIN)
    packed = [pack(data) for data in datas for pack in mutations.COMPRESSORS.values()]
    return [*packed, *(one for data in datas for one in _zstd(data)), packed[0] + packed[3]]


def _expand(data: bytes, folder: Path) -> object:
    from rankload.loader.fetch.decompress import COMPRESSED, Expanded

    path = put(data, folder)
    kind = sniff(path)
    if kind not in COMPRESSED:
        return None
    with Expanded(path, kind, path, limit=1 << 24) as expanded:
        while expanded.read(1 << 16):
            pass
    return None


# --- headers and small texts -----------------------------------------------------------------------------------------


def _safetensors_seeds(folder: Path) -> list[bytes]:
    real = (DATA / "safetensors-sharded-index" / "ckpt" / "model-00002-of-00002.safetensors").read_bytes()
    small = json.dumps(
        {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"k": "v"}}
    ).encode()
    scalar = json.dumps(
        {
            "b": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
            "e": {"dtype": "BF16", "shape": [0, 5], "data_offsets": [1, 1]},
        }
    ).encode()
    return [
        real,
        *(len(one).to_bytes(8, "little") + one + bytes(size) for one, size in ((small, 8), (scalar, 1))),
    ]


def _safetensors(data: bytes, folder: Path) -> object:
    path = put(data, folder, "f.safetensors")
    return read_safetensors(path, len(data), name=path, open_file=open_local)


def _json_seeds(folder: Path) -> list[bytes]:
    paths = (
        DATA / "trainer-plain-w2" / "ckpt" / "trainer_state.json",
        DATA / "safetensors-sharded-index" / "ckpt" / "model.safetensors.index.json",
        DATA / "rank-shards-w2" / "fsdp_config.json",
    )
    return [*(path.read_bytes() for path in paths), b'{"metadata": {}, "weight_map": {"a": "m.safetensors"}}']


def _json(data: bytes, folder: Path) -> object:
    """As trainer_state.json, as a model's index, and as verl's ``fsdp_config.json`` of a folder."""
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    if b"world_size" in data:  # to look for the files of a thousand ranks takes its time
        put(data, shards, "fsdp_config.json")
        with contextlib.suppress(*BAD_BYTES, NotFoundError):
            locate(LocalStore(), str(shards))
    with contextlib.suppress(*BAD_BYTES):
        read_model_index(put(data, folder, "model.safetensors.index.json"), name="index")
    return parse_json(data, name="trainer_state.json", what="it", finite=False)


def _dcp_seeds(folder: Path) -> list[bytes]:
    return [
        (DATA / name / "ckpt" / ".metadata").read_bytes() for name in ("lightning-mp-w2", "dcp-tp-fsdp-w4")
    ] + _small_dcp(folder)


def _small_dcp(folder: Path) -> list[bytes]:
    """The ``.metadata`` of a few values, as torch's own classes pickle them."""
    from torch.distributed.checkpoint import save
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    out = folder / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"w": torch.ones(2, 3), "n": {"step": 1}}, storage_writer=FileSystemWriter(out), no_dist=True)
    return [(out / ".metadata").read_bytes()]


def _dcp_metadata(data: bytes, folder: Path) -> object:
    return read_metadata(put(data, folder, ".metadata"), name=".metadata")


@contextlib.contextmanager
def _dcp_folder(folder: Path) -> Iterator[Parse]:
    """Opens a whole folder: the first byte says whether its ``.metadata`` or its file of items is the hostile one."""
    real = DATA / "dcp-tp-fsdp-w4" / "ckpt"
    for path in real.iterdir():
        shutil.copy(path, folder / path.name)

    def parse(data: bytes) -> object:
        name = ".metadata" if data[:1] == b"m" else "__0_0.distcp"
        try:
            put(data[1:], folder, name)
            with open_alone(folder, EVERYTHING) as opened:
                return len(opened.saved.state)
        finally:
            shutil.copy(real / name, folder / name)

    with _cache_in(folder):
        yield parse


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """What is unpacked or fetched goes into `folder` meanwhile, where a target may write."""
    os.environ["RANKLOAD_CACHE_DIR"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("RANKLOAD_CACHE_DIR", None)


def _dcp_items(folder: Path) -> list[bytes]:
    real = DATA / "dcp-tp-fsdp-w4" / "ckpt"
    return [b"m" + (real / ".metadata").read_bytes(), b"i" + (real / "__0_0.distcp").read_bytes()]


def _after_first(mutate: mutations.Mutator) -> mutations.Mutator:
    """Leaves the first byte, which says what the rest is for."""
    return lambda data, chance, seeds: (
        data[:1]
        + mutate(data[1:], chance, [seed[1:] for seed in seeds if seed[:1] == data[:1]] or [data[1:]])
    )


def _either(data: bytes, chance: Any, seeds: Sequence[bytes]) -> bytes:
    if data[:1] == b"m":
        return _after_first(mutations.pickled)(data, chance, seeds)
    return _after_first(functools.partial(mutations.anywhere, tokens=(b"PK\3\4", b"PK\1\2", b"PK\5\6")))(
        data, chance, seeds
    )


def _texts(folder: Path) -> list[bytes]:
    return [
        b"global_step3",
        b"a/b\n",
        b"ep1-ba4-rank0.pt.tar",
        b"../x",
        b"/etc/passwd",
        b"\xef\xbb\xbfx",
        b"a.symlink",
        b"l.symlink",
        b".",
    ]


def _latest(data: bytes, folder: Path) -> object:
    store = LocalStore()
    return read_tag(store, put(data, folder, "latest"))


def _symlink(data: bytes, folder: Path) -> object:
    store = LocalStore()
    put(b"x", folder, "ep1-ba4-rank0.pt.tar")
    put(data, folder, "l.symlink")
    return resolve(store, str(folder / "l"))


def _manifests(folder: Path) -> list[bytes]:
    one = manifest_of({"a": "0" * 64, "b\\c\n": "f" * 64})
    return [one, b"SHA256 (x y) = " + b"a" * 64 + b"\n", b"# c\r\n\r\n" + b"0" * 64 + b" *d/e\r\n", b"0" * 64]


def _manifest(data: bytes, folder: Path) -> object:
    is_manifest(data)
    return parse_manifest(data, "SHA256SUMS")


# --- this node's cache -----------------------------------------------------------------------------------------------


def _records(folder: Path) -> list[bytes]:
    process = {
        "host": "h",
        "pid": os.getpid(),
        "started": 1,
        "machine": "m",
        "work": "work-1",
        "purpose": "load",
    }
    about = {"group": "g", "content": "c", "stays": True, "awaited": False, "checkpoint": "x"}
    done = {"sizes": {"": 3}, "details": {"a": 1}}
    landed = struct.pack("<QQI", 0, 3, 0)
    return [*(json.dumps(one).encode() for one in (process, about, done)), landed + struct.pack("<I", 0)]


def _record(data: bytes, folder: Path) -> object:
    entry_folder, slot = folder / "entry", folder / "entry" / "whole"
    shutil.rmtree(entry_folder, ignore_errors=True)
    (entry_folder / "users").mkdir(parents=True)
    slot.mkdir()
    for path in (
        entry_folder / "about",
        entry_folder / "users" / "u",
        slot / "claim",
        slot / "done",
        slot / "o.landed",
    ):
        path.write_bytes(data)
    put(b"abc", slot, "o")
    entry_path = str(entry_folder)
    records.about(entry_path)
    records.whole(str(slot), str(slot / "o"))
    records.is_used_for("load", entry_path, 1e12)
    records.claimed_for(str(slot / "claim"), "work-1")
    Landed(str(slot / "o")).reach(0, 3)
    PartialFile(str(slot / "o"), 3).close()
    list(records.take_over(str(folder), "g", 1e12))
    if entry_folder.exists():
        records.in_use(entry_path, 1e12)
    list(records.sweep(str(folder), 1e12, at_once=True))
    for gone in folder.glob(".gone-*"):
        records.remove(str(gone))
    return None


# --- between ranks ---------------------------------------------------------------------------------------------------

_MESSAGES: tuple[Any, ...] = (
    Located,
    FetchRequest,
    FetchPlan,
    FetchedFile,
    RankReport,
    dict[str, FetchedFile],
    frozenset[StorageId],
)


def _message_seeds(folder: Path) -> list[bytes]:
    made = [_example(hint) for hint in _MESSAGES]
    rng = json.dumps(
        {
            "python": [3, list(range(9)), None],
            "numpy": ["MT19937", [1, 2], 1, 0, 0.0],
            "torch": "AAAA",
            "cuda": ["AA=="],
        }
    )
    return [
        *(bytes([index]) + json.dumps(encode(one)).encode() for index, one in enumerate(made)),
        bytes([99]) + rng.encode(),
    ]


def _example(hint: Any) -> Any:
    """A value of that type: the first of its choices, and one of each of its items."""
    import collections.abc
    import dataclasses

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _example(next(one for one in arguments if one is not type(None)))
    if origin is typing.Literal:
        return arguments[0]
    if origin in (dict, collections.abc.Mapping):
        return {_example(arguments[0]): _example(arguments[1])}
    if origin is tuple and arguments[-1] is not ...:
        return tuple(map(_example, arguments))
    if origin is not None:
        made = [_example(arguments[0])]
        return frozenset(made) if origin is frozenset else tuple(made) if origin is not list else made
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint)
        names = (
            [field.name for field in dataclasses.fields(hint)]
            if dataclasses.is_dataclass(hint)
            else hint._fields
        )
        return hint(**{name: _example(hints[name]) for name in names})  # type: ignore[operator]
    return {bool: True, int: 1, float: 0.5, str: "a", None: None, type(None): None}[hint]


def _message(data: bytes, folder: Path) -> object:
    """What one rank sent another, which the store of the job hands over as JSON."""
    if data[:1] >= b"\x50":
        return decode_rng(data[1:])
    try:
        record = json.loads(data[1:])
    except RecursionError:
        return None  # json's own; that it is JSON at all, the channel sees to
    return decode(_MESSAGES[(data[0] if data else 0) % len(_MESSAGES)], record)


def _requests(folder: Path) -> list[bytes]:
    """The first byte says who sends the rest: a stranger to the server, one that has proved itself, or a false server
    to the client."""
    asked = json.dumps({"key": "k", "start": 0, "stop": 3}).encode()
    request = len(asked).to_bytes(4, "big") + asked
    frames = [
        struct.pack("!cQ", b"d", 3) + b"abc",
        struct.pack("!cQ", b"w", 1) + struct.pack("!cQ", b"e", 2) + b"no",
    ]
    hello = range_server._HELLO + bytes(range_server._NONCE_BYTES)
    return [
        b"p" + request,
        *(b"c" + one for one in frames),
        b"p\xff\xff\xff\xff",
        b"s" + hello + bytes(32),
        b"s" + hello + request,
        b"s" + request,
    ]


@contextlib.contextmanager
def _peer(folder: Path) -> Iterator[Parse]:
    put(b"abc", folder, "k")
    crashes: list[str] = []
    was = threading.excepthook
    threading.excepthook = lambda args: crashes.append(f"{args.exc_type.__name__}: {args.exc_value}")
    server = RangeServer(
        lambda key: Served(str(folder / "k"), lambda start, stop: min(stop, 3), lambda: 0), "h"
    )

    def parse(data: bytes) -> object:
        crashes.clear()
        if data[:1] == b"c":
            return _ask(data[1:])
        if data[:1] == b"p":
            sender = PeerConnection(server.address)._socket
        else:
            sender = socket.create_connection(("127.0.0.1", server.address.port), timeout=5)
        with sender:
            sender.settimeout(1)
            with contextlib.suppress(OSError):
                sender.sendall(data[1:])
                sender.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                # Who asks for what the file does not have is told to wait for as long as it stays.
                while (got := sender.recv(1 << 16)) and got[:1] != b"w":
                    pass
        if crashes:
            raise FindingError("exception", f"in the server's thread: {crashes[0][:200]}")
        return None

    try:
        yield parse
    finally:
        server.close()
        threading.excepthook = was


def _ask(answer: bytes) -> object:
    """What the client makes of `answer`, which it gets for a request of three bytes from one that knows the key."""
    key = bytes(32)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    hello = connection.recv(
                        len(range_server._HELLO) + range_server._NONCE_BYTES, socket.MSG_WAITALL
                    )
                    theirs = hello[len(range_server._HELLO) :]
                    ours = bytes(range_server._NONCE_BYTES)
                    connection.sendall(ours + range_server._proof(key, b"server", theirs, ours) + answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        connection = PeerConnection(PeerAddress("h", "elsewhere", ("127.0.0.1",), port, key.hex()))
        try:
            connection.ask("k", 0, 3)
            view = memoryview(bytearray(3))
            while view:
                view = view[connection.receive(view, lambda progress: None) :]
        finally:
            connection.close()
            thread.join(5)
    return None


# --- HTTP ------------------------------------------------------------------------------------------------------------

_HTTP_TOKENS = tuple(
    f"{line}\r\n".encode("latin-1")
    for line in (
        f"Content-Range: bytes 0-{'9' * 4500}/*",
        "Content-Range: bytes 0-1/2",
        f"Content-Length: {'9' * 4500}",
        f"Retry-After: {'9' * 4500}",
        "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT",
        "Retry-After: \xb2",
        "Content-Length: \xb2",
        'ETag: W/"x"',
        "Location: //[::1/",
        "Location: http://\xb2/",
        f"x-amz-checksum-crc32: AAAAAA==-{'9' * 4500}",
        "x-amz-checksum-type: COMPOSITE",
        "x-goog-hash: crc32c=AAAAAA==",
        f"Repr-Digest: sha-256=:{'A' * 43}=:",
        f"Digest: md5={'A' * 22}==",
        "Content-Encoding: gzip",
        f'X-Linked-ETag: "{"0" * 64}"',
    )
)


def _headers_seeds(folder: Path) -> list[bytes]:
    return [
        b'Content-Range: bytes 0-9/10\r\nContent-Length: 10\r\nETag: "a"\r\nRetry-After: 3\r\nLocation: /b?c#d\r\n',
        b"x-amz-checksum-crc32: AAAAAA==\r\nx-goog-hash: crc32c=AAAAAA==,md5="
        + b"A" * 22
        + b"==\r\nLocation: http://h:1/\r\n",
        *_HTTP_TOKENS,
    ]


def _headers(data: bytes, folder: Path) -> object:
    headers = Message()
    for line in data.decode("latin-1").split("\r\n")[:200]:
        name, colon, value = line.partition(":")
        if colon and name.strip():
            headers[name.strip()] = value.strip(" \t").replace("\r", "").replace("\n", "")
    pin = answers.pin_of(headers, 10)
    in_headers(headers)
    in_headers(headers, whole=False)
    answers.retry_after_s(headers)
    for check in (
        lambda: answers.check_partial_answer(headers, 0, 10, pin, "x"),
        lambda: answers.check_whole_answer(headers, answers.Pin(10, '"a"'), "x"),
        lambda: redirected("http://h/a", headers.get("Location", ""), "x"),
    ):
        with contextlib.suppress(CorruptError, AccessError):
            check()
    return answers.status_error(len(data) % 600, headers, data[:100], "x", "none")


class _Small(torch.nn.Module):
    """A model that is worth fetching in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(250_000))
        self.b = torch.nn.Parameter(torch.zeros(7))


def _objects() -> dict[str, bytes]:
    """What the server serves: one torch file, as it is, in a tar and packed; its optimizer's part is not loaded."""
    torch.manual_seed(1)
    model = _Small()
    model.load_state_dict({"w": torch.rand(250_000), "b": torch.rand(7)})
    tree = {"state": {"model": model.state_dict(), "unused": torch.zeros(300_000)}}
    whole = _saved(tree)
    small = _saved({"state": {"model": model.state_dict()}})
    return {
        "/a": whole,
        "/small.tar": tar_bytes(entry("composer_states.pt", small)),
        "/packed.pt": mutations.COMPRESSORS["gzip"](small),
        "/linked.symlink": b"a",
        "/sums.pt": small,
        "/sums.pt.sha256": f"{_sha256(small)}  sums.pt\n".encode(),
    }


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


_LOADS = (
    ("/a", "node"),
    ("/a", "direct"),
    ("/small.tar", "node"),
    ("/packed.pt", "node"),
    ("/linked", "node"),
    ("/sums.pt", "node"),
)
HTTP_ERRORS = (*BAD_BYTES, AccessError, NotFoundError, MismatchError, LayoutError, RankloadError)


@contextlib.contextmanager
def _http(folder: Path) -> Iterator[Parse]:
    """A whole load. The first byte says of what; each four bytes after it are what is wrong with the next answer."""
    objects = _objects()
    expected = torch.load(io.BytesIO(objects["/a"]))["state"]["model"]
    was = retries.BACKOFF_S
    retries.BACKOFF_S = 0.001
    with _cache_in(folder), scripted(objects) as server:

        def parse(data: bytes) -> object:
            path, mode = _LOADS[(data[0] if data else 0) % len(_LOADS)]
            server.begin(data[1:])
            return _load_and_compare(server, path, mode, expected)

        try:
            yield parse
        finally:
            retries.BACKOFF_S = was


def _load_and_compare(
    server: ScriptedServer, path: str, mode: str, expected: dict[str, torch.Tensor]
) -> object:
    model = _Small()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(
                server.url(path),
                State(model),
                load_weights_only=True,
                progress_bar=False,
                options={"mode": mode, "stall_timeout_s": 4.0},
            )
    except (InternalError, OptionError, TopologyError, TimestampError, AlgorithmError) as error:
        raise FindingError("exception", f"{type(error).__name__}: {error}") from error
    except RankloadError as error:
        if "planted" in f"{error} {error.details}":
            raise FindingError("secret", str(error)) from error
        if type(error) is RankloadError:
            # How ranks are told of an exception that nobody foresaw.
            raise FindingError("exception", error.message) from error
        raise
    if any(not torch.equal(value, expected[name]) for name, value in model.state_dict().items()):
        raise FindingError("damage", "a damaged byte was loaded without an error")
    return None


def _scripts(folder: Path) -> list[bytes]:
    loads = range(len(_LOADS))
    each = [
        bytes([(kind + before) % len(_LOADS), *bytes(4 * before), kind, kind * 7 % 256, kind, 3])
        for before in (0, 1, 2)
        for kind in range(KINDS)
    ]
    return [*(bytes([one]) for one in loads), *each]


def _script(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """Another script of up to eight wrong answers among right ones, or of one that is wrong again and again."""
    codes = [bytes(chance.randrange(256) for _ in range(4)) for _ in range(chance.choice((1, 1, 2, 4, 8)))]
    codes = [bytes([chance.randrange(KINDS)]) + code[1:] for code in codes]
    for _ in range(chance.choice((0, 0, 1, 3))):
        codes.insert(chance.randrange(len(codes) + 1), bytes(4))
    return bytes([chance.randrange(len(_LOADS))]) + b"".join(codes * chance.choice((1, 1, 1, 40)))


TARGETS: dict[str, Target] = {
    "torch-zip": Target(
        "zip directory and records of torch files", _zip_seeds, parsing(_torch_file), mutations.torch_zip, 300
    ),
    "torch-legacy": Target(
        "torch files of the format before 1.6",
        lambda folder: [_saved(value, legacy=True) for value in _values()[:2]],
        parsing(_torch_file),
        mutations.pickled,
        200,
    ),
    "pickle": Target("opcodes of a torch file's pickle", _pickles, parsing(_pickle), mutations.pickled, 300),
    "plain-pickle": Target(
        "plain pickles", _plain_pickles, parsing(_torch_file), mutations.plain_pickle, 200
    ),
    "tar": Target(
        "tars, plain and packed, whole and by their headers", _tars, parsing(_tar), mutations.tar, 300
    ),
    "decompress": Target(
        "gzip, bzip2, xz and zstd",
        _packed,
        parsing(_expand),
        mutations.anywhere,
        300,
        per_byte=0,
        most_bytes=LEAST + SPARE,
    ),
    "safetensors": Target(
        "headers of safetensors files",
        _safetensors_seeds,
        parsing(_safetensors),
        mutations.safetensors,
        500,
        per_byte=600,
    ),
    "json": Target(
        "trainer_state.json, a model's index, fsdp_config.json",
        _json_seeds,
        parsing(_json),
        mutations.json_text,
        300,
        per_byte=600,
    ),
    "dcp-metadata": Target(
        ".metadata of DCP folders", _dcp_seeds, parsing(_dcp_metadata), mutations.dcp_pickle, 120, per_byte=42
    ),
    "dcp-folder": Target(
        "DCP folders whose .metadata or items are hostile",
        _dcp_items,
        _dcp_folder,
        _either,
        40,
        (*BAD_BYTES, NotFoundError, LayoutError),
        per_byte=42,
    ),
    "latest": Target(
        "latest",
        _texts,
        parsing(_latest),
        mutations.with_tokens(b"..", b"/", b"\\", b"\0", b"\xff", b"\xc2\xa0"),
        500,
    ),
    "symlink": Target(
        ".symlink texts",
        _texts,
        parsing(_symlink),
        mutations.with_tokens(b"..", b"/", b"\\", b"\0", b"\xff", b".symlink", b"l"),
        500,
        (*BAD_BYTES, NotFoundError, AccessError),
    ),
    "manifest": Target(
        "SHA256SUMS and the like",
        _manifests,
        parsing(_manifest),
        mutations.with_tokens(b"\\", b"\n", b"  ", b"../", b"0" * 64, b"\xff"),
        500,
    ),
    "cache": Target("records of this node's cache", _records, parsing(_record), mutations.json_text, 200, ()),
    "messages": Target(
        "JSON that ranks send each other",
        _message_seeds,
        parsing(_message),
        _after_first(mutations.json_text),
        500,
        (ValueError, CorruptError),
        per_byte=600,
    ),
    "peer": Target(
        "the server of ranges and its client",
        _requests,
        _peer,
        _after_first(
            mutations.with_tokens(
                b'"stop": ',
                b"9" * 5000,
                b"[" * 3000,
                b"Infinity",
                struct.pack("!cQ", b"d", 1 << 63),
                struct.pack("!cQ", b"e", 1 << 63),
            )
        ),
        60,
        (OSError, ValueError),
    ),
    "http-headers": Target(
        "headers of HTTP answers",
        _headers_seeds,
        parsing(_headers),
        mutations.with_tokens(*_HTTP_TOKENS),
        500,
        (),
    ),
    "http-load": Target(
        "whole loads, whose answers are wrong",
        _scripts,
        _http,
        _script,
        160,
        HTTP_ERRORS,
        per_byte=0,
        most_bytes=LEAST + SPARE,
        most_s=20.0,
    ),
}
"""By name; ``make fuzz`` runs all of them."""
