"""Runs a block under torch's own defaults, whatever modes its caller has entered, and gives them back afterwards.

A load makes tensors that outlive it and writes into tensors of the job. Under a caller's ``inference_mode`` those could
never be trained; under ``torch.device("meta")`` they would have no data. Only functions import torch here.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

_AUTOCAST_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu")

_callers_device: contextvars.ContextVar[Any] = contextvars.ContextVar("callers_device", default=None)


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """Runs its block without the caller's ``inference_mode``, default device, autocast and filling of new memory.

    New tensors are ordinary ones on the CPU. The default dtype stays: it holds for all threads, and nothing here relies
    on it. At the end the caller's modes are as they were, and weights that autocast had cast and kept are forgotten:
    they may have changed.
    """
    import torch
    import torch.utils.deterministic

    deterministic: Any = torch.utils.deterministic
    kinds = [kind for kind in _AUTOCAST_KINDS if torch.is_autocast_enabled(kind)]
    device = torch.get_default_device() if _callers_device.get() is None else _callers_device.get()
    noted = _callers_device.set(device)
    filled = deterministic.fill_uninitialized_memory
    try:
        with contextlib.ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            # As a mode it costs each of torch's functions a call of Python.
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            for kind in kinds:
                modes.enter_context(torch.autocast(kind, enabled=False))
            # Filling costs a pass over all that is read, and fails for types such as float4.
            deterministic.fill_uninitialized_memory = False
            yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.clear_autocast_cache()
        _callers_device.reset(noted)


def callers_device() -> Any:
    """The default device of whoever called the load, on which meta tensors get memory; the CPU where that is meta."""
    import torch

    noted = _callers_device.get()
    device = torch.get_default_device() if noted is None else noted
    return torch.device("cpu") if device.type == "meta" else device


def what_tensors_lack() -> str | None:
    """Why tensors that are made now hold no data, or another type than was asked for; None where they do.

    Modes of other makers (``FakeTensorMode``, ``deepspeed.zero.Init``, accelerate's ``init_empty_weights``) change what
    torch's constructors give, and cannot be left from inside.
    """
    import torch

    made = torch.empty(1, dtype=torch.float32, device="cpu")
    if type(made) is not torch.Tensor:
        return f"a {type(made).__name__} instead of a Tensor"
    if made.device.type != "cpu" or made.dtype != torch.float32:
        return f"a {made.dtype} tensor on {made.device} instead of a float32 one on the CPU"
    return None
