"""Follows ``NAME.symlink`` objects: small texts that hold the real object's name, for stores that have no links.

A name that is missing is looked for as ``NAME.symlink``. What a link holds is relative to the root of its bucket
(server, file system), or else to the link's own folder; links to links are followed. Composer writes such objects.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CorruptError, NotFoundError, UnsafeError
from .base import ObjectInfo, Store

SUFFIX = ".symlink"
MAX_LINKS = 16
MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Resolved:
    """The object that a name stands for."""

    info: ObjectInfo
    links: tuple[str, ...] = ()
    """The ``.symlink`` objects that were followed, in order."""


def resolve(store: Store, name: str) -> Resolved | None:
    """The object that `name` stands for; None where neither it nor ``NAME.symlink`` is there.

    Raises `CorruptError` for a loop, a chain of more than 16 links or a text that is no name; `NotFoundError`
    for a link to nothing; `UnsafeError` for a link that leaves its store. Where the store cannot say whether `name` is
    there, it is returned as it is (``info.certain`` is False): should its download fail, `resolve_link` finds the link.
    """
    return _resolve(store, name, ())


def resolve_link(store: Store, name: str) -> Resolved | None:
    """As `resolve`, beginning with ``NAME.symlink``; None where there is no such link, or `name` is one itself."""
    return None if name.endswith(SUFFIX) else _resolve(store, name + SUFFIX, ())


def _resolve(store: Store, name: str, links: tuple[str, ...]) -> Resolved | None:
    if name.endswith(SUFFIX):
        return _follow(store, name, links)
    info = store.stat(name)
    if info is not None:
        return Resolved(info, links)
    return _follow(store, name + SUFFIX, links)


def _follow(store: Store, link: str, links: tuple[str, ...]) -> Resolved | None:
    described = store.describe(link)
    if link in links or len(links) >= MAX_LINKS:
        chain = " -> ".join(store.describe(each) for each in (*links, link))
        problem = "leads back to itself" if link in links else f"has more than {MAX_LINKS} links"
        raise CorruptError(f"{described}: the chain of links {problem}: {chain}", path=described)
    if store.stat(link) is None:
        return None
    try:
        text = _text(store.read_small(link, MAX_TEXT), described)
    except NotFoundError:
        return None
    for target in store.link_targets(link, text):
        found = _resolve(store, target, (*links, link))
        if found is not None:
            return found
    raise NotFoundError(f"{described}: the link names {text!r}, which is not there", path=described)


def _text(data: bytes, described: str) -> str:
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{described}: expected an object's name in UTF-8", path=described) from error
    if not text or any(ord(character) < 32 for character in text):
        raise CorruptError(f"{described}: expected one object's name, got {text[:80]!r}", path=described)
    if ".." in text.replace("\\", "/").split("/"):
        raise UnsafeError(f"{described}: the link would leave its folder: {text!r}", path=described)
    return text
