"""DeepSpeed's own way to another world size beside rankload's, in one run.

    python -m benchmarks.reshard_universal [--params 200M] [--rounds 2] [--warm] [--write docs/benchmarks.md]

Four ranks train and save with DeepSpeed; two restore. DeepSpeed's way is its offline conversion
(``ds_to_universal``, with its defaults) and a load of what that wrote; rankload's is a load of the native files.
They take turns. What was restored is compared, tensor by tensor, bit for bit, with what DeepSpeed reported before it
saved. The start of Python and imports are not counted, nor is the making of the engines.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SUPPORT = REPOSITORY / "tests" / "support"
sys.path[:0] = [str(REPOSITORY), str(SUPPORT)]

from processes import run_ranks  # noqa: E402
from reshard_worker import SETTINGS, engine_of, numbers, slug, tensors_of  # noqa: E402
from zero_model import LATER_DATA_SEED, train  # noqa: E402

from benchmarks.gauge import Cost, gauged, size_of  # noqa: E402
from benchmarks.measure import drop_from_page_cache  # noqa: E402
from benchmarks.tables import publish  # noqa: E402

SIZES = {
    "40M": {"vocabulary": 8192, "width": 1024, "blocks": 5},
    "200M": {"vocabulary": 8192, "width": 2048, "blocks": 7},
}
WANTED = {"40M": ("1 bf16", "3 bf16", "1 bf16 round-robin"), "200M": ("1 bf16", "3 bf16")}
SAVED_BY, RESTORED_BY = 4, 2
TAG = "here"
ZERO = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000, "sub_group_size": 50_000_000}
WAYS = ("DeepSpeed", "rankload")
KINDS = ("fp32", "exp_avg", "exp_avg_sq", "module", "frozen", "buffer")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reshard_universal", description=__doc__)
    parser.add_argument("--params", choices=tuple(SIZES), default="40M")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--write", help="a Markdown file whose table of this size is replaced")
    arguments = parser.parse_args()
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="rankload-universal-") as root:
        ranks(SAVED_BY, "save", root, arguments.params)
        for setting in WANTED[arguments.params]:
            for _ in range(arguments.rounds):
                for way in WAYS:
                    found = one(way, Path(root), setting, arguments.params, cold=not arguments.warm)
                    rows.setdefault((setting, way), []).append(found)
                    print(setting, way, found, file=sys.stderr, flush=True)
    text = table(rows, arguments.params, arguments.rounds, "warm" if arguments.warm else "cold")
    print(text)
    if arguments.write:
        publish(arguments.write, f"universal {arguments.params}", text)


def one(way: str, root: Path, setting: str, params: str, *, cold: bool) -> dict[str, Any]:
    """One restore, with all that must come before it; what it cost and what it left out."""
    folder = root / slug(setting, SAVED_BY)
    universal = folder / f"{TAG}_universal"
    convert: dict[str, Any] = asdict(
        Cost(io=dict.fromkeys(("rchar", "wchar", "read_bytes", "write_bytes"), 0))
    )
    left = 0
    try:
        if way == "DeepSpeed":
            cool(folder / TAG, cold)
            (convert,) = ranks(1, "convert", setting, str(folder / TAG), str(universal))
            left = size_of(universal)
            cool(universal, cold)
        else:
            cool(folder / TAG, cold)
        loads = ranks(RESTORED_BY, "restore", way, str(folder), setting, params)
    finally:
        shutil.rmtree(universal, ignore_errors=True)
    load_seconds = max(load["seconds"] for load in loads)
    return {
        "convert": convert["seconds"],
        "load": load_seconds,
        "total": convert["seconds"] + load_seconds,
        **{key: convert["io"][key] + sum(load["io"][key] for load in loads) for key in convert["io"]},
        **{key: max(convert[key], sum(load[key] for load in loads)) for key in ("anonymous", "resident")},
        "disk": convert["disk"],
        "left": left,
        "wrong": loads[0]["wrong"],
        "apart": loads[0]["apart"],
    }


def ranks(world_size: int, function: str, *arguments: str) -> list[dict[str, Any]]:
    finished = run_ranks(
        __file__,
        world_size,
        args=(function, *arguments),
        deadline_s=1500,
        env={"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(SUPPORT)},
        fork=False,
    )
    if any(rank.returncode != 0 for rank in finished):
        raise SystemExit(repr(finished))
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


def cool(folder: Path, cold: bool) -> None:
    for path in folder.rglob("*") if cold else ():
        if path.is_file():
            drop_from_page_cache(str(path))


def table(rows: dict[tuple[str, str], list[dict[str, Any]]], params: str, rounds: int, heat: str) -> str:
    """Markdown: medians of the rounds, and of the ratios within each."""
    lines = [
        f"About {params.removesuffix('M')} million parameters, saved by {SAVED_BY} ranks and restored by "
        f"{RESTORED_BY}, files {heat}, medians of {rounds} rounds. Bytes: asked of files, and in brackets what came "
        "from or went to the disk. Memory: the highest rise of private memory over all processes, and in brackets "
        "with pages of files.",
        "",
        "| saved by | way | convert, s | load, s | total, s | read, MB | written, MB | left on disk, MB (at the peak) "
        "| memory, MiB | not restored |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (setting, way), found in rows.items():
        middle = {key: median(one[key] for one in found) for key in found[0] if key not in ("wrong", "apart")}
        megabytes = {key: f"{value / 1e6:,.0f}" for key, value in middle.items()}
        wrong = sorted({line for one in found for line in one["wrong"]})
        apart = max(one["apart"] for one in found)
        convert = f"{middle['convert']:.1f}" if middle["convert"] else ""
        lines.append(
            f"| stage {setting} | {way} | {convert} | {middle['load']:.1f} | {middle['total']:.1f} "
            f"| {megabytes['rchar']} ({megabytes['read_bytes']}) | {megabytes['wchar']} ({megabytes['write_bytes']}) "
            f"| {megabytes['left']} ({megabytes['disk']}) "
            f"| {middle['anonymous'] / 2**20:,.0f} ({middle['resident'] / 2**20:,.0f}) "
            f"| {'; '.join(wrong) or 'nothing'}{f'; the next losses {apart:.1e} apart' if wrong else ''} |"
        )
    lines.append("")
    for setting in dict.fromkeys(setting for setting, _ in rows):
        theirs, ours = (rows[setting, way] for way in WAYS)
        ratios = [a["total"] / b["total"] for a, b in zip(theirs, ours, strict=True)]
        loads = [a["load"] / b["load"] for a, b in zip(theirs, ours, strict=True)]
        lines.append(
            f"- stage {setting}: DeepSpeed's way took {median(ratios):.1f} times as long ({min(ratios):.1f} to "
            f"{max(ratios):.1f}); its load without the conversion {median(loads):.1f} times."
        )
    from importlib.metadata import version

    lines += ["", f"torch {torch.__version__}, DeepSpeed {version('deepspeed')}, "
              f"Python {platform.python_version()}, {os.cpu_count()} CPUs, gloo."]  # fmt: skip
    return "\n".join(lines)


# --- what the ranks do -----------------------------------------------------------------------------------------------


def engine_for(setting: str, params: str, seed: int, **config: Any) -> Any:
    return engine_of(setting, seed, sizes=SIZES[params], zero=dict(ZERO), config=config)


def save(root: str, params: str) -> None:
    from journey_worker import start_deepspeed

    start_deepspeed()
    for setting in WANTED[params]:
        folder = Path(root, slug(setting, SAVED_BY))
        engine = engine_for(setting, params, seed=0)
        train(engine, 3, rank=0)
        engine.save_checkpoint(str(folder), tag=TAG, client_state={"epoch": 3})
        told = {
            "digests": dict(digests(tensors_of(engine, setting))),
            "frozen": [name for name, p in engine.module.named_parameters() if not p.requires_grad],
            "numbers": numbers(engine),
            "losses": train(engine, 2, rank=0, seed=LATER_DATA_SEED),
        }
        if torch.distributed.get_rank() == 0:
            (folder / "oracle.json").write_text(json.dumps(told))
        del engine
    finish({})


def convert(setting: str, native: str, universal: str) -> None:
    """DeepSpeed's command, as it would be called; in this process, whose imports are over."""
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = ["ds_to_universal.py", "--input_folder", native, "--output_folder", universal]
    if SETTINGS[setting]["stage"] < 3:
        sys.argv.append("--inject_missing_state")
    arguments = ds_to_universal.parse_arguments()
    with gauged(every_s=0.2, family=True, folder=Path(universal)) as cost:
        ds_to_universal.main(arguments)
    print(json.dumps(asdict(cost)))


