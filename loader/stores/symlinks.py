"""Follows ``NAME.symlink`` objects: small texts that hold the real object's name, for stores that have no links.

A name that is missing is looked for as ``NAME.symlink``. What a link holds is relative to the root of its bucket
(server, file system), or else to the link's own folder; links to links are followed. Composer writes such objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import AccessError, CorruptError, NotFoundError, UnsafeError
from .base import ObjectInfo, Store
from .names import file_name, with_suffix
from .probes import Probes

SUFFIX = ".symlink"
MAX_LINKS = 16
MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Resolved:
    """The object that a name stands for."""

    info: ObjectInfo
    links: tuple[str, ...] = field(default=(), repr=False)  # may have signatures in them
    """The ``.symlink`` objects that were followed, in order."""


def resolve(store: Store, name: str) -> Resolved | None:
    """The object that `name` stands for; None where neither it nor ``NAME.symlink`` is there.

    Raises `CorruptError` for a loop, a chain of more than 16 links or a text that is no name; `NotFoundError`
    for a link to nothing; `UnsafeError` for a link that leaves its store; `AccessError` where nothing was found and the
    store refused to speak of a name. Where the store cannot say whether `name` is there, it is returned as it is
    (``info.certain`` is False): should its download fail, `resolve_link` finds the link.
    """
    probes = Probes(store)
    found = _resolve(probes, name, (), sure=False)
    if found is None and probes.refused:
        raise probes.nothing(f"{store.describe(name)} was not found", store.describe(name))
    return found


def resolve_link(store: Store, name: str) -> Resolved | None:
    """As `resolve`, beginning with ``NAME.symlink``; None where there is no such link, or `name` is one itself.

    None too where the store refuses to say whether there is one.
    """
    return None if _is_link(name) else _resolve(Probes(store), with_suffix(name, SUFFIX), (), sure=True)


def search(probes: Probes, name: str) -> Resolved | None:
    """As `resolve`, but sure that the object is there, and no page: its first bytes are read where there is doubt.

    What the store refuses to speak of is noted in `probes`, and is no error.
    """
    return _resolve(probes, name, (), sure=True)


def _is_link(name: str) -> bool:
    return file_name(name).endswith(SUFFIX)


def _resolve(probes: Probes, name: str, links: tuple[str, ...], *, sure: bool) -> Resolved | None:
    if _is_link(name):
        return _follow(probes, name, links)
    # What a link names is one of several names: which of them is there must be sure.
    info = probes.look(name) if sure or links else probes.stat(name)
    if info is not None:
        return Resolved(info, links)
    return _follow(probes, with_suffix(name, SUFFIX), links)


def _follow(probes: Probes, link: str, links: tuple[str, ...]) -> Resolved | None:
    store = probes.store
    described = store.describe(link)
    if link in links or len(links) >= MAX_LINKS:
        chain = " -> ".join(store.describe(each) for each in (*links, link))
        problem = "leads back to itself" if link in links else f"has more than {MAX_LINKS} links"
        raise CorruptError(f"{described}: the chain of links {problem}: {chain}", path=described)
    info = probes.stat(link)
    if info is None or (info.may_be_page and probes.look(link) is None):
        return None
    try:
        text = _text(store.read_small(link, MAX_TEXT), described)
    except NotFoundError:
        return None
    except AccessError as error:
        probes.note(error)
        return None
    targets = Probes(store)
    for target in store.link_targets(link, text):
        found = _resolve(targets, target, (*links, link), sure=True)
        if found is not None:
            return found
    raise targets.nothing(f"{described}: the link names {text!r}, which was not found", described)


def _text(data: bytes, described: str) -> str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{described}: expected an object's name in UTF-8", path=described) from error
    if not text or any(ord(character) < 32 for character in text):
        raise CorruptError(f"{described}: expected one object's name, got {text[:80]!r}", path=described)
    if ".." in text.replace("\\", "/").split("/"):
        raise UnsafeError(f"{described}: the link would leave its folder: {text!r}", path=described)
    return text
