"""Runs a framework's own load where an adapter leaves it to that: every rank must run it, and it may run collectives.

A rank that fails in it would leave the others in a collective for ever. So it runs in a stage of a session: what one
rank raises ends all, and a rank that cannot leave its collective ends (``distributed.watchdog``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..distributed.errors import RankloadError
from ..distributed.session import open_session
from ..distributed.watchdog import watched_collectives
from ..loader.request import settle_options


@contextlib.contextmanager
def native_load(what: str, options: Any = None) -> Iterator[None]:
    """A block of a framework's own load, which messages call `what`; it may call loads of rankload too.

    Every rank must enter. Of `options`, as `rankload.load` takes them, ``stall_timeout_s`` counts here.

    Raises:
        RankloadError: another rank raised something, or died. What this rank raises first, stays as it is.
    """
    resolved, _ = settle_options(options)
    own: Exception | None = None
    try:
        with (
            open_session(stall_timeout_s=resolved.stall_timeout_s) as session,
            session.channel.stage("native load"),
            watched_collectives(session.channel, f"{what}'s own load"),
        ):
            try:
                yield
            except Exception as error:
                own = error
                raise
    except RankloadError as error:
        if own is not None and error.__cause__ is own:
            raise own from own.__cause__  # the framework's error is what its caller may expect
        raise
