"""Asks a store for names that may not exist, and remembers of which of them it refused to speak.

Whoever may not list a bucket of S3 is answered 403 for what is not there, as for what he may not read. So a refusal
means "not known": the next name is asked for, and only where nothing was found it is an error (`Probes.nothing`).

Some servers answer 200 and a page to every name. A page is none of the objects that are looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from ..errors import AccessError, CorruptError, NotFoundError
from ..store_errors import ADVICE_CREDENTIALS, refusals_in
from ..workers import Stop, stopped_by
from .base import ONE_CONNECTION, ObjectInfo, Store

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 3
"""How many requests for names that may not exist are made at once: servers with a small backlog let more of them wait
for seconds."""
HEAD_BYTES = 512
"""What is read of an object to see that it is there, and no page."""
_SMALL_BYTES = 4096
_SHOWN = 8
"""Refused names that a message lists."""


class Probes:
    """The names that one search asks a store for. Not for several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.refused: dict[str, str] = {}
        """What the store refused to speak of, as messages call it, and why."""
        self.pages: list[str] = []
        """The names for which there came a page."""

    def stat(self, name: str) -> ObjectInfo | None:
        """What the store says of `name`; None too where it refuses."""
        try:
            return self.store.stat(name)
        except AccessError as error:
            self.note(error)
            return None

    def look(self, name: str) -> ObjectInfo | None:
        """As `stat`, but where the store is not certain, or tells of what may be a page, the first bytes are read.

        It stays uncertain where the store has only whole objects to give.
        """
        try:
            info = self.store.stat(name)
            if info is None or info.is_folder or (info.certain and not info.may_be_page):
                return info
            head = self.store.peek(name, HEAD_BYTES)
        except NotFoundError:
            return None
        except AccessError as error:
            self.note(error)
            return None
        if head is None:
            return info
        if is_page(head):
            self.pages.append(name)
            return None
        return replace(info, certain=True, may_be_page=False)

    def exists(self, name: str) -> bool:
        """Whether there is such an object, as far as the store tells; fetched whole where there is no other way."""
        info = self.look(name)
        if info is None or info.is_folder:
            return False
        if info.certain:
            return True
        try:
            self.store.read_small(name, _SMALL_BYTES)
        except NotFoundError:
            return False
        except AccessError as error:
            self.note(error)
            return False
        except CorruptError:
            return True  # longer than the limit, so it is there
        return True

    def nothing(self, problem: str, path: str) -> NotFoundError | AccessError:
        """The error for a search that found nothing: `problem`, and what was refused. The caller raises it."""
        if not self.refused:
            return NotFoundError(problem, path=path)
        listed = [f"{name} ({reason})" for name, reason in self.refused.items()]
        if len(listed) > _SHOWN:
            listed[_SHOWN:] = [f"and {len(listed) - _SHOWN} more"]
        error = AccessError(
            f"{problem}. The store refused access to {', '.join(listed)}. Where a user may not list what is there, "
            f"stores answer so for what is not there, too: check the path first, then {ADVICE_CREDENTIALS}",
            path=path,
        )
        error.details["refused"] = dict(self.refused)
        return error

    def note(self, error: AccessError) -> None:
        """Notes what the store refused; raises `error` where it says something else."""
        found = refusals_in(error)
        if not found:
            raise error
        self.refused |= found


def ask_each(store: Store, ask: Callable[[T], R], items: Sequence[T], *, at_once: int = AT_ONCE) -> list[R]:
    """What `ask` says of each of `items`, in their order.

    Of a store that is asked over a network `at_once` at a time, except where each thread would have to log in.
    """
    if store.is_local or getattr(store, "protocol", "") in ONE_CONNECTION:
        return [ask(one) for one in items]
    stop = Stop()

    def asked(one: T) -> R:
        with stopped_by(stop):
            return ask(one)

    with ThreadPoolExecutor(at_once) as threads:
        try:
            return list(threads.map(asked, items))
        except BaseException:
            stop.set()
            raise


def all_there(store: Store, names: Sequence[str]) -> list[str]:
    """Those of `names` that are there; what the store refuses to speak of is taken not to be."""
    told = ask_each(store, lambda name: Probes(store).exists(name), names)
    return [name for name, there in zip(names, told, strict=True) if there]


def is_page(head: bytes) -> bool:
    """Whether the first bytes of an object are those of an HTML or XML page."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error", b"<!--"))
