"""Chooses which of a parameter's saved tensors fill its weights, and which its fp32 masters. Pure."""

from __future__ import annotations

from typing import NamedTuple

from ...saved.tensor import SavedTensor


class ParameterSources(NamedTuple):
    """What a parameter is filled from."""

    low: SavedTensor | None
    """Fills the weights that the module computes with; None where ranks cast their shares of these from masters."""
    masters: SavedTensor | None
    """Fills the masters; None where they are cast from the module's weights, or are these and ``low`` fills them."""


def choose_sources(
    value: SavedTensor, master: SavedTensor | None, dtype: str, *, apart: bool, trained_in_shares: bool
) -> ParameterSources:
    """What fills a parameter of `dtype`, given its saved weights and, where the checkpoint has it, its saved master.

    Args:
        apart: whether the parameter's masters are other memory than its weights.
        trained_in_shares: whether each rank keeps a share of it (stage 3), and the optimizer updates it.
    """
    # A module of another dtype than saved is filled from the masters, which are more precise.
    source = value if master is None or value.dtype == dtype else master
    from_shares = trained_in_shares and source is master
    if not apart:
        masters = source if from_shares else None
    elif master is not None:
        masters = master
    else:
        masters = None if value.dtype == dtype else value
    return ParameterSources(None if from_shares else source, masters)
