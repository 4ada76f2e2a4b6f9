"""NumPy's pickled random generators, made again from their state: plain numbers and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import CorruptError
from ..formats.pickle.known import BIT_GENERATORS
from ..saved.values import GlobalName, InertObject


def realise_random(value: InertObject) -> Any:
    """The generator that a pickled one of ``numpy.random`` stands for; its seed sequence is left out.

    ``value`` has real fields. What is neither a generator nor a bit generator stays as it is. Raises
    `CorruptError` where the state does not fit, as NumPy finds.
    """
    name = value.global_name.rpartition(".")[2]
    if name == "__randomstate_ctor":
        made: Any = np.random.RandomState(_bit_generator(value.args[0] if value.args else "MT19937"))
    elif name == "__generator_ctor":
        made = np.random.Generator(_bit_generator(value.args[0] if value.args else "MT19937"))
    elif name == "__bit_generator_ctor" or name in BIT_GENERATORS:
        made = _bit_generator(value.args[0] if value.args else name)
    else:
        return value
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if isinstance(state, dict):
        target = made.bit_generator if isinstance(made, np.random.Generator) else made
        if isinstance(made, np.random.RandomState):
            made.set_state(state)
        else:
            target.state = state
    return made


def _bit_generator(kind: Any) -> Any:
    if isinstance(kind, np.random.BitGenerator):
        return kind
    name = kind.name.rpartition(".")[2] if isinstance(kind, GlobalName) else kind
    if name not in BIT_GENERATORS:
        raise CorruptError("a NumPy generator of an unknown kind")
    return getattr(np.random, name)()
