"""Restores models split over pipeline stages and tensor-parallel ranks at other data-parallel sizes; prints the table.

    python -m benchmarks.reshard_parallel [--work FOLDER] [--write docs/benchmarks.md]

As `benchmarks.reshard_matrix`; what a restore is held to is in tests/support/parallel_worker.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from .reshard_matrix import Case, Matrix, command_line, covering, tell  # noqa: E402

WORKER = SUPPORT / "parallel_worker.py"
SETTINGS = (
    "pipeline 0 fp32", "pipeline 1 bf16", "pipeline 1 fp32", "pipeline 1 BF16_Optimizer", "tensor 0 fp32",
    "tensor 0 bf16", "tensor 1 bf16", "tensor 2 bf16", "tensor 3 bf16", "pipeline and tensor 1 bf16",
)  # fmt: skip
SIZES = {"pipeline": (2, 4, 6), "tensor": (2, 4, 6), "pipeline and tensor": (4, 8)}
"""World sizes: one to three ranks for each of 2 stages, of 2 tensor-parallel ranks, or of 2 times 2."""


def split_of(setting: str) -> str:
    """Settings can only be restored into those of the same stages and tensor-parallel size."""
    return setting.rsplit(" ", 2)[0]


def _matrix(settings: tuple[str, ...]) -> Matrix:
    return Matrix("parallel", WORKER, settings, split_of, WORKER)


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for split, sizes in SIZES.items():
        settings = tuple(setting for setting in SETTINGS if split_of(setting) == split)
        cases += covering(_matrix(settings), settings, sizes)
    return cases


def main() -> None:
    arguments = command_line("reshard_parallel", __doc__).parse_args()
    tell([(_matrix(SETTINGS), SETTINGS, all_cases())], arguments)


if __name__ == "__main__":
    main()
