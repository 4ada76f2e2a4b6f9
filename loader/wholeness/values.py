"""What came of comparing a checkpoint's bytes with their checksums, file by file. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

FileState = Literal[
    "whole", "damaged", "missing", "short", "nothing to compare with", "in part", "not chosen"
]
"""``in part``: what was chosen of it is as it was written; ``not chosen``: nothing of it was."""
WRONG: frozenset[FileState] = frozenset({"damaged", "missing", "short"})


@dataclass(frozen=True)
class Damage:
    """Bytes that are not those that were written."""

    what: str
    """The record, item or checksum of the file that they belong to."""
    start: int
    """Of the bytes that were summed, from the file's beginning."""
    stop: int
    expected: str
    got: str
    tensors: tuple[str, ...] = ()
    """Names of the tensors in those bytes, as the file has them; empty where they could not be told."""

    def __str__(self) -> str:
        of = f" of {_listed(self.tensors)}" if self.tensors else ""
        return f"{self.what}{of}, bytes {self.start:,} to {self.stop:,}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class FileVerdict:
    """What is known of one file."""

    file: str
    """Its path or URI, without secrets."""
    state: FileState
    size_bytes: int | None = None
    compared_bytes: int = 0
    """How many of its bytes were compared with a checksum, each once."""
    compared_by: tuple[str, ...] = ()
    """With which: ``zip CRC-32``, ``sha256 of SHA256SUMS``."""
    reason: str = ""
    """Why it is not whole, or was compared with nothing, or in part."""
    damages: tuple[Damage, ...] = ()
    left_out: tuple[str, ...] = ()
    """Checksums that it was not compared with, each with the reason."""
    sha256: str | None = None
    """Of the bytes that were read, where that was asked for."""

    @property
    def is_wrong(self) -> bool:
        return self.state in WRONG


@dataclass(frozen=True)
class Wholeness:
    """What is known of a checkpoint."""

    path: str
    """Without secrets."""
    kind: str | None
    """None where it could not be opened."""
    step: int | None
    world_size: int | None
    files: tuple[FileVerdict, ...]
    problems: tuple[str, ...] = ()
    """What is wrong with the checkpoint beyond single files: files of two saves, a save that did not end."""
    notes: tuple[str, ...] = ()
    """What could not be looked at, and why."""
    subset: str | None = None
    """As it was asked for; None where all was compared."""
    seed: int | None = None
    """Of a random subset: the same one chooses the same bytes again."""
    total_bytes: int = 0
    """Of all that there are checksums of."""
    written: tuple[str, ...] = ()
    """The manifests that were written."""

    @property
    def compared_bytes(self) -> int:
        return sum(one.compared_bytes for one in self.files)

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong was found. Files that there was nothing to compare with count as nothing wrong."""
        return not self.problems and not any(one.is_wrong for one in self.files)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "path": self.path,
            "sound": self.is_sound,
            "kind": self.kind,
            "step": self.step,
            "world_size": self.world_size,
            "subset": self.subset,
            "seed": self.seed,
            "compared_bytes": self.compared_bytes,
            "total_bytes": self.total_bytes,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "written": list(self.written),
            "files": [_file(one) for one in self.files],
        }


def _file(one: FileVerdict) -> dict[str, Any]:
    return {
        "file": one.file,
        "state": one.state,
        "size_bytes": one.size_bytes,
        "compared_bytes": one.compared_bytes,
        "compared_by": list(one.compared_by),
        "reason": one.reason,
        "left_out": list(one.left_out),
        "damages": [
            {
                "what": each.what,
                "tensors": list(each.tensors),
                "start": each.start,
                "stop": each.stop,
                "expected": each.expected,
                "got": each.got,
            }
            for each in one.damages
        ],
    }


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
