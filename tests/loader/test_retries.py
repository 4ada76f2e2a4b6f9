"""For how long what failed is tried again, on a clock of the test's own, and what is told of it."""

from __future__ import annotations

import errno
import logging
import random
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader import retries
from rankload.loader.errors import AccessError, NotFoundError, RankloadError
from rankload.loader.retries import (
    Attempts,
    Outages,
    Progress,
    TryAgainError,
    Wait,
    until_done,
    waited_s,
    waiting_at_most,
)
from rankload.loader.store_errors import is_expired, outage_in, store_error


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(retries, "_CHANCE", random.Random(0))
    return clock


def down(**more: object) -> TryAgainError:
    return TryAgainError(AccessError("http://h/a: HTTP 503", path="http://h/a"), **more)  # type: ignore[arg-type]


class Server:
    """Work that fails until a time, each attempt taking `takes_s`."""

    def __init__(self, clock: Clock, until: float, takes_s: float = 0.01, **failure: object) -> None:
        self.clock, self.until, self.takes_s, self.failure = clock, clock.now + until, takes_s, failure
        self.asked: list[float] = []

    def __call__(self) -> str:
        self.asked.append(self.clock.now)
        self.clock.sleep(self.takes_s)
        if self.clock.now < self.until:
            raise down(**self.failure)
        return "answer"


def ask(outages: Outages, server: Server) -> str:
    return until_done(outages, "http://h/a", server, lambda: None)


@pytest.mark.parametrize("seconds", [1, 5, 30, 100])
@pytest.mark.parametrize("failure", [{}, {"is_there": False, "origin": "h"}])
def test_an_outage_is_waited_out(seconds: float, failure: dict[str, object], clock: Clock) -> None:
    outages, server = Outages(120.0), Server(clock, seconds, **failure)
    outages.answered("h")
    begin = clock.now
    assert ask(outages, server) == "answer"
    waited = waited_s(outages.waits())
    assert seconds <= clock.now - begin <= seconds + retries.MAX_BACKOFF_S + 0.1
    assert waited == pytest.approx(clock.now - begin)
    assert len(server.asked) < 40 + seconds


def test_patience_ends_with_the_failures_own_error(clock: Clock) -> None:
    server, begin = Server(clock, 1e9), clock.now
    with pytest.raises(AccessError, match=r"HTTP 503 \(after \d+ attempts, \d+ s without progress\)"):
        ask(Outages(20.0), server)
    # The last attempt is made shortly before the end, and not a whole pause before it.
    assert 19 <= clock.now - begin <= 20
    assert server.asked[-1] - begin >= 19


def test_a_server_that_never_answered_is_given_up_soon(clock: Clock) -> None:
    for more, expected in (({}, retries.FIRST_ANSWER_S), ({"lasting": True}, 0.0)):
        begin = clock.now
        with pytest.raises(AccessError):
            ask(Outages(120.0), Server(clock, 1e9, is_there=False, origin="h", **more))
        assert expected - 1 <= clock.now - begin <= expected + 0.1
    # A name that resolved before is an outage where it does not any more.
    outages = Outages(120.0)
    outages.answered("h")
    assert ask(outages, Server(clock, 30, is_there=False, origin="h", lasting=True)) == "answer"
    # No other call's stall time-out is exceeded for it.
    begin = clock.now
    with pytest.raises(AccessError):
        ask(Outages(3.0), Server(clock, 1e9, is_there=False, origin="h"))
    assert clock.now - begin <= 3


def fail(attempts: Attempts) -> None:
    while True:
        attempts.failed(down(), lambda: None)


def test_progress_begins_patience_anew(clock: Clock) -> None:
    outages = Outages(10.0)
    with Attempts(outages, "a") as attempts:
        for _ in range(20):
            clock.sleep(4)
            attempts.failed(down(), lambda: None)
            attempts.moved()
        assert clock.now - 1000 > 80
        with pytest.raises(AccessError, match="503"):
            fail(attempts)
    # Another thread's bytes are progress of the same work.
    outages, progress = Outages(10.0), Progress()
    one, other = Attempts(outages, "a", progress), Attempts(outages, "a", progress)
    for _ in range(10):
        clock.sleep(4)
        one.failed(down(), lambda: None)
        other.moved()


