"""A checkpoint exported: rankload beside DeepSpeed's ``zero_to_fp32`` and torch's ``dcp_to_torch_save``.

    python -m benchmarks.export --write docs/benchmarks.md
    python -m benchmarks.export --sparse 20

Engines of ZeRO stage 1 and 3 and an FSDP2 module save the same weights on two ranks. Each is exported by a process of
its own, by either way in turns, from files in the page cache to the same disk. Medians are shown. rankload compares the
checkpoint's checksums, writes a manifest, and returns once its files are on the disk; so the time that the others' take
to get there is shown too. What the ways wrote is compared, bit for bit. Nothing is asserted about speed.

``--sparse`` makes a model of so many GB of files that are all hole, and exports it alone; that its memory stays within
twice the largest tensor and 300 MB is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Ranks are started as scripts of the tests' are.
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

from benchmarks.tables import publish, table  # noqa: E402

WIDTH = 2048
BYTES_OF_A_LAYER = 4 * (WIDTH * WIDTH + WIDTH)
SPARE_BYTES = 300 << 20
RANKS = 2
OURS = "**rankload**"
WAYS = {
    "stage 1, bf16": (OURS, "`zero_to_fp32`"),
    "stage 3, bf16": (OURS, "`zero_to_fp32`"),
    "DCP, fp32": (OURS, "`dcp_to_torch_save`"),
}
HEADER = (
    "checkpoint",
    "way",
    "seconds",
    "until on the disk",
    "x time of rankload",
    "CPU s",
    "peak memory, MB",
    "written, MB",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights in fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sparse", type=float, metavar="GB", help="export a model of files that are all hole"
    )
    parser.add_argument("--write", metavar="PAGE", help="replace the tables in this page")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as root:
        if given.sparse:
            name, text = "bench-export-sparse", sparse(Path(root), given.sparse)
        else:
            name, text = "bench-export", side_by_side(Path(root), given.megabytes, given.rounds)
    print(text)
    if given.write:
        publish(given.write, name, text)


def side_by_side(root: Path, megabytes: int, rounds: int) -> str:
    from processes import run_ranks

    layers = max(1, megabytes * 1_000_000 // BYTES_OF_A_LAYER)
    for what in WAYS:
        finished = run_ranks(
            __file__,
            RANKS,
            args=("save", what, str(root / what), layers),
            deadline_s=900,
            env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            fork=False,
        )
        if any(rank.returncode for rank in finished):
            raise SystemExit(repr(finished))
    rows = []
    for what, ways in WAYS.items():
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(rounds):
            for way in ways if turn % 2 == 0 else reversed(ways):
                runs[way].append(run_alone(what, way, root / what, root / "out" / way.strip("*`")))
            compare(root / "out", ways)
            shutil.rmtree(root / "out")
        base = median(one["seconds"] for one in runs[OURS])
        for way, found in runs.items():
            seconds, on_disk, cpu, peak, written = (
                median(one[key] for one in found) for key in ("seconds", "on_disk", "cpu", "peak", "written")
            )
            rows.append(
                (
                    what,
                    way,
                    f"{seconds:.1f}",
                    f"{on_disk:.1f}",
                    f"{seconds / base:.2f}",
                    f"{cpu:.1f}",
                    f"{peak / 1e6:,.0f}",
                    f"{written / 1e6:,.0f}",
                )
            )
    import torch

    about = (
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}; "
        f"{layers * BYTES_OF_A_LAYER / 1e6:,.0f} MB of weights in fp32, the largest tensor "
        f"{WIDTH * WIDTH * 4 / 1e6:.0f} MB; saved by {RANKS} ranks; medians of {rounds} rounds. Memory is the "
        "process's peak, with Python and torch."
    )
    return f"{about}\n\n{table(HEADER, rows)}"


def run_alone(what: str, way: str, source: Path, out: Path) -> dict[str, float]:
    """One export in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "export", what, way, str(source), str(out)],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def export(what: str, way: str, source: str, out: str) -> None:
    """Exports, and prints what it took."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if way == OURS:
        from rankload.loader.exporting.export import export_checkpoint

        begin, begin_cpu = time.perf_counter(), time.process_time()
        export_checkpoint(source, out, dtype="fp32")
    elif what.startswith("DCP"):
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        os.makedirs(out)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        dcp_to_torch_save(source, f"{out}/model.pt")
    else:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        begin, begin_cpu = time.perf_counter(), time.process_time()
        convert_zero_checkpoint_to_fp32_state_dict(source, out)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    written = 0
    for path in Path(out).iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        written += path.stat().st_size
    on_disk = time.perf_counter() - begin
    figures = {"seconds": seconds, "on_disk": on_disk, "cpu": cpu, "peak": peak_bytes(), "written": written}
    print(json.dumps(figures))


def peak_bytes() -> int:
    """The most that this process has had in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def compare(out: Path, ways: tuple[str, ...]) -> None:
    """Compares what the ways wrote, tensor by tensor. Raises `SystemExit` where they differ."""
    import torch
    from safetensors.torch import load_file

    ours: dict[str, Any] = {}
    for path in (out / ways[0].strip("*`")).glob("*.safetensors"):
        ours.update(load_file(path))
    (path,) = (out / ways[1].strip("*`")).iterdir()
    theirs = torch.load(path, mmap=True, weights_only=True)
    theirs = theirs.get("model", theirs)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise SystemExit(f"{ways}: they wrote other tensors")


