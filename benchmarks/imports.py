"""One import, in a process of its own: how long `from rankload import load` takes beyond torch, and what it brings.

python -m benchmarks.imports
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    import torch.distributed  # noqa: F401 (what is measured comes after it)

    before = set(sys.modules)
    begin = time.perf_counter()
    from rankload import load

    seconds = time.perf_counter() - begin
    new = set(sys.modules) - before
    ours = sum(name.split(".")[0] == load.__module__.split(".")[0] for name in new)
    print(json.dumps({"seconds": seconds, "ours": ours, "others": len(new) - ours}))


if __name__ == "__main__":
    main()
