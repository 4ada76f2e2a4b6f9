"""From what a checkpoint's index says to real tensors and objects: everything that a restore needs to read.

The names come from two modules: `tensor_read` moves bytes, `realise` makes objects. Importing this one
imports torch.
"""

from __future__ import annotations

from .realise import realise
from .safe_types import require_safe
from .tensor_read import CopyRequest, Reader, read_tensor, torch_dtype
from .tree_walk import find_unknown

__all__ = ["CopyRequest", "Reader", "find_unknown", "read_tensor", "realise", "require_safe", "torch_dtype"]
