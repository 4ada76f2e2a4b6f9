from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankload.loader import State, load
from rankload.loader.errors import CorruptError, FormatError
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.rng import apply_rng, capture_rng, complete_states, decode, encode, restore_rng
from rankload.loader.saved.values import InertObject
from torch import nn


def draws() -> tuple[Any, ...]:
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        float(np.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(1).tolist(),
    )


def test_capture_and_apply_repeat_the_draws() -> None:
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.randn()
    state = capture_rng()
    assert set(state) >= {"python", "numpy", "torch"}
    first = draws()
    assert draws() != first
    apply_rng(state)
    assert draws() == first


def test_the_way_between_ranks_keeps_every_bit() -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = capture_rng()
    sent = decode(encode(state))
    first = draws()
    apply_rng(sent)
    assert draws() == first
    assert sent["python"] == state["python"]
    assert torch.equal(sent["torch"], state["torch"])


@pytest.mark.parametrize("seed", [17, None])
def test_states_that_lack_are_derived_the_same_every_time_and_all_differ(seed: int | None) -> None:
    saved = [capture_rng()]
    random.random()
    states, derived = complete_states(saved, 4, seed)
    again, _ = complete_states(saved, 4, seed)
    assert len(states) == 4
    assert [text.split(" (")[0] for text in derived] == [f"rng of rank {rank}" for rank in (1, 2, 3)]
    seen = []
    for state, other in zip(states, again, strict=True):
        apply_rng(state)
        first = draws()
        apply_rng(other)
        assert draws() == first
        assert first not in seen
        seen.append(first)


@pytest.mark.parametrize(
    "payload",
    [
        b"nonsense",
        b"[1]",
        b'{"python": 1}',
        b'{"numpy": []}',
        b'{"torch": "*"}',
        b'{"numpy": ["MT19937", [-1], 0]}',
        b'{"numpy": {}}',
        b"[" * 100_000,
    ],
    ids=lambda payload: payload[:20].decode(),
)
def test_what_is_no_random_state_is_not_taken_for_one(payload: bytes) -> None:
    with pytest.raises(CorruptError, match="a rank sent an RNG state that cannot be read"):
        decode(payload)


def test_another_seed_gives_other_states() -> None:
    saved = [capture_rng()]
    a, _ = complete_states(saved, 2, 1)
    b, _ = complete_states(saved, 2, 2)
    assert a[1]["python"] != b[1]["python"]


def test_a_smaller_world_keeps_the_first_ones() -> None:
    saved = [capture_rng(), capture_rng(), capture_rng()]
    states, derived = complete_states(saved, 2, None)
    assert len(states) == 2
    assert derived == ()


def test_a_position_without_a_state_is_derived_like_a_further_rank() -> None:
    saved = capture_rng()
    random.random()
    states, derived = complete_states([None, saved, None], 4, 17)
    assert states[1] is not saved
    assert states[1]["python"] == saved["python"]
    assert derived == tuple(f"rng of rank {rank} (from seed 17)" for rank in (0, 2, 3))
    whole, _ = complete_states([saved], 4, 17)
    assert [states[rank]["python"] for rank in (2, 3)] == [whole[rank]["python"] for rank in (2, 3)]
    _, derived = complete_states([None, saved], 2, None)
    assert derived == ("rng of rank 0 (from rank 1's state)",)


@pytest.mark.parametrize("saved", [[], [None, None]])
def test_without_any_state_none_is_made_up(saved: list[None]) -> None:
    assert complete_states(saved, 2, 17) == ([], ())


def test_nothing_to_restore_is_warned_of() -> None:
    state = capture_rng()
    first = draws()
    apply_rng(state)
    with pytest.warns(UserWarning, match="no RNG states to restore"):
        restore_rng(None)
    assert draws() == first


