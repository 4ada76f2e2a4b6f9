"""What users pass as ``object_store``, over a dict: a store of objects, and a logger's destination."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class ObjectStore:
    """Composer's interface. With `announce` it calls back with bytes; `transient` failures come first."""

    def __init__(self, objects: dict[str, bytes], *, announce: bool = True) -> None:
        self.objects = objects
        self.announce = announce
        self.downloads: list[str] = []
        self.transient = 0

    def get_object_size(self, object_name: str) -> int:
        if object_name not in self.objects:
            raise FileNotFoundError(object_name)
        return len(self.objects[object_name])

    def download_object(
        self, object_name: str, filename: str, overwrite: bool = False, callback: Any = None
    ) -> None:
        self.downloads.append(object_name)
        if self.transient:
            self.transient -= 1
            raise type("ObjectStoreTransientError", (RuntimeError,), {})()
        if object_name not in self.objects:
            raise FileNotFoundError(object_name)
        data = self.objects[object_name]
        with open(f"{filename}.own.tmp", "wb") as file:
            file.write(data)
            if self.announce:
                callback(len(data), len(data))
        os.rename(f"{filename}.own.tmp", filename)


class Destination:
    """The interface of a logger's destination: downloads, and tells nothing else."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def download_file(
        self, remote_file_name: str, destination: str, overwrite: bool = False, progress_bar: bool = True
    ) -> None:
        if remote_file_name not in self.objects:
            raise FileNotFoundError(remote_file_name)
        Path(destination).write_bytes(self.objects[remote_file_name])
