"""Captures random states, gathers them over the ranks and restores them; derives those that a checkpoint lacks.

A state is a dict with Composer's keys: ``python`` (``random.getstate()``), ``numpy`` (the legacy global generator's
tuple), ``torch`` (the CPU generator's ByteTensor) and ``cuda`` (this rank's device, where CUDA is initialised). Other
forms are brought into this one (`normal_form`), before anything of a file is read or made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..distributed.printable import warn
from .errors import CorruptError, FormatError
from .plurals import counted
from .saved.dtypes import ITEMSIZE
from .saved.random_states import (
    CUDA_BYTES,
    MT_WORDS,
    NAMES,
    TORCH_BYTES,
    check_position,
    check_twister,
)
from .saved.tensor import SavedTensor
from .saved.values import InertArray, InertObject, kind_of
from .torch_modes import default_modes

if TYPE_CHECKING:
    from ..distributed.channel import Channel

RngState = dict[str, Any]

_INTEGERS = frozenset(name for name in ITEMSIZE if name.startswith(("int", "uint")))
_OTHER_BIT_GENERATORS = frozenset({"PCG64", "PCG64DXSM", "Philox", "SFC64"})
_MOST_BYTES = 1 << 20
"""What is longer is no generator's state."""
_MOST_DEVICES = 4096

_LACKING = b"-"
"""Sent for a random state that this rank's own file should have, and lacks."""


def capture_rng() -> RngState:
    """This rank's random states as they are now; ``cuda`` only where CUDA is initialised."""
    state: RngState = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if _cuda_is_initialised():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def gather_rng() -> list[RngState]:
    """Every rank's random states, by global rank, on every rank. All ranks must call it."""
    from ..distributed.session import open_session

    with open_session() as session:
        return gather_states(session.channel, capture_rng())


def gather_states(channel: Channel, state: RngState) -> list[RngState]:
    """Every rank's `state`, by global rank, on every rank of `channel`. All ranks must call it."""
    return [decode(payload) for payload in channel.gather_bytes("gather rng", encode(state))]


class HasRngStates(Protocol):
    """What `restore_rng` takes besides a list: a `LoadResult`."""

    @property
    def rng_states(self) -> Sequence[RngState] | None: ...


def restore_rng(rng_states: Sequence[RngState] | HasRngStates | None) -> None:
    """Sets this rank's generators from its entry of a list that `load_checkpoint` or `gather_rng` returned, or of the
    `LoadResult` of `load`.

    Every entry is checked before any generator is set. A ``cuda`` state is set where CUDA is initialised; a list of all
    devices' states sets each device's. None, which `load_checkpoint` returns where there are no RNG states, is warned
    of and changes nothing; so is an entry of a generator that there is not here.
    Raises `FormatError` where the list is shorter than the world, or an entry is not of the right form.
    """
    from ..distributed.session import current_topology

    rng_states = _listed(rng_states)
    if rng_states is None:
        warn("no RNG states to restore: the generators stay as they are", stacklevel=2)
        return
    topology = current_topology()
    if len(rng_states) <= topology.rank:
        raise FormatError(
            f"the list has {len(rng_states)} RNG states, but this is rank {topology.rank} of "
            f"{topology.world_size}: pass what load_checkpoint or gather_rng returned in this world",
            rank=topology.rank,
        )
    apply_rng(rng_states[topology.rank])


def _listed(given: Sequence[RngState] | HasRngStates | None) -> Sequence[RngState] | None:
    """The list that `restore_rng` was given, by itself or in a result."""
    states: Any = (
        given if given is None or isinstance(given, list | tuple) else getattr(given, "rng_states", given)
    )
    if states is not None and not isinstance(states, list | tuple):
        raise FormatError(
            f"restore_rng was given a {type(given).__name__}: expected the result of load, or the list that "
            "load_checkpoint or gather_rng returned"
        )
    return states


def apply_rng(state: Mapping[str, Any]) -> None:
    """Sets this process's generators from one rank's state, once `check_state` has checked all of it; warns of what no
    generator here takes."""
    checked, left = check_state(state)
    if left:
        warn(f"not restored: {'; '.join(left)}", stacklevel=3)
    if "python" in checked:
        random.setstate(checked["python"])
    if "numpy" in checked:
        np.random.set_state(checked["numpy"])
    if "torch" in checked:
        torch.random.set_rng_state(checked["torch"])
    if "cuda" in checked and _cuda_is_initialised():
        _apply_cuda(checked["cuda"])


