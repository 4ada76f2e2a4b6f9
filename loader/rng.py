"""Captures random states, gathers them over the ranks and restores them; derives those that a checkpoint lacks.

A state is a dict with Composer's keys: ``python`` (``random.getstate()``), ``numpy`` (the legacy global generator's
tuple), ``torch`` (the CPU generator's ByteTensor) and ``cuda`` (this rank's device, where CUDA is initialised).
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import CorruptError, FormatError

if TYPE_CHECKING:
    from ..distributed.channel import Channel

RngState = dict[str, Any]

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


def restore_rng(rng_states: Sequence[RngState] | None) -> None:
    """Sets this rank's generators from its entry of a list that `load_checkpoint` or `gather_rng` returned.

    Every entry is checked before any generator is set. A ``cuda`` state is set where CUDA is initialised. None,
    which `load_checkpoint` returns where there are no RNG states, is warned of and changes nothing.
    Raises `FormatError` where the list is shorter than the world, or an entry is not of the right form.
    """
    from ..distributed.session import current_topology

    if rng_states is None:
        warnings.warn("no RNG states to restore: the generators stay as they are", stacklevel=2)
        return
    topology = current_topology()
    if len(rng_states) <= topology.rank:
        raise FormatError(
            f"the list has {len(rng_states)} RNG states, but this is rank {topology.rank} of "
            f"{topology.world_size}: pass what load_checkpoint or gather_rng returned in this world",
            rank=topology.rank,
        )
    apply_rng(rng_states[topology.rank])


def apply_rng(state: Mapping[str, Any]) -> None:
    """Sets this process's generators from one rank's state, once `check_state` has checked all of it."""
    checked = check_state(state)
    if "python" in checked:
        random.setstate(checked["python"])
    if "numpy" in checked:
        np.random.set_state(checked["numpy"])
    if "torch" in checked:
        torch.random.set_rng_state(checked["torch"])
    if "cuda" in checked and _cuda_is_initialised():
        torch.cuda.set_rng_state(checked["cuda"])


def _cuda_is_initialised() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def check_state(state: Mapping[str, Any], where: str = "rng") -> RngState:
    """`state` in the exact types that the generators take, which are not touched.

    Raises `FormatError`, which calls the state `where`, for an unknown key or a value that no generator takes.
    """
    checked: RngState = {}
    for key, value in state.items():
        try:
            if key == "python":
                version, words, gauss = value
                checked[key] = (int(version), tuple(int(word) for word in words), gauss)
                random.Random().setstate(checked[key])  # noqa: S311 (no secret)
            elif key == "numpy":
                checked[key] = (str(value[0]), np.asarray(value[1], dtype=np.uint32), *value[2:])
                np.random.RandomState().set_state(checked[key])
            elif key in ("torch", "cuda"):
                checked[key] = torch.as_tensor(value, dtype=torch.uint8).cpu().contiguous()
                if key == "torch":
                    torch.Generator().set_state(checked[key])
            else:
                raise ValueError("expected python, numpy, torch or cuda")
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise FormatError(f"{where}/{key} is no random state: {error}") from error
    return checked


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
            plain[key] = base64.b64encode(value.cpu().numpy().tobytes()).decode()
        elif key == "numpy":
            name, keys, *rest = value
            plain[key] = [str(name), np.asarray(keys, dtype=np.uint32).tolist(), *[_number(x) for x in rest]]
        else:
            version, words, gauss = value
            plain[key] = [int(version), [int(word) for word in words], gauss]
    return json.dumps(plain, sort_keys=True)


def _number(value: Any) -> int | float:
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
                state[key] = torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.uint8)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
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
