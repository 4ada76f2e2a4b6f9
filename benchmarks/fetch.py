"""How fast one large object comes from a server: rankload beside other clients, and the limit.

    python -m benchmarks.fetch --size 1000 --write docs/benchmarks.md

Servers are real ones on loopback. Clients take turns within each round (A/B/C, A/B/C ...), each run is a process of
its own, and what is shown are medians. The clock runs from a client's first request to its last byte; processor time
is the client's and its children's, never the server's. Nothing is asserted about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from .fetch_clients import CLIENTS, DISCARD, Place
from .measure import peak_private_bytes
from .tables import REPOSITORY, publish, table

sys.path.insert(0, str(REPOSITORY / "tests" / "support"))
from certificates import BUNDLES, make_certificate
from real_servers import REGION, S3Server, counted, hadro, nginx, seaweedfs
from server_process import ServerMissing

CAP = 90_000_000
"""Bytes a second that each connection gets where links are capped: what object stores were seen to give."""
UNCAPPED_CONNECTIONS = 4
CAPPED_CONNECTIONS = 16
DEADLINE_S = 300.0
BUCKET, KEY = "bench", "object.bin"


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch", description=__doc__)
    parser.add_argument("--size", type=int, default=1000, help="of the object, in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", default=",".join(SERVERS), help=f"some of {', '.join(SERVERS)}")
    parser.add_argument("--clients", help="only those whose name holds one of these words")
    parser.add_argument("--write", help="the page to write the tables to")
    arguments = parser.parse_args()
    texts = [
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, Linux {platform.release()}; an object of "
        f"{arguments.size:,} MB; medians of {arguments.rounds} rounds."
    ]
    print(texts[0], flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="rankload-bench-") as work,
        tempfile.TemporaryDirectory(prefix="rankload-bench-", dir="/dev/shm") as targets,
    ):
        source = make_object(Path(work, "served", BUCKET, KEY), arguments.size * 1_000_000)
        for setting in arguments.settings.split(","):
            try:
                with contextlib.ExitStack() as stack:
                    title, place = SERVERS[setting](stack, source, Path(work))
                    rounds = compare(place, source, Path(targets), arguments.rounds, arguments.clients)
            except ServerMissing as missing:
                texts.append(f"{setting}: skipped, {missing}.")
            else:
                texts.append(f"**{title}**\n\n{show(rounds, place.size)}")
            print(f"\n{texts[-1]}", flush=True)
    if arguments.write:
        publish(arguments.write, "bench-fetch", "\n\n".join(texts))


def make_object(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(os.urandom(min(left, 16 << 20)))
    return path


def on_nginx(stack: contextlib.ExitStack, source: Path, work: Path) -> tuple[str, Place]:
    server = stack.enter_context(nginx(source.parent.parent, work))
    url = f"{server.url}/{BUCKET}/{KEY}"
    return "HTTP (nginx), uncapped", Place(url, url, source.stat().st_size, {}, UNCAPPED_CONNECTIONS, False)


def on_encrypted_nginx(stack: contextlib.ExitStack, source: Path, work: Path) -> tuple[str, Place]:
    certificate = make_certificate(work)
    stack.enter_context(mock.patch.dict(os.environ, dict.fromkeys(BUNDLES, str(certificate.bundle))))
    server = stack.enter_context(nginx(source.parent.parent, work, certificate=certificate))
    url = f"{server.url}/{BUCKET}/{KEY}"
    return "HTTPS (nginx), uncapped", Place(url, url, source.stat().st_size, {}, UNCAPPED_CONNECTIONS, False)


def on_capped_nginx(stack: contextlib.ExitStack, source: Path, work: Path) -> tuple[str, Place]:
    server = stack.enter_context(nginx(source.parent.parent, work, limit_rate=CAP))
    url = f"{server.url}/capped/{BUCKET}/{KEY}"
    place = Place(url, url, source.stat().st_size, {}, CAPPED_CONNECTIONS, True)
    return f"HTTP (nginx), {CAP // 1_000_000} MB/s for each connection", place


def on_seaweedfs(stack: contextlib.ExitStack, source: Path, work: Path) -> tuple[str, Place]:
    server = stack.enter_context(seaweedfs(work))
    fill(server, source)
    return "S3 (SeaweedFS), uncapped", s3_place(server, source)


def on_hadro(stack: contextlib.ExitStack, source: Path, work: Path) -> tuple[str, Place]:
    server = stack.enter_context(hadro(source.parent.parent, work))
    return "S3 (hadro), uncapped", s3_place(server, source)


def on_capped_s3(stack: contextlib.ExitStack, source: Path, work: Path) -> tuple[str, Place]:
    """nginx caps here: hadro paces its answers in one thread, which is slower than 16 connections of this rate."""
    server = stack.enter_context(seaweedfs(work))
    fill(server, source)
    front = stack.enter_context(counted(server.endpoint, work, limit_rate=CAP))
    place = s3_place(replace(server, endpoint=front.url), source)
    title = f"S3 (SeaweedFS behind nginx), {CAP // 1_000_000} MB/s for each connection"
    return title, replace(place, connections=CAPPED_CONNECTIONS, capped=True)


SERVERS = {
    "http": on_nginx,
    "https": on_encrypted_nginx,
    "s3-seaweedfs": on_seaweedfs,
    "s3-hadro": on_hadro,
    "http-capped": on_capped_nginx,
    "s3-capped": on_capped_s3,
}


def s3_client(server: S3Server) -> Any:
    if importlib.util.find_spec("boto3") is None:
        raise ServerMissing("boto3, which fills the bucket and signs URLs, is not installed")
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )


def fill(server: S3Server, source: Path) -> None:
    client = s3_client(server)
    client.create_bucket(Bucket=BUCKET)
    client.upload_file(str(source), BUCKET, KEY)


def s3_place(server: S3Server, source: Path) -> Place:
    what = {"Bucket": BUCKET, "Key": KEY}
    signed = s3_client(server).generate_presigned_url("get_object", Params=what, ExpiresIn=7 * 86400)
    size = source.stat().st_size
    return Place(f"s3://{BUCKET}/{KEY}", signed, size, server.options, UNCAPPED_CONNECTIONS, False)


def compare(
    place: Place, source: Path, targets: Path, n_rounds: int, words: str | None
) -> dict[str, list[Run] | str]:
    """The runs of each client, or why there are none. One run of the limit warms everything up."""
    kind = "s3" if place.url.startswith("s3:") else "http"
    runs: dict[str, list[Run] | str] = {}
    for name, (_, _, kinds, package) in CLIENTS.items():
        chosen = words is None or any(word in name for word in [*words.split(","), "raw limit"])
        if kind in kinds.split() and chosen:
            runs[name] = []
            if package is not None and importlib.util.find_spec(package) is None:
                runs[name] = f"skipped: {package} is not installed"
            elif name.startswith("curl") and shutil.which("curl") is None:
                runs[name] = "skipped: curl is not installed"
    fetch(next(iter(runs)), place, source, targets)
    for _ in range(n_rounds):
        for name, found in runs.items():
            if isinstance(found, list):
                found.append(fetch(name, place, source, targets))
    return runs


def fetch(client: str, place: Place, source: Path, targets: Path) -> Run:
    """One run in a process of its own; what it wrote is compared with the source at some places."""
    target = DISCARD if CLIENTS[client][1] == DISCARD else str(targets / "target")
    with running(client, place, target) as process:
        if process.stdout is None or process.stdin is None or process.stdout.readline() != "ready\n":
            raise SystemExit(f"{client} could not be prepared")
        with peak_private_bytes([process.pid]) as peak:
            process.stdin.write("go\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{client} failed")
        found = json.loads(line)
    if os.path.exists(targets / "target"):
        check_same(source, targets / "target", client)
        os.unlink(targets / "target")
    return Run(found["seconds"], found["cpu_seconds"], peak.above_start)


@contextlib.contextmanager
def running(client: str, place: Place, target: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fetch_clients"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    deadline = threading.Timer(DEADLINE_S, process.kill)
    deadline.start()
    try:
        if process.stdin is not None:
            process.stdin.write(
                json.dumps({"client": client, "place": asdict(place), "target": target}) + "\n"
            )
            process.stdin.flush()
        yield process
        process.wait(DEADLINE_S)
    finally:
        deadline.cancel()
        process.kill()
        process.wait()


def check_same(source: Path, target: Path, client: str) -> None:
    size = source.stat().st_size
    if target.stat().st_size != size:
        raise SystemExit(f"{client} wrote {target.stat().st_size} bytes, expected {size}")
    with source.open("rb") as one, target.open("rb") as other:
        for offset in range(0, size, max(1, size // 64)):
            one.seek(offset)
            other.seek(offset)
            if one.read(4096) != other.read(4096):
                raise SystemExit(f"{client} wrote other bytes at {offset}")


def show(runs: dict[str, list[Run] | str], size: int) -> str:
    gigabytes = size / 1e9
    limit = runs[next(iter(CLIENTS))]
    rows: list[list[object]] = []
    for name, found in runs.items():
        where = CLIENTS[name][1]
        if isinstance(found, str):
            rows.append([name, where, found, "", "", ""])
            continue
        # Rates are compared within a round: the machine's own ups and downs meet both.
        ratios = [one.seconds / run.seconds for one, run in zip(limit, found, strict=True)]  # type: ignore[union-attr]
        rows.append(
            [
                name,
                where,
                f"{gigabytes / median(run.seconds for run in found):.2f}",
                f"{median(run.cpu_seconds for run in found) / gigabytes:.2f}",
                f"{median(run.peak_bytes for run in found) / 1e6:.0f}",
                f"{median(ratios):.2f}",
            ]
        )
    header = ("client", "into", "GB/s", "CPU s/GB", "peak memory, MB", "rate / raw limit")
    return table(header, rows)


if __name__ == "__main__":
    main()
