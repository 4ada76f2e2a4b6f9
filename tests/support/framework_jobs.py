"""Runs jobs of real frameworks by their own interpreter, and puts what they saved where a URI names it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_server import CountingServer, Served, counting_server
from places import TESTS
from processes import run_ranks
from real_servers import S3Server


@dataclass(frozen=True)
class Published:
    """A checkpoint where a job reads it, and the variables that the job needs for that."""

    uri: str
    env: Mapping[str, str] = field(default_factory=dict)
    web: CountingServer | None = None
    """What serves it, where that is ``http``."""


Publish = Callable[[str, Path], contextlib.AbstractContextManager[Published]]
"""Puts a file or folder where the named scheme finds it, for the length of a block."""


def run_job(
    python: str,
    job: str,
    world_size: int,
    *args: object,
    deadline_s: float,
    env: Mapping[str, str] | None = None,
) -> Any:
    """What rank 0 of a job's function (``trainer_job.py:save``) tells, as JSON; None where it tells nothing.

    All ranks must end well.
    """
    finished = run_ranks(
        f"{TESTS / 'frameworks' / job}",
        world_size,
        args=args,
        deadline_s=deadline_s,
        env={"DS_ACCELERATOR": "cpu", **(env or {})},
        python=python,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    told = [line for line in finished[0].stdout.splitlines() if line.startswith('{"')]
    assert len(told) <= 1, told
    return json.loads(told[0]) if told else None


def files_of(path: Path) -> dict[str, Path]:
    """The file at `path`, or all that the folder there has, by their names beside it."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return {one.relative_to(path.parent).as_posix(): one for one in sorted(files)}


@contextlib.contextmanager
def on_the_web(path: Path) -> Iterator[Published]:
    objects = {f"/run/{name}": Served(one.read_bytes()) for name, one in files_of(path).items()}
    with counting_server(objects) as server:
        yield Published(server.url(f"/run/{path.name}"), web=server)


def in_s3(path: Path, server: S3Server, folder: str) -> Published:
    """Uploads it into `folder` of the bucket ``checkpoints``, where it stays."""
    import fsspec

    found, place = files_of(path), f"checkpoints/{folder}"
    store = fsspec.filesystem("s3", skip_instance_cache=True, **server.options)
    store.put([str(one) for one in found.values()], [f"{place}/{name}" for name in found])
    return Published(f"s3://{place}/{path.name}", env=server.environment)
