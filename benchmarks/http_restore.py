"""One restore over HTTP, as one rank under torchrun: ``METHOD URL MEGABYTES FOLDER`` to FOLDER/rankN.json."""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.request
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rankload.loader import State, load_checkpoint

from .measure import make_model, measured

METHODS = ("each rank downloads", "rankload, once per node")


def restore(method: str, url: str, model: torch.nn.Module, folder: Path) -> None:
    if method == "each rank downloads":
        own = folder / f"own-{dist.get_rank()}.pt"
        with urllib.request.urlopen(url) as response, own.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
        model.load_state_dict(torch.load(own, mmap=True, weights_only=True))
        own.unlink()
    else:
        options = {"cache_dir": str(folder / "cache")}
        load_checkpoint(url, State(model=model), load_weights_only=True, progress_bar=False, options=options)


def main(method: str, url: str, megabytes: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = make_model(int(megabytes), seed=1)
    dist.barrier()
    with measured() as result:
        restore(method, url, model, Path(folder))
        dist.barrier()
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(asdict(result)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