def of_pickle(tmp_path: Path, entry: dict[str, Any]) -> Path:
    torch.save({"model": nn.Linear(2, 2).state_dict(), "rng": [entry]}, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def load_states(path: Path) -> Any:
    result = load(path, State(nn.Linear(2, 2)), progress_bar=False)
    return result.rng_states, result.receipt.not_restored


def other_forms(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    words, position = state["numpy"][1:3]
    generator = np.random.RandomState()
    generator.set_state(state["numpy"])
    return {
        "numpy as a dict": {**state, "numpy": generator.get_state(legacy=False)},
        "numpy as a generator": {**state, "numpy": generator},
        "numpy as a new generator": {**state, "numpy": np.random.Generator(generator._bit_generator)},
        "numpy as a bit generator": {**state, "numpy": generator._bit_generator},
        "numpy scalars": {
            **state,
            "numpy": (
                np.str_("MT19937"),
                words,
                np.int64(position),
                np.int32(state["numpy"][3]),
                *state["numpy"][4:],
            ),
        },
        "lists": {
            "python": [state["python"][0], list(state["python"][1]), state["python"][2]],
            "numpy": ["MT19937", words.tolist(), *state["numpy"][2:]],
            "torch": state["torch"].tolist(),
        },
        "tensors": {
            **state,
            "numpy": ("MT19937", torch.from_numpy(words.astype(np.int64)), *state["numpy"][2:]),
        },
        "transformers": {
            "python": state["python"],
            "numpy": state["numpy"],
            "cpu": state["torch"],
            "cuda": None,
        },
        "accelerate": {
            "random_state": state["python"],
            "numpy_random_seed": state["numpy"],
            "torch_manual_seed": state["torch"],
            "torch_cuda_manual_seed": [],
        },
        "Megatron": {
            "random_rng_state": state["python"],
            "np_rng_state": state["numpy"],
            "torch_rng_state": state["torch"],
            "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        },
        "cuda of one device in a list": {**state, "cuda": [torch.zeros(16, dtype=torch.uint8)]},
        "cuda of two devices": {**state, "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2},
    }


@pytest.mark.parametrize("form", other_forms(capture_rng()))
def test_every_form_that_frameworks_save_repeats_the_draws(tmp_path: Path, form: str) -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = capture_rng()
    first = draws()
    entry = other_forms(state)[form]
    # A new generator of NumPy keeps no half of a pair.
    if form in ("numpy as a new generator", "numpy as a bit generator"):
        apply_rng({**state, "numpy": (*state["numpy"][:3], 0, 0.0)})
        first = draws()
    states, lost = load_states(of_pickle(tmp_path, entry))
    assert lost == ()
    restore_rng(states)
    assert draws() == first
    restore_rng([entry])
    assert draws() == first
    assert decode(encode(states[0])).keys() == states[0].keys()
    cuda = states[0].get("cuda")
    assert isinstance(cuda, list) is (form == "cuda of two devices")
    if cuda is not None:
        sent = decode(encode(states[0]))["cuda"]
        assert all(torch.equal(a, b) for a, b in zip(sent, cuda, strict=True))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"numpy": None}, "rng/0/numpy (the checkpoint has None)"),
        (
            {"numpy": np.random.default_rng(1)},
            "rng/0/numpy (a state of PCG64; NumPy's global generator is an MT19937)",
        ),
        (
            {"torch": torch.zeros(5048, dtype=torch.uint8)},
            "rng/0/torch (5,048 bytes; a state of torch's CPU generator has 5,056)",
        ),
        (
            {"cuda": torch.zeros(816, dtype=torch.uint8)},
            "rng/0/cuda (816 bytes; a state of a CUDA generator has 16 or 8)",
        ),
        ({"mps": torch.zeros(44, dtype=torch.uint8)}, "rng/0/mps (expected python, numpy, torch, cuda)"),
        ({"cpu": torch.zeros(5056, dtype=torch.uint8)}, "rng/0/cpu (a second state of torch)"),
    ],
)
def test_a_state_of_another_generator_is_told_and_the_rest_restored(
    tmp_path: Path, other: dict[str, Any], reason: str
) -> None:
    state = capture_rng()
    with pytest.warns(UserWarning, match="random states that are not restored: rng/0/"):
        states, lost = load_states(of_pickle(tmp_path, {**state, **other}))
    assert lost == (reason,)
    kept = {key for key in state if key not in other}
    assert set(states[0]) == kept
    with pytest.warns(UserWarning, match=r"not restored: rng/\w+ \("):
        restore_rng([{**state, **other}])
    restore_rng(states)
    for key, value in capture_rng().items():
        assert key not in kept or str(value) == str(state[key])


def twister(left: int, following: int) -> torch.Tensor:
    """A state of torch's CPU generator that will read `left` - 1 words from the one at `following` on."""
    state = torch.get_rng_state()
    state.numpy()[8:12].view(np.int32)[0] = left
    state.numpy()[16:24].view(np.uint64)[0] = following
    return state


