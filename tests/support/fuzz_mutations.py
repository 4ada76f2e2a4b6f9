"""Changes bytes at random as a hostile or damaged file might have them: anywhere, or by the structure of a format.

Every mutator is a function of the bytes, a `random.Random` and further seeds to take parts from; the same three give
the same result.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

MOST = 256 << 10
"""Bytes that a mutated input is cut to."""
NUMBERS = (
    0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 511, 512, 1 << 15, (1 << 16) - 1, 1 << 16, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip

Mutator = Callable[[bytes, Random, Sequence[bytes]], bytes]


def number(chance: Random) -> int:
    return chance.choice(NUMBERS) + chance.choice((0, 0, 0, -1, 1))


def packed(value: int, width: int, chance: Random) -> bytes:
    return (value & ((1 << (8 * width)) - 1)).to_bytes(width, chance.choice(("little", "big")))


def anywhere(data: bytes, chance: Random, seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """Changes one to four places, whatever the format; `tokens` are texts that it gives a meaning to."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 4))):
        at = chance.randrange(len(out) + 1)
        what = chance.randrange(9)
        if what == 0 and out:
            out[min(at, len(out) - 1)] = chance.randrange(256)
        elif what == 1 and out:
            out[min(at, len(out) - 1)] ^= 1 << chance.randrange(8)
        elif what == 2:
            width = chance.choice((1, 2, 4, 8))
            out[at : at + width] = packed(number(chance), width, chance)
        elif what == 3:
            del out[at : at + chance.choice((1, 2, 4, 8, 64, 512))]
        elif what == 4:
            begin = chance.randrange(len(out) + 1)
            part = out[begin : begin + chance.choice((1, 4, 16, 64, 512))]
            out[at:at] = part * chance.choice((1, 1, 1, 2, 64, 1000))
        elif what == 5 and tokens:
            token = chance.choice(tokens)
            out[at : at + chance.choice((0, len(token)))] = token * chance.choice((1, 1, 1, 1, 300, 5000))
        elif what == 6:
            other = chance.choice(seeds)
            begin = chance.randrange(len(other) + 1)
            out[at:] = other[begin:]
        elif what == 7:
            del out[at:]
        else:
            out[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 2, 4, 16))))
        del out[MOST:]
    return bytes(out)


def with_tokens(*tokens: bytes) -> Mutator:
    return lambda data, chance, seeds: anywhere(data, chance, seeds, tokens)


# --- JSON ------------------------------------------------------------------------------------------------------------

_TEXTS = (
    "", ".", "..", "/", "../x", "a/../b", "/etc/passwd", "\\", "a\\b", "\0", "\x1b[2J", "\n", "\ud800",
    "é" * 300, "x" * 5000, "__metadata__", "weight_map", "F32", "NaN", "torch.float32",
)  # fmt: skip
_RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"1" + b"0" * 400, b"[" * 3000,
    b"{\"a\":" * 3000, b"[" * 200 + b"]" * 200, b"[" * 100_000, b'"\\ud800"', b'"\\u0000"',
    b"[0" + b",0" * 2000 + b"]", b'{"a":1,"a":2}', b"truefalse", b"'a'", b"\xff\xfe", b"\xef\xbb\xbf",
    b"/*x*/",
)  # fmt: skip