def test_retry_after_is_honoured_as_far_as_patience_goes(clock: Clock) -> None:
    server, begin = Server(clock, 60, after_s=50.0), clock.now
    assert ask(Outages(120.0), server) == "answer"
    assert [after - before >= 50 for before, after in zip(server.asked, server.asked[1:], strict=False)]
    assert len(server.asked) == 3
    # Longer than patience: one last attempt at its end.
    server, begin = Server(clock, 15, after_s=3600.0), clock.now
    assert ask(Outages(20.0), server) == "answer"
    assert clock.now - begin <= 20


def test_what_went_on_without_an_answer_does_not_wait_for_the_next_one(clock: Clock) -> None:
    """A manifest that could not be asked for is noted; its other names are not waited for as long again."""
    outages, begin = Outages(20.0), clock.now
    for _ in range(5):
        with pytest.raises(AccessError):
            ask(outages, Server(clock, 1e9))
    assert clock.now - begin < 21
    ask(outages, Server(clock, 0))
    clock.sleep(500)
    begin = clock.now
    assert ask(outages, Server(clock, 15)) == "answer"


def test_what_a_call_can_do_without_is_not_waited_for_for_long(clock: Clock) -> None:
    outages, begin = Outages(120.0), clock.now
    with waiting_at_most(10):
        with pytest.raises(AccessError):
            ask(outages, Server(clock, 1e9))
        assert 8 < clock.now - begin < 11
        # All of it together, and each is asked for once at least.
        late = Server(clock, 1e9)
        with pytest.raises(AccessError):
            ask(outages, late)
        assert len(late.asked) == 1
        assert clock.now - begin < 11
        assert outages.silence_s(60) == retries.LEAST_SILENCE_S
    assert outages.silence_s(60) == 60
    ask(outages, Server(clock, 0))
    begin = clock.now
    assert ask(outages, Server(clock, 100)) == "answer"


def test_answers_that_end_at_one_byte_are_given_up_soon(clock: Clock) -> None:
    outages, begin = Outages(120.0), clock.now
    ends = iter([7, 7, None, *[7] * 20])
    asked: list[int | None] = []

    def work() -> None:
        asked.append(next(ends))
        raise down(ends_at=asked[-1])

    with pytest.raises(AccessError, match="6 answers in a row ended there"):
        until_done(outages, "a", work, lambda: None)
    assert len(asked) == 3 + retries.SAME_END
    assert clock.now - begin < 30
    # One that comes further each time, or ends elsewhere, is none of them.
    with Attempts(outages, "b") as attempts:
        for number in range(50):
            attempts.failed(down(ends_at=number), lambda: None)
            attempts.moved()
        for number in range(2, 12):
            attempts.failed(down(ends_at=number % 2 + 1), lambda: None)


def test_an_answer_of_any_kind_ends_it(clock: Clock) -> None:
    failing = iter([down(), NotFoundError("gone")])

    def work() -> None:
        raise next(failing)

    outages = Outages(20.0)
    with pytest.raises(NotFoundError, match="gone"):
        until_done(outages, "a", work, lambda: None)


def test_pauses_are_ended_by_the_caller(clock: Clock) -> None:
    calls: list[float] = []

    def idle() -> None:
        calls.append(clock.now)
        if len(calls) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        until_done(Outages(120.0), "a", Server(clock, 1e9, after_s=100.0), idle)
    assert clock.now - 1000 < 1


