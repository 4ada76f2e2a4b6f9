"""Making the receipt out of what every rank did."""

from __future__ import annotations

from ..distributed.session import Session
from .check import Checked
from .checkpoint import Checkpoint
from .fetch.whole_checks import NOTHING
from .receipt import FileRecord, Receipt, StageRecord, combine
from .request import LoadRequest
from .saved.ignore import Ignored
from .stages import Stopwatch


def make_receipt(
    request: LoadRequest,
    checkpoint: Checkpoint,
    ignored: Ignored,
    checked: Checked,
    restored: list[str],
    derived: tuple[str, ...],
    notes: list[str],
    session: Session,
    watch: Stopwatch,
) -> Receipt:
    """The same receipt on every rank, from what each rank did."""
    prepared, remote = checked.prepared, checkpoint.opening.remote
    own = {
        "ignored": list(ignored.paths),
        "missing": prepared.mismatch.missing,
        "unexpected": prepared.mismatch.unexpected,
        "renamed": prepared.renamed,
        "cast": prepared.cast,
        "derived": [*derived, *(f"{name} (zeros)" for name in prepared.reset)],
        "not_restored": [] if request.weights_only else list(prepared.not_restored),
        "restored": restored,
        "notes": notes,
        "parts": remote.fetched_by_path(),
        "streamed": remote.streamed,
        "node": session.topology.node_rank,
        "host": session.channel.host,
        "laps": [[lap.stage, lap.seconds, lap.bytes, lap.begin_s] for lap in watch.laps],
        "files": [
            [
                file.name,
                file.size_bytes,
                file.fetched_bytes,
                remote.known.own_bytes(checkpoint.paths.get(file.name, "")),
                file.verified,
                checkpoint.paths.get(file.name, ""),
                *compared(checkpoint, file),
            ]
            for file in checkpoint.files
        ],
    }
    verify = request.options.verify or "during"
    everybody = session.channel.gather("receipt", own)
    # Every rank of a node tells what the node fetched for it; of what came in parts, the rank that fetched knows best.
    parts = {(one["node"], path): count for one in everybody for path, count in one["parts"].items()}
    cost: dict[str, dict[int, int]] = {}
    straight: dict[str, int] = {}
    files: dict[str, FileRecord] = {}
    for one in everybody:
        for name, size, told, own_bytes, verified, path, by, left_out in one["files"]:
            straight[name] = straight.get(name, 0) + own_bytes
            by_node = cost.setdefault(name, {})
            fetched = parts.get((one["node"], path), told)
            by_node[one["node"]] = max(fetched, by_node.get(one["node"], 0))
            known = files.get(name)
            files[name] = FileRecord(
                name,
                size,
                sum(by_node.values()) + straight[name],
                verified and (not known or known.verified),
                tuple(dict.fromkeys((*(known.verified_by if known else ()), *by))) if verify != "off" else (),
                tuple(dict.fromkeys((*(known.not_compared if known else ()), *left_out))),
            )
    streamed = dict.fromkeys(name for one in everybody for name in one["streamed"])
    return Receipt(
        path=checkpoint.name,
        kind=checkpoint.kind,
        layout=checkpoint.contents.layout,
        saved_world_size=checkpoint.saved_world_size,
        world_size=session.topology.world_size,
        n_nodes=session.topology.n_nodes,
        weights_only=request.weights_only,
        verify=verify,
        cache_dir=checkpoint.cache_dir,
        restored=tuple(everybody[0]["restored"]),
        **combine(everybody),
        unverified=tuple(file.name for file in files.values() if verify == "off" or not file.verified),
        notes=(
            *checkpoint.notes,
            *prepared.notes,
            *everybody[0]["notes"],
            *(f"server without ranges: {name} was read as one stream" for name in streamed),
        ),
        files=tuple(files.values()),
        hosts=tuple(one["host"] for one in everybody),
        nodes=tuple(one["node"] for one in everybody),
        stages=tuple(
            StageRecord(rank, stage, seconds, count, begin_s)
            for rank, one in enumerate(everybody)
            for stage, seconds, count, begin_s in one["laps"]
        ),
    )


def compared(checkpoint: Checkpoint, file: FileRecord) -> tuple[list[str], list[str]]:
    """What `file` was compared with by now on this rank, and what it was not."""
    whole = checkpoint.opening.remote.compared(checkpoint.paths.get(file.name, "")) or NOTHING
    return [*file.verified_by, *whole.by], [*file.not_compared, *whole.left_out]
