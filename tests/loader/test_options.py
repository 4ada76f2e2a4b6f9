from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rankload.loader.errors import OptionError
from rankload.loader.options import LoadOptions, Options, resolve_options


def test_argument_comes_before_environment_before_default() -> None:
    environ = {"RANKLOAD_STALL_TIMEOUT_S": "7.5", "RANKLOAD_CACHE_DIR": "/fast", "RANKLOAD_VERIFY": "before"}
    assert resolve_options(None, {}) == Options(
        cache_dir=None,
        cache_home="auto",
        cache_size=0,
        stall_timeout_s=120.0,
        safe_types=(),
        storage_options={},
        rename={},
        allow_missing_frozen=False,
        layout={},
        hyperparameters=None,
        leave_out=(),
        verify="during",
        asks_for_checksums=False,
        mode="auto",
        interface=None,
        trace=None,
    )
    assert resolve_options(None, {"RANKLOAD_RESUME": "/runs"}) == resolve_options(None, {})
    found = resolve_options(LoadOptions(stall_timeout_s=3), environ)
    assert (found.stall_timeout_s, found.cache_dir, found.verify) == (3, "/fast", "before")


def test_every_option_that_is_given_is_taken() -> None:
    given: dict[str, Any] = {
        "cache_dir": "/fast",
        "cache_home": "disk",
        "cache_size": 5,
        "interface": "10.1.0.0/16",
        "stall_timeout_s": 7.5,
        "safe_types": (int, "a.b"),
        "storage_options": {"key": "k"},
        "rename": {"a": "b"},
        "allow_missing_frozen": True,
        "layout": {"model": "x"},
        "hyperparameters": "job",
        "leave_out": ("optimizers", "rng"),
        "verify": "before",
        "mode": "node",
        "trace": "trace.json",
    }
    assert set(given) == {one.name for one in fields(LoadOptions)}
    expected = Options(**given, asks_for_checksums=True)
    assert resolve_options(given, {}) == resolve_options(LoadOptions(**given), {}) == expected


def test_who_names_a_way_to_verify_asks_for_checksums() -> None:
    assert not resolve_options(None, {}).asks_for_checksums
    assert not resolve_options({"verify": "off"}, {}).asks_for_checksums
    assert resolve_options({"verify": "during"}, {}).asks_for_checksums
    assert resolve_options(None, {"RANKLOAD_VERIFY": "before"}).asks_for_checksums


def test_parts_are_left_out_by_role_or_by_name_in_one_order() -> None:
    for given in (["scheduler", "optimizer"], {"schedulers", "optimizers"}, ("optimizers", "scheduler")):
        assert resolve_options({"leave_out": given}, {}).leave_out == ("optimizers", "schedulers")
    assert resolve_options({"leave_out": "optimizer"}, {}).leave_out == ("optimizers",)