def test_waits_are_logged_from_five_seconds_on(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rankload"):
        ask(Outages(120.0, who="rank 3"), Server(clock, 2))
        assert not caplog.records
        ask(Outages(120.0, who="rank 3"), Server(clock, 31))
    said = [record.getMessage() for record in caplog.records]
    # Each time that it has doubled, and at the end.
    assert [text.split(" s for ")[0] for text in said[:-1]] == [f"rank 3 has waited {n}" for n in (5, 10, 20)]
    assert said[0] == (
        "rank 3 has waited 5 s for http://h/a, and waits on, for 120 s without progress at most: http://h/a: HTTP 503"
    )
    assert said[-1].startswith("rank 3 waited 3")


def test_a_silence_is_a_wait_too(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    outages = Outages(120.0)
    with caplog.at_level(logging.WARNING, "rankload"), Attempts(outages, "a") as attempts:
        for _ in range(14):
            clock.sleep(0.5)
            attempts.quiet()
        attempts.moved()
        clock.sleep(0.5)
        attempts.quiet()
        attempts.moved()
    assert [wait.seconds for wait in outages.waits()] == [7.0]
    assert "nothing comes" in caplog.text


def test_a_wait_that_is_under_way_is_counted(clock: Clock) -> None:
    outages = Outages(120.0)
    attempts = Attempts(outages, "a")
    clock.sleep(2)
    attempts.failed(down(after_s=3.0), lambda: None)
    assert waited_s(outages.waits()) >= 5
    attempts.close()
    attempts.close()
    assert len(outages.waits()) == 1


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=12))
def test_seconds_are_counted_once(spans: list[tuple[int, int]]) -> None:
    waits = [Wait(float(begin), float(length), "") for begin, length in spans]
    assert waited_s(waits) == len(
        {second for begin, length in spans for second in range(begin, begin + length)}
    )


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class ClientResponseError(Exception):
    """As aiohttp's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='x'")
        self.status = status


class ServerDisconnectedError(Exception):
    """As aiohttp's."""


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class ObjectStoreTransientError(RuntimeError):
    """As Composer's."""


class AuthenticationException(type("SSHException", (Exception,), {})):  # type: ignore[misc]
    """As paramiko's."""


OUTAGES: dict[str, tuple[Exception, bool | None]] = {
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
    "reset": (ConnectionResetError(errno.ECONNRESET, "reset"), True),
    "no route": (OSError(errno.EHOSTUNREACH, "no route"), False),
    "time-out": (TimeoutError("x"), False),
    "ended": (EOFError(), True),
    "503": (ClientResponseError(503), True),
    "429": (ClientResponseError(429), True),
    "disconnected": (ServerDisconnectedError(), True),
    "fsspec's http, refused": (raised_from(FileNotFoundError("u"), ConnectionRefusedError()), False),
    "fsspec's http, 503": (raised_from(FileNotFoundError("u"), ClientResponseError(503)), True),
    "s3fs, SlowDown": (raised_from(OSError(errno.EBUSY, "x"), ClientError("SlowDown", 503)), True),
    "transient": (ObjectStoreTransientError("x"), True),
    "404": (raised_from(FileNotFoundError("u"), ClientResponseError(404)), None),
    "403": (raised_from(PermissionError("u"), ClientError("AccessDenied", 403)), None),
    "not there": (FileNotFoundError(errno.ENOENT, "u"), None),
    "wrong key": (AuthenticationException("x"), None),
    "certificate": (
        raised_from(type("ServiceRequestError", (Exception,), {})("x"), ssl.SSLCertVerificationError("x")),
        None,
    ),
    "disk full": (OSError(errno.ENOSPC, "x"), None),
    "ours": (NotFoundError("x"), None),
    "any": (ValueError("x"), None),
}


@pytest.mark.parametrize("name", OUTAGES)
def test_outages_of_other_backends(name: str) -> None:
    error, is_there = OUTAGES[name]
    found = outage_in(error)
    assert (None if found is None else found.is_there) == is_there
    mapped = store_error(error, "s3://b/a")
    assert isinstance(mapped, RankloadError)
    assert isinstance(mapped, NotFoundError) == (name in ("404", "not there", "ours"))


def test_expired_credentials() -> None:
    assert is_expired(raised_from(PermissionError("x"), ClientError("ExpiredToken", 400)))
    assert not is_expired(raised_from(PermissionError("x"), ClientError("AccessDenied", 403)))


def test_the_default_is_the_options() -> None:
    from rankload.loader.options import resolve_options

    assert Outages().stall_timeout_s == resolve_options(None).stall_timeout_s
