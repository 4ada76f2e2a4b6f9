from __future__ import annotations

import pytest
from rankload.loader.errors import (
    AccessError,
    CorruptError,
    PartialRestoreError,
    RankloadError,
    after_first_change,
    partial_once_begun,
)


@pytest.mark.parametrize(
    ("error", "helps"), [(CorruptError("damaged."), True), (AccessError("gone."), False)]
)
def test_verify_before_is_named_where_it_would_have_helped(error: RankloadError, *, helps: bool) -> None:
    def restore() -> None:
        with partial_once_begun() as begun:
            begun.append("a.pt")
            with after_first_change("a.pt", ["model"]):
                raise error

    with pytest.raises(PartialRestoreError) as told:
        restore()
    assert told.value.message.count('LoadOptions(verify="before") finds such damage before') == helps


def test_the_rank_that_met_an_error_is_said_to_have_met_it() -> None:
    assert str(AccessError("gone", rank=1, host="h")) == "gone [met by rank 1, host h]"
    assert str(AccessError("gone")) == "gone"
