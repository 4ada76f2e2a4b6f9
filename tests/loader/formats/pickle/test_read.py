"""The restricted unpickler: inert values out of any pickle, and nothing that a pickle can take hold of."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from typing import Any

import pytest
from rankload.loader.errors import CorruptError, RankloadError, UnsafeError
from rankload.loader.formats.pickle.budget import Budget
from rankload.loader.formats.pickle.inert import PickledGlobal, PickledTensor
from rankload.loader.formats.pickle.read import read_pickle
from rankload.loader.formats.pickle.scan import scan_pickle
from rankload.loader.formats.pickle.tensors import lay_out
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.tree import find_unknown
from rankload.loader.saved.values import GlobalName, InertObject

LIMIT = 64 << 20


def find_storage(pid: tuple[Any, ...]) -> PickledTensor:
    return PickledTensor(StorageRef("f", str(pid[2]), 0, 400, None), "float32", (pid[4],), (1,))


def read(data: bytes) -> Any:
    scanned = scan_pickle(data, name="f", memory_limit=LIMIT)
    return read_pickle(data, scanned, name="f", memory_limit=LIMIT, find_storage=find_storage)


class Old:
    def __init__(self) -> None:
        self.a = 1


class WithNew:
    def __new__(cls, *args: Any, **kwargs: Any) -> WithNew:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.b = [2]

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"k": 2}


class ADict(dict):
    pass


class AList(list):
    pass


@pytest.mark.parametrize("protocol", [4, 5])
def test_new_objects_in_several_frames(protocol: int) -> None:
    """A frame states how many bytes it has, which the opcodes in place of those of new objects change."""
    data = pickle.dumps([[Old(), f"{index:1000}"] for index in range(200)], protocol)
    assert data.count(pickle.FRAME) > 1
    found = read(data)
    assert [(one.state, len(text)) for one, text in found] == [({"a": 1}, 1000)] * 200


def test_calls_alone_as_inert_objects() -> None:
    """They hash by identity, so that any number of them may be keys; what else a file's keys may be is bounded."""
    data = pickle.dumps({WithNew(): (Old(), complex(1, 2)) for _ in range(12_000)})
    with pytest.raises(UnsafeError):
        read(data)
    scanned = scan_pickle(data, name="f", memory_limit=LIMIT, inert=True)
    found = read_pickle(data, scanned, name="f", memory_limit=LIMIT, inert=True)
    assert len(found) == 12_000
    assert all(isinstance(one, InertObject) for key, value in found.items() for one in (key, *value))
    numbers = pickle.dumps({float(one): None for one in range(12_000)})
    with pytest.raises(UnsafeError):
        scan_pickle(numbers, name="f", memory_limit=LIMIT, inert=True)


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_described(protocol: int) -> None:
    value = [Old(), Old, functools.partial(print, 1), ADict(x=1), AList([1, 2])]
    got = read(pickle.dumps(value, protocol))
    name = f"{__name__}.Old"
    assert (got[0].global_name, got[0].state, got[0].known) == (name, {"a": 1}, False)
    assert got[0].via_new
    assert got[1] == GlobalName(name)
    assert got[2].global_name == "functools.partial"
    if protocol >= 2:
        assert got[3].entries == {"x": 1}
        assert got[4].items == [1, 2]
    assert all(not entry.known for entry in got)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arguments_of_new_are_kept(protocol: int) -> None:
    got = read(pickle.dumps(WithNew(), protocol))
    if protocol >= 4:
        assert (got.args, got.kwargs) == ((1,), {"k": 2})
        assert got.global_name == f"{__name__}.WithNew"
    else:
        # Written as a call of what another call gives.
        assert got.global_name == "functools.partial()"
    assert got.state == {"b": [2]}


def test_old_opcodes_for_objects() -> None:
    for data in (b"(imodule\nName\n}b.", b"(cmodule\nName\no}b.", b"cmodule\nName\n)\x81}b."):
        got = read(data)
        assert (got.global_name, got.state) == ("module.Name", {})
    got = read(b"(K\x01K\x02imodule\nName\n.")
    assert got.args == (1, 2)


