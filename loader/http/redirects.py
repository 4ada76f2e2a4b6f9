"""Follows redirects. The headers that are the user's go to the user's own server alone, by every method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from email.message import Message

from ..errors import AccessError
from .addresses import Address, origin_of, redirected
from .answers import Arrived
from .connections import Connections
from .exchange import Answer, Request, exchange

MAX_REDIRECTS = 10
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True)
class Followed:
    """The answer at the end of a chain of redirects."""

    answer: Answer
    url: str = field(repr=False)
    """Which URL answered."""
    passed: tuple[Message, ...] = field(repr=False)
    """The headers of the redirects that led there, in order."""


def follow(connections: Connections, request: Request, address: Address, arrived: Arrived) -> Followed:
    """Sends `request`, for `address` or for a URL that it is known to lead to, and follows redirects.

    The request's headers go to every server, those of `address` to its own. The answer may have any status but a
    redirect's with a Location. Raises as `exchange` does, and `AccessError` for more than 10 redirects, or one to what
    is no http(s) URL.
    """
    url, described = request.url, request.described
    passed: list[Message] = []
    while True:
        own = address.headers if origin_of(url) == address.origin else {}
        answer = exchange(connections, replace(request, url=url, headers={**own, **request.headers}), arrived)
        location = answer.response.headers.get("Location")
        if answer.response.status not in _REDIRECTS or location is None:
            return Followed(answer, url, tuple(passed))
        if answer.n_bytes == 0:
            answer.give_back()
        else:
            answer.drop()
        passed.append(answer.response.headers)
        if len(passed) > MAX_REDIRECTS:
            raise AccessError(f"{described}: more than {MAX_REDIRECTS} redirects", path=described)
        url = redirected(url, location, described)
