"""A framework's own load inside an adapter: what a rank raises stays its own error, and ends the other ranks."""

from __future__ import annotations

import os

from processes import run_ranks
from rankload.distributed.errors import RankloadError
from rankload.integrations.native import native_load


class TagError(ValueError):
    """An error that the framework's users expect."""


def loads() -> None:
    rank = int(os.environ["RANK"])
    with native_load("Framework"):
        pass
    seen: Exception | None = None
    try:
        with native_load("Framework"):
            if rank == 1:
                raise TagError("no such tag")
    except (TagError, RankloadError) as error:
        seen = error
    assert isinstance(seen, TagError if rank == 1 else RankloadError), seen
    assert "no such tag" in str(seen)
    if rank == 0:
        assert "TagError" in str(seen)
        assert "rank 1" in str(seen)


def test_what_a_rank_raises_stays_its_own_and_ends_the_others() -> None:
    finished = run_ranks(f"{__file__}:loads", 2, deadline_s=60)
    assert [rank.returncode for rank in finished] == [0, 0], finished
