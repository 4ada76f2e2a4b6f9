"""What messages call a saved value."""

from __future__ import annotations

from typing import Any

import pytest
from rankload.loader.saved.values import GlobalName, InertArray, InertObject, LazyTensor, StorageRef, kind_of


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (LazyTensor(StorageRef("f", "0", 0, 4, None), "float32", (1,), (1,)), "tensor"),
        (InertObject("torch.device", ("cpu",)), "torch.device"),
        (InertArray("<f4", (1,), bytes(4)), "NumPy array"),
        (GlobalName("torch.float32"), "torch.float32"),
        ({}, "dict"),
        (None, "NoneType"),
    ],
)
def test_a_saved_value_is_called_what_it_was(value: Any, kind: str) -> None:
    assert kind_of(value) == kind
