"""What the ranks of test_stores_real.py do. An assertion ends a rank's process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from modules_worker import check_against_oracle, oracle_of, plain_job
from rankload.loader import AccessError, NotFoundError, load


def main(cache_dir: str, checkpoints: str) -> None:
    """Prints a line for each of three loads: of what is there, of what is not, and with a wrong secret."""
    torch.distributed.init_process_group("gloo")
    storage = json.loads(os.environ["STORAGE_OPTIONS"])
    options = {"storage_options": storage, "cache_dir": cache_dir}
    state = plain_job()
    load("s3://checkpoints/s1-w4", state, options=options)
    check_against_oracle(state, oracle_of(Path(checkpoints, "s1-w4")), low=False, weights_only=False)
    print("restored")
    refused = {**options, "storage_options": {**storage, "secret": f"wrong-{storage['secret']}"}}
    for path, given in (("s3://checkpoints/s1-w4/no-such", options), ("s3://checkpoints/s1-w4", refused)):
        try:
            load(path, plain_job(), options=given)
        except (AccessError, NotFoundError) as error:
            assert storage["secret"] not in str(error)
            print(type(error).__name__)
    torch.distributed.destroy_process_group()
