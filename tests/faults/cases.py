"""Every case of the matrix as data: journey, stage, role and fault, what is promised, and what cannot happen.

`ALL` has the cases, `IMPOSSIBLE` what is left out and why, `CORE` those that `make test` runs: one for each kind of
promise. What a case means is in `lane`; here is nothing but values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from faulty_store import StoreFault
from injector import JOINING, LEAVING

STALL_TIMEOUT_S = 5.0
"""Of cases in which something stalls."""
LONG_STALL_TIMEOUT_S = 30.0
"""Of all others, as long as everything moves: what is dead must be told from what stalls."""
DEATH_S = 10.0
STALL_S = STALL_TIMEOUT_S + 5.0
NO_ANSWER_S = 15.0
SOON_S = 10.0
"""For errors that nobody has to wait for, and for loads that go on as if nothing had been."""
WATCHDOG = 75


@dataclass(frozen=True)
class Role:
    """Who has the fault: two nodes of two ranks."""

    name: str
    ranks: tuple[int, ...]
    node: int


LEADER = Role("leader", (0,), 0)
FOLLOWER = Role("follower", (1,), 0)
OTHER_LEADER = Role("other node's leader", (2,), 1)
OTHER_FOLLOWER = Role("other node's follower", (3,), 1)
EVERY_ROLE = (LEADER, FOLLOWER, OTHER_LEADER, OTHER_FOLLOWER)
ALL_RANKS = Role("all", (0, 1, 2, 3), 0)


@dataclass(frozen=True)
class Promise:
    """What every rank must do in a case."""

    text: str
    errors: frozenset[str] = frozenset()
    """One of these on every rank that can raise, the same on all; none: the journey comes to its end."""
    within_s: float = SOON_S
    """After the fault has fired."""
    names_rank: bool = False
    """Whether the message, or what a watchdog prints, names the rank that has the fault."""
    words: tuple[str, ...] = ()
    """What the message holds besides."""
    partial: bool = False
    """Whether a `PartialRestoreError` is right, and only where a rank was changed: the restore may have begun. Without
    it nothing may be changed."""
    keeps_cause: bool = False
    """Whether the rank that raised has its own exception as the cause."""
    watchdog: bool = False
    """Whether a rank that waits in native code may end with the exit code of the watchdog instead."""
    either: bool = False
    """Whether a rank may come to its end although others raise: nothing can be agreed on after the last agreement."""


@dataclass(frozen=True)
class Stage:
    """A stage of a journey: its name here, and the agreements that it is, as a pattern."""

    name: str
    pattern: str
    moved: bool = False
    changed: bool = False
    """Whether ranks may have been changed when it begins."""


@dataclass(frozen=True)
class Case:
    """One fault in one journey."""

    journey: str
    """A key of `rank_worker.JOURNEYS`."""
    source: str
    """What it reads or writes: a key of `lane.SOURCES`."""
    stage: Stage
    role: Role
    fault: str
    promise: Promise
    store: StoreFault | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    needs_nodes: bool = False
    """Whether it needs real nodes: a network, or a disk, of each one's own."""
    restarted: bool = False
    """Whether torchrun's agents start the ranks again."""

    @property
    def name(self) -> str:
        return f"{self.title} / {self.stage.name} / {self.role.name} / {self.fault}"

    @property
    def stall_timeout_s(self) -> float:
        joins = self.stage.pattern == JOINING and not self.restarted
        stalls = self.fault == "SIGSTOP" or self.store is not None or joins
        return STALL_TIMEOUT_S if stalls else LONG_STALL_TIMEOUT_S

    @property
    def title(self) -> str:
        how = "".join(f", {key}={value}" for key, value in self.options.items() if key in ("mode", "verify"))
        launcher = ", torchrun's agents" if self.restarted else ""
        return f"{self.journey} {SOURCE_WORDS[self.source]}".strip() + how + launcher


@dataclass(frozen=True)
class Impossible:
    """Cases that cannot happen."""

    what: str
    why: str


SOURCE_WORDS = {
    "http": "over HTTP",
    "local": "of a local file",
    "engine folder": "of a DeepSpeed folder",
    "runs": "of a folder of runs",
    "file": "",
    "folder": "",
}

# --- what is promised ----------------------------------------------------------------------------------------------

