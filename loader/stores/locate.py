"""Finds the checkpoint that a path names: a file, a DeepSpeed folder with ``latest``, one of its tag folders, a folder
of ``torch.distributed.checkpoint`` (DCP), or the folder of a model in one or several files, also one of each rank.

Names are derived, and the store is asked for each, so that stores that cannot list do as well as those that can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import CorruptError, FormatError, RankloadError, UnsafeError
from .names import file_name, folder_of, has_query, without_slash
from .probes import Probes

if TYPE_CHECKING:
    from .base import Store

MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""The first rank's model file: of stages 0 to 2, and of stage 3."""
MODEL_INDEX = ".index.json"
"""The end of the name of an index of a model in several files."""
MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Files of Hugging Face's libraries that have a model's weights, or say where those are; the first that is there is
taken."""
SLICES_FILE = re.compile(r"shard-(?P<rank>\d{5})-model-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")
"""A file in which torch's HuggingFaceStorageWriter saved one rank's slices; all its numbers count from 1."""
_SLICES_PARTS = 8
"""Up to how many files a rank its first one is looked for."""
RANK_FILE = re.compile(r"model_world_size_(?P<ranks>\d{1,9})_rank_(?P<rank>\d{1,9})\.pt")
"""A file in which verl and others save one rank's shards of a model."""
_RANKS_CONFIG = "fsdp_config.json"
"""The file beside those that says how many there are."""
_RANKS = (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128)
"""How many ranks' files are looked for where it is not there; in a local folder, up to the `_MOST_LOCAL_RANKS`."""
_MOST_LOCAL_RANKS = 1024
_CONFIG_LIMIT = 64 << 10
UNIVERSAL_MARKERS = ("zero/optimizer_state.pt",)
"""Files, relative to the tag folder, that only a universal checkpoint has; its model files look like native ones."""
DCP_METADATA = ".metadata"
"""The file that a DCP folder is finished with, and by which it is recognised."""
_ACCELERATE_MODEL = "pytorch_model_fsdp_0"
"""The DCP folder of the model inside of one that Accelerate saved."""
DCP_PLACES = (DCP_METADATA, f"{_ACCELERATE_MODEL}/{DCP_METADATA}")
"""Where it lies in a folder."""
OTHER_KINDS = {
    "__0.metadata": (
        "a torch.distributed.checkpoint (DCP) folder in which each rank saved the metadata of its own part "
        "(use_collectives=False)",
        "torch.distributed.checkpoint.load reads it; save it again with collectives",
    ),
    "__0_0.distcp": (
        "a torch.distributed.checkpoint (DCP) folder that was not finished: .metadata, which is written last, is not "
        "in it",
        "take an older checkpoint",
    ),
    "latest_universal": (
        "a DeepSpeed universal checkpoint",
        "pass the native folder that it was converted from",
    ),
    "adapter_config.json": (
        "a PEFT adapter's folder",
        "pass its file adapter_model.safetensors or adapter_model.bin",
    ),
}
"""Files by which a folder of a kind that is not read is recognised, the most telling first; what it is, and what to
do."""
OTHER_FILES = {
    ".distcp": (
        "one file of a torch.distributed.checkpoint (DCP) folder alone",
        "pass the folder",
    ),
    "adapter_config.json": (
        "the settings of a PEFT adapter, and holds no weights itself",
        "pass adapter_model.safetensors or adapter_model.bin beside it",
    ),
}
"""Ends of the names of files of such kinds."""
FILE_SUFFIXES = (
    ".pt", ".pth", ".pkl", ".ckpt", ".bin", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".lzma", ".zst", ".symlink",
    ".safetensors", ".distcp", ".json",
)  # fmt: skip
LATEST = "latest"
LATEST_LIMIT = 4096
"""Bytes of a ``latest`` file that are read: it holds a folder's name."""


@dataclass(frozen=True)
class Located:
    """Where a checkpoint lies in its store."""

    form: str
    """``file`` or ``folder``."""
    name: str = field(repr=False)  # may have a signature in it, as the next ones
    """The file's object name, or the folder's."""
    first: str = field(repr=False)
    """Object name of the file to read first: the file itself, the first rank's model file, or a model's index."""
    tag: str | None = None
    """The tag folder's own name, or what ``latest`` holds (which may be nested); None for a file, and for a model's
    folder."""
    by_latest: bool = False
    """Whether the folder was named by the ``latest`` of the one above."""
    root: str | None = field(default=None, repr=False)
    """The folder that the path names, where a framework may have more files; None for a file and for a tag's folder."""
    first_inside: str = ""
    """Name of `first` relative to the folder, where it lies in a folder inside it."""


