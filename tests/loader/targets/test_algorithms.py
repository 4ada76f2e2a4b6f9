from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from rankload.loader.errors import AlgorithmError, OptionError
from rankload.loader.targets import algorithms
from rankload.loader.targets.algorithms import (
    Algorithm,
    apply_required,
    ordered_algorithms,
    parse_call,
    register_algorithm,
    required_algorithms,
    without_unregistered,
)


class Widen:
    def __init__(self, factor: int = 2) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        return f"Widen(factor={self.factor})"

    @staticmethod
    def required_on_load() -> bool:
        return True

    def match(self, event: Any, state: Any) -> bool:
        return True

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        state.applied.append((repr(self), str(event.value)))

    def state_dict(self) -> dict[str, Any]:
        return {"repr": repr(self)}


class Deepen(Widen):
    def __repr__(self) -> str:
        return f"Deepen(factor={self.factor})"


class Failing(Widen):
    def __repr__(self) -> str:
        return f"Failing(factor={self.factor})"

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        raise RuntimeError("no such layer")


class Job:
    def __init__(self, *present: Any) -> None:
        self.algorithms = list(present)
        self.applied: list[tuple[str, str]] = []


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "_REGISTRY", {})
    for kind in (Widen, Deepen, Failing):
        register_algorithm(kind)


def saved(*items: Any) -> list[tuple[str, dict[str, str]]]:
    return [(type(item).__qualname__, {"repr": repr(item)}) for item in items]


def test_the_protocol_is_satisfied() -> None:
    assert isinstance(Widen(), Algorithm)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "Widen(factor=__import__('os'))",
        "Widen(factor=print(1))",
        "Widen(**{'factor': 3})",
        "algorithms.Widen()",
        "Widen",
        "Widen() or Widen()",
        "[Widen()]",
        "Widen(" + "(" * 5000 + ")" * 5000 + ")",
        "",
        "<composer.LabelSmoothing object at 0x7f>",
    ],
)
def test_only_a_plain_call_with_literals_is_parsed(text: str) -> None:
    assert parse_call(text) is None


def test_a_plain_call_is_parsed() -> None:
    assert parse_call("SqueezeExcite(latent_channels=4,min_channels=8)") == (
        "SqueezeExcite",
        [],
        {"latent_channels": 4, "min_channels": 8},
    )


def test_absent_ones_are_added_in_the_checkpoints_order() -> None:
    job = Job()
    missing = required_algorithms(saved(Widen(3), Deepen(1), Deepen(4)), job.algorithms)
    assert [repr(item) for item in missing[:2]] == ["Widen(factor=3)", "Deepen(factor=1)"]
    changes: list[str] = []
    with pytest.warns(UserWarning, match="Added Widen"):
        apply_required(missing, job, None, note_change=changes.append)
    assert job.applied[:2] == [("Widen(factor=3)", "init"), ("Deepen(factor=1)", "init")]
    assert changes[0] == "algorithm Widen(factor=3)"


def test_the_same_one_does_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert required_algorithms(saved(Widen(3)), [Widen(3)]) == []


def test_another_form_warns_and_keeps_the_users() -> None:
    with pytest.warns(UserWarning, match=r"Widen\(factor=3\).*this job has Widen\(factor=5\)"):
        assert required_algorithms(saved(Widen(3)), [Widen(5)]) == []


def test_excluded_and_unknown_ones_are_skipped() -> None:
    assert required_algorithms(saved(Widen(3)), [], exclude=["Widen"]) == []
    assert required_algorithms([("Unknown", {"repr": "Unknown()"})], []) == []


def test_one_that_cannot_be_rebuilt_warns() -> None:
    with pytest.warns(UserWarning, match="cannot be rebuilt"):
        assert required_algorithms([("Widen", {"repr": "Widen(factor=os.system('x'))"})], []) == []
    with pytest.warns(UserWarning, match="cannot be rebuilt"):
        assert required_algorithms([("Widen", {"repr": "Deepen(factor=1)"})], []) == []


def test_layouts_before_lists_have_none() -> None:
    assert required_algorithms({"Widen": {}}, []) == []


def test_passes_order_them_and_may_not_put_them_before_the_users() -> None:
    def backwards(found: Sequence[Any], event: Any) -> Sequence[Any]:
        return list(reversed(found))

    job = Job()
    missing = required_algorithms(saved(Widen(3), Deepen(1)), job.algorithms)
    with pytest.warns(UserWarning, match="Added"):
        apply_required(ordered_algorithms(missing, job.algorithms, [backwards]), job, None)
    assert [name for name, _ in job.applied] == ["Deepen(factor=1)", "Widen(factor=3)"]

    job = Job(Deepen(9))
    missing = required_algorithms(saved(Widen(3)), job.algorithms)
    with pytest.raises(OptionError, match="exclude_algorithms") as caught:
        apply_required(ordered_algorithms(missing, job.algorithms, [backwards]), job, None)
    assert isinstance(caught.value, ValueError)
    assert job.applied == []


def test_a_failing_one_names_the_way_out() -> None:
    job = Job()
    missing = required_algorithms(saved(Failing()), job.algorithms)
    with pytest.raises(AlgorithmError, match=r"no such layer.*exclude_algorithms=\['Failing'\]") as caught:
        apply_required(missing, job, None)
    assert isinstance(caught.value, ValueError)


def test_what_is_handed_to_a_state_that_evaluates_is_filtered() -> None:
    entries = [
        ("Widen", {"repr": "Widen(factor=3)"}),
        ("Widen", {"repr": "Widen(factor=__import__('os').system('x'))"}),
        ("Evil", {"repr": "__import__('os').system('x')"}),
    ]
    kept, refused = without_unregistered(entries)
    assert kept == entries[:1]
    assert refused == ["Widen", "Evil"]
