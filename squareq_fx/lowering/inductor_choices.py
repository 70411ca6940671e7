"""Choices of TorchInductor's code generator that its own heuristics make for other models than ours."""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices

__all__ = ["RowsInRegisters"]

_NARROWEST, _WIDEST = 1024, 16384
"""Elements of a row: shorter ones are left to Inductor's own choice, which was the faster one for the 128 of an attention head
on an H200; longer ones do not fit the registers of its eight warps, 64 each."""


class RowsInRegisters(InductorChoices):
    """Kernels that reduce rows of known width read a row once, for all the reductions that were fused over it.

    A norm, its modulation and the quantisation of the result are four reductions of one row. Inductor holds at most 1024
    elements of a row in registers (64 where it cannot tell how the row lies in memory, which a `cat` is enough for) and reads
    longer ones again for each reduction.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        from torch._inductor.runtime.hints import ReductionHint

        usual = InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
        if usual or cooperative_reduction or features.get_reduction_hint() not in (ReductionHint.INNER, ReductionHint.DEFAULT):
            return usual
        width = features.reduction_numel
        return bool(getattr(width, "is_Integer", False)) and _NARROWEST < int(width) <= _WIDEST
