"""squareq_fx: run diffusion models on INT8 weights streamed block by block, as transforms of a torch.fx graph.

    slab = squareq_fx.build_slab(model, "out/model_int8")
    gm = squareq_fx.compile(model, slab)
    gm(sample, timestep, encoder_hidden_states=...)
"""

from squareq_fx._version import __version__
from squareq_fx.api import compile
from squareq_fx.capture import capture
from squareq_fx.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from squareq_fx.compiled import CompiledModule
from squareq_fx.compute import Decisions
from squareq_fx.errors import (
    AdapterError,
    BindingError,
    CaptureError,
    PassError,
    RuntimeStateError,
    SlabError,
    SquareQError,
    VerificationError,
)
from squareq_fx.functional import value_and_grad
from squareq_fx.inlining import inline
from squareq_fx.lora import Lora
from squareq_fx.memory.forecast import Forecast, forecast
from squareq_fx.passes import default_passes, insert_after
from squareq_fx.pipeline import run
from squareq_fx.slab import Slab, build_slab, open_slab
from squareq_fx.views.draw import draw
from squareq_fx.views.explain import explain
from squareq_fx.views.show import diff, show

__all__ = [
    "AdapterError",
    "BindingError",
    "CaptureError",
    "CompiledModule",
    "Decisions",
    "Forecast",
    "Lora",
    "PassError",
    "RuntimeStateError",
    "Slab",
    "SlabError",
    "SquareQError",
    "VerificationError",
    "__version__",
    "build_slab",
    "capture",
    "compile",
    "default_passes",
    "diff",
    "draw",
    "explain",
    "forecast",
    "inline",
    "insert_after",
    "latest_checkpoint",
    "load_checkpoint",
    "open_slab",
    "run",
    "save_checkpoint",
    "show",
    "value_and_grad",
]
