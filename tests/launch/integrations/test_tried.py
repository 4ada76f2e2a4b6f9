"""Each adapter knows the versions that it was tried with, those that the tests install, and warns of others."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

import pytest
from places import REPOSITORY
from rankload.integrations.versions import warn_of_version

ADAPTERS = {
    "deepspeed": ("deepspeed.py", ("constraints.txt", "constraints-older.txt")),
    "transformers": ("transformers.py", ("constraints-frameworks.txt",)),
    "accelerate": ("accelerate.py", ("constraints-frameworks.txt",)),
    "lightning": ("lightning_home.py", ("constraints-frameworks.txt",)),
    "torchtitan": ("torchtitan.py", ("constraints-frameworks.txt",)),
    "torchdata": ("data.py", ("constraints-frameworks.txt",)),
    "mosaicml": ("composer.py", ("constraints-composer.txt",)),
}
"""Where the versions of a distribution stand, and where the tests pin them."""


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_what_an_adapter_was_tried_with_is_what_the_tests_install(name: str) -> None:
    file, pinned = ADAPTERS[name]
    source = (REPOSITORY / "launch" / "integrations" / file).read_text()
    (line,) = re.findall(r"^TRIED = \((.*)\)$", source, re.MULTILINE)
    tried = re.findall(r'"([^"]+)"', line)
    found = [
        version
        for one in pinned
        for version in re.findall(rf"^{name}==(.*)$", (REPOSITORY / one).read_text(), re.MULTILINE)
    ]
    assert len(found) == len(tried) == len(pinned)
    for version, one in zip(found, tried, strict=True):
        assert version == one or version.startswith(f"{one}.")


def test_another_version_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"near": "5.24.1", "far": "5.240.0"}[name])
    warn_of_version.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_version("near", ("5.24",))
    with pytest.warns(UserWarning, match=r"for far was tried with 4\.9, 5\.24, and 5\.240\.0 is installed"):
        warn_of_version("far", ("4.9", "5.24"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_version("far", ("4.9", "5.24"))
    warn_of_version.cache_clear()


def test_a_distribution_that_is_not_installed_under_its_name_is_no_warning() -> None:
    warn_of_version.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_version("no-such-distribution-of-that-name", ("1",))