def mersenne(position: Any, words: Any = None) -> dict[str, Any]:
    key = np.zeros(624, np.uint32) if words is None else words
    return {"bit_generator": "MT19937", "state": {"key": key, "pos": position}, "has_gauss": 0, "gauss": 0.0}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a position": ({"numpy": mersenne(10**6)}, "position is 1000000, expected 0 to 624"),
    "a position below": ({"numpy": ("MT19937", np.zeros(624, np.uint32), -1, 0, 0.0)}, "position is -1"),
    "a position of no int": ({"numpy": mersenne(3.5)}, "position is a float, expected an int"),
    "few words": (
        {"numpy": ("MT19937", np.zeros(3, np.uint32), 0, 0, 0.0)},
        r"expected 624 words.*shape \(3,\)",
    ),
    "a range": ({"numpy": mersenne(1, range(1 << 26))}, "expected 624 words"),
    "python's range": ({"python": (3, range(1 << 26), None)}, "expected 625 words"),
    "python's position": ({"python": (3, (*[1] * 624, 10**6), None)}, "position is 1000000"),
    "python's words": (
        {"python": (3, (*[1 << 40] * 624, 3), None)},
        "integers that are not from 0 to 4294967295",
    ),
    "python's pair": ({"python": (3, (*[1] * 624, 3), 10**400)}, "too large"),
    "an int": ({"python": 5}, r"expected the tuple of random.getstate\(\), got 5"),
    "repeated bytes": (
        {"torch": torch.zeros(1, dtype=torch.uint8).expand(1 << 40)},
        r"expected the 5,056 bytes of torch's CPU generator, got a tensor of uint8 and shape \(1099511627776,\)",
    ),
    "a row of rows": (
        {"torch": torch.zeros(2, 2528, dtype=torch.uint8)},
        r"got a tensor of uint8 and shape \(2, 2528\)",
    ),
    "floats": ({"torch": torch.zeros(5056)}, "got a tensor of float32"),
    "many bytes": (
        {"torch": torch.zeros(5056, dtype=torch.int64) + 256},
        "integers that are not from 0 to 255",
    ),
    "torch's position": ({"torch": twister(624, 624)}, "624 words left from word 624 on"),
    "torch's high position": ({"torch": twister(1, 2**32 + 3)}, "1 words left from word 4294967299"),
    "cuda": (
        {"cuda": torch.zeros(1, dtype=torch.uint8).expand(1 << 40)},
        "expected the 16 or 8 bytes of a CUDA",
    ),
    "cuda of a device": (
        {"cuda": [torch.zeros(16, dtype=torch.uint8), 7]},
        "expected the 16 or 8 bytes.*got 7",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_state_is_refused_before_anything_changes(tmp_path: Path, name: str) -> None:
    broken, message = HOSTILE[name]
    state = capture_rng()
    path = of_pickle(tmp_path, {**state, **broken})
    assert path.stat().st_size < 200_000
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    key = next(iter(broken))
    with pytest.raises(
        FormatError, match=f"(?s)last.pt: rng/0/{key} is no random state: .*{message}.*ignore_keys"
    ):
        load(path, State(model), progress_bar=False)
    assert torch.equal(model.weight, before)
    with pytest.raises(FormatError, match=f"rng/{key} is no random state"):
        apply_rng({**state, **broken})
    load(path, State(model), ignore_keys=["rng"], progress_bar=False)
    assert str(capture_rng()) == str(state)


@pytest.mark.parametrize(
    "state",
    [
        mersenne(10**6),
        mersenne(0, np.zeros(3, np.uint32)),
        {**np.random.Philox(1).state, "buffer_pos": 10**6},
        {**np.random.Philox(1).state, "buffer_pos": -1},
    ],
)
def test_a_hostile_generator_among_other_entries_is_refused(state: dict[str, Any]) -> None:
    kind = state["bit_generator"]
    constructor = "__randomstate_ctor" if kind == "MT19937" else "__generator_ctor"
    inert = InertObject(f"numpy.random._pickle.{constructor}", (kind,), state=state, known=True)
    with pytest.raises(CorruptError, match=r"cannot be made \(ValueError: its (position|key|buffer_pos) is"):
        materialize({"g": inert}, reader=TensorReader(), file="f")


def test_unknown_names_beside_known_ones_are_told_in_composers_layout_too(tmp_path: Path) -> None:
    state = capture_rng()
    model = nn.Linear(2, 2)
    contents = {"state": State(model).state_dict(), "rng": [{**state, "jax": 1}]}
    torch.save(contents, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="random states that are not restored"):
        states, lost = load_states(tmp_path / "last.pt")
    assert set(states[0]) == set(state)
    assert lost == ("rng/0/jax (expected python, numpy, torch, cuda)",)
    torch.save({**contents, "rng": torch.get_rng_state()}, tmp_path / "last.pt")
    result = load(tmp_path / "last.pt", State(model), progress_bar=False)
    assert result.rng_states is None
    assert torch.equal(result.extra["rng"], torch.get_rng_state())


def test_devices_states_go_to_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr("rankload.loader.rng._cuda_is_initialised", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, *device: told.append((int(state[0]), *device))
    )
    each = [torch.full((16,), number, dtype=torch.uint8) for number in (5, 6, 7)]
    apply_rng({"cuda": each[0]})
    apply_rng({"cuda": each[:2]})
    assert told == [(5,), (5, 0), (6, 1)]
    with pytest.warns(UserWarning, match="of 3 devices, this process sees 2"):
        apply_rng({"cuda": each})
    assert told[3:] == [(5, 0), (6, 1)]


def test_a_loads_result_is_restored_as_its_states_are() -> None:
    @dataclass
    class Result:
        rng_states: list[dict[str, Any]] | None

    states = [capture_rng()]
    expected = torch.rand(3)
    restore_rng(Result(states))
    assert torch.equal(torch.rand(3), expected)
    with pytest.warns(UserWarning, match="no RNG states to restore"):
        restore_rng(Result(None))
    with pytest.raises(FormatError, match="was given a dict: expected the result of load, or the list"):
        restore_rng(states[0])  # type: ignore[arg-type]