def _apply_cuda(states: torch.Tensor | list[torch.Tensor]) -> None:
    """Sets the current device's generator; where all devices' states were saved, each device's."""
    if isinstance(states, torch.Tensor):
        torch.cuda.set_rng_state(states)
        return
    count = torch.cuda.device_count()
    if len(states) != count:
        warn(
            f"the CUDA random states are of {counted(len(states), 'device')}, this process sees {count}: device i "
            "gets the i-th of them",
            stacklevel=4,
        )
    for device, state in enumerate(states[:count]):
        torch.cuda.set_rng_state(state, device)


def _cuda_is_initialised() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def check_state(state: Mapping[str, Any], where: str = "rng") -> tuple[RngState, tuple[str, ...]]:
    """`state` in the exact types that the generators take, which are not touched, and what none of them takes.

    Takes all forms that `normal_form` knows. Raises `FormatError`, which calls the state `where`, for a state that
    would lead a generator out of its memory, or is none.
    """
    kept, left = normal_form(state, where)
    with default_modes():
        return {name: _checked(name, value, f"{where}/{name}") for name, value in kept.items()}, left


def normal_form(state: Mapping[str, Any], where: str = "rng") -> tuple[RngState, tuple[str, ...]]:
    """`state` under this module's names and in its forms, and what cannot be restored, with the reason.

    Values may be real, or as the file describes them (`SavedTensor`, `InertArray`, `InertObject`): none is read, made
    or gone through, only lengths and single numbers are compared. Names are those of `NAMES`. NumPy's state may be a
    tuple, a dict, or a generator; ``cuda`` may be a list of all devices' states. None and an empty list are no state.

    Raises `FormatError` for what is no state of any generator, or names a position outside of its memory.
    """
    kept: RngState = {}
    left = []
    for key, value in state.items():
        place, name = f"{where}/{key}", NAMES.get(key)
        try:
            if name is None:
                raise _OtherGeneratorError(f"expected {', '.join(_FORMS)}")
            if name in kept:
                raise _OtherGeneratorError(f"a second state of {name}")
            found = _FORMS[name](value)
        except _OtherGeneratorError as other:
            left.append(f"{place} ({other})")
        except (TypeError, ValueError, OverflowError) as error:
            raise _no_state(place, error) from error
        else:
            if found is not None:
                kept[name] = found
    return kept, tuple(left)


def _no_state(place: str, error: Exception) -> FormatError:
    return FormatError(
        f"{place} is no random state: {error}. To load without the random states, pass ignore_keys=['rng']"
    )


class _OtherGeneratorError(Exception):
    """What was saved is no state of a generator that is restored here."""


def _python_form(value: Any) -> Any:
    if value is None:
        raise _OtherGeneratorError("the checkpoint has None")
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"expected the tuple of random.getstate(), got {_shown(value)}")
    version, words, gauss = value
    if _number(version) not in (2, 3):
        raise ValueError(f"its version is {_shown(version)}, expected 3")
    _of_length(words, MT_WORDS + 1)
    if isinstance(words, list | tuple):
        check_position(words[-1])
    return (int(_number(version)), words, None if gauss is None else float(_number(gauss)))


def _numpy_form(value: Any) -> Any:
    if value is None:
        raise _OtherGeneratorError("the checkpoint has None")
    if isinstance(value, np.random.RandomState):
        value = value.get_state(legacy=False)
    elif isinstance(value, np.random.Generator):
        value = value.bit_generator.state
    elif isinstance(value, np.random.BitGenerator):
        value = value.state
    elif isinstance(value, InertObject) and value.global_name.startswith("numpy.random."):
        found = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        made_of = value.args[0] if value.args else None
        if not isinstance(found, Mapping) and isinstance(made_of, InertObject):
            return _numpy_form(made_of)
        value = found
    if isinstance(value, Mapping):
        inner = value.get("state")
        inner = inner if isinstance(inner, Mapping) else {}
        parts = (value.get("bit_generator"), inner.get("key"), inner.get("pos"))
        value = (*parts, value.get("has_gauss", 0), value.get("gauss", 0.0))
    if not isinstance(value, list | tuple) or len(value) not in (3, 5):
        raise ValueError(f"expected the result of numpy.random.get_state(), got {_shown(value)}")
    kind, words, position, has_gauss, gauss = (*value, 0, 0.0)[:5]
    name = _text(kind)
    if name in _OTHER_BIT_GENERATORS:
        raise _OtherGeneratorError(f"a state of {name}; NumPy's global generator is an MT19937")
    if name != "MT19937":
        raise ValueError(f"it is of {_shown(kind)}, expected 'MT19937'")
    _of_length(words, MT_WORDS)
    return (
        name,
        words,
        check_position(_number(position)),
        int(bool(_number(has_gauss))),
        float(_number(gauss)),
    )


