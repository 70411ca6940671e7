"""What `compile` gets its graphs from: the program cache, or else capture and the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn

from squareq_fx.collector import resumed
from squareq_fx.ir import Stage, program
from squareq_fx.pipeline import Pass, run
from squareq_fx.slab import Slab
from squareq_fx.stored.cache import ProgramCache, program_key

__all__ = ["CachedGraphs"]

_Show = Callable[[str], None]


@dataclass(frozen=True)
class CachedGraphs:
    """The graphs of one model after any passes.

    Args:
        model, slab: what the graphs are of.
        capture: traces the model, if its graph is not in the cache: `squareq_fx.capture.capture`.
        traced_as: the options of `capture` and `program_key`: `example_inputs`, `device`, `block_pattern`.
        cache: where graphs are read and kept; None: each is made.
        status: shows that work is going on while it is entered, and yields what shows a text about it.
        observe: called with each stage, be it made or read.
    """

    model: nn.Module
    slab: Slab
    capture: Callable[..., fx.GraphModule]
    traced_as: Mapping[str, Any]
    cache: ProgramCache | None
    status: Callable[[], AbstractContextManager[_Show]]
    observe: Callable[[Stage], None] | None

    def after(
        self, passes: tuple[Pass, ...], until: str | None = None, captured: fx.GraphModule | None = None
    ) -> fx.GraphModule:
        """The graph after these passes, from the cache if it is there.

        Args:
            until: stop after the pass of this name.
            captured: begin with this graph, which `after((), "capture")` returned; its stages are not observed again.

        Raises:
            CaptureError: see `capture`.
            PassError, VerificationError: see `pipeline.run`.
        """
        with self.status() as show:
            make = partial(self._make, passes, until, captured, show)
            if self.cache is None:
                return make()
            key = partial(program_key, self.model, self.slab, passes, until=until, **self.traced_as)
            graph, was_read = self.cache.get(key, self.model, make)
            if was_read:
                seen = len(program(captured).history) if captured is not None else 0
                for stage in program(graph).history[seen:]:
                    self._report(show, stage)
            return graph

    def _make(
        self, passes: tuple[Pass, ...], until: str | None, captured: fx.GraphModule | None, show: _Show
    ) -> fx.GraphModule:
        show("capturing; up to half a minute for the largest models")
        with resumed():
            if captured is None:
                captured = self.capture(self.model, slab=self.slab, **self.traced_as)
            return run(captured, passes, until=until, observe=partial(self._report, show))

    def _report(self, show: _Show, stage: Stage) -> None:
        show(f"{stage.name} done in {stage.seconds:.1f} s")
        if self.observe is not None:
            self.observe(stage)
