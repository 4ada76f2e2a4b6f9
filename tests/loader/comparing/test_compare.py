"""Where two checkpoints differ, across kinds, names and dtypes; nothing is said of equal ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from every_kind import KINDS, copy_kind, serving
from rankload.loader import NotFoundError, OptionError
from rankload.loader.alone import open_alone
from rankload.loader.comparing import compare
from rankload.loader.comparing.compare import Watch, compare_checkpoints
from rankload.loader.comparing.results import Comparison
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors are read in several pieces, and several tensors in one batch."""
    monkeypatch.setattr(compare, "PIECE_BYTES", 4096)


def saved(path: Path, tree: object) -> Path:
    torch.save(tree, path)
    return path


def told(found: Comparison) -> list[tuple[str, str]]:
    return [(one.what, one.key) for one in found.differences]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_equals_itself_and_its_remote_copy(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path / "copy")
    own = compare_checkpoints(path, path)
    assert own.equal
    assert own.n_equal
    assert own.elements
    keys = compare_checkpoints(path, path, keys_only=True)
    assert keys.equal
    assert keys.elements == 0
    with serving(tmp_path / "copy") as server:
        url = server.url(f"/{Path(path).relative_to(tmp_path / 'copy')}")
        there = compare_checkpoints(url, path, options={"cache_dir": str(tmp_path / "cache")})
    assert there.equal
    assert (there.n_equal, there.elements) == (own.n_equal, own.elements)


