from __future__ import annotations

import json
import logging
from dataclasses import fields
from typing import Any

import pytest
from places import DATA
from rankload.loader.errors import OptionError
from rankload.loader.fetch.tally import FetchedAgain
from rankload.loader.journey import LoadResult
from rankload.loader.receipt import (
    FileRecord,
    FileReport,
    RankReport,
    Receipt,
    StageRecord,
    join_reports,
    log_receipt,
)
from rankload.loader.request import check_logger
from rankload.loader.retries import Wait
from rankload.loader.stages import Timing
from rankload.loader.wire import decode, encode


def receipt(**changes: Any) -> Receipt:
    given: dict[str, Any] = {
        "path": "s3://bucket/ep1-rank{rank}.tar",
        "kind": "composer-zero",
        "layout": "deepspeed",
        "saved_world_size": 2,
        "world_size": 2,
        "n_nodes": 1,
        "weights_only": False,
        "verify": "during",
        "restored": ("model (3 entries, 1,200 bytes)", "optimizer AdamW (2,400 bytes)"),
        "renamed": {"module.w": "w"},
        "files": (FileRecord("a", 1000, 1000, True), FileRecord("b", 500, 500, True)),
        "stages": (StageRecord(0, "fetch", 1.5, 1500), StageRecord(1, "fetch", 1.0, 0)),
    }
    return Receipt(**{**given, **changes})


def test_as_dict_is_json() -> None:
    found = json.loads(json.dumps(receipt().as_dict()))
    assert found["files"][0] == {
        "name": "a",
        "size_bytes": 1000,
        "fetched_bytes": 1000,
        "verified": True,
        "verified_by": [],
        "not_compared": [],
    }
    assert found["renamed"] == {"module.w": "w"}


def test_three_lines_say_what_happened() -> None:
    first, second, third = receipt().lines()
    assert "composer-zero" in first
    assert "saved by 2 ranks" in first
    assert "optimizer AdamW" in first
    assert "2 files, 1,500 bytes, 1,500 bytes fetched; 1.50 s" in second
    assert "1 renamed" in third
    assert "every byte compared" in third
    assert "not verified: b" in receipt(unverified=("b",)).lines()[2]


def test_print_shows_the_lines_and_names_what_was_not_restored() -> None:
    told = receipt(
        not_restored=("state/schedulers/StepLR", "state/scaler"),
        missing=tuple(f"w{index}" for index in range(25)),
        cast={"w": "float32 -> bfloat16"},
    )
    lines = str(told).splitlines()
    assert tuple(lines[:3]) == told.lines()
    assert lines[3] == "not restored: state/schedulers/StepLR, state/scaler"
    assert lines[4].startswith("missing in the checkpoint: w0, w1, ")
    assert lines[4].endswith(", w19 and 5 more")
    assert lines[5:] == ["cast: w (float32 -> bfloat16)"]
    assert str(receipt()).splitlines() == list(receipt().lines())
    assert str(LoadResult(None, told, {})) == str(told)


def test_one_of_a_kind_is_told_in_the_singular() -> None:
    one = receipt(saved_world_size=1, world_size=1, files=(FileRecord("a", 1, 1, True),))
    assert "saved by 1 rank; on 1 rank, 1 node)" in one.lines()[0]
    assert one.lines()[1].startswith("1 file, 1 byte, 1 byte fetched; ")


def test_the_json_is_the_golden_one() -> None:
    """What readers of the JSON go by: a key that goes, or changes its meaning, needs a new `SCHEMA_VERSION`."""
    every_field = Receipt(
        path="s3://bucket/ep1-rank{rank}.tar",
        kind="composer-zero",
        layout="deepspeed",
        saved_world_size=4,
        world_size=2,
        n_nodes=1,
        weights_only=True,
        verify="during",
        cache_dir="/dev/shm/rankload-1000/job",
        restored=("model (3 entries, 1,200 bytes)", "optimizer AdamW (2,400 bytes)"),
        ignored=("state/model/head.weight",),
        missing=("state/model/new.bias",),
        unexpected=("state/model/old.bias",),
        renamed={"module.w": "w"},
        cast={"w": "float32 -> bfloat16"},
        derived=("rng of rank 1",),
        unverified=("s3://bucket/b",),
        not_restored=("state/scaler",),
        notes=("resharded from 4 ranks to 2 ranks",),
        files=(
            FileRecord("s3://bucket/a", 1000, 900, True, ("zip CRC-32",), ("md5 of the store: in parts",)),
            FileRecord("s3://bucket/b", 500, 500, False),
        ),
        fetched_again=(FetchedAgain("s3://bucket/a", 400, "storage data/0 has another CRC-32"),),
        stages=(StageRecord(0, "fetch", 1.5, 1500, 2.0), StageRecord(1, "fetch", 0.5, 0, 2.25)),
        hosts=("node-a", "node-a"),
        nodes=(0, 0),
        waited_s=2.5,
    )
    unset = Receipt("", "", "", None, 0, 0, False, "")
    assert not [
        one.name for one in fields(Receipt) if getattr(every_field, one.name) == getattr(unset, one.name)
    ]
    assert every_field.as_dict() == json.loads((DATA / "receipt.json").read_text())