def _torch_form(value: Any) -> Any:
    if value is None:
        raise _OtherGeneratorError("the checkpoint has None")
    if isinstance(value, torch.Generator):
        if value.device.type != "cpu":
            raise _OtherGeneratorError(f"a generator of {value.device}")
        value = value.get_state()
    return _bytes_form(value, (TORCH_BYTES,), "torch's CPU generator")


def _cuda_form(value: Any) -> Any:
    if value is None or (isinstance(value, list | tuple) and not value):
        return None
    if isinstance(value, list | tuple) and not isinstance(value[0], int):
        if len(value) > _MOST_DEVICES:
            raise ValueError(
                f"it has {counted(len(value), 'entry', 'entries')}, expected one for each device"
            )
        devices = [_bytes_form(state, CUDA_BYTES, "a CUDA generator") for state in value]
        return devices[0] if len(devices) == 1 else devices
    return _bytes_form(value, CUDA_BYTES, "a CUDA generator")


_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "python": _python_form,
    "numpy": _numpy_form,
    "torch": _torch_form,
    "cuda": _cuda_form,
}


def _bytes_form(value: Any, lengths: tuple[int, ...], whose: str) -> Any:
    """`value`, a row of bytes of one of `lengths`."""
    length = _length(value)
    if length in lengths:
        return value
    expected = " or ".join(f"{one:,}" for one in lengths)
    if length is None or not 0 < length <= _MOST_BYTES:
        raise ValueError(f"expected the {expected} bytes of {whose}, got {_shown(value)}")
    raise _OtherGeneratorError(f"{counted(length, 'byte')}; a state of {whose} has {expected}")


def _of_length(value: Any, length: int) -> None:
    if _length(value) != length:
        raise ValueError(f"expected {length} words, got {_shown(value)}")


def _length(value: Any) -> int | None:
    """The number of integers in `value`, a row of them that was saved or is in memory; None where it is none."""
    if isinstance(value, list | tuple):
        return len(value)
    if isinstance(value, SavedTensor):
        whole = value.dtype in _INTEGERS and value.is_contiguous
    elif isinstance(value, InertArray):
        whole = value.dtype[1:2] in ("i", "u")
    elif isinstance(value, torch.Tensor):
        whole = str(value.dtype).removeprefix("torch.") in _INTEGERS and value.is_contiguous()
    elif isinstance(value, np.ndarray):
        whole = value.dtype.kind in "iu"
    else:
        whole = False
    return value.shape[0] if whole and len(value.shape) == 1 else None


def _number(value: Any) -> Any:
    """The number that `value` is, or describes. Raises `ValueError` where it is none."""
    if isinstance(value, InertArray) and value.scalar and value.dtype[1:2] in ("i", "u", "f", "b"):
        value = np.frombuffer(value.data, dtype=np.dtype(value.dtype))[0]
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, int | float):
        raise ValueError(f"it has {_shown(value)} where a number is expected")
    return value


def _text(value: Any) -> str | None:
    if isinstance(value, InertArray) and value.scalar and value.dtype[1:2] in ("U", "S"):
        value = np.frombuffer(value.data, dtype=np.dtype(value.dtype))[0]
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return str(value) if isinstance(value, str) else None


def _shown(value: Any) -> str:
    if isinstance(value, int | float | str | None):
        return repr(value)[:80]
    if isinstance(value, SavedTensor | InertArray | np.ndarray | torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {kind_of(value)} of {dtype} and shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value):,} items"
    return f"a {kind_of(value)}"


def _checked(name: str, value: Any, place: str) -> Any:
    """`value`, which is real and in its normal form, in the exact types that the generator `name` takes."""
    try:
        if name == "python":
            version, words, gauss = value
            state = (version, tuple(_integers(words, 1 << 32).tolist()), gauss)
            random.Random().setstate(state)  # noqa: S311 (no secret)
            return state
        if name == "numpy":
            kind, words, position, has_gauss, gauss = value
            words = _integers(words, 1 << 32).astype(np.uint32)
            np.random.RandomState().set_state((kind, words, position, has_gauss, gauss))
            return (kind, words, position, has_gauss, gauss)
        if isinstance(value, list) and not isinstance(value[0], int):
            return [_tensor(one) for one in value]
        found = _tensor(value)
        if name == "torch":
            numbers = found.numpy()
            left, following = numbers[8:12].view(np.int32)[0], numbers[16:24].view(np.uint64)[0]
            check_twister(int(left), int(following))
            torch.Generator().set_state(found)
        return found
    except (TypeError, ValueError, OverflowError, RuntimeError, IndexError) as error:
        raise _no_state(place, error) from error


