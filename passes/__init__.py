"""The compiler's passes, one file each, and the order they run in.

A pass is any callable from GraphModule to GraphModule; options are fields of a frozen dataclass. Passes never import each
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

if __name__ == "passes":
    raise ImportError(
        "import squareq_fx.passes instead: `import passes` from the repository's folder would make a second copy of every class"
    )

from squareq_fx.compute import Compute, Decisions
from squareq_fx.errors import PassError
from squareq_fx.lora import Lora
from squareq_fx.passes.activations import Activations
from squareq_fx.passes.adapt import Adapt
from squareq_fx.passes.attention import Attention
from squareq_fx.passes.canonicalize import Canonicalize
from squareq_fx.passes.differentiate import Differentiate, Save
from squareq_fx.passes.fuse import Fuse
from squareq_fx.passes.outline import Outline
from squareq_fx.passes.quantize import Quantize
from squareq_fx.passes.schedule import Schedule
from squareq_fx.passes.stream import Stream
from squareq_fx.pipeline import Pass, pass_name
from squareq_fx.slab.reader import Slab

__all__ = [
    "Activations",
    "Adapt",
    "Attention",
    "Canonicalize",
    "Differentiate",
    "Fuse",
    "Outline",
    "Quantize",
    "Save",
    "Schedule",
    "Stream",
    "default_passes",
    "insert_after",
]


def default_passes(
    slab: Slab,
    *,
    compute: Compute | Mapping[str, Compute] | Decisions = "w8a16",
    keep: Iterable[str] = (),
    lora: Lora | None = None,
    save: Save | Mapping[str, Save] = "recompute",
    inputs: Iterable[str] = (),
    slots: int = 2,
    distance: int = 1,
    budget: int | None = None,
) -> tuple[Pass, ...]:
    """What `compile` runs.

    Args:
        compute, keep: of `Quantize`.
        lora: adds the adapters and the backward; None, and no `inputs`, for a model that only runs.
        save, inputs: of `Differentiate`.
        slots, distance, budget: of `Schedule`; `slots` also says how many segments `Stream` may hold.

    Raises:
        PassError: `distance` needs more slots, or an option has no such value.
    """
    inputs = tuple(inputs)
    adapt = () if lora is None else (Adapt(lora),)
    backward = () if lora is None and not inputs else (Differentiate(save, inputs),)
    placed = (Stream(hold=slots), Activations(), Fuse(), Attention(), Schedule(slots, distance, budget))
    return (Canonicalize(), Quantize(slab, compute, tuple(keep)), *adapt, Outline(), *backward, *placed)


def insert_after(passes: Iterable[Pass], name: str, *new: Pass) -> tuple[Pass, ...]:
    """The same passes with `new` after the one called `name`.

    Raises:
        PassError: no pass has that name.
    """
    passes = tuple(passes)
    names = [pass_name(p) for p in passes]
    if name not in names:
        raise PassError(f"there is no pass {name!r} to insert after; the passes are {', '.join(names)}")
    at = names.index(name) + 1
    return (*passes[:at], *new, *passes[at:])
