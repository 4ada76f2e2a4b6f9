from __future__ import annotations

import pytest
from rankload.loader.changes import partial_restore
from rankload.loader.errors import AccessError, AlgorithmError, CorruptError, RankloadError


@pytest.mark.parametrize(
    ("error", "helps"), [(CorruptError("damaged."), True), (AccessError("gone."), False)]
)
def test_verify_before_is_named_where_it_would_have_helped(error: RankloadError, *, helps: bool) -> None:
    told = partial_restore(error, "a.pt", {0: ("model",)}, 1)
    assert told.message.count('LoadOptions(verify="before") finds such damage before') == helps
    assert told.details["cause"] == type(error).__name__


def test_what_was_changed_is_told_by_rank_where_it_differs() -> None:
    cause = AccessError("gone", rank=1, host="h", path="b.pt")
    same = partial_restore(cause, "a.pt", {0: ("model", "optimizer"), 1: ("model", "optimizer")}, 2)
    assert "; changed: model, optimizer. gone. Take" in same.message
    assert (same.rank, same.host, same.changed) == (1, "h", ("model", "optimizer"))
    assert same.changed_by_rank == {0: same.changed, 1: same.changed}
    other = partial_restore(cause, "a.pt", {0: ("model",), 2: ("model",), 3: ()}, 5)
    assert "changed: model (ranks 0, 2); nothing (rank 3); not known (ranks 1, 4). gone." in other.message
    assert other.changed == ("model",)
    assert other.changed_by_rank == {0: ("model",), 2: ("model",), 3: ()}


def test_a_partial_restore_of_another_kind_keeps_its_kind() -> None:
    cause = AlgorithmError("an algorithm failed", changed=("algorithm A",))
    told = partial_restore(cause, "a.pt", {0: ("algorithm A", "model")}, 1)
    assert told is cause
    assert (told.changed, told.message, told.path) == (
        ("algorithm A", "model"),
        "an algorithm failed",
        "a.pt",
    )


def test_the_rank_that_met_an_error_is_said_to_have_met_it() -> None:
    assert str(AccessError("gone", rank=1, host="h")) == "gone [met by rank 1, host h]"
    assert str(AccessError("gone")) == "gone"