def with_weights(kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """A DeepSpeed folder, and its weights in fp32 as a plain dict."""
    folder = Path(copy_kind(kind, tmp_path))
    oracle = load_file(folder / "oracle.safetensors")
    state = {name.removeprefix("fp32/"): value for name, value in oracle.items() if name.startswith("fp32/")}
    for name, value in oracle.items():
        if name.startswith("buffer/"):
            short = name.removeprefix("buffer/")
            state[short] = value.long() if short == "count" else value
    # It is not trained, so there is no fp32 of it.
    state["frozen.weight"] = oracle["module/frozen.weight"].bfloat16()
    return folder, saved(tmp_path / "weights.pt", state)


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_zero_equals_its_weights_in_fp32(kind: str, tmp_path: Path) -> None:
    folder, weights = with_weights(kind, tmp_path)
    for pair in ((folder, weights), (weights, folder)):
        found = compare_checkpoints(*pair, weights_only=True)
        assert told(found) == []
        # Stage 1 keeps bf16 weights, and masters beside them.
        assert any("compared by its fp32 masters" in one for one in found.notes) == (kind == "zero1")
        assert found.equal
        assert found.n_equal > 10
    everything = compare_checkpoints(folder, weights)
    assert not everything.equal
    assert not everything.differences
    assert any(key.startswith("state/optimizers/") for key in everything.only_a)
    assert not any("masters" in key for key in everything.only_a)


def test_masters_that_were_compared_with_nothing_are_said_to_be_in_one_alone(tmp_path: Path) -> None:
    folder, weights = with_weights("zero1", tmp_path)
    state = torch.load(weights)
    name = "blocks.1.down.weight"
    with open_alone(folder) as opened:
        dtype = getattr(torch, opened.saved.state["model"][name].dtype)
    # Of one dtype in both: so the weights themselves are compared.
    state[name] = state[name].to(dtype)
    found = compare_checkpoints(folder, saved(weights, state))
    assert not found.differences
    assert [key for key in found.only_a if "masters" in key] == [f"fp32 masters/{name}"]


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_one_changed_element_is_found_with_its_place(kind: str, tmp_path: Path) -> None:
    folder, weights = with_weights(kind, tmp_path)
    state = torch.load(weights)
    name = "blocks.1.down.weight"
    before = float(state[name][3, 5])
    state[name][3, 5] += 0.25
    other = saved(tmp_path / "other.pt", state)
    for a, b in ((weights, other), (folder, other)):
        found = compare_checkpoints(a, b, weights_only=True)
        (one,) = found.differences
        assert (one.what, one.key, one.differing, one.first) == ("elements", f"state/model/{name}", 1, (3, 5))
        assert one.elements == state[name].numel()
        assert one.max_abs == pytest.approx(abs(float(state[name][3, 5]) - before))
        assert compare_checkpoints(a, b, weights_only=True, atol=0.3).equal
        assert not compare_checkpoints(a, b, weights_only=True, atol=0.2).equal


def test_names_that_wrappers_changed_are_the_same_unless_told_otherwise(tmp_path: Path) -> None:
    model = {"a.weight": torch.rand(3, 4), "b.bias": torch.rand(5)}
    optimizer = {
        "state": {name: {"exp_avg": torch.rand(value.shape)} for name, value in model.items()},
        "param_groups": [{"lr": 0.1, "params": list(model)}],
    }
    wrapped = {
        "model": {f"module.{name}": value for name, value in model.items()},
        "optimizer": {
            "state": {f"module.{name}": value for name, value in optimizer["state"].items()},
            "param_groups": [{"lr": 0.1, "params": [f"module.{name}" for name in model]}],
        },
    }
    a = saved(tmp_path / "a.pt", {"model": model, "optimizer": optimizer})
    b = saved(tmp_path / "b.pt", wrapped)
    found = compare_checkpoints(a, b)
    assert found.equal, found
    assert found.renamed == {name: f"module.{name}" for name in model}
    exact = compare_checkpoints(a, b, exact_names=True)
    assert len(exact.only_a) == len(exact.only_b) == 4
    assert told(exact) == [("value", exact.differences[0].key)]
    renamed = compare_checkpoints(a, b, exact_names=True, options={"rename": {"": "module."}})
    assert renamed.equal, renamed


def test_what_one_lacks_and_other_shapes_dtypes_and_kinds(tmp_path: Path) -> None:
    a = saved(
        tmp_path / "a.pt",
        {"same": torch.ones(2), "gone": torch.ones(2), "shape": torch.ones(2, 3), "dtype": torch.ones(3)},
    )
    b = saved(
        tmp_path / "b.pt",
        {
            "same": torch.ones(2),
            "new": torch.ones(2),
            "shape": torch.ones(3, 2),
            "dtype": torch.ones(3).half(),
        },
    )
    for keys_only in (False, True):
        found = compare_checkpoints(a, b, keys_only=keys_only)
        assert (found.only_a, found.only_b) == (("state/model/gone",), ("state/model/new",))
        assert told(found) == [("shape", "state/model/shape"), ("dtype", "state/model/dtype")]
        assert found.n_equal == 1
    assert [(one.a, one.b) for one in found.differences] == [("(2, 3)", "(3, 2)"), ("float32", "float16")]


def test_values_that_are_no_tensors_are_compared_too(tmp_path: Path) -> None:
    import numpy as np

    def tree(**changed: object) -> dict[str, object]:
        values: dict[str, object] = {
            "model": {"w": torch.ones(2)},
            "optimizer": {
                "state": {0: {"step": torch.tensor(3.0)}},
                "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0]}],
            },
            "epoch": 3,
            "nothing": float("nan"),
            "array": np.arange(4),
            "text": "x",
        }
        return {**values, **changed}

    a = saved(tmp_path / "a.pt", tree())
    assert compare_checkpoints(a, saved(tmp_path / "same.pt", tree())).equal
    for key, changed in (
        ("epoch", {"epoch": 4}),
        ("epoch", {"epoch": 3.0}),
        ("nothing", {"nothing": 0.0}),
        ("array", {"array": np.array([0, 1, 2, 4])}),
        ("text", {"text": "y"}),
    ):
        found = compare_checkpoints(a, saved(tmp_path / "b.pt", tree(**changed)))
        assert [one.key for one in found.differences] == [key], changed
        assert found.differences[0].what in ("value", "kind")
        assert compare_checkpoints(a, tmp_path / "b.pt", weights_only=True).equal
    other = tree()
    other["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.98)
    found = compare_checkpoints(a, saved(tmp_path / "b.pt", other))
    assert [one.key.rsplit("/", 1)[1] for one in found.differences] == ["betas"]
    assert compare_checkpoints(a, tmp_path / "b.pt", rtol=0.1).equal


def test_nans_and_infinities_are_counted(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    a = saved(tmp_path / "a.pt", {"w": torch.tensor([nan, 1.0, nan, inf, -inf, 0.0, 2.0])})
    b = saved(tmp_path / "b.pt", {"w": torch.tensor([nan, nan, 1.0, inf, inf, -0.0, 2.5])})
    (one,) = compare_checkpoints(a, b).differences
    assert (one.differing, one.only_a_nan, one.only_b_nan, one.first) == (4, 1, 1, (1,))
    assert one.max_abs == inf
    assert one.as_dict()["max_abs"] == "inf"
    assert compare_checkpoints(a, a).equal


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool),
        *(torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int64),
    ],
)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    zeros = torch.zeros(2000, dtype=torch.float32)
    ones = zeros.clone()
    ones[1234] = 1
    a = saved(tmp_path / "a.pt", {"w": zeros.to(dtype)})
    b = saved(tmp_path / "b.pt", {"w": ones.to(dtype)})
    (one,) = compare_checkpoints(a, b).differences
    assert (one.differing, one.first, one.max_abs) == (1, (1234,), 1.0)


def test_large_whole_numbers_differ_by_one(tmp_path: Path) -> None:
    for dtype in (torch.int64, torch.uint64):
        large = torch.tensor([2**62 + 1], dtype=dtype)
        a, b = (
            saved(tmp_path / "a.pt", {"w": large}),
            saved(tmp_path / "b.pt", {"w": torch.tensor([2**62], dtype=dtype)}),
        )
        assert compare_checkpoints(a, b).differences[0].differing == 1