NOTHING_CHANGED = "nothing is changed"
SAID = "where a rank was changed, a PartialRestoreError that says what"
RESTORES = Promise("restores, bit for bit, on every rank")
ENDS_WELL = Promise("comes to its end")
RAISED = Promise(
    f"the same error on every rank, with the exception as its cause; {NOTHING_CHANGED}",
    frozenset({"RankloadError"}),
    names_rank=True,
    words=("InjectedError",),
    keeps_cause=True,
)
DEAD = Promise(
    f"PeerError on every other rank, within {DEATH_S:.0f} s; {NOTHING_CHANGED}",
    frozenset({"PeerError"}),
    DEATH_S,
    names_rank=True,
)
STOPPED = Promise(
    f"StalledError on every other rank, within stall_timeout_s + 5 s; {NOTHING_CHANGED}",
    frozenset({"StalledError"}),
    STALL_S,
    names_rank=True,
)
GONE_BEFORE_JOINING = Promise(
    f"PeerError or StalledError that names who has not joined; {NOTHING_CHANGED}",
    frozenset({"PeerError", "StalledError"}),
    STALL_S,
    names_rank=True,
)


def begun(promise: Promise) -> Promise:
    """The same where the restore has begun: all say so."""
    return replace(
        promise, text=promise.text.replace(NOTHING_CHANGED, SAID), partial=True,
    )  # fmt: skip


def collective(promise: Promise) -> Promise:
    """The same where ranks wait in collectives, which nothing interrupts."""
    return replace(
        promise, text=f"{promise.text}; or exit code {WATCHDOG} and the cause on stderr", watchdog=True
    )


OF_PROCESSES = {
    "raises": RAISED,
    "SIGKILL": DEAD,
    "SIGSTOP": STOPPED,
    "sys.exit(0)": DEAD,
    "os._exit(0)": DEAD,
    "clock": RESTORES,
}
"""What a fault of a process must lead to in a load, before the restore."""

# --- faults of processes -------------------------------------------------------------------------------------------

LOAD = (
    Stage("joining", JOINING),
    Stage("places", "topology"),
    Stage("arguments", "same arguments"),
    Stage("opening", "open"),
    Stage("locating", "locate"),
    Stage("fetching indexes", "fetch first"),
    Stage("reading", "read"),
    Stage("check", "check"),
    Stage("fetching parts", "fetch parts: room"),
    Stage("restore", "restore", moved=True, changed=True),
    Stage("checksums", "checksums agree", changed=True),
    Stage("receipt", "receipt", changed=True),
)
TWO_ROLES = ("sys.exit(0)", "os._exit(0)", "clock")
"""Tried at the two ranks that have least in common: to the others they are an error like any, or a death like any."""
FEW = ("fetching indexes", "restore", "receipt")
"""Where `os._exit(0)` is tried: it is a SIGKILL with another exit code."""


def process_cases(
    journey: str,
    source: str,
    stages: Sequence[Stage],
    faults: Sequence[str],
    *,
    ends_well: Promise = RESTORES,
    collectives: bool = False,
    roles: Sequence[Role] = EVERY_ROLE,
    options: dict[str, Any] | None = None,
) -> Iterator[Case]:
    for stage in stages:
        for fault in faults:
            if fault == "os._exit(0)" and stage.name not in FEW:
                continue
            if fault in TWO_ROLES and len(roles) > 2:
                roles_of_fault: Sequence[Role] = (LEADER, OTHER_FOLLOWER)
            else:
                roles_of_fault = roles
            promise = ends_well if fault == "clock" else OF_PROCESSES[fault]
            if stage.pattern == JOINING and fault in ("SIGKILL", "SIGSTOP", "os._exit(0)"):
                promise = GONE_BEFORE_JOINING
            if stage.pattern == JOINING and fault in ("raises", "sys.exit(0)"):
                # It fails before the others can hear of it.
                promise = replace(GONE_BEFORE_JOINING, keeps_cause=fault == "raises")
            if stage.changed and fault != "clock":
                promise = begun(promise)
            if collectives and fault != "clock":
                promise = collective(promise)
            for role in roles_of_fault:
                yield Case(journey, source, stage, role, fault, promise, options=options or {})