AskAhead = Callable[[Sequence[str]], None]
"""Called with names that will be asked for next, so that a store may ask for all of them at once."""


def one_by_one(names: Sequence[str]) -> None:
    """The `AskAhead` of a store that is asked for each name in its turn."""


def locate(store: Store, name: str, ask_ahead: AskAhead = one_by_one) -> Located:
    """The checkpoint that `name` (expanded for rank 0) names in `store`. One rank calls it, for all.

    Raises `NotFoundError` where it names nothing, `AccessError` where nothing was found and the store refused to speak
    of some names, `FormatError` where it names a folder or file of a kind that is not read, `CorruptError` or
    `UnsafeError` where ``latest`` cannot be a folder's name.

    A URL with a query is asked for as it is, before any other name: it may be signed for this object alone.
    """
    probes = Probes(store)
    as_folder = partial(_as_folder, ask_ahead=ask_ahead)
    if looks_like_file(name):
        finders: tuple[Callable[[Probes, str], Located | None], ...] = (_as_file, as_folder)
        ask_ahead([name])
    else:
        finders = (as_folder, _as_file)
    for finder in (*finders, _as_model):
        found = finder(probes, name)
        if found is not None:
            return found
    _refuse_other_kinds(store, name)
    if name in probes.pages:
        return Located("file", name, name)  # whoever reads it says what it is
    info = probes.stat(name) if store.is_local else None
    what = "" if info is not None and info.is_folder else "there is no such object, "
    raise probes.nothing(
        f"{store.describe(name)} is no checkpoint: {what}no {LATEST!r} in it, as a DeepSpeed folder has, and no "
        f"{', '.join((*MODEL_STATES, DCP_METADATA))}, {MODEL_FILES[0]} or {MODEL_FILES[1]}{_nearby(store, name)}",
        store.describe(name),
    )


def _as_file(probes: Probes, name: str) -> Located | None:
    from .symlinks import search

    found = search(probes, name)
    if found is None or found.info.is_folder:
        return None
    if not found.info.certain and not looks_like_file(name):
        # The store cannot say that there is such a file: one inside of it shows that there is none.
        model = _as_model(probes, name)
        if model is not None:
            return model
    _refuse_other_files(probes.store, found.info.name)
    return _model(probes.store, found.info.name)


def looks_like_file(name: str) -> bool:
    """Whether `name` is asked for as a file before it is taken for a folder's."""
    return has_query(name) or file_name(name).endswith(FILE_SUFFIXES)


def _as_model(probes: Probes, name: str) -> Located | None:
    store = probes.store
    # A rank's files have their number in their names.
    slices = (f"shard-00001-model-00001-of-{parts:05}.safetensors" for parts in range(1, _SLICES_PARTS + 1))
    for candidate in (*MODEL_FILES, *slices):
        found = store.join(name, candidate)
        if probes.exists(found):
            return replace(_model(store, found), root=without_slash(name))
    return _as_ranks(probes, name)


def _as_ranks(probes: Probes, name: str) -> Located | None:
    """A folder of the shards of a model, in one file of each rank."""
    store, config = probes.store, probes.store.join(name, _RANKS_CONFIG)
    known = _ranks_in(store.read_small(config, _CONFIG_LIMIT)) if probes.exists(config) else None
    likely = range(1, _MOST_LOCAL_RANKS + 1) if store.is_local else _RANKS
    for count in (known,) if known is not None else likely:
        first = store.join(name, f"model_world_size_{count}_rank_0.pt")
        if probes.exists(first):
            return _model(store, first)
    if known is None:
        return None
    raise probes.nothing(
        f"{store.describe(config)} says that {known} ranks saved, and model_world_size_{known}_rank_0.pt is not beside "
        "it: copy the files of all ranks there, or take another checkpoint",
        store.describe(name),
    )


def _ranks_in(config: bytes) -> int | None:
    """The number of ranks that a ``fsdp_config.json`` states; None where it is none that verl or others write."""
    try:
        stated = json.loads(config)
    except (ValueError, RecursionError):
        return None
    for place in (stated, stated.get("fsdp_config") if isinstance(stated, dict) else None):
        count = place.get("world_size") if isinstance(place, dict) else None
        if type(count) is int and 1 <= count < 1_000_000:
            return count
    return None


def _model(store: Store, name: str) -> Located:
    """Where the checkpoint of the file `name` lies: in the folder, where it is one of several files."""
    own = file_name(name)
    if not (own.endswith(MODEL_INDEX) or SLICES_FILE.fullmatch(own) or RANK_FILE.fullmatch(own)):
        return Located("file", name, name)
    return Located("folder", folder_of(name) or ("." if store.is_local else ""), name)


