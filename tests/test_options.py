from __future__ import annotations

import pytest
from rankload.loader.errors import OptionError
from rankload.loader.options import LoadOptions, resolve_options


def test_argument_comes_before_environment_before_default() -> None:
    environ = {"RANKLOAD_STALL_TIMEOUT_S": "7.5", "RANKLOAD_CACHE_DIR": "/fast", "RANKLOAD_VERIFY": "before"}
    assert resolve_options(None, {}) == LoadOptions(stall_timeout_s=120.0, verify="during")
    found = resolve_options(LoadOptions(stall_timeout_s=3), environ)
    assert (found.stall_timeout_s, found.cache_dir, found.verify) == (3, "/fast", "before")


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ({"chache_dir": "x"}, {}, "unknown option chache_dir; known ones: cache_dir"),
        (None, {"RANKLOAD_STALL_TIMEOUT": "1"}, "unknown environment variable RANKLOAD_STALL_TIMEOUT;"),
        (None, {"RANKLOAD_STALL_TIMEOUT_S": "soon"}, "expected a number of seconds"),
        ({"verify": "later"}, {}, "expected one of before, during, off"),
        ({"stall_timeout_s": 0}, {}, "expected seconds above 0"),
        ({"safe_types": "a.b"}, {}, "expected a list"),
        ({"layout": {"modle": "x"}}, {}, "layout names modle"),
        (3, {}, "expected LoadOptions or a mapping"),
    ],
)
def test_what_does_not_fit_raises(options: object, environ: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve_options(options, environ)  # type: ignore[arg-type]
