"""What comparing costs: each checksum's rate, and a load with ``verify`` off, during and before.

    python -m benchmarks.checksums --megabytes 1000 --write docs/benchmarks.md

The model is restored by one process, with a manifest beside the file: from a local file, from nginx, and from nginx in
a tar. Settings take turns within each round; what is shown are medians. Nothing is asserted about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

import torch  # noqa: E402
from rankload.loader import State, load  # noqa: E402
from rankload.loader.stores.digests import ALGORITHMS, new_digest  # noqa: E402
from real_servers import nginx  # noqa: E402

from benchmarks.measure import make_model  # noqa: E402
from benchmarks.tables import publish, table  # noqa: E402

CHUNK_BYTES = 4 << 20
VERIFY = ("off", "during", "before")
SAVED, TARRED = "saved.pt", "saved.pt.tar"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checksums", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", help="the page to write the tables to")
    arguments = parser.parse_args()
    rates = table(("checksum", "GB/s"), rates_by_name(arguments.rounds))
    print(rates, flush=True)
    loads = table(("from", *(f"verify={verify}, s" for verify in VERIFY)), seconds_by_source(arguments))
    print(loads)
    if arguments.write:
        text = (
            f"{os.cpu_count()} CPUs, Python {platform.python_version()}, one thread; medians of {arguments.rounds} "
            f"rounds. Loads are of a model of {arguments.megabytes:,} MB, page cache warm.\n\n{rates}\n\n{loads}"
        )
        publish(arguments.write, "bench-checksums", text)


def rates_by_name(rounds: int) -> list[tuple[str, str]]:
    data = memoryview(bytearray(os.urandom(CHUNK_BYTES)) * 32)
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    ways: dict[str, Callable[[], object]] = {}
    for algorithm in ALGORITHMS:
        if new_digest(algorithm) is not None:
            ways[algorithm] = lambda algorithm=algorithm: _digested(algorithm, chunks)
    ways["crc32 of zlib"] = lambda: [zlib.crc32(chunk) for chunk in chunks]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    return [(name, f"{len(data) / median(each) / 1e9:.1f}") for name, each in seconds.items()]


def _digested(algorithm: str, chunks: list[memoryview]) -> bytes:
    digest = new_digest(algorithm)
    if digest is None:
        raise SystemExit(f"nothing computes {algorithm}")
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def seconds_by_source(arguments: argparse.Namespace) -> list[list[str]]:
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankload-bench-")))
        folder = work / "served"
        folder.mkdir()
        saved = make_model(arguments.megabytes, seed=1)
        torch.save({"model": saved.state_dict()}, folder / SAVED)
        with tarfile.open(folder / TARRED, "w") as archive:
            archive.add(folder / SAVED, SAVED)
        (folder / "SHA256SUMS").write_text("".join(_line(folder / name) for name in (SAVED, TARRED)))
        url = stack.enter_context(nginx(folder, work)).url
        sources = {
            "a local file": str(folder / SAVED),
            "nginx, in parts": f"{url}/{SAVED}",
            "nginx, in a tar": f"{url}/{TARRED}",
        }
        target = make_model(arguments.megabytes, seed=2)
        seconds: dict[tuple[str, str], list[float]] = {
            (name, verify): [] for name in sources for verify in VERIFY
        }
        for _ in range(arguments.rounds):
            for (name, verify), each in seconds.items():
                options = {"cache_dir": str(work / "cache"), "verify": verify}
                begin = time.perf_counter()
                load(
                    sources[name], State(target), load_weights_only=True, progress_bar=False, options=options
                )
                each.append(time.perf_counter() - begin)
        for (key, value), (_, other) in zip(
            saved.state_dict().items(), target.state_dict().items(), strict=True
        ):
            if not torch.equal(value, other):
                raise SystemExit(f"{key} was not restored")
    return [[name, *(f"{median(seconds[name, verify]):.2f}" for verify in VERIFY)] for name in sources]


def _line(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return f"{digest.hexdigest()}  {path.name}\n"


if __name__ == "__main__":
    main()
