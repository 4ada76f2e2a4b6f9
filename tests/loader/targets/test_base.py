"""A plan is carried out in full or not at all, and what it reads is what it said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rankload.loader.errors import InternalError, MismatchError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.copies import Copy, copies_into
from rankload.loader.saved.mismatch import Mismatch, fits
from rankload.loader.saved.tensor import SavedTensor
from rankload.loader.targets.base import Change, Plan, RestoreOptions, Work, carry_out, join
from rankload.loader.targets.dtensor import kept_part


@dataclass
class Filling:
    """Fills `tensor`, and makes its trees real, or forgets to."""

    tensor: torch.Tensor
    copies: tuple[Copy, ...] = ()
    trees: Mapping[str, Any] = field(default_factory=dict)
    forgets: str = ""

    def prepare(self, work: Work) -> Change:
        if self.forgets != "trees":
            work.real(self.trees)

        def change() -> list[str]:
            if self.forgets != "copies":
                work.fill(self.copies, {"x": self.tensor}, {"x": "tensor"})
            return ["tensor"]

        return change


def filling(tmp_path: Path, forgets: str = "") -> Filling:
    torch.save({"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2)}, tmp_path / "file.pt")
    tree = read_index(str(tmp_path / "file.pt")).tree
    tensor = torch.zeros(2, 3)
    region, memory = kept_part(tensor, "x")
    copies = tuple(copies_into(tree["x"], region, memory, name="x"))
    return Filling(tensor, copies, {"state/y": tree["y"]}, forgets)


def work(*, strict: bool = True) -> Work:
    return Work(TensorReader(), RestoreOptions(strict=strict, file="a file"), lambda part: None)


def test_every_copy_and_tree_must_be_used(tmp_path: Path) -> None:
    step = filling(tmp_path)
    plan = Plan((step,))
    planned = [step.copies[0].storage, *step.trees["state/y"].storages]
    assert [copy.storage for copy in plan.copies] == planned
    assert carry_out(plan, work()) == ["tensor"]
    assert torch.equal(step.tensor, torch.arange(6.0).view(2, 3))
    for forgets, name in (("copies", "x"), ("trees", "state/y")):
        with pytest.raises(InternalError, match=f"a file: {name} were planned and not restored"):
            carry_out(Plan((filling(tmp_path, forgets),)), work())


def test_what_is_planned_later_is_checked_and_told(tmp_path: Path) -> None:
    later = Plan(
        (filling(tmp_path),),
        Mismatch(missing=["model/head"]),
        renamed={"a": "b"},
        cast={"model/b": "float32 -> float16"},
        not_restored=("state/other",),
        notes=("later",),
    )
    first = Plan((filling(tmp_path),), notes=("first",), rest=lambda: later)
    with pytest.raises(MismatchError, match="model/head"):
        carry_out(first, work())
    done = work(strict=False)
    assert carry_out(first, done) == ["tensor", "tensor"]
    told = done.carried_out
    assert told.notes == ("first", "later")
    assert told.mismatch.missing == ["model/head"]
    assert (told.renamed, told.cast, told.not_restored) == (later.renamed, later.cast, later.not_restored)


def test_plans_are_joined_in_order() -> None:
    ends: list[int] = []
    plans = [
        Plan(mismatch=Mismatch(missing=["a"]), reset=("a",)),
        Plan(mismatch=Mismatch(wrong=["b"]), reset=("b",), finish=lambda: ends.append(1)),
    ]
    joined = join(plans)
    assert (joined.mismatch.missing, joined.mismatch.wrong, joined.reset) == (["a"], ["b"], ("a", "b"))
    assert joined.finish is not None
    joined.finish()
    assert ends == [1]
    assert join([]).copies == ()


def test_what_a_new_tensor_will_be_is_known_before() -> None:
    wide = torch.empty(4, 6).t()
    for tensor in (
        wide,
        torch.empty(3, 5, 2)[:, 1:],
        torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ):
        _, memory = kept_part(tensor, "x", new=torch.float64)
        made = torch.empty_like(tensor, dtype=torch.float64)
        assert (memory.dtype, memory.stride, memory.plain) == ("float64", made.stride(), True)
        _, memory = kept_part(tensor, "x")
        assert (memory.dtype, memory.stride) == ("float32", tensor.stride())
        meta = tensor.to("meta")
        _, memory = kept_part(meta, "x")
        assert (memory.stride, memory.plain) == (torch.empty_like(meta, device="cpu").stride(), True)
    _, memory = kept_part(torch.empty(2, dtype=torch.complex64).conj(), "x")
    assert not memory.plain


def test_a_tensor_that_fits_and_others() -> None:
    saved = SavedTensor("float32", (2, 3), ())
    mismatch, cast = Mismatch(), {}
    assert fits(saved, "model/a", (2, 3), "float32", mismatch, cast)
    assert fits(saved, "model/b", (2, 3), "bfloat16", mismatch, cast)
    assert not fits(saved, "model/c", (3, 2), "float32", mismatch, cast)
    assert not fits(saved, "model/d", (2, 3), "int64", mismatch, cast)
    assert not fits([1], "model/e", (2, 3), "float32", mismatch, cast)
    assert cast == {"model/b": "float32 -> bfloat16"}
    assert mismatch.wrong == [
        "model/c: expected shape (3, 2), got (2, 3)",
        "model/d: expected int64, got float32",
        "model/e: expected a tensor, got a list",
    ]