def _integers(value: Any, end: int) -> np.ndarray[Any, Any]:
    """`value`, a row of integers, as an array. Raises `ValueError` for one that is negative, or not below `end`."""
    found = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if found.dtype.kind not in "iu":
        raise ValueError("it holds something other than integers")
    if len(found) and not (int(found.min()) >= 0 and int(found.max()) < end):
        raise ValueError(f"it holds integers that are not from 0 to {end - 1}")
    return found


def _tensor(value: Any) -> torch.Tensor:
    return torch.from_numpy(_integers(value, 256).astype(np.uint8))


def complete_states(
    saved: Sequence[RngState | None], world_size: int, seed: int | None
) -> tuple[list[RngState], tuple[str, ...]]:
    """One state for each rank of this world, and which of them were derived.

    The ranks that `saved` has a state for get it. The others, those at None (lacking, or ignored) and those
    beyond its end, get states that follow from `seed` (the checkpoint's ``rank_zero_seed``), or where there is
    none from the first saved state, and from their rank: the same on every load, on every rank. A derived entry
    has ``cuda`` only where the first saved one has it. Where nothing was saved, both are empty.
    """
    source = next((rank for rank, state in enumerate(saved) if state is not None), None)
    first = None if source is None else saved[source]
    if first is None:
        return [], ()
    basis = f"seed {seed}" if seed is not None else f"rank {source}'s state"
    root = hashlib.sha256(str(seed).encode() if seed is not None else _canonical(first).encode()).digest()
    states: list[RngState] = []
    derived = []
    for rank in range(world_size):
        state = saved[rank] if rank < len(saved) else None
        if state is None:
            state = _derived(root, rank, with_cuda="cuda" in first)
            derived.append(f"rng of rank {rank} (from {basis})")
        states.append(dict(state))
    return states, tuple(derived)


def _derived(root: bytes, rank: int, *, with_cuda: bool) -> RngState:
    def words(generator: str) -> int:
        return int.from_bytes(hashlib.sha256(root + f"/{rank}/{generator}".encode()).digest()[:8], "little")

    state: RngState = {
        "python": random.Random(words("python")).getstate(),  # noqa: S311 (a training seed, no secret)
        "numpy": np.random.RandomState(words("numpy") % 2**32).get_state(),
        "torch": torch.Generator().manual_seed(words("torch") % 2**63).get_state(),
    }
    if with_cuda and torch.cuda.is_available():
        generator = torch.Generator(device="cuda").manual_seed(words("cuda") % 2**63)
        state["cuda"] = generator.get_state().cpu()
    return state


def _canonical(state: Mapping[str, Any]) -> str:
    """`state` as JSON text, the same in every process for equal states: states are derived from it."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            plain[key] = _as_text(value)
        elif key == "cuda":
            plain[key] = [_as_text(one) for one in value]
        elif key == "numpy":
            name, keys, *rest = value
            plain[key] = [
                str(name),
                np.asarray(keys, dtype=np.uint32).tolist(),
                *[_shortest(x) for x in rest],
            ]
        else:
            version, words, gauss = value
            plain[key] = [int(version), [int(word) for word in words], gauss]
    return json.dumps(plain, sort_keys=True)


def _as_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _shortest(value: Any) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def encode(state: Mapping[str, Any]) -> bytes:
    """`state` as JSON, to be sent to other ranks; nothing is pickled."""
    return _canonical(state).encode()


def decode(payload: bytes) -> RngState:
    """The state that `encode` was given; raises `CorruptError` where `payload` holds no random states."""
    try:
        state: RngState = json.loads(payload)
        for key, value in state.items():
            if key == "python":
                state[key] = (value[0], tuple(value[1]), value[2])
            elif key == "numpy":
                state[key] = (value[0], np.array(value[1], dtype=np.uint32), *value[2:])
            else:
                state[key] = (
                    [_from_text(one) for one in value] if isinstance(value, list) else _from_text(value)
                )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"a rank sent an RNG state that cannot be read: {error}") from error
    return state


def encode_own(saved: Sequence[RngState | None] | None, rank: int, *, single: bool) -> bytes:
    """The state of `rank` among those in the files that it read, for the other ranks' `decode_each`.

    `saved` with several entries has one for each saved rank. With at most one, that is the state of `rank` itself if
    `single`, else of another rank. Empty where no file has a state for `rank`; a mark where the file that should, lacks
    it.
    """
    alone = saved is None or len(saved) < 2
    if not (single if alone else rank < len(saved or ())):
        return b""
    own = saved[0 if alone else rank] if saved else None
    return encode(own) if own else _LACKING


def decode_each(each: Sequence[bytes]) -> list[RngState | None] | None:
    """The states from every rank's `encode_own`, by rank; None at ranks without one, which get a derived state.

    None as a whole where the file of any rank lacks the state that it should have: then no rank gets one.
    """
    return None if _LACKING in each else [decode(state) if state else None for state in each]
