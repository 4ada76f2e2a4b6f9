"""The lines that docs/frameworks.md gives for a framework, run as they stand."""

from __future__ import annotations

import re
from typing import Any

from places import REPOSITORY

PAGE = REPOSITORY / "docs" / "frameworks.md"


def run_lines(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the block of Python that follows ``<!-- lines: NAME -->``, with `names` as what the user's job has.

    Returns `names`, with what the lines have defined.
    """
    found = re.findall(
        rf"<!-- lines: {re.escape(name)} -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    if len(found) != 1:
        raise ValueError(f"{PAGE} has {len(found)} blocks of lines named {name}, not one")
    exec(compile(found[0], f"{PAGE}: {name}", "exec"), names)
    return names
