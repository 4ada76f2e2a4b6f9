"""Making the receipt out of what every rank did."""

from __future__ import annotations

from ..distributed.session import Session
from .arguments import LoadRequest
from .check import Checked
from .checkpoint import Checkpoint
from .ignore import Ignored
from .receipt import FileRecord, Receipt, StageRecord, combine
from .stopwatch import Stopwatch
from .whole_checks import NOTHING


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
    prepared = checked.prepared
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
        "node": session.topology.node_rank,
        "host": session.channel.host,
        "laps": [[lap.stage, lap.seconds, lap.bytes, lap.begin_s] for lap in watch.laps],
        "files": [
            [
                file.name,
                file.size_bytes,
                *fetched_bytes(checkpoint, file),
                file.verified,
                *compared(checkpoint, file),
            ]
            for file in checkpoint.files
        ],
    }
    verify = request.options.verify or "during"
    everybody = session.channel.gather("receipt", own)
    # Every rank of a node tells what the node fetched for it.
    cost: dict[str, dict[int, int]] = {}
    straight: dict[str, int] = {}
    files: dict[str, FileRecord] = {}
    for one in everybody:
        for name, size, fetched, own_bytes, verified, by, left_out in one["files"]:
            straight[name] = straight.get(name, 0) + own_bytes
            by_node = cost.setdefault(name, {})
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
        notes=(*checkpoint.notes, *prepared.notes, *everybody[0]["notes"]),
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


def fetched_bytes(checkpoint: Checkpoint, file: FileRecord) -> tuple[int, int]:
    """What this node fetched of `file` by now, on the rank that did, and what this rank read for itself alone."""
    remote, path = checkpoint.opening.remote, checkpoint.paths.get(file.name, "")
    by_parts = remote.fetched_bytes(path)
    return file.fetched_bytes if by_parts is None else by_parts, remote.own_bytes(path)
