"""The range engine beside raw sockets, from a server on loopback: ``python -m benchmarks.range_engine``.

Raw is the limit: threads that ask for ranges, receive them into a buffer of their own, and do nothing else. Every run
is a process of its own; methods take turns within each round; ratios are taken within a round, and medians over the
rounds are shown. The server is nginx where it is installed, else, and where connections are capped, one of
Python's with sendfile. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from rankload.loader.range_engine import Reading, read_ranges
from rankload.loader.range_open import open_range_source
from rankload.loader.range_targets import FileTarget, MemoryTarget, Target
from rankload.loader.ranges import ByteRange
from rankload.loader.store import open_store

from .measure import resident

RAW_CHUNK = 8 << 20
CAP_BYTES_S = 90_000_000
PIECE = 256 << 10
LINKS = {"uncapped": ("raw x2", "raw x4", "raw x8"), "90 MB/s a connection": ("raw x16", "raw x32")}
OURS = ("rankload, memory", "rankload, file")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.range_engine", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url", help="an object that a server of yours has, in place of ours")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rankload-bench-", dir=shared_memory()) as name:
        folder = Path(name)
        if arguments.url:
            urls, server = dict.fromkeys(("uncapped",), arguments.url), "the one at --url"
            compare(urls, server, arguments.rounds, folder)
            return
        with (folder / "object").open("wb") as file:
            for _ in range(arguments.megabytes):
                file.write(os.urandom(1 << 20))
        with serving(folder) as (urls, server):
            compare(urls, server, arguments.rounds, folder)


def compare(urls: dict[str, str], server: str, rounds: int, folder: Path) -> None:
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; server: {server}"
    )
    for link, url in urls.items():
        methods = (*LINKS[link], *OURS)
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for _ in range(rounds):
            for method in methods:
                command = [sys.executable, "-m", "benchmarks.range_engine", "--one", method, url, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if done.returncode != 0:
                    raise SystemExit(f"{method} failed:\n{done.stderr}")
                runs[method].append(json.loads(done.stdout.splitlines()[-1]))
        show(link, runs, LINKS[link])


def show(link: str, runs: dict[str, list[dict[str, float]]], raw: Sequence[str]) -> None:
    print(f"\n{link}")
    print(f"  {'method':<18}{'GB/s':>7}{'x best raw':>22}{'CPU s/GB':>10}{'peak RSS':>11}{'connections':>13}")
    best = [max(pair) for pair in zip(*([run["rate"] for run in runs[one]] for one in raw), strict=True)]
    for method, found in runs.items():
        shares = [run["rate"] / limit for run, limit in zip(found, best, strict=True)]
        spread = f"{median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})"
        figures = {key: median(run[key] for run in found) for key in found[0]}
        print(
            f"  {method:<18}{figures['rate'] / 1e9:>7.2f}{spread:>22}{figures['cpu'] * 1e9:>10.2f}"
            f"{figures['extra'] / 1e6:>+8.0f} MB{figures['connections']:>13.0f}"
        )


def one(method: str, url: str, folder: str) -> None:
    """One run in a fresh process; prints rate, CPU seconds a byte, memory beside the target, and connections."""
    store, name = open_store(url)
    info = store.stat(name)
    store.close()
    if info is None or info.size_bytes is None:
        raise SystemExit(f"{url}: not there")
    size = info.size_bytes
    connections = 0
    if method.startswith("raw"):
        connections = int(method.removeprefix("raw x"))
        buffers = [bytearray(b"\1") * RAW_CHUNK for _ in range(connections)]
        before = begin()
        raw(url, size, buffers)
    else:
        source = open_range_source(store, info)
        if source is None:
            raise SystemExit(f"{url}: no source of ranges")
        path = os.path.join(folder, "landed")
        target: Target
        if method.endswith("file"):
            file = target = FileTarget(path, size)
        else:
            target = MemoryTarget([(0, memoryview(bytearray(b"\1") * size))])
        before = begin()
        report = read_ranges([Reading(source, [ByteRange(0, size)], target)], lambda n_bytes: None)
        connections = report.connections
    seconds, cpu_s, extra = end(before)
    if method.endswith("file"):
        extra -= size
        file.close()
        os.unlink(path)
    figures = {"rate": size / seconds, "cpu": cpu_s / size, "extra": extra, "connections": connections}
    print(json.dumps(figures))


def begin() -> tuple[float, float, int]:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    return time.perf_counter(), cpu_seconds(), resident("VmRSS")


def end(before: tuple[float, float, int]) -> tuple[float, float, int]:
    return time.perf_counter() - before[0], cpu_seconds() - before[1], resident("VmHWM") - before[2]


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def raw(url: str, size: int, buffers: Sequence[bytearray]) -> None:
    parts = urlsplit(url)
    starts = iter(range(0, size, RAW_CHUNK))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work(buffer: memoryview) -> None:
        with socket.create_connection((parts.hostname, parts.port)) as sock:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                length = min(RAW_CHUNK, size - start)
                asked = f"bytes={start}-{start + length - 1}"
                head = f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: {asked}\r\n\r\n"
                sock.sendall(head.encode())
                answer = b""
                while b"\r\n\r\n" not in answer:
                    answer += sock.recv(4096)
                at = len(answer) - answer.index(b"\r\n\r\n") - 4
                if not answer.startswith(b"HTTP/1.1 206"):
                    raise SystemExit(answer.decode("latin-1"))
                while at < length:
                    at += sock.recv_into(buffer[at:length])

    def guarded(buffer: memoryview) -> None:
        try:
            work(buffer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(memoryview(buffer),)) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def shared_memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Servers of `folder` in other processes: the object's URL by link, and their names.

    nginx's own cap lets each request begin with a burst, so the capped link is always Python's server.
    """
    nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(started(folder, None))
        urls = dict.fromkeys(LINKS, f"http://127.0.0.1:{port}/capped/object")
        if nginx is not None:
            port = stack.enter_context(started(folder, nginx))
        urls["uncapped"] = f"http://127.0.0.1:{port}/object"
        own = "sendfile in Python threads"
        yield urls, own if nginx is None else f"nginx; capped: {own}"


