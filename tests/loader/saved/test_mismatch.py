from __future__ import annotations

import pytest
from rankload.distributed.errors import from_record, to_record
from rankload.loader.errors import MismatchError, MissingFrozenError
from rankload.loader.saved.mismatch import Mismatch


def test_everything_missing_frozen_is_an_error_of_its_own() -> None:
    found = Mismatch(missing=["model/base.w", "model/base.b"], frozen=["model/base.w", "model/base.b"])
    with pytest.raises(MissingFrozenError) as raised:
        found.raise_if_any("adapter.pt", strict=True)
    message = str(raised.value)
    assert "has every trained weight of the model and lacks 2 frozen parameters" in message
    assert "LoadOptions(allow_missing_frozen=True)" in message
    assert raised.value.details["missing"] == ["model/base.w", "model/base.b"]
    assert isinstance(from_record(to_record(raised.value)), MissingFrozenError)
    found.raise_if_any("adapter.pt", strict=True, allow_missing_frozen=True)
    found.raise_if_any("adapter.pt", strict=False)


@pytest.mark.parametrize(
    "more",
    [
        {"missing": ["model/head.w"]},
        {"unexpected": ["model/x"]},
        {"wrong": ["model/x: expected (1,), got (2,)"]},
    ],
)
def test_the_option_admits_frozen_names_only(more: dict[str, list[str]]) -> None:
    found = Mismatch(missing=["model/base.w"], frozen=["model/base.w"])
    found.extend(Mismatch(**more))
    with pytest.raises(MismatchError, match=r"model/base\.w") as raised:
        found.raise_if_any("a.pt", strict=True)
    assert type(raised.value) is MismatchError
    with pytest.raises(MismatchError) as raised:
        found.raise_if_any("a.pt", strict=True, allow_missing_frozen=True)
    assert raised.value.details["missing"] == more.get("missing", [])
    assert "base.w" not in str(raised.value)


def test_advice_that_was_tried_takes_the_place_of_what_may_help() -> None:
    found = Mismatch(missing=["model/w"], unexpected=["model/model.w"])
    with pytest.raises(MismatchError, match=r"LoadOptions\(rename=\{\.\.\.\}\)"):
        found.raise_if_any("a.pt", strict=True)
    found.extend(Mismatch(advice=["Pass this."]))
    found.extend(Mismatch(advice=["Pass this."]))
    with pytest.raises(MismatchError, match=r"Pass this\.$") as raised:
        found.raise_if_any("a.pt", strict=True)
    assert "{...}" not in str(raised.value)