def test_views_and_tied_weights(tmp_path: Path) -> None:
    base = torch.rand(64, 96)
    tied = {"wte": base, "head": base, "turned": base.T, "wide": torch.rand(1, 5).expand(7, 5)}
    a = saved(tmp_path / "a.pt", tied)
    b = saved(
        tmp_path / "b.pt",
        {name: value.clone().contiguous() for name, value in tied.items() if name != "head"},
    )
    found = compare_checkpoints(a, b)
    assert found.equal, found
    assert "tied to names that both have: head" in found.notes[0]
    c = saved(tmp_path / "c.pt", {"turned": base.T.contiguous()})
    assert compare_checkpoints(a, c).only_a == ("state/model/wte", "state/model/head", "state/model/wide")


@pytest.mark.parametrize("kind", ["dcp", "zero3"])
def test_a_weight_that_is_lacking_is_not_taken_for_a_tied_one_where_no_tensor_is_read(
    kind: str, tmp_path: Path
) -> None:
    path = copy_kind(kind, tmp_path)
    with open_alone(path) as opened:
        names = [str(name) for name in opened.saved.state["model"] if str(name) != "blocks.0.down.bias"]
        shapes = {name: opened.saved.state["model"][name].shape for name in names}
    # Another weight has its shape.
    other = saved(tmp_path / "other.pt", {name: torch.zeros(shape) for name, shape in shapes.items()})
    for keys_only in (True, False):
        found = compare_checkpoints(path, other, weights_only=True, keys_only=keys_only)
        assert "state/model/blocks.0.down.bias" in found.only_a


@pytest.mark.parametrize("kind", ["dcp", "dcp-tp", "rank-shards", "slices", "sharded"])
def test_shards_equal_the_whole_tensors_and_differ_where_one_was_changed(kind: str, tmp_path: Path) -> None:
    path = Path(copy_kind(kind, tmp_path))
    folder = path if (path / "oracle.safetensors").exists() else path.parent
    oracle = folder / "oracle.safetensors"
    state = {
        name.removeprefix("model/"): value
        for name, value in load_file(oracle).items()
        if name.startswith("model/")
    }
    other = saved(tmp_path / "whole.pt", state)
    before = compare_checkpoints(path, other, weights_only=True)
    assert not before.differences
    assert before.n_equal > 8
    name = max(state, key=lambda one: state[one].numel())
    state[name].view(-1)[-1] += 1
    after = compare_checkpoints(path, saved(other, state), weights_only=True)
    changed = {one.key.removeprefix("state/model/") for one in after.differences}
    assert name in changed
    assert all(one.differing == 1 for one in after.differences)


def test_only_keys_that_match(tmp_path: Path) -> None:
    a = saved(
        tmp_path / "a.pt",
        {"up.weight": torch.ones(2), "down.weight": torch.ones(2), "more.bias": torch.ones(1)},
    )
    b = saved(tmp_path / "b.pt", {"up.weight": torch.zeros(2), "down.weight": torch.zeros(2)})
    for grep in ("up", "state/model/up*", "*/up.w[e]ight"):
        found = compare_checkpoints(a, b, grep=grep)
        assert told(found) == [("elements", "state/model/up.weight")]
        assert found.only_a == ()
    # What lies below a place that matches is meant, too, as by ignore_keys.
    assert [key for _, key in told(compare_checkpoints(a, b, grep="st?te/model"))] == [
        "state/model/up.weight",
        "state/model/down.weight",
    ]


def test_remote_bytes_are_read_in_few_requests_and_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PIECE_BYTES", 1 << 20)
    torch.manual_seed(0)
    state = {f"layer{number}.weight": torch.rand(64, 64) for number in range(160)}
    state["large"] = torch.rand(1 << 20)
    (tmp_path / "copy").mkdir()
    path = saved(tmp_path / "copy" / "a.pt", state)
    state["layer7.weight"][1, 1] = 3
    other = saved(tmp_path / "b.pt", state)
    heard: list[int] = []
    with serving(tmp_path / "copy") as server:
        found = compare_checkpoints(
            server.url("/a.pt"),
            other,
            options={"cache_dir": str(tmp_path / "cache")},
            watch=Watch(heard.append, heard.append),
        )
        assert server.sent_bytes < os.path.getsize(path) + (2 << 20)
        assert len(server.asked) < 60
    assert told(found) == [("elements", "state/model/layer7.weight")]
    assert sum(heard[1:]) == heard[0] == found.elements
    kept = sum(one.stat().st_blocks * 512 for one in (tmp_path / "cache").rglob("*") if one.is_file())
    assert kept < 1 << 20


def test_keys_alone_read_no_tensor_of_a_remote_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    path = saved(tmp_path / "copy" / "a.pt", {"large": torch.rand(1 << 20)})
    with serving(tmp_path / "copy") as server:
        options = {"cache_dir": str(tmp_path / "cache")}
        assert compare_checkpoints(server.url("/a.pt"), path, keys_only=True, options=options).equal
        assert server.sent_bytes < 1 << 20


def test_errors(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.pt", {"w": torch.ones(1)})
    with pytest.raises(NotFoundError, match="gone"):
        compare_checkpoints(a, tmp_path / "gone.pt")
    for bad in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="rtol"):
            compare_checkpoints(a, a, rtol=bad)