@contextlib.contextmanager
def started(folder: Path, nginx: str | None) -> Iterator[int]:
    """The port of one server."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.range_engine", "--serve", str(port), str(folder)]
    if nginx is not None:
        (folder / "nginx.conf").write_text(nginx_conf(folder, port))
        command = [nginx, "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if time.monotonic() > deadline or server.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait()


def nginx_conf(folder: Path, port: int) -> str:
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
{user} daemon off; worker_processes 2; pid {folder}/nginx.pid;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000; {temporary}
  server {{
    listen 127.0.0.1:{port}; root {folder};
    location / {{ }}
  }}
}}
"""


def serve(port: int, folder: str) -> None:
    """Ranges by sendfile, a thread for each connection."""
    listening = socket.create_server(("127.0.0.1", port))
    while True:
        sock, _ = listening.accept()
        threading.Thread(target=serve_one, args=(sock, folder), daemon=True).start()


def serve_one(sock: socket.socket, folder: str) -> None:
    with sock, open(os.path.join(folder, "object"), "rb") as file, contextlib.suppress(OSError):
        size = os.fstat(file.fileno()).st_size
        head = b""
        free_at = time.monotonic()
        while True:
            while b"\r\n\r\n" not in head:
                new = sock.recv(4096)
                if not new:
                    return
                head += new
            asked, _, head = head.partition(b"\r\n\r\n")
            match = re.search(rb"\r\n[Rr]ange: bytes=(\d+)-(\d+)", asked)
            first, last = (int(match[1]), int(match[2])) if match else (0, size - 1)
            status = (
                f"206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}" if match else "200 OK"
            )
            length = last + 1 - first
            sock.sendall(f'HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: "1"\r\n\r\n'.encode())
            position = first
            is_capped = b"/capped/" in asked.partition(b"\r\n")[0]
            while position <= last and not asked.startswith(b"HEAD"):
                sent = os.sendfile(sock.fileno(), file.fileno(), position, min(PIECE, last + 1 - position))
                position += sent
                if is_capped:
                    # The cap is the connection's: a new request does not begin with a burst.
                    free_at = max(free_at, time.monotonic() - PIECE / CAP_BYTES_S) + sent / CAP_BYTES_S
                    time.sleep(max(0.0, free_at - time.monotonic()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    elif sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        main()