LEAVES = Stage("leaving", LEAVING, changed=True)
LAST_WORD = Promise(
    "every rank ends: restored bit for bit where it had read the last outcome, else by a PartialRestoreError",
    frozenset({"PartialRestoreError"}),
    NO_ANSWER_S,
    partial=True,
    either=True,
)
LEFT_BEHIND = replace(RESTORES, text="the others restore, and do not wait for it for long")
ALL_FAULTS = ("raises", "SIGKILL", "SIGSTOP", "sys.exit(0)", "os._exit(0)", "clock")
DEADLY = ("raises", "SIGKILL", "SIGSTOP")

OF_LOADS = (
    *process_cases("load", "http", LOAD, ALL_FAULTS),
    *process_cases(
        "load", "http", [Stage("fetching parts", "fetch parts: room")], DEADLY, options={"mode": "job"}
    ),
    *process_cases(
        "load", "http", [Stage("fetching parts", "fetch parts: room")], DEADLY, options={"mode": "direct"}
    ),
    *process_cases(
        "load into an engine",
        "engine folder",
        [Stage("reading", "read.*"), Stage("restore", "restore", moved=True, changed=True)],
        ("raises", "SIGKILL", "SIGSTOP", "sys.exit(0)"),
        roles=(LEADER, OTHER_FOLLOWER),
    ),
    *process_cases(
        "load into an engine",
        "engine folder",
        [Stage("finish (DeepSpeed's collectives)", "finish", changed=True)],
        ("raises", "SIGKILL", "SIGSTOP", "sys.exit(0)"),
        collectives=True,
    ),
    *(
        Case("load", "http", LEAVES, role, fault, LAST_WORD if role is LEADER else LEFT_BEHIND)
        for role in EVERY_ROLE
        for fault in ("SIGKILL", "SIGSTOP")
    ),
)
OF_RESUMES = tuple(
    process_cases(
        "autoresume",
        "runs",
        [
            Stage("joining", JOINING),
            Stage("finding", "find checkpoints"),
            # Not 'read': rank 0 reads by itself, too, to prove a checkpoint, and what it cannot read it passes over.
            Stage("check", "check"),
            Stage("restore", "restore", moved=True, changed=True),
        ],
        ("raises", "SIGKILL", "SIGSTOP", "clock"),
        roles=(LEADER, OTHER_FOLLOWER),
    )
)
OF_SAVES = (
    *process_cases(
        "save",
        "file",
        [
            Stage("joining", JOINING),
            Stage("check", "check"),
            Stage("random states", "gather rng"),
            Stage("gather", "gather"),
        ],
        ("raises", "SIGKILL", "SIGSTOP", "sys.exit(0)", "clock"),
        ends_well=ENDS_WELL,
        roles=(LEADER, OTHER_FOLLOWER),
    ),
    *process_cases(
        "save",
        "file",
        [Stage("write", "write", moved=True)],
        ("raises", "SIGKILL", "SIGSTOP"),
        roles=(LEADER,),
    ),
    *process_cases(
        "save of shards", "file", [Stage("gather (FSDP's collectives)", "gather")], DEADLY, collectives=True
    ),
    *process_cases(
        "save of an engine",
        "folder",
        [Stage("engine (DeepSpeed's collectives)", "engine")],
        DEADLY,
        collectives=True,
    ),
    *process_cases(
        "save of an engine",
        "folder",
        [
            Stage("sums", "sums"),
            Stage("manifest", "manifest"),
            Stage("names", "names"),
            Stage("latest", "latest"),
        ],
        DEADLY,
        roles=(LEADER, OTHER_LEADER),
    ),
)
NO_EXPORT = "what stands there is no export"
ALONE = Role("the process", (0,), 0)
WRITING = Stage("fetching and writing", "fetch .*safetensors.*")
OF_EXPORTS = (
    Case(
        "export",
        "http",
        WRITING,
        ALONE,
        "raises",
        Promise(f"the exception; {NO_EXPORT}", frozenset({"RankloadError", "InjectedError"})),
    ),
    Case("export", "http", WRITING, ALONE, "SIGKILL", Promise(NO_EXPORT)),
    Case("export", "http", WRITING, ALONE, "clock", ENDS_WELL),
    Case(
        "export",
        "http",
        WRITING,
        ALONE,
        "full disk",
        Promise(f"AccessError; {NO_EXPORT}", frozenset({"AccessError"})),
        needs_nodes=True,
    ),
)

# --- faults of stores ----------------------------------------------------------------------------------------------

