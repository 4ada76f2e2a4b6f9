"""One local restore in a fresh process: ``METHOD FILE MEGABYTES``; prints seconds and extra memory as JSON.

Imports and the destination's allocation are over when the clock starts; torch's import is nobody's gain.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import torch
from rankload.loader import State, load_checkpoint

from .measure import make_model, measured

METHODS = ("torch.load", "torch.load(mmap)", "rankload", "rankload, verify=off", "plain read")


def restore(method: str, path: str, model: torch.nn.Module, buffer: bytearray) -> None:
    if method == "plain read":
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    elif method.startswith("rankload"):
        verify = "off" if method.endswith("off") else "during"
        load_checkpoint(path, State(model=model), load_weights_only=True, options={"verify": verify})
    else:
        model.load_state_dict(torch.load(path, mmap=method.endswith("(mmap)"), weights_only=True))


def main(method: str, path: str, megabytes: str) -> None:
    torch.set_num_threads(1)
    model = make_model(int(megabytes), seed=1)
    expected = make_model(int(megabytes), seed=0)
    buffer = bytearray(16 << 20)
    with measured() as result:
        restore(method, path, model, buffer)
    if method != "plain read":
        pairs = zip(model.parameters(), expected.parameters(), strict=True)
        if not all(torch.equal(one, two) for one, two in pairs):
            raise SystemExit(f"{method} did not restore the weights")
    print(json.dumps({**asdict(result), "bytes": os.path.getsize(path)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
