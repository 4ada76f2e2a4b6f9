"""Restores mixtures of experts of every setting into engines of every setting with the same experts; prints the table.

    python -m benchmarks.reshard_moe [--work FOLDER] [--write docs/benchmarks.md]

As `benchmarks.reshard_matrix`; what a restore is held to is in tests/support/moe_worker.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from moe_worker import SETTINGS  # noqa: E402

from .reshard_matrix import Case, Matrix, command_line, covering, tell  # noqa: E402

SIZES = {1: (1, 2, 3, 4), 2: (2, 4, 8), 4: (4, 8)}
"""World sizes by the widest expert-parallel size, which divides them."""


WORKER = SUPPORT / "moe_worker.py"


def layers_of(setting: str) -> str:
    """Settings can only be restored into those of the same experts."""
    return repr(SETTINGS[setting]["layers"])


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for layers in dict.fromkeys(map(layers_of, SETTINGS)):
        settings = [setting for setting in SETTINGS if layers_of(setting) == layers]
        widest = max(ep_size for _, ep_size in SETTINGS[settings[0]]["layers"])
        # A setting by itself is tried at every two sizes.
        alone = [(settings[0], n, settings[0], m) for n in SIZES[widest] for m in SIZES[widest]]
        cases += covering(_matrix(settings), settings, SIZES[widest]) if len(settings) > 1 else alone
    return cases


def _matrix(settings: Sequence[str]) -> Matrix:
    return Matrix("experts", WORKER, tuple(settings), layers_of, WORKER)


def main() -> None:
    arguments = command_line("reshard_moe", __doc__).parse_args()
    cases = all_cases()
    settings = list(dict.fromkeys(case[0] for case in cases))
    tell([(_matrix(settings), settings, cases)], arguments)


if __name__ == "__main__":
    main()