FROM_THE_START = Stage("locating", "")
STORE_STAGES = (
    FROM_THE_START,
    # Bytes are wrong from there on: those of the parts too, which are read while others are restored.
    Stage("fetching indexes", "fetch first", changed=True),
    Stage("fetching parts", "fetch parts: room", changed=True),
)
BOTH_NODES = Role("both nodes", (0,), 0)
NODE_A = Role("leader's node", (0,), 0)
NODE_B = Role("other node", (0,), 1)

OUTAGE = Promise(
    f"AccessError or StalledError within stall_timeout_s + 5 s; {NOTHING_CHANGED}",
    frozenset({"AccessError", "StalledError"}),
    STALL_S,
    words=("big.pt",),
)
NEVER_ANSWERED = Promise(
    f"AccessError within {NO_ANSWER_S:.0f} s; {NOTHING_CHANGED}",
    frozenset({"AccessError"}),
    NO_ANSWER_S,
    words=("big.pt",),
)
SILENT = Promise(
    f"StalledError within stall_timeout_s + 5 s; {NOTHING_CHANGED}",
    frozenset({"StalledError"}),
    STALL_S,
    words=("big.pt",),
)
REFUSED = Promise(f"AccessError at once; {NOTHING_CHANGED}", frozenset({"AccessError"}), words=("big.pt",))
MISSING = Promise(
    f"NotFoundError at once; {NOTHING_CHANGED}", frozenset({"NotFoundError"}), words=("big.pt",)
)
DAMAGED = Promise(f"CorruptError; {NOTHING_CHANGED}", frozenset({"CorruptError"}), STALL_S, words=("big.pt",))
UNUSABLE = Promise(
    f"CorruptError, AccessError or StalledError within stall_timeout_s + 5 s; {NOTHING_CHANGED}",
    frozenset({"CorruptError", "AccessError", "StalledError"}),
    STALL_S,
    words=("big.pt",),
)
OF_STORES = {
    "refuses": OUTAGE,
    "stalls": SILENT,
    "resets": OUTAGE,
    "500": OUTAGE,
    "503": OUTAGE,
    "403": REFUSED,
    "loses": MISSING,
    "shrinks": DAMAGED,
    "changes": DAMAGED,
    "cuts": UNUSABLE,
    "overstates": UNUSABLE,
    "flips": DAMAGED,
}
STORE_WORDS = {
    "refuses": "refuses connections",
    "stalls": "accepts and never answers",
    "resets": "resets connections",
    "500": "answers 500",
    "503": "answers 503",
    "403": "answers 403",
    "loses": "answers 404",
    "shrinks": "has half the object",
    "changes": "has another object",
    "cuts": "cuts bodies short",
    "overstates": "tells wrong lengths",
    "flips": "flips a bit of each body",
}
SHORT_S = 2.0


def store_cases() -> Iterator[Case]:
    for kind in ("stalls", "503", "403", "loses", "shrinks", "changes", "flips"):
        yield Case(
            "export", "http", WRITING, BOTH_NODES, STORE_WORDS[kind],
            replace(OF_STORES[kind], text=OF_STORES[kind].text.replace(NOTHING_CHANGED, NO_EXPORT)),
            StoreFault(kind, objects=frozenset({"/big.pt"})),
        )  # fmt: skip
    yield Case(
        "export", "http", WRITING, BOTH_NODES, f"{STORE_WORDS['503']} for {SHORT_S:.0f} s",
        replace(ENDS_WELL, within_s=30.0), StoreFault("503", objects=frozenset({"/big.pt"}), lasts_s=SHORT_S),
    )  # fmt: skip
    for stage in STORE_STAGES:
        start = stage is FROM_THE_START
        objects = frozenset({"/big.pt"})
        for kind, promised in OF_STORES.items():
            if start and kind in ("changes", "flips", "cuts"):
                continue
            promise = promised
            if start and kind in ("refuses", "resets"):
                promise = NEVER_ANSWERED
            if stage.changed:
                promise = begun(promise)
            roles = [BOTH_NODES]
            if stage.name.startswith("fetching") and kind != "refuses":
                roles += [NODE_B, NODE_A] if kind in ("stalls", "503", "flips") else [NODE_B]
            for role in roles:
                store = StoreFault(kind, objects=objects, at_once=start)
                yield Case(
                    "load", "http", stage, role, STORE_WORDS[kind], promise, store,
                    needs_nodes=role is not BOTH_NODES,
                )  # fmt: skip
        for kind in ("refuses", "stalls", "resets", "503"):
            store = StoreFault(kind, objects=objects, at_once=start, lasts_s=SHORT_S)
            if kind == "stalls":
                # One answer never comes; the next connection is well.
                continue
            yield Case(
                "load", "http", stage, BOTH_NODES, f"{STORE_WORDS[kind]} for {SHORT_S:.0f} s",
                replace(RESTORES, within_s=30.0), store,
            )  # fmt: skip
    parts = STORE_STAGES[-1]
    for kind in ("flips", "cuts"):
        for times, options in ((1, {}), (1, {"cache_size": "64MB"}), (None, {"verify": "before"})):
            if kind == "cuts" and times is None:
                continue
            yield Case(
                "load",
                "http",
                parts,
                BOTH_NODES,
                f"{STORE_WORDS[kind]}, {'once' if times else 'always'}{', cached' if 'cache_size' in options else ''}",
                RESTORES if times else DAMAGED,
                StoreFault(kind, objects=frozenset({"/big.pt"}), times=times),
                options=options,
            )