def test_python_2_spellings() -> None:
    assert read(b"c__builtin__\nset\n](K\x01K\x02e\x85R.") == {1, 2}
    assert read(b"c__builtin__\nxrange\nK\x03\x85R.").global_name == "builtins.range"
    got = read(
        b"ccopy_reg\n_reconstructor\n(cmodule\nName\nc__builtin__\nobject\nNtR}X\x01\x00\x00\x00aK\x01sb."
    )
    assert (got.global_name, got.state, got.args, got.via_new) == ("module.Name", {"a": 1}, (), True)


def test_nothing_is_imported() -> None:
    name = "this_module_is_never_imported"
    before = set(sys.modules)
    got = read(b"c" + name.encode() + b"\nName\n)R.")
    assert got.global_name == f"{name}.Name"
    read(b"cwave\nopen\n)R0cantigravity\nfly\n.")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n}b.",
        b"cos\nsystem\n(N}X\x04\x00\x00\x00nameNstb.",
        b"c__builtin__\nset\n}b.",
        b"ctorch\nfloat32\n}b.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x94}b.",
    ],
)
def test_state_of_classes_and_functions_is_refused(data: bytes) -> None:
    with pytest.raises(UnsafeError):
        read(data)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuKdtQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x0a\x85K\x01\x85\x89}tR"


def test_tensors_cannot_be_moved_afterwards() -> None:
    assert read(TENSOR + b".").shape == (10,)
    for patch in (b"}b", b"](K\x01K\x02eb", b"(N}X\x05\x00\x00\x00shapeK\x01stb"):
        for target in (TENSOR, STORAGE):
            with pytest.raises(RankloadError):
                read(target + patch + b".")


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
MINUS_1 = b"J\xff\xff\xff\xff"
DTYPE = (
    b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tR(K\x03X\x01\x00\x00\x00|NNN"
    + MINUS_1
    + MINUS_1
    + b"K\x00tb"
)


def array_state(shape: bytes, data: bytes) -> bytes:
    return b"(K\x01" + shape + DTYPE + b"\x89C" + bytes([len(data)]) + data + b"tb"


def test_arrays_take_their_contents_once() -> None:
    got = read(ARRAY + array_state(b"K\x03\x85", b"abc") + b".")
    assert (got.dtype, got.shape, got.data) == ("|u1", (3,), b"abc")
    with pytest.raises(UnsafeError):
        read(ARRAY + array_state(b"K\x03\x85", b"abc") * 2 + b".")
    for shape in (b"K\x04\x85", b"J\xff\xff\xff\xff\x85", b"N", b"X\x01\x00\x00\x00a\x85"):
        with pytest.raises(CorruptError):
            read(ARRAY + array_state(shape, b"abc") + b".")


def test_arrays_of_objects_are_never_made() -> None:
    numpy = pytest.importorskip("numpy")
    for protocol in (2, 5):
        got = read(pickle.dumps({"a": numpy.array([print, 1], dtype=object)}, protocol))
        assert got["a"].data == b""
        assert find_unknown(got) == [("a", "NumPy array of Python objects")]
        got = read(pickle.dumps(numpy.zeros(2, "i4,f4"), protocol))
        assert find_unknown(got) == [("", "NumPy array of Python objects")]


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (101,), (1,)),
        (1, (100,), (1,)),
        (0, (2, 51), (51, 1)),
        (0, (2,), (100,)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (True,), (1,)),
        (0, (2.0,), (1,)),
        (0, "ab", (1,)),
        (0, (1 << 70,), (0,)),
        (0, (1,) * 65, (1,) * 65),
        (0, (1 << 40,) * 4, (0,) * 4),
        (1 << 70, (), ()),
    ],
)
def test_tensors_beyond_their_storage(offset: Any, shape: Any, stride: Any) -> None:
    base = find_storage(("storage", None, "0", "cpu", 100))
    with pytest.raises(CorruptError):
        lay_out(Budget(LIMIT), base, "float32", offset, shape, stride, False)


def test_tensors_at_the_edge_of_their_storage() -> None:
    base = find_storage(("storage", None, "0", "cpu", 100))
    for offset, shape, stride in ((0, (100,), (1,)), (99, (), ()), (100, (0,), (1,)), (0, (5, 7), (0, 16))):
        assert lay_out(Budget(LIMIT), base, "float32", offset, shape, stride, False).shape == shape