def json_text(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """Changes a value, a key or the text of a JSON document."""
    if chance.random() < 0.25:
        return anywhere(data, chance, seeds, _RAW)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return anywhere(data, chance, seeds, _RAW)
    places = list(_places(tree))
    raw: bytes | None = None
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if not places:
            break
        inside, key = chance.choice(places)
        try:
            raw = _change(inside, key, chance, [one[0] for one in places]) or raw
        except (KeyError, IndexError):
            continue
    try:
        text = json.dumps(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return anywhere(data, chance, seeds, _RAW)
    return (text if raw is None else text.replace(b'"@raw@"', raw, 1))[:MOST]


def _places(tree: Any) -> Any:
    pending = [tree]
    while pending:
        one = pending.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            yield one, key
            pending.append(one[key])


def _change(inside: Any, key: Any, chance: Random, others: list[Any]) -> bytes | None:
    what = chance.randrange(8)
    if what == 0:
        inside[key] = chance.choice((None, True, False, 0, -1, 0.5, 1e308, [], {}, [[]], {"a": {}}))
    elif what == 1:
        inside[key] = number(chance)
    elif what == 2:
        inside[key] = chance.choice(_TEXTS)
    elif what == 3:
        del inside[key]
    elif what == 4 and isinstance(inside, dict):
        inside[chance.choice((*_TEXTS, *inside))] = inside.pop(key)
    elif what == 5:
        inside[key] = json.loads(json.dumps(chance.choice(others)))
    elif what == 6 and isinstance(inside, list):
        inside.extend([inside[key]] * chance.choice((1, 2, 70)))
    else:
        inside[key] = "@raw@"
        return chance.choice(_RAW)
    return None


# --- pickles ---------------------------------------------------------------------------------------------------------

_GLOBALS = (
    "os system", "posix system", "builtins eval", "__builtin__ exec", "builtins getattr",
    "builtins __import__", "importlib import_module", "torch load", "torch.storage _load_from_bytes",
    "torch._inductor x", "torch.serialization _get_layout", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_device_tensor_from_numpy", "torch._utils _rebuild_wrapper_subclass",
    "torch FloatStorage", "torch QInt8Storage", "torch.storage UntypedStorage", "torch float32",
    "torch device", "torch Size", "torch Tensor", "collections OrderedDict", "collections Counter",
    "collections defaultdict", "collections deque", "_codecs encode", "copyreg _reconstructor",
    "copyreg __newobj__", "copyreg __newobj_ex__", "copy_reg _reconstructor", "builtins bytearray",
    "builtins bytes", "builtins set", "builtins frozenset", "builtins complex", "builtins object",
    "builtins list", "builtins dict", "builtins int", "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray scalar", "numpy dtype", "numpy ndarray", "numpy.core.multiarray _frombuffer",
    "datetime datetime", "datetime timedelta", "datetime timezone", "decimal Decimal", "uuid UUID",
    "pathlib PosixPath", "argparse Namespace", "types SimpleNamespace", "torch.distributed.tensor DTensor",
    "torch.distributed._shard.sharded_tensor.api ShardedTensor",
    "torch.distributed.checkpoint.metadata Metadata", "torch.distributed.checkpoint.filesystem _StorageInfo",
    "functools partial", "operator attrgetter", "pickle loads", "os.path join", "a..b c", " x", "x ",
)  # fmt: skip


_OPCODES = [*(opcode.code.encode("latin-1")[0] for opcode in pickletools.opcodes), *range(0, 256, 7)]


def _unicode(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _snippet(chance: Random) -> bytes:
    """Opcodes that push a value, or do something to what is on the stack."""
    module, name = chance.choice(_GLOBALS).split(" ", 1)
    call = f"c{module}\n{name}\n".encode()
    what = chance.randrange(16)
    if what == 0:
        return call
    if what == 1:
        return (
            call
            + chance.choice(
                (b")", b"N\x85", b"K\x01\x85", b"](K\x01K\x02e\x85", b"}\x85", _unicode("x") + b"\x85")
            )
            + b"R"
        )
    if what == 2:
        return call + b")" + chance.choice((b"\x81", b"}\x92"))
    if what == 3:
        return _unicode(module) + _unicode(name) + b"\x93"
    if what == 4:
        return (
            call + b")R" + chance.choice((b"}b", b"Nb", b"(K\x00}tb", b"}" + _unicode("__class__") + b"Nsb"))
        )
    if what == 5:
        return b"J" + struct.pack("<I", number(chance) & 0xFFFFFFFF)
    if what == 6:
        size = chance.choice((0, 1, 8, 9, 255))
        return b"\x8a" + bytes([size]) + bytes(chance.choice((0, 0x7F, 0xFF)) for _ in range(size))
    if what == 7:
        size = chance.choice((300, 2000, 9000))
        return b"\x8b" + struct.pack("<I", size) + b"\x7f" * size
    if what == 8:
        return b"G" + chance.choice(
            (b"\x7f\xf0" + b"\0" * 6, b"\x7f\xf8" + b"\0" * 6, struct.pack(">d", 1e300))
        )
    if what == 9:
        return _unicode(chance.choice(_TEXTS))
    if what == 10:
        return chance.choice((b"\x82\x01", b"\x83\x01\0", b"\x84\x01\0\0\0", b"\x97", b"\x98", b"P0\n", b"Q"))
    if what == 11:
        index = chance.choice((0, 1, 2, 3, 10, 200))
        return chance.choice((b"h", b"q")) + bytes([index])
    if what == 12:
        return (
            b"("
            + _unicode("storage")
            + b"ctorch\nFloatStorage\n"
            + _unicode("0")
            + _unicode("cpu")
            + b"K\x04tQ"
        )
    if what == 13:
        return chance.choice(
            (
                b"(",
                b"0",
                b"1",
                b"2",
                b"t",
                b"l",
                b"d",
                b"e",
                b"a",
                b"s",
                b"u",
                b"o",
                b"\x90",
                b"\x91",
                b"b",
                b".",
            )
        )
    if what == 14:
        return b"i" + module.encode() + b"\n" + name.encode() + b"\n"
    return (
        chance.choice((b"I", b"L", b"F", b"V", b"S"))
        + chance.choice((b"1", b"01", b"-0", b"9" * 200, b"1e999", b"'a'", b"'", b"\\u0041", b"\\ud800"))
        + b"\n"
    )


def pickled(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """Changes the opcodes of a pickle: takes away, repeats, swaps and puts in whole ones, or changes their bytes."""
    way = chance.random()
    if way < 0.2:
        return anywhere(data, chance, seeds)
    if way < 0.25:
        return b"\x80\x04" + bytes(chance.choice(_OPCODES) for _ in range(chance.choice((5, 30, 200)))) + b"."
    ops = opcodes_of(data)
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        at = chance.randrange(len(ops) + 1)
        what = chance.randrange(7)
        if what == 0:
            ops[at:at] = [_snippet(chance) for _ in range(chance.choice((1, 1, 2, 4)))]
        elif what == 1:
            ops[at : at + 1] = [_snippet(chance)]
        elif what == 2:
            del ops[at : at + chance.choice((1, 1, 2, 8))]
        elif what == 3:
            begin = chance.randrange(len(ops) + 1)
            ops[at:at] = ops[begin : begin + chance.choice((1, 3, 10, 40))] * chance.choice((1, 1, 1, 2, 100))
        elif what == 4 and at < len(ops):
            other = chance.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        elif what == 5 and at < len(ops):
            ops[at] = ops[at][:1] + anywhere(ops[at][1:], chance, seeds)[:4096]
        else:
            other_ops = opcodes_of(chance.choice(seeds)[:8192])
            begin = chance.randrange(len(other_ops) + 1)
            ops[at:at] = other_ops[begin : begin + chance.choice((1, 5, 30))]
    return b"".join(ops)[:MOST]


def opcodes_of(data: bytes) -> list[bytes]:
    """The pickle's opcodes, each with its argument; the rest where it is none as one."""
    found: list[bytes] = []
    begin = 0
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:
        places = _readable(data)
    for place in [*places[1:], len(data)]:
        found.append(data[begin:place])
        begin = place
    return found


def _readable(data: bytes) -> list[int]:
    places: list[int] = []
    try:
        for _, _, place in pickletools.genops(data):
            places.append(place or 0)
    except Exception:
        return places or [0]
    return places


# --- torch zips ------------------------------------------------------------------------------------------------------

_ZIP_FIELDS = {
    b"PK\3\4": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\1\2": (
        (4, 2),
        (6, 2),
        (8, 2),
        (10, 2),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 2),
        (30, 2),
        (32, 2),
        (42, 4),
    ),
    b"PK\5\6": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\6\6": ((4, 8), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\6\7": ((4, 4), (8, 8), (16, 4)),
}


def torch_zip(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """Changes fields of a zip's headers, or packs it anew around a pickle that was changed."""
    way = chance.random()
    if way < 0.15:
        return anywhere(data, chance, seeds, tuple(_ZIP_FIELDS))
    if way < 0.45:
        try:
            return _packed_anew(data, chance, seeds)
        except Exception:
            return anywhere(data, chance, seeds)
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        mark = chance.choice(tuple(_ZIP_FIELDS))
        places = [at for at in range(len(out)) if out.startswith(mark, at)]
        if not places:
            continue
        at = chance.choice(places)
        offset, width = chance.choice(_ZIP_FIELDS[mark])
        value = chance.choice(
            (number(chance), chance.choice(places), len(out), chance.randrange(len(out) + 1))
        )
        out[at + offset : at + offset + width] = (value & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
    return bytes(out[:MOST])


def _packed_anew(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    others = []
    for seed in seeds:
        with zipfile.ZipFile(io.BytesIO(seed)) as archive:
            others += [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    which = chance.randrange(len(records))
    name, held = records[which]
    what = chance.randrange(5)
    pickle_at = next(index for index, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    if what <= 2:
        records[pickle_at] = (records[pickle_at][0], pickled(records[pickle_at][1], chance, others))
    elif what == 3:
        records[which] = (
            chance.choice((name + "/", "/" + name, "../" + name, "", "archive/data/0", "x/data.pkl", name)),
            held,
        )
    else:
        records[which] = (name, anywhere(held, chance, others))
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", chance.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    ) as archive:
        for name, held in records:
            archive.writestr(zipfile.ZipInfo(name), held)
    return out.getvalue()[:MOST]


# --- tars ------------------------------------------------------------------------------------------------------------

_TAR_FIELDS = (
    (0, 100),
    (100, 8),
    (124, 12),
    (124, 12),
    (136, 12),
    (148, 8),
    (156, 1),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
)
_TAR_VALUES = (
    b"/etc/x", b"../x", b"a/../../x", b"./", b"", b"C:/x", b"a\\b", b"\0" * 100, b"\xff" * 12,
    b"\x80" + b"\0" * 11, b"\x80" + b"\0" * 3 + b"\xff" * 8, b"77777777777\0", b"-1", b"99999999999",
    b"00000000001\0", b"a/" * 50,
)  # fmt: skip
_TAR_TYPES = b"0123456789DKLMNSVXgxA\0"
_PAX = (
    b"path=../x\n", b"size=-1\n", b"size=99999999999999999999\n", b"linkpath=/etc\n", b"GNU.sparse.major=1\n",
    b"GNU.sparse.map=0,1\n", b"path=" + b"a/" * 900 + b"\n", b"size=abc\n", b"mtime=1e999\n",
    b"path=\xff\xfe\n", b"GNU.sparse.size=1\n", b"GNU.sparse.minor=0\nGNU.sparse.major=1\n",
    b"hdrcharset=BINARY\n", b"path=\0\n", b"uid=" + b"9" * 5000 + b"\n",
)  # fmt: skip
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def tar(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """Changes headers of a plain tar, with right checksums mostly; packs it, or changes it as it is packed."""
    plain = data if data[257:262] == b"ustar" else seeds[0]
    if chance.random() < 0.2:
        return anywhere(data, chance, seeds)
    out = bytearray(plain)
    for _ in range(chance.choice((1, 1, 2, 3))):
        headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
        if not headers:
            break
        at = chance.choice(headers)
        what = chance.randrange(6)
        if what <= 2:
            offset, width = chance.choice(_TAR_FIELDS)
            value = bytes([chance.choice(_TAR_TYPES)]) if width == 1 else chance.choice(_TAR_VALUES)
            out[at + offset : at + offset + width] = value[:width].ljust(width, b"\0")
        elif what == 3:
            block = out[at : at + 512 * chance.choice((1, 2, 3))]
            out[at:at] = block * chance.choice((1, 1, 2, 50))
        elif what == 4:
            del out[at : at + 512 * chance.choice((1, 1, 2))]
        else:
            out[at:at] = _pax(chance)
        if chance.random() < 0.9:
            _sum_again(out)
    changed = bytes(out[:MOST])
    if chance.random() < 0.35:
        changed = chance.choice(tuple(COMPRESSORS.values()))(changed)
        if chance.random() < 0.3:
            changed = anywhere(changed, chance, seeds)
    return changed


def _pax(chance: Random) -> bytes:
    text = chance.choice(_PAX)
    record = b"%d %b" % (len(text) + chance.choice((3, 3, 3, 0, 100, 1 << 40)), text)
    header = bytearray(512)
    header[:4] = b"./@x"
    header[124:136] = b"%011o\0" % len(record)
    header[156:157] = chance.choice((b"x", b"x", b"g", b"X", b"L", b"K"))
    header[257:265] = b"ustar\0" + b"00"
    return bytes(header) + record.ljust(-(-len(record) // 512) * 512, b"\0")


def _sum_again(out: bytearray) -> None:
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """Changes the header as JSON, with its length right mostly, or the bytes."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.25 or length > len(data):
        return anywhere(data, chance, seeds)
    header = json_text(data[8 : 8 + length], chance, [seed[8:] for seed in seeds])
    stated = len(header) if chance.random() < 0.9 else number(chance) & ((1 << 64) - 1)
    return stated.to_bytes(8, "little") + header + data[8 + length :]


def dcp_pickle(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    """As `pickled`, of a file of fifty kilobytes of which few opcodes differ: more of them are changed."""
    for _ in range(chance.choice((1, 1, 2))):
        data = pickled(data, chance, seeds)
    return data


def plain_pickle(data: bytes, chance: Random, seeds: Sequence[bytes]) -> bytes:
    changed = pickled(data, chance, seeds)
    # The file is known by its first bytes.
    return changed if chance.random() < 0.1 or changed[:1] == b"\x80" else pickle.PROTO + b"\x04" + changed