def _as_folder(probes: Probes, name: str, ask_ahead: AskAhead) -> Located | None:
    store = probes.store
    latest = store.join(name, LATEST)
    ask_ahead([latest, *(store.join(name, one) for one in MODEL_STATES)])
    if probes.exists(latest):
        tag = read_tag(store, latest)
        folder = store.join(name, tag)
        in_folder = Probes(store)
        ask_ahead([store.join(folder, one) for one in (*MODEL_STATES, *UNIVERSAL_MARKERS)])
        found = _model_file(in_folder, folder)
        if found is None:
            _refuse_other_kinds(store, folder)
            raise in_folder.nothing(
                f"{store.describe(latest)} names the tag {tag!r}, but {store.describe(folder)} holds no "
                f"{' or '.join(MODEL_STATES)}{_nearby(store, folder)}",
                store.describe(folder),
            )
        return Located("folder", folder, found, tag, by_latest=True, root=without_slash(name))
    found = _model_file(probes, name)
    if found is not None:
        return Located("folder", without_slash(name), found, file_name(name))
    return _as_dcp(probes, name, ask_ahead)


def _as_dcp(probes: Probes, name: str, ask_ahead: AskAhead) -> Located | None:
    """A DCP folder, by itself or by its ``.metadata``, or the folder in which Accelerate put one."""
    store = probes.store
    if file_name(name) == DCP_METADATA:
        name = folder_of(name)
    ask_ahead([store.join(name, inside) for inside in DCP_PLACES])
    for inside in DCP_PLACES:
        first = store.join(name, inside)
        if probes.exists(first):
            folder = without_slash(name)
            return Located("folder", folder, first, file_name(name), root=folder, first_inside=inside)
    return None


def read_tag(store: Store, latest: str) -> str:
    """The tag that the object `latest` names: a folder beside it, or one below that, as DeepSpeed joins them.

    Its parts are joined by one ``/``, without ``.`` and a ``/`` at the end. Raises `CorruptError` where it is empty or
    no text, `UnsafeError` where it would lead elsewhere.
    """
    shown = store.describe(latest)
    try:
        tag = store.read_small(latest, LATEST_LIMIT).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{shown} is not text: {error}", path=shown) from error
    if not tag:
        raise CorruptError(f"{shown} is empty, expected a tag", path=shown)
    if any(ord(char) < 32 for char in tag):
        raise CorruptError(
            f"{shown} holds {tag[:80]!r}, expected a tag, which is one line of text", path=shown
        )
    parts = [part for part in tag.split("/") if part not in ("", ".")]
    if tag.startswith("/") or "\\" in tag or ".." in parts or not parts:
        raise UnsafeError(
            f"{shown} holds {tag[:80]!r}, expected the name of a folder beside it, or below such a one "
            "(epoch1/step3)",
            path=shown,
        )
    return "/".join(parts)


def _model_file(probes: Probes, folder: str) -> str | None:
    store = probes.store
    for candidate in MODEL_STATES:
        name = store.join(folder, candidate)
        if probes.exists(name):
            _refuse_universal(store, folder)
            return name
    return None


def _refuse_universal(store: Store, folder: str) -> None:
    """Raises `FormatError` where `folder` is a DeepSpeed universal checkpoint.

    Only the files that the conversion adds show it: the model files are copies of the native ones, and native ones may
    hold the key ``universal_checkpoint_info``, which the conversion needs.
    """
    for marker in UNIVERSAL_MARKERS:
        if Probes(store).exists(store.join(folder, marker)):
            raise FormatError(
                f"{store.describe(folder)} is a DeepSpeed universal checkpoint (it holds {marker}), which is not "
                "supported; pass the native folder that it was converted from",
                path=store.describe(folder),
            )


def _refuse_other_kinds(store: Store, folder: str) -> None:
    for marker, (kind, remedy) in OTHER_KINDS.items():
        if Probes(store).exists(store.join(folder, marker)):
            raise FormatError(
                f"{store.describe(folder)} is {kind} (it holds {marker}), which is not supported: {remedy}",
                path=store.describe(folder),
            )


def _refuse_other_files(store: Store, name: str) -> None:
    for end, (kind, remedy) in OTHER_FILES.items():
        if file_name(name).endswith(end):
            raise FormatError(
                f"{store.describe(name)} is {kind}, which is not supported: {remedy}",
                path=store.describe(name),
            )


def _nearby(store: Store, name: str) -> str:
    """What the store can say of what lies there instead, to end a message; a store that fails here says nothing."""
    try:
        said = store.nearby(name)
    except RankloadError:
        return ""
    return f". {said}" if said else ""