def test_safe_types_have_one_order_in_every_process() -> None:
    assert resolve_options({"safe_types": ["b.B", "a.A"]}, {}).safe_types == ("b.B", "a.A")
    assert resolve_options({"safe_types": {"c.C", Path, "a.A"}}, {}).safe_types == ("a.A", "c.C", Path)


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (
            {"chache_dir": "x"},
            {},
            r"unknown option chache_dir \(did you mean cache_dir\?\); known ones: cache_dir",
        ),
        (None, {"RANKLOAD_STALL_TIMEOUT": "1"}, "unknown environment variable RANKLOAD_STALL_TIMEOUT;"),
        (None, {"RANKLOAD_STALL_TIMEOUT_S": "soon"}, "expected a number of seconds"),
        ({"leave_out": ["optimiser"]}, {}, "leave_out names 'optimiser': expected some of model, optimizer,"),
        ({"leave_out": 3}, {}, "leave_out=3: expected a list of names such as 'optimizer', got one int"),
        ({"verify": "later"}, {}, "expected one of before, during, off"),
        ({"stall_timeout_s": 0}, {}, "expected seconds above 0"),
        ({"safe_types": "a.b"}, {}, "expected a list"),
        ({"layout": {"modle": "x"}}, {}, "layout names modle"),
        (3, {}, "options is of type int: expected LoadOptions or a mapping"),
        ({3: 1}, {}, "unknown option 3;"),
        ({"layout": None}, {}, "layout is of type NoneType: expected a mapping"),
        ({"layout": {"model": 3}}, {}, r"layout\['model'\] is of type int: expected a string"),
        ({"rename": ["a"]}, {}, "rename is of type list: expected a mapping"),
        (
            {"rename": {"backbone.*": "encoder.*"}},
            {},
            r"pattern.*, as in rename=\{\"backbone.\": \"encoder.\"\}",
        ),
        ({"rename": {r"^model\.": ""}}, {}, r"a pattern, .*as in rename=\{\"model.\": \"\"\}"),
        ({"rename": {"*.weight": "w"}}, {}, "is a pattern, and rename knows none: .* is a prefix; any other"),
        ({"rename": {"head": "top."}}, {}, r"a whole name to a prefix: .*rename=\{\"head.\": \"top.\"\}"),
        ({"allow_missing_frozen": 1}, {}, "allow_missing_frozen=1: expected True or False"),
        ({"rename": {3: "a"}}, {}, "rename has a key of type int: expected strings"),
        ({"storage_options": "key"}, {}, "storage_options is of type str: expected a mapping"),
        ({"stall_timeout_s": "x"}, {}, "stall_timeout_s='x': expected seconds above 0"),
        ({"stall_timeout_s": True}, {}, "expected seconds above 0"),
        ({"stall_timeout_s": float("nan")}, {}, "expected seconds above 0"),
        ({"safe_types": [3]}, {}, "safe_types holds 3: expected types, or their names"),
        ({"safe_types": None}, {}, "expected a list"),
        ({"cache_dir": 3}, {}, "cache_dir=3: expected the path of a folder"),
        ({"cache_dir": b"x"}, {}, "expected the path of a folder"),
        ({"verify": ["off"]}, {}, "expected one of before, during, off"),
        ({"hyperparameters": "mine"}, {}, "hyperparameters='mine': expected one of checkpoint, job"),
        ({"mode": "fast"}, {}, "mode='fast': expected one of node, direct, auto, job"),
        ({"mode": "direct"}, {"RANKLOAD_VERIFY": "before"}, "cannot compare them before"),
        ({"cache_home": "ram"}, {}, "cache_home='ram': expected one of auto, memory, disk"),
        ({"cache_size": -1}, {}, "cache_size=-1: expected a number of bytes"),
        ({"cache_size": True}, {}, "cache_size=True: expected a number of bytes"),
        ({"cache_size": "20 elephants"}, {}, "expected a number of bytes, or text such as '20GB'"),
        (None, {"RANKLOAD_CACHE_SIZE": "much"}, "RANKLOAD_CACHE_SIZE='much': expected a number of bytes"),
        (None, {"RANKLOAD_DEBUG": "1"}, "unknown environment variable RANKLOAD_DEBUG;"),
    ],
)
def test_what_does_not_fit_raises(options: object, environ: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_options(options, environ)  # type: ignore[arg-type]


def test_a_path_object_is_a_cache_folder() -> None:
    assert resolve_options({"cache_dir": Path("/fast/cache")}, {}).cache_dir == "/fast/cache"


def test_sizes_of_the_cache() -> None:
    for text, size in (("0", 0), ("20GB", 20 * 10**9), ("20 GiB", 20 << 30), ("1.5MiB", 3 << 19), ("7B", 7)):
        assert resolve_options(None, {"RANKLOAD_CACHE_SIZE": text}).cache_size == size
        assert resolve_options({"cache_size": text}, {"RANKLOAD_CACHE_SIZE": "1TB"}).cache_size == size
    assert resolve_options({"cache_size": 5}, {"RANKLOAD_CACHE_HOME": "memory"}).cache_home == "memory"


def test_storage_options_are_never_shown() -> None:
    assert "secret" not in repr(LoadOptions(storage_options={"key": "secret"}))
    assert "secret" not in repr(resolve_options({"storage_options": {"key": "secret"}}, {}))
    for wrong in ("secret", ["secret"], {3: "secret"}):
        given: Any = {"storage_options": wrong}
        with pytest.raises(OptionError) as caught:
            resolve_options(given, {})
        assert "secret" not in str(caught.value)
    with pytest.raises(OptionError) as caught:
        resolve_options("key=secret", {})  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_a_size_of_the_cache_may_be_text_for_type_checkers_too() -> None:
    assert typing.get_type_hints(LoadOptions)["cache_size"] == int | str | None
    assert resolve_options(LoadOptions(cache_size="20GB"), {}).cache_size == 20 * 10**9
    assert resolve_options(None, {}).cache_size == 0


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    options = resolve_options(LoadOptions(trace="~/trace.json"), {"RANKLOAD_CACHE_DIR": "~/cache"})
    assert (options.cache_dir, options.trace) == ("/somewhere/cache", "/somewhere/trace.json")
