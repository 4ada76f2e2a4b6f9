"""Watches what one execution of a parser does: what it raises, imports, runs, writes, and how much memory it takes.

    guard = Guard(folder, promised=(CorruptError,), most_bytes=..., most_s=...)
    guard.run(parse, data)      # raises `FindingError` for whatever a parser of hostile bytes must not do

Python's audit events show code that is compiled or run, programs that are started and files that are written, in every
thread; a finder shows what is imported. An ``import`` statement of the code under test is no finding: its name is in
the code, not in the file.
"""

from __future__ import annotations

import codecs
import dis
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from types import FrameType
from typing import Any

RUNS = frozenset(
    {
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "subprocess.Popen",
        "pty.spawn",
        "ctypes.dlopen",
        "ctypes.call_function",
        "pickle.find_class",
        "marshal.load",
        "marshal.loads",
        "code.__new__",
        "function.__new__",
        "builtins.input",
        "webbrowser.open",
    }
)
"""Events that no parser of ours causes, whatever the file."""
CODE = frozenset({"exec", "compile"})
"""Events of running Python code, which making a dataclass or reading type hints causes too."""
MAKES_CODE = ("typing.py", "dataclasses.py", "__init__.py", "functools.py", "enum.py", "annotationlib.py")
"""Files of Python's own that make code of what the code under test has declared."""
WRITES = frozenset(
    {
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
    }
)
for _name in (
    "ascii",
    "cp437",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "utf-32-le",
    "utf-32-be",
    "idna",
    "punycode",
    "unicode_escape",
):
    codecs.lookup(_name)  # what zipfile, json, our messages and the like import on first use
_IMPORTS = dis.opmap["IMPORT_NAME"]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FROZEN = "<frozen "


class FindingError(Exception):
    """What the code under test did and must not do."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Guard:
    """Runs a parser on hostile bytes, watched. One at a time in a process."""

    def __init__(
        self, folder: str, promised: tuple[type[BaseException], ...], *, most_bytes: int, most_s: float
    ) -> None:
        """The parser may write below `folder` only, and raise the types of `promised` only."""
        self._folders = (os.path.realpath(folder), "/dev/null")
        self._promised = promised
        self._most_bytes = most_bytes
        self._most_s = most_s
        self._seen: list[FindingError] = []
        self._inside = threading.local()

    def run(self, parse: Callable[[bytes], object], data: bytes, *, more_bytes: int = 0) -> str:
        """Calls `parse` with `data`; returns the name of the error that it raised, or ``read``.

        `more_bytes` is what this input may take beyond the bytes that any may. Raises `FindingError`.
        """
        self._seen.clear()
        said = "read"
        _forget_peak()
        before, begun, worked = _resident(), time.monotonic(), time.process_time()
        with _watching(self):
            try:
                parse(data)
            except FindingError:
                raise
            except self._promised as error:
                said = type(error).__name__
            except Exception as error:
                raise FindingError("exception", f"{type(error).__name__}: {str(error)[:300]}") from error
            finally:
                took = min(time.monotonic() - begun, time.process_time() - worked)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        if self._seen:
            raise self._seen[0]
        if grown > self._most_bytes + more_bytes:
            raise FindingError("memory", f"{grown >> 20} MiB for {len(data):,} bytes")
        if took > self._most_s:
            raise FindingError("hang", f"{took:.1f} s of work for {len(data):,} bytes")
        return said

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Takes in an audit event."""
        if getattr(self._inside, "busy", False):
            return
        self._inside.busy = True
        try:
            problem = self._problem(event, args, sys._getframe(2))
        finally:
            self._inside.busy = False
        if problem:
            self._seen.append(FindingError(*problem))

    def _problem(self, event: str, args: tuple[Any, ...], frame: FrameType) -> tuple[str, str] | None:
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITING
            return None if not writes or self._is_own(path) else ("write", f"opens {path!r} to write")
        if event in WRITES:
            outside = [one for one in args if isinstance(one, (str, bytes)) and not self._is_own(one)]
            return ("write", f"{event} of {outside[0]!r}") if outside else None
        if event == "import":
            looks = _looks_only(frame)
            return None if looks or _by_statement(frame) else ("import", f"of {args[0]!r}")
        if event in RUNS:
            return None if _by_statement(frame) else ("execution", f"{event} {args!r:.200}")
        if event in CODE:
            own = os.path.basename(frame.f_code.co_filename) in MAKES_CODE
            return None if own or _by_statement(frame) else ("execution", f"{event} {args!r:.200}")
        return None

    def _is_own(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(path)
        # Names relative to a folder's descriptor, as shutil.rmtree uses them, say nothing of where they are.
        if "/" not in text:
            return True
        # To follow a thousand folders for each of a thousand would take longer than anything that is looked for.
        text = os.path.realpath(text) if text.count("/") < 50 else os.path.abspath(text)
        return any(text == one or text.startswith(f"{one}/") for one in self._folders)


def _looks_only(frame: FrameType | None) -> bool:
    """Whether ``importlib.util.find_spec`` asks, which imports nothing where the name has no dot."""
    while frame is not None and frame.f_code.co_filename.startswith(f"{_FROZEN}importlib._"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.endswith(
        ("importlib/util.py", "<frozen importlib.util>")
    )


def _by_statement(frame: FrameType | None) -> bool:
    """Whether what happens belongs to an ``import`` statement, whose name is in the code; the outermost import counts.

    The unpickler's own import, and those of ``importlib.import_module``, are calls.
    """
    found = False
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_FROZEN):
            at = frame.f_lasti
            if at >= 0 and code.co_code[at] == _IMPORTS:
                found = True
            elif code.co_name == "import_module" and code.co_filename.endswith("importlib/__init__.py"):
                found = False
        frame = frame.f_back
    return found


class _Imports(MetaPathFinder):
    """Finds nothing, and tells the guard what is looked for, by whichever way."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if _watched:
            _watched[-1].note("import", (fullname,))


_watched: list[Guard] = []
_hooked: list[bool] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watched and (event == "open" or event in RUNS or event in CODE or event in WRITES):
        _watched[-1].note(event, args)


@contextmanager
def _watching(guard: Guard) -> Iterator[None]:
    if not _hooked:
        sys.addaudithook(_hook)  # for good: there is no way to take it away
        _hooked.append(True)
    imports = _Imports()
    sys.meta_path.insert(0, imports)
    _watched.append(guard)
    try:
        yield
    finally:
        _watched.pop()
        sys.meta_path.remove(imports)


def _forget_peak() -> None:
    """Has the kernel count the most memory that this process takes from now on."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
