"""The store in memory does what torch's does, of which one rank made do before."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rankload.distributed.memory_store import MemoryStore
from torch._C._distributed_c10d import HashStore

KEYS = st.sampled_from(["a", "b"])
VALUES = st.sampled_from(["", "x", "y", "3"])
CALLS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES.map(str.encode)),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1, max_size=2)),
    st.tuples(st.just("delete_key"), KEYS),
    st.tuples(st.just("add"), st.just("n"), st.integers(0, 3)),
)


def answer(store: Any, call: tuple[Any, ...]) -> Any:
    name, *arguments = call
    found = getattr(store, name)(*arguments)
    return bytes(found) if name == "compare_set" else found


@given(st.lists(CALLS, max_size=12))
def test_it_answers_as_torchs_own(calls: list[tuple[Any, ...]]) -> None:
    ours, theirs = MemoryStore(), HashStore()
    for call in calls:
        assert answer(ours, call) == answer(theirs, call), call
    held = [key for key in ("a", "b") if theirs.check([key])]
    assert [bytes(one) for one in ours.multi_get(held)] == [bytes(theirs.get(key)) for key in held]


def test_a_session_alone_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from rankload.distributed.session import open_session_alone\n"
        "with open_session_alone() as session:\n"
        "    assert session.channel.gather('it', 1) == [1]\n"
        "    assert session.topology.ranks_by_node == ((0,),)\n"
        "assert 'torch' not in sys.modules\n"
    )
    # Whatever job this process may be part of.
    subprocess.run([sys.executable, "-c", code], check=True, env={"RANK": "3", "WORLD_SIZE": "8"}, timeout=60)
