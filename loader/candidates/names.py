"""Says which names are those of checkpoints, and which step a name tells. Pure.

The names are those that the writers give by themselves: DeepSpeed's ``global_step100``, Trainer's ``checkpoint-100``,
Accelerate's ``checkpoint_3``, torchtitan's ``step-100``, Lightning's ``epoch=1-step=100.ckpt``, Composer's
``ep1-ba100-rank0.pt``, and a script's own, such as ``iter_100.pt``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..stores.locate import (
    DCP_METADATA,
    FILE_SUFFIXES,
    LATEST,
    MODEL_FILES,
    MODEL_STATES,
    RANK_FILE,
    SLICES_FILE,
)

_STEP = re.compile(
    r"(?:^|[^a-z])(?:global[-_]?steps?|steps?|iter(?:ation)?s?|ckpt|checkpoint|batch|ba|it)[-_=]?(\d{1,18})(?![0-9])",
    re.IGNORECASE,
)
_EPOCH = re.compile(r"(?:^|[^a-z])ep(?:och)?[-_=]?(\d{1,18})(?![0-9])", re.IGNORECASE)
_RANK = re.compile(r"(?P<before>(?:.*[-_.])?rank[-_]?)(?P<rank>\d{1,9})(?P<after>(?:\D.*)?)", re.DOTALL)
_SUFFIXES = tuple(end for end in FILE_SUFFIXES if end not in (".json", ".distcp", ".symlink"))
_WEIGHTS = (".safetensors", ".bin")
"""Ends of the names of files from which no run goes on: they have weights alone."""
_PARTS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states|dl_state_dict|custom_checkpoint|"
    r"adapter_model|model-\d|pytorch_model-\d|mp_rank_|zero_pp_rank_|bf16_zero|expp_rank_|layer_\d|shard-\d|"
    r"optim_world_size_|extra_state_world_size_)",
)
"""How the names of files begin that are a part of a checkpoint, and none themselves."""
_OWN_FILES = frozenset(
    {DCP_METADATA, *MODEL_STATES, *MODEL_FILES, "trainer_state.json", "random_states_0.pkl"}
)
INSIDE = re.compile(r"pytorch_model(_fsdp)?(_\d+)?|checkpoint")
"""Folders of a checkpoint that frameworks save in: Accelerate's, and Lightning's for DeepSpeed."""


def step_of(name: str) -> int | None:
    """The step that a file's or folder's own name tells; None where it tells none."""
    found = _STEP.findall(name)
    return int(found[-1]) if found else None


def epoch_of(name: str) -> int | None:
    """The epoch that it tells."""
    found = _EPOCH.findall(name)
    return int(found[-1]) if found else None


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name may be a checkpoint by itself, rather than a part of one, or one half written."""
    ends = name.endswith(_SUFFIXES) and not name.endswith(_WEIGHTS)
    return ends and not name.startswith(".") and _PARTS.match(name) is None


@dataclass(frozen=True, slots=True)
class OfRank:
    """The name of a file that one rank saved."""

    before: str
    rank: int
    after: str

    @property
    def template(self) -> str:
        """The name for all ranks, as a path for `load`."""
        return f"{escaped(self.before)}{{rank}}{escaped(self.after)}"

    @property
    def name(self) -> str:
        return f"{self.before}{self.rank}{self.after}"


def of_rank(name: str) -> OfRank | None:
    """The parts of a name such as Composer's ``ep1-ba100-rank0.pt``; None where it has no rank in it."""
    match = _RANK.fullmatch(name)
    return None if match is None else OfRank(match["before"], int(match["rank"]), match["after"])


def escaped(name: str) -> str:
    """A plain name as a path for `load`, in which braces are variables."""
    return name.replace("{", "{{").replace("}", "}}")


def is_one_checkpoint(names: frozenset[str]) -> bool:
    """Whether a folder with these entries is itself one checkpoint, rather than a folder of several."""
    return bool(names & _OWN_FILES) or any(
        RANK_FILE.fullmatch(name) or SLICES_FILE.fullmatch(name) for name in names
    )


def looks_like_checkpoint(names: frozenset[str]) -> bool:
    """Whether a folder with these entries holds anything of a checkpoint, if only the beginning of one."""
    return (
        is_one_checkpoint(names)
        or LATEST in names
        or any(INSIDE.fullmatch(name) for name in names)
        or any(name.endswith((*_SUFFIXES, ".distcp")) for name in names)
    )