def test_calls_that_copy_are_counted() -> None:
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x000"
    encode = b"c_codecs\nencode\nq\x010" + b"h\x01h\x00\x85R0" * 200
    with pytest.raises(UnsafeError, match="copy more"):
        read(b"\x80\x02" + text + encode + b"N.")


@pytest.mark.parametrize(
    "data",
    [
        b"c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
        b"c__builtin__\nbytes\nJ\x00\x00\x00\x7f\x85R.",
        b"c__builtin__\nset\nc__builtin__\nxrange\nJ\x00\x00\x00\x7f\x85R\x85R.",
        b"c__builtin__\nlist\nc__builtin__\nxrange\nJ\x00\x00\x00\x7f\x85R\x85R.",
        b"ctorch\nSize\nX\x01\x00\x00\x00a\x85R.",
        b"K\x01Q.",
        b"Psomething\n.",
        b"](ctorch\nSize\nK\x01\x85\x85Q.",
    ],
)
def test_calls_that_do_not_fit(data: bytes) -> None:
    with pytest.raises((CorruptError, UnsafeError)):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
        b"cdatetime\ntimedelta\nX\x01\x00\x00\x00a\x85R.",
        b"c__builtin__\nset\n](]e\x85R.",
        b"cdatetime\ndatetime\nC\x01a\x85R.",
        b"cdatetime\ndatetime\n(C\x0a\x07\xe8\x01\x01\x00\x00\x00\x00\x00\x00cpkg\nZone\n)RtR.",
        b"c__builtin__\ngetattr\ncpkg\nOuter\nX\x05\x00\x00\x00Inner\x86R.",
    ],
)
def test_calls_in_forms_that_are_not_known_are_objects_of_unknown_types(data: bytes) -> None:
    assert find_unknown(read(data))


def test_attributes_of_ordered_dicts() -> None:
    od = b"ccollections\nOrderedDict\n)R"
    metadata = b"}X\x09\x00\x00\x00_metadata}sb"
    assert read(od + metadata + b".")._metadata == {}
    got = read(od + b"}X\x05\x00\x00\x00itemsNsb.")
    assert list(got.items()) == []
    got = read(od + b"(N}X\x05\x00\x00\x00itemsNstb.")
    assert list(got.items()) == []


def test_results_can_be_copied_but_not_patched() -> None:
    got = read(pickle.dumps([Old(), Old], 2))
    again = copy.deepcopy(got)
    assert type(again[0]) is InertObject
    assert again[0].state == {"a": 1}
    assert type(again[1]) is GlobalName
    assert isinstance(got[1], PickledGlobal)


def test_copies_of_a_tensor_are_plain_ones() -> None:
    tensor = read(b"ctorch._utils\n_rebuild_parameter\n(" + TENSOR + b"\x88}tR.")
    assert type(tensor) is PickledTensor
    for again in (copy.copy(tensor), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert type(again) is SavedTensor
        assert (again.dtype, again.shape, again.requires_grad) == ("float32", (10,), True)
        (piece,) = again.pieces
        (own,) = tensor.pieces
        for name in ("region", "offset", "stride", "storage"):
            assert getattr(piece, name) == getattr(own, name)
    with pytest.raises(UnsafeError, match="sets the state of a tensor"):
        tensor.__setstate__({"shape": (3,)})


def test_a_tensor_shares_its_shape_with_the_pickle() -> None:
    shape = b"(" + b"K\x01" * 64 + b"tq\x00"
    strides = b"(" + b"K\x07" * 64 + b"tq\x01"
    args = b"(" + STORAGE + b"K\x00" + shape + strides + b"\x89}tq\x02"
    call = b"ctorch._utils\n_rebuild_tensor_v2\nq\x03"
    got = read(b"(" + call + args + b"0" * 2 + b"h\x03h\x02R" * 3 + b"h\x00h\x01l.")
    *tensors, sizes, steps = got
    assert len(tensors) == 3
    for tensor in tensors:
        assert tensor.shape is sizes
        assert tensor.pieces[0].stride is steps
