"""Names of objects: what is a URL's query stays as it is, and is no part of the name."""

from __future__ import annotations

import pytest
from rankload.loader.errors import UnsafeError
from rankload.loader.stores.names import (
    child_of,
    file_name,
    folder_of,
    has_query,
    path_of,
    url_link_targets,
    with_suffix,
    without_slash,
)

QUERY = "?X-Sig=a%2Fb%2Bc%3D~+&name=x/y.pt#part"
URL = f"https://host//a%20b/run%2F1.pt{QUERY}"


def test_what_is_made_of_a_url_keeps_its_query_to_the_letter() -> None:
    assert path_of(URL) == "//a b/run/1.pt"
    assert (file_name(URL), has_query(URL)) == ("1.pt", True)
    assert with_suffix(URL, ".symlink") == f"https://host//a%20b/run%2F1.pt.symlink{QUERY}"
    assert folder_of(URL) == f"https://host//a%20b{QUERY}"
    assert (
        child_of(URL, "step #3?/100%.pt") == f"https://host//a%20b/run%2F1.pt/step%20%233%3F/100%25.pt{QUERY}"
    )
    assert without_slash(f"https://host/run/{QUERY}") == f"https://host/run{QUERY}"
    assert child_of("HTTP://host", "a.pt") == "HTTP://host/a.pt"


@pytest.mark.parametrize("name", ["/data/run#1/100%?.pt", "bucket/run#1/100%?.pt", "/100%?.pt"])
def test_in_other_names_nothing_is_special(name: str) -> None:
    assert (path_of(name), file_name(name), has_query(name)) == (name, "100%?.pt", False)
    assert with_suffix(name, ".sha256") == f"{name}.sha256"
    assert child_of(folder_of(name), "x y") == name.replace("100%?.pt", "x y")
    assert not has_query("https://host/a.pt#?")


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("b.pt", ["https://h/d/b.pt?s=%2F", "https://h/b.pt?s=%2F"]),
        ("/d/b.pt", ["https://h/d/b.pt?s=%2F"]),
        ("run #1/b:c.pt", ["https://h/d/run%20%231/b%3Ac.pt?s=%2F", "https://h/run%20%231/b%3Ac.pt?s=%2F"]),
        ("a%20b", ["https://h/d/a%2520b?s=%2F", "https://h/a%2520b?s=%2F", "https://h/d/a%20b?s=%2F",
                   "https://h/a%20b?s=%2F"]),
        ("https://H/x?y", ["https://H/x?y"]),
    ],
)  # fmt: skip
def test_links_at_urls(text: str, targets: list[str]) -> None:
    assert url_link_targets("https://h/d/a.symlink?s=%2F", text) == targets


def test_a_link_at_a_url_leads_to_no_other_server() -> None:
    with pytest.raises(UnsafeError, match="another server"):
        url_link_targets("https://h/a.symlink", "https://h.example/b")