def restore(way: str, folder: str, setting: str, params: str) -> None:
    from journey_worker import start_deepspeed
    from rankload.loader import State, load

    start_deepspeed()
    config = {"checkpoint": {"load_universal": True}} if way == "DeepSpeed" else {}
    engine = engine_for(setting, params, seed=5, **config)
    torch.distributed.barrier()
    with gauged() as cost:
        if way == "DeepSpeed":
            _, client_state = engine.load_checkpoint(folder)
        else:
            client_state = load(folder, State(engine), progress_bar=False).extra
        torch.distributed.barrier()
    oracle = json.loads(Path(folder, "oracle.json").read_text())
    frozen = {f"module/{name}" for name in oracle["frozen"]}
    found = dict(digests(tensors_of(engine, setting, sound=False)))
    wrong = counted(oracle["digests"], found, frozen)
    told = json.loads(json.dumps(numbers(engine)))
    wrong += [name for name, value in oracle["numbers"].items() if told[name] != value]
    if (client_state or {}).get("epoch") != 3:
        wrong.append("client_state")
    losses = train(engine, 2, rank=0, seed=LATER_DATA_SEED)
    apart = max(abs(a / b - 1) for a, b in zip(losses, oracle["losses"], strict=True))
    del engine
    finish({**asdict(cost), "wrong": wrong, "apart": apart})


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, str]]:
    for name, tensor in tensors:
        yield name, hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def counted(expected: dict[str, str], found: dict[str, str], frozen: set[str]) -> list[str]:
    """``N of M KIND`` for each kind of which some tensors are not what was saved."""

    def kind(name: str) -> str:
        return "frozen" if name in frozen else name.partition("/")[0]

    every = Counter(map(kind, expected))
    wrong = Counter(kind(name) for name in expected if found.get(name) != expected[name])
    return [f"{wrong[kind]} of {every[kind]} {kind}" for kind in KINDS if wrong[kind]]


def finish(line: dict[str, Any]) -> None:
    gc.collect()
    print(json.dumps(line))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    name, *rest = sys.argv[1:] if sys.argv[1:2] and not sys.argv[1].startswith("-") else ["main"]
    globals()[name](*rest)
