"""torchrun's agent of one node: ``agent.py ARGUMENTS`` as torchrun takes them."""

from __future__ import annotations

import sys

from torch.distributed.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
