"""Restores models split over pipeline stages and tensor-parallel ranks at other data-parallel sizes; prints the table.

    python -m benchmarks.reshard_parallel [--work FOLDER] [--write docs/reshard.md]

As `benchmarks.reshard_matrix`; what a restore is held to is in tests/parallel_worker.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from .published import publish  # noqa: E402
from .reshard_matrix import Case, Matrix, covering, run, table  # noqa: E402

WORKER = TESTS / "parallel_worker.py"
SETTINGS = (
    "pipeline 0 fp32", "pipeline 1 bf16", "pipeline 1 fp32", "pipeline 1 BF16_Optimizer", "tensor 0 fp32",
    "tensor 0 bf16", "tensor 1 bf16", "tensor 2 bf16", "tensor 3 bf16", "pipeline and tensor 1 bf16",
)  # fmt: skip
SIZES = {"pipeline": (2, 4, 6), "tensor": (2, 4, 6), "pipeline and tensor": (4, 8)}
"""World sizes: one to three ranks for each of 2 stages, of 2 tensor-parallel ranks, or of 2 times 2."""


def split_of(setting: str) -> str:
    """Settings can only be restored into those of the same stages and tensor-parallel size."""
    return setting.rsplit(" ", 2)[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reshard_parallel", description=__doc__)
    parser.add_argument("--work", help="a folder that is kept, with what was saved and what was found")
    parser.add_argument("--write", help="a Markdown file whose table is replaced")
    arguments = parser.parse_args()
    matrix = Matrix("parallel", WORKER, SETTINGS, split_of, WORKER)
    cases: list[Case] = []
    for split, sizes in SIZES.items():
        settings = tuple(setting for setting in SETTINGS if split_of(setting) == split)
        cases += covering(Matrix("parallel", WORKER, settings, split_of, WORKER), settings, sizes)
    with tempfile.TemporaryDirectory(prefix="rankload-reshard-") as scratch:
        work = Path(arguments.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        results = run(matrix, cases, work)
    text = table(matrix, SETTINGS, cases, results)
    print(text)
    if arguments.write:
        publish(Path(arguments.write), matrix.name, text)
    if any(results[case]["problems"] for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