def test_loggers(caplog: pytest.LogCaptureFixture) -> None:
    class Metrics:
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float]) -> None:
            self.seen = metrics

    class Hyperparameters:
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def log_hyperparameters(self, parameters: dict[str, float]) -> None:
            self.seen = parameters

    with caplog.at_level(logging.INFO):
        log_receipt(receipt(), logging.getLogger("mine"))
        assert [record.name for record in caplog.records] == ["mine"] * 3
        caplog.clear()
        log_receipt(receipt(), None)
        assert [record.name for record in caplog.records] == ["rankload"] * 3
    for logger in (Metrics(), Hyperparameters()):
        log_receipt(receipt(), logger)
        assert logger.seen["rankload/seconds/fetch"] == 1.5
        assert logger.seen["rankload/fetched_bytes"] == 1500
        check_logger(logger)
    with pytest.raises(OptionError, match=r"expected a logging\.Logger"):
        check_logger(object())


def report(**fields: Any) -> RankReport:
    nothing: tuple[str, ...] = ()
    blank: dict[str, Any] = dict.fromkeys(
        ("restored", "ignored", "missing", "unexpected", "derived", "not_restored", "notes", "streamed"),
        nothing,
    )
    empty: dict[str, Any] = {"renamed": {}, "cast": {}, "fetched_in_parts": {}, "timings": (), "files": ()}
    return RankReport(**{"node": 0, "host": "h", **blank, **empty, **fields})


def test_what_ranks_differ_in_is_united_in_the_order_of_ranks() -> None:
    reports = [
        report(
            restored=("model",),
            missing=("a", "b"),
            renamed={"module.w": "w"},
            cast={"w": "float32 -> bfloat16"},
            notes=("n",),
            timings=(Timing("fetch", 1.5, 10, 2.0),),
        ),
        report(
            restored=("model, another part",),
            missing=("b", "c"),
            unexpected=("x",),
            derived=("rng of rank 1",),
            cast={"v": "i", "w": "j"},
            streamed=("s",),
            node=1,
            host="i",
        ),
    ]
    found = join_reports(
        [decode(RankReport, json.loads(json.dumps(encode(one)))) for one in reports], receipt()
    )
    assert (found.missing, found.unexpected, found.ignored) == (("a", "b", "c"), ("x",), ())
    assert (found.derived, found.not_restored) == (("rng of rank 1",), ())
    assert found.renamed == {"module.w": "w"}
    assert found.cast == {"w": "float32 -> bfloat16", "v": "i"}
    assert found.restored == ("model",)
    assert found.notes[-2:] == ("n", "server without ranges: s was read as one stream")
    assert (found.hosts, found.nodes) == (("h", "i"), (0, 1))
    assert found.stages == (StageRecord(0, "fetch", 1.5, 10, 2.0),)


def test_bytes_of_a_file_are_those_of_each_node_and_each_rank_once() -> None:
    def known(fetched: int, own: int, *, verified: bool = True) -> tuple[FileReport, ...]:
        return (FileReport("f", "/f", 100, fetched, own, verified, ("zip CRC-32",), ()),)

    reports = [
        report(files=known(40, 0), fetched_in_parts={"/f": 60}),
        report(files=known(40, 5)),
        report(files=known(70, 0, verified=False), node=1),
    ]
    about = receipt(verify="during", notes=())
    (file,) = join_reports(reports, about).files
    # Node 0 fetched 60 in parts, as its leader counted them; node 1 the whole 70; and rank 1 another 5 directly.
    assert file == FileRecord("f", 100, 60 + 70 + 5, verified=False, verified_by=("zip CRC-32",))
    assert join_reports(reports, about).unverified == ("f",)
    assert join_reports(reports[:2], receipt(verify="off")).files[0].verified_by == ()


def test_waits_of_all_ranks_count_once() -> None:
    """Rank 0 waited twice, rank 1 meanwhile; rank 2 not at all."""

    def of(rank: int, *waits: Wait) -> RankReport:
        return report(host=f"h{rank}", waits=waits)

    busy, cut = Wait(100.0, 5.0, "http://h/a: HTTP 503"), Wait(110.0, 1.0, "http://h/b: ended early")
    joined = join_reports([of(0, busy, cut), of(1, Wait(103.0, 4.0, "http://h/a: reset")), of(2)], receipt())
    assert joined.waited_s == 8.0
    assert joined.notes[-2:] == (
        "rank 0 waited 6.0 s for the store: http://h/a: HTTP 503",
        "rank 1 waited 4.0 s for the store: http://h/a: reset",
    )
    assert "; waited 8.0 s for the store" in joined.lines()[1]
    assert joined.metrics()["rankload/waited_seconds"] == 8.0
    many = join_reports([of(rank, Wait(0.0, rank + 1.0, "x")) for rank in range(12)], receipt())
    assert len([note for note in many.notes if "waited" in note]) == 9
    assert many.notes[-1] == "4 more ranks waited for the store, for 4.0 s at most"
