"""Chooses the checkpoint that a framework resumes from: the newest one that is proven whole."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..distributed.printable import package_logger
from ..distributed.session import current_topology
from ..loader import LoadOptions, find_checkpoints
from ..loader.candidates.names import INSIDE
from ..loader.stores.names import file_name, folder_of

_TAG = re.compile(r"global_step\d+")
"""How DeepSpeed's folder is named inside of one that Trainer saves."""
_logger = package_logger()


def newest(
    path: str | os.PathLike[str],
    *,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> str | None:
    """The checkpoint with the highest step at or below `path` that is proven whole; None where there is none.

    A framework's own choice takes the highest number, also of a folder that a killed save left empty; None is a cold
    start to it. Every rank must call, with the same arguments, which are those of `rankload.find_checkpoints`. Rank 0
    logs what was passed over.
    """
    found = find_checkpoints(path, object_store=object_store, newest=True, options=options)
    if current_topology().rank == 0:
        for one in found:
            if one.proven is False:
                _logger.warning("%s", one)
    chosen = next((one.path for one in found if one.proven), None)
    if chosen is not None and (_TAG.fullmatch(file_name(chosen)) or INSIDE.fullmatch(file_name(chosen))):
        return folder_of(chosen)  # the framework's own folder is the one around it
    return chosen
