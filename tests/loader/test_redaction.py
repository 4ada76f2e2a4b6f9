"""Secrets are taken out of paths of every kind, and out of texts."""

from __future__ import annotations

import pytest
from rankload.loader.redaction import redact_path, redact_text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://me:secret@host:8/a{rank}.tar?sig=secret#secret", "https://host:8/a{rank}.tar"),
        ("HTTP://host/<rank>?sig=secret", "HTTP://host/<rank>"),
        ("s3://key:secret@bucket/what?{rank:05d}", "s3://bucket/what?{rank:05d}"),
        ("simplecache::https://a:secret@host/x?sig=secret", "simplecache::https://host/x"),
        ("simplecache::https://a:se@cret@host/x?sig=secret", "simplecache::https://host/x"),
        ("zip://inner?1::https://host/x?sig=secret", "zip://inner?1::https://host/x"),
        ("s3://bucket/me@home/{rank}", "s3://bucket/me@home/{rank}"),
        ("local/a#1/what?{rank}@x", "local/a#1/what?{rank}@x"),
    ],
)
def test_paths(path: str, shown: str) -> None:
    assert redact_path(path) == shown


def test_texts() -> None:
    assert redact_text("see https://u:p@host/x?sig=1 now") == "see https://host/x now"
    assert redact_text("'az://c/x?sig=1', s3://k:s@b/y#z") == "'az://c/x', s3://b/y"
