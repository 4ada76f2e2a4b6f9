"""Says so where a framework's version is none that an adapter was tried with. Pure, but for the installed versions."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from ..distributed.printable import warn


@cache
def warn_of_version(distribution: str, tried: tuple[str, ...]) -> None:
    """Warns, once in a process, where `distribution` is of none of the versions `tried` (``5.24`` stands for all of
    ``5.24.*``)."""
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return  # not installed under this name: whoever imported it knows
    if not any(found == one or found.startswith(f"{one}.") for one in tried):
        warn(
            f"rankload's adapter for {distribution} was tried with {', '.join(tried)}, and {found} is installed: "
            "compare a resumed run with one that went on, before you rely on it",
            stacklevel=3,
        )