def save(what: str, path: str, layers: str) -> None:
    """Every rank: saves the weights in one of the ways that `WAYS` names."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(int(layers))))
    if what.startswith("DCP"):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo")
        for layer in model:
            fully_shard(layer)
        dcp.save({"model": fully_shard(model).state_dict()}, checkpoint_id=path)
        torch.distributed.barrier()
    else:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": int(what.split()[1].strip(","))},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        engine.save_checkpoint(path)
    # Without a shutdown, in which threads of gloo may meet one that is gone.
    os._exit(0)


def sparse(root: Path, gigabytes: float) -> str:
    """Exports files that are all hole; returns a table. Raises `SystemExit` where that took too much memory."""
    largest = 500_000_000
    source = root / "sparse"
    source.mkdir()
    files = max(1, round(gigabytes * 1e9 / 5e9))
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        rest = int(gigabytes * 1e9 / files - largest) // 30 // 8192 * 8192
        sizes = {f"{number}.embedding": largest, **{f"{number}.{layer}.weight": rest for layer in range(30)}}
        header, position = {}, 0
        for key, size in sizes.items():
            header[key] = {
                "dtype": "BF16",
                "shape": [size // 4096, 2048],
                "data_offsets": [position, position],
            }
            size = size // 4096 * 4096
            header[key]["data_offsets"][1] = position = position + size
            weight_map[key] = name
        text = json.dumps(header).encode()
        with open(source / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = []
    for to in ("safetensors", "dcp"):
        code = (
            "import sys, time; from rankload.loader.exporting.export import export_checkpoint; "
            "begin = time.perf_counter(); "
            f"done = export_checkpoint({str(source)!r}, {str(root / 'out')!r}, to={to!r}); "
            "print(time.perf_counter() - begin, done.bytes); print(open('/proc/self/status').read())"
        )
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        seconds, written = done.stdout.splitlines()[0].split()
        (line,) = [one for one in done.stdout.splitlines() if one.startswith("VmHWM:")]
        peak = int(line.split()[1]) << 10
        if peak > 2 * largest + SPARE_BYTES:
            raise SystemExit(f"{to}: {peak:,} bytes of memory")
        rows.append((to, f"{float(seconds):.0f}", f"{int(written) / 1e6:,.0f}", f"{peak / 1e6:,.0f}"))
        shutil.rmtree(root / "out")
    about = (
        f"{gigabytes:g} GB of bf16 in {files} sparse files, the largest tensor {largest / 1e6:,.0f} MB; the bound is "
        f"{(2 * largest + SPARE_BYTES) / 1e6:,.0f} MB."
    )
    return f"{about}\n\n" + table(("to", "seconds", "written, MB", "peak memory, MB"), rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        export(*sys.argv[2:])
    elif sys.argv[1:2] == ["save"]:
        save(*sys.argv[2:])
    else:
        main()
