"""One checkpoint of every kind that is read, to be copied, damaged and served."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from bad_server import BadServer, Behaviour, bad_server
from places import DATA
from zero_folders import unpack_zero

KINDS = {
    "zero1": "s1-w4",
    "zero3": "s3-w4",
    "accelerate": "accelerate-plain-w2/ckpt",
    "accelerate-zero": "accelerate-zero2-w2/ckpt",
    "trainer": "trainer-plain-w2/ckpt",
    "composer": "composer-monolithic-w2/ep2-ba8-rank0.pt",
    "composer-tar": "composer-monolithic-w2/manual-ep2-ba8-rank0.tar",
    "composer-zero1": "composer-zero1-w2/ep1-ba4-rank{rank}.pt.tar",
    "composer-zero3": "composer-zero3-w2/ep1-ba4-rank{rank}.pt.tar",
    "dcp": "dcp-fsdp2-w2/ckpt",
    "dcp-tp": "dcp-tp-fsdp-w4/ckpt",
    "lightning": "lightning-mp-w2/ckpt",
    "slices": "dcp-hf-sharded-w2/ckpt",
    "rank-shards": "rank-shards-w2",
    "sharded": "safetensors-sharded-index/ckpt",
    "safetensors": "safetensors-single/ckpt/model.safetensors",
}
"""Their paths, below tests/data or where `copy_kind` puts them, as a load takes them."""


def copy_kind(kind: str, target: Path) -> str:
    """Copies the checkpoint of this kind into `target`; its path there."""
    path = KINDS[kind]
    if kind in ("zero1", "zero3"):
        return str(unpack_zero(int(kind[-1]), target))
    top = path.split("/")[0]
    shutil.copytree(DATA / top, target / top)
    return str(target / path)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[BadServer]:
    """A server that does ranges, of the files in `folder`, by their paths in it."""
    files = {
        f"/{path.relative_to(folder)}": Behaviour(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }
    with bad_server(files) as server:
        yield server