# --- faults of files, disks and networks ---------------------------------------------------------------------------

LOCAL_STAGES = (
    Stage("locating", "open"),
    Stage("reading", "read"),
    Stage("check", "check"),
    Stage("restore", "restore", moved=True, changed=True),
)


def file_cases() -> Iterator[Case]:
    for stage in LOCAL_STAGES:
        for fault, promised in (
            ("missing file", Promise(
                f"NotFoundError, or CorruptError where it was read already; {NOTHING_CHANGED}",
                frozenset({"NotFoundError", "CorruptError"}), words=("big.pt",))),
            ("truncated file", Promise(
                f"CorruptError; {NOTHING_CHANGED}", frozenset({"CorruptError"}), words=("big.pt",))),
            ("changed file", Promise(
                f"CorruptError; {NOTHING_CHANGED}", frozenset({"CorruptError"}), words=("big.pt",))),
        ):  # fmt: skip
            if stage.name == "locating" and fault == "changed file":
                continue
            yield Case(
                "load",
                "local",
                stage,
                LEADER,
                fault,
                begun(promised) if stage.name != "locating" else promised,
            )


FULL = Promise(
    f"AccessError that names the node's disk; {NOTHING_CHANGED}", frozenset({"AccessError"}), words=("free",)
)


def disk_cases() -> Iterator[Case]:
    for role in (LEADER, OTHER_LEADER):
        for stage in (
            Stage("fetching indexes", "fetch first"), Stage("fetching parts", "fetch parts: room", changed=True)
        ):  # fmt: skip
            promise = replace(FULL, words=())
            yield Case(
                "load", "http", stage, role, "full disk", begun(promise) if stage.changed else promise,
                options={"cache_dir": "small"}, needs_nodes=True,
            )  # fmt: skip
    yield Case(
        "save", "small file", Stage("write", "write", moved=True), LEADER, "full disk",
        Promise("AccessError on every rank; the checkpoint before is as it was", frozenset({"AccessError"})),
        needs_nodes=True,
    )  # fmt: skip


SOURCE_WORDS["small file"] = "to a small disk"
CUT_OFF = Promise(
    f"PeerError on both sides within {DEATH_S:.0f} s; {NOTHING_CHANGED}", frozenset({"PeerError"}), DEATH_S
)


def network_cases() -> Iterator[Case]:
    for stage in LOAD:
        if stage.name in ("arguments", "opening"):
            continue
        promise = CUT_OFF
        if stage.pattern == JOINING:
            promise = replace(
                GONE_BEFORE_JOINING,
                names_rank=False,
                text=GONE_BEFORE_JOINING.text,
                within_s=STALL_S + DEATH_S,
            )
        if stage.changed or stage.name == "fetching parts":
            promise = begun(promise)
        if stage.name == "receipt":
            promise = replace(LAST_WORD, within_s=DEATH_S)
        for role in (NODE_A, NODE_B):
            yield Case(
                "load",
                "http",
                stage,
                replace(role, ranks=(role.node * 2,)),
                "network cut",
                promise,
                needs_nodes=True,
            )
    for journey, source, stage in (
        ("save", "file", Stage("gather", "gather")),
        ("autoresume", "runs", Stage("restore", "restore", moved=True, changed=True)),
    ):
        yield Case(
            journey, source, stage, replace(NODE_B, ranks=(2,)), "network cut",
            begun(CUT_OFF) if stage.changed else CUT_OFF, needs_nodes=True,
        )  # fmt: skip


