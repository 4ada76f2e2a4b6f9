"""Pickles that would run something, were anything in them called."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles of a dict ``{"a": ...}``, each of which would make the file `canary` if anything in it ran."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    command = text(touch)
    inside = b"\x80\x02}" + text("a")
    return {
        "reduce os.system": pickle.dumps({"a": Call(os.system, touch)}, 2),
        "reduce, protocol 0": pickle.dumps({"a": Call(os.system, touch)}, 0),
        "stack global": pickle.dumps({"a": Call(os.system, touch)}, 4),
        "eval": pickle.dumps({"a": Call(eval, code)}, 2),
        "exec": pickle.dumps({"a": Call(exec, code)}, 5),
        "subprocess": pickle.dumps({"a": Call(subprocess.Popen, ["touch", str(canary)])}, 2),
        "inst": inside + b"(" + command + b"ios\nsystem\ns.",
        "obj": inside + b"(cos\nsystem\n" + command + b"os.",
        "newobj": inside + b"cos\nsystem\n" + command + b"\x85\x81s.",
        "newobj_ex": inside + b"cos\nsystem\n" + command + b"\x85}\x92s.",
        "memoised": inside + b"cos\nsystem\nq\x000h\x00" + command + b"\x85Rs.",
        "in a persistent id": inside + b"cos\nsystem\n" + command + b"\x85RQs.",
        "as a storage": inside
        + b"("
        + text("storage")
        + b"cos\nsystem\n"
        + command
        + text("cpu")
        + b"K\x01tQs.",
        "as a tensor's function": inside
        + b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n"
        + command
        + b"\x85}tRs.",
        "as an array's class": inside
        + b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\nK\x00\x85C\x01btRs.",
        "as a dtype": inside + b"cnumpy\ndtype\ncos\nsystem\n" + command + b"\x85R\x85Rs.",
        "as a factory": inside + b"ccollections\ndefaultdict\ncos\nsystem\n\x85Rs.",
        "getattr": inside + b"c__builtin__\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86Rs.",
        "setstate": pickle.dumps({"a": Call(Call, print, state={"reduced": Call(os.system, touch)})}, 2),
        "as a key": b"\x80\x02}cos\nsystem\n" + command + b"\x85RNs.",
        "as a member": b"\x80\x04\x8f(cos\nsystem\n" + command + b"\x85R\x90.",
        "partial": pickle.dumps({"a": Call(functools.partial, os.system, touch)}, 2),
        "import hook": inside + b"crunpy\n_run_code\n(" + text(code) + b"}tRs.",
    }
