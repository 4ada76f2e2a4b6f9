"""What others chose reaches no terminal and no log as it is: it could move the cursor, or forge a line."""

from __future__ import annotations

import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.distributed.errors import PeerError, RankloadError, from_record, to_record
from rankload.distributed.printable import Lines, package_logger, printable, warn

HOSTILE = "w\x1b]0;owned\x07\x9b2J\nrestored: all\r\u202eeno\u2028\udcff"
ESCAPED = "w\\x1b]0;owned\\x07\\x9b2J\\nrestored: all\\r\\u202eeno\\u2028\\udcff"


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in text)


@given(st.text(st.characters()), st.text(st.characters()))
def test_no_message_holds_what_could_change_a_terminal(message: str, host: str) -> None:
    error = RankloadError(message, rank=0, host=host)
    assert is_harmless(str(error))
    error.message += host
    assert is_harmless(str(error))
    back = from_record(to_record(error))
    assert str(back) == str(error)
    assert printable(printable(message)) == printable(message)


def test_what_is_for_the_eye_stays_and_the_rest_is_written_out() -> None:
    assert printable("s3://b/größe 重み.pt: 'a' \\ \u200b") == "s3://b/größe 重み.pt: 'a' \\ \u200b"
    assert printable(HOSTILE) == ESCAPED


def test_lines_are_ours_alone() -> None:
    error = PeerError(Lines(["first", f"  {HOSTILE}"]), rank=1, host=HOSTILE)
    assert str(error) == f"first\n  {ESCAPED} [met by rank 1, host {ESCAPED}]"
    error.message += f"; {HOSTILE}"
    assert error.message == f"first\n  {ESCAPED}; {ESCAPED}"
    assert from_record(to_record(error)).message == error.message


def test_logs_and_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rankload"):
        package_logger().info("read %s of %d after %s", HOSTILE, 3, OSError(HOSTILE))
    assert caplog.messages == [f"read {ESCAPED} of 3 after {ESCAPED}"]
    with pytest.warns(UserWarning, match="no place") as told:
        warn(f"no place for {HOSTILE}")
    assert str(told[0].message) == f"no place for {ESCAPED}"
    assert told[0].filename == __file__