# --- torchrun's agents ---------------------------------------------------------------------------------------------

AGAIN = Promise("the agents start all ranks again, and these restore", within_s=120.0)


def restart_cases() -> Iterator[Case]:
    stages = {stage.name: stage for stage in LOAD}
    for stage, role, fault in (
        ("joining", OTHER_FOLLOWER, "SIGKILL"),
        ("fetching indexes", LEADER, "SIGKILL"),
        ("restore", OTHER_LEADER, "SIGKILL"),
        ("check", FOLLOWER, "raises"),
        ("receipt", OTHER_FOLLOWER, "os._exit(0)"),
    ):
        yield Case("load", "http", stages[stage], role, fault, AGAIN, restarted=True)


ALL: tuple[Case, ...] = (
    *OF_LOADS,
    *store_cases(),
    *file_cases(),
    *disk_cases(),
    *network_cases(),
    *OF_RESUMES,
    *OF_SAVES,
    *OF_EXPORTS,
    *restart_cases(),
)


def _core() -> Iterator[Case]:
    """One case for each kind of promise."""
    wanted = {
        "load over HTTP / fetching indexes / other node's follower / raises",
        "load over HTTP / restore / other node's leader / raises",
        "load over HTTP / check / leader / sys.exit(0)",
        "load over HTTP / receipt / leader / clock",
        "load over HTTP / fetching parts / other node / answers 403",
        "load over HTTP / locating / both nodes / answers 404",
        "load of a local file / reading / leader / truncated file",
        "load over HTTP / reading / follower / SIGKILL",
        "save / write / leader / raises",
    }
    found = [case for case in ALL if case.name in wanted]
    assert len(found) == len(wanted), wanted - {case.name for case in found}
    yield from found


CORE: tuple[Case, ...] = tuple(_core())

# --- what cannot happen ------------------------------------------------------------------------------------------

IMPOSSIBLE: tuple[Impossible, ...] = (
    Impossible(
        "a faulty store while joining, comparing arguments, reading, checking, or agreeing on the receipt",
        "no store is asked there; what is restored may still be fetched meanwhile: the stage 'fetching parts'",
    ),
    Impossible(
        "a faulty store for a follower, by itself", "the first rank of a node fetches what its node needs"
    ),
    Impossible(
        "a faulty store for one node while locating",
        "rank 0 alone locates, and looks for manifests",
    ),
    Impossible(
        "wrong bytes, another object or half a body while locating",
        "the index that comes there is read, and fetched again, in the stages after it; from the start on, another "
        "object is just the object",
    ),
    Impossible(
        "half a manifest, another one or wrong bytes of it while locating",
        "a manifest that is damaged proves nothing, or that the checkpoint is damaged: the case of flipped bits",
    ),
    Impossible(
        "403 after the credentials' hour with new credentials to be had",
        "the store of the matrix has none; tests/loader/ranges and tests/loader/stores renew them",
    ),
    Impossible("a full disk in a load's other stages", "nothing is written but what is fetched"),
    Impossible("a full disk at a follower", "the first rank of its node writes what the node fetches"),
    Impossible(
        "a full disk in a save of an engine",
        "DeepSpeed writes by itself, and what it makes of a full disk is its own; docs/saving.md says what follows",
    ),
    Impossible(
        "a local file that is missing or damaged, by role",
        "all ranks read the same file; one rank changes it, and which one makes no difference",
    ),
    Impossible(
        "a local file that another one replaces while it is located",
        "then it is the other file that is loaded",
    ),
    Impossible("a cut network at a follower", "the network is its node's"),
    Impossible("a cut network where both nodes are played on one machine", "there is none to cut"),
    Impossible(
        "a clock that jumps in an engine's collectives",
        "no clock is read there; a load's other stages have the case",
    ),
    Impossible(
        "a rank that fails while rank 0 writes a file",
        "the others write nothing, and wait at the stage's end",
    ),
    Impossible(
        "SIGSTOP of an export", "one process runs it, and nobody waits for it: it goes on when it is woken"
    ),
    Impossible("a stage 'gather' or 'receipt' of an export", "one process runs it"),
    Impossible(
        "a clock that jumps while joining under torchrun", "it is the agent's clock that counts there"
    ),
)
