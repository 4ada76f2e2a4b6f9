"""Uploads a file and its manifest: the old manifest goes first, the new one comes last.

The file is written to the node's temporary folder (``TMPDIR``), and uploaded from there. Object stores replace an
object in one step. A store that does not (SFTP, SMB) may keep a short one after a kill: it has no manifest, and a load
refuses it as cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable

from ..stores.base import OnBytes
from ..stores.fsspec import FsspecStore
from ..stores.manifest import SIDE, manifest_beside
from ..stores.names import file_name
from .local import check_room, write_errors
from .summed import SummedFile, write_summed

_REMEDY = ", or set TMPDIR to a folder on another disk"


def upload_file(
    store: FsspecStore,
    name: str,
    write: Callable[[SummedFile], None],
    *,
    needed_bytes: int,
    on_bytes: OnBytes,
) -> None:
    """Writes the object `name` and its manifest ``NAME.sha256``. Raises as `FsspecStore.upload`, and `AccessError`
    where the temporary folder has no room for it."""
    described = store.describe(name)
    remove_folders(described)
    folder = make_folder(described, needed_bytes)
    part = os.path.join(folder, "object")
    try:
        with write_errors(part):
            digest = write_summed(part, write, on_bytes)
        store.remove(name + SIDE)
        store.upload(part, name, on_bytes)
        store.write_small(name + SIDE, manifest_beside(file_name(name), digest))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(described: str, needed_bytes: int) -> str:
    """A private temporary folder for what is uploaded to `described`."""
    with write_errors(tempfile.gettempdir()):
        check_room(tempfile.gettempdir(), needed_bytes, described, _REMEDY)
        return tempfile.mkdtemp(prefix=_prefix(described))


def remove_folders(described: str) -> None:
    """Removes the temporary folders that this user's killed saves to `described` left on this machine."""
    prefix = _prefix(described)
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            ours = entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)
            if ours and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                shutil.rmtree(entry.path, ignore_errors=True)


def _prefix(described: str) -> str:
    return f"rankload-save-{hashlib.sha256(described.encode()).hexdigest()[:12]}-"
