"""Small models for the compiler's tests: random ones built from named specs, and tiny diffusers backbones.

A spec is a frozen tree of dataclasses whose repr is the model in one line, so that a failing property prints
what it failed on. Everything expensive (model, slab, capture, the whole pipeline) is cached by spec.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import fx, nn

import squareq_fx
from squareq_fx.ir import program
from squareq_fx.kernels.reference import dequantize
from squareq_fx.lora import Lora
from squareq_fx.passes import Save
from squareq_fx.slab import Slab

__all__ = [
    "EXAMPLES",
    "SIZES",
    "Attend",
    "Block",
    "Const",
    "Conv",
    "Drop",
    "Function",
    "Gate",
    "Idle",
    "InPlace",
    "Mlp",
    "Norm",
    "OtherBias",
    "Residual",
    "Seq",
    "Spec",
    "Split",
    "Staged",
    "Table",
    "Tiny",
    "Twice",
    "dequantized",
    "few",
    "make_slab",
    "make_staged",
    "scratch",
    "seeded",
    "specs",
    "staged",
    "training",
]

FEATURES, CONTEXT, CLASSES = 7, 6, 11
SIZES = ((2, 5, 3), (1, 9, 4), (3, 4, 6))
"""(batch, tokens, context tokens) that one capture is run at."""

_SCRATCH = tempfile.TemporaryDirectory(prefix="squareq_fx_tests_")


def scratch(name: str) -> Path:
    """A fresh path below a folder that goes with the interpreter."""
    return Path(tempfile.mkdtemp(dir=_SCRATCH.name)) / name


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from `seed` on, and its old state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---------------------------------------------------------------- the pieces of a block: [B, S, W] -> [B, S, W]


class _Part:
    def build(self, width: int) -> nn.Module:
        raise TypeError(f"{type(self).__name__} builds nothing")

    def __repr__(self) -> str:
        values = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        return type(self).__name__ + (f"({', '.join(map(repr, values))})" if values else "")


@dataclass(frozen=True, repr=False)
class Mlp(_Part):
    hidden: int
    bias: bool = True

    def build(self, width: int) -> nn.Module:
        return _Mlp(width, self.hidden, self.bias)


@dataclass(frozen=True, repr=False)
class Norm(_Part):
    def build(self, width: int) -> nn.Module:
        return _Ignoring(nn.LayerNorm(width))


@dataclass(frozen=True, repr=False)
class Attend(_Part):
    """Attention to the second input of the block."""

    def build(self, width: int) -> nn.Module:
        return _Attend(width)


@dataclass(frozen=True, repr=False)
class Gate(_Part):
    """Several outputs of one operation: chunk."""

    def build(self, width: int) -> nn.Module:
        return _Gate(width)


@dataclass(frozen=True, repr=False)
class Split(_Part):
    """Several outputs of unequal size: split_with_sizes; one is not used."""

    def build(self, width: int) -> nn.Module:
        return _Split(width)


@dataclass(frozen=True, repr=False)
class InPlace(_Part):
    """x += 1; x[:, 0] = 0"""

    def build(self, width: int) -> nn.Module:
        return _InPlace()


@dataclass(frozen=True, repr=False)
class Drop(_Part):
    def build(self, width: int) -> nn.Module:
        return _Ignoring(nn.Dropout(0.3))


@dataclass(frozen=True, repr=False)
class Conv(_Part):
    def build(self, width: int) -> nn.Module:
        return _Conv(width)


@dataclass(frozen=True, repr=False)
class Table(_Part):
    """Views of a parameter of the block itself."""

    def build(self, width: int) -> nn.Module:
        return _Table(width)


@dataclass(frozen=True, repr=False)
class Const(_Part):
    """A plain tensor attribute, and a tensor made in the forward."""

    def build(self, width: int) -> nn.Module:
        return _Const(width)


@dataclass(frozen=True, repr=False)
class OtherBias(_Part):
    """F.linear with a layer's weight and a bias that is not the layer's."""

    def build(self, width: int) -> nn.Module:
        return _OtherBias(width)


@dataclass(frozen=True, repr=False)
class Idle(_Part):
    """A layer that is never called."""

    def build(self, width: int) -> nn.Module:
        return _Idle(width)


@dataclass(frozen=True, repr=False)
class Seq(_Part):
    parts: tuple[_Part, ...]

    def build(self, width: int) -> nn.Module:
        return _Seq([part.build(width) for part in self.parts])

    def __repr__(self) -> str:
        return " . ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class Residual(_Part):
    part: _Part

    def build(self, width: int) -> nn.Module:
        return _Residual(self.part.build(width))


@dataclass(frozen=True, repr=False)
class Twice(_Part):
    """One module called two times."""

    part: _Part

    def build(self, width: int) -> nn.Module:
        return _Twice(self.part.build(width))


class _Ignoring(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=not bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class _Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(CONTEXT, width, bias=False)
        self.v = nn.Linear(CONTEXT, width, bias=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unsqueeze(1) for y in (self.q(x), self.k(context), self.v(context)))
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        return a * torch.sigmoid(b)


class _Split(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.more = nn.Linear(width, width + 4)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        y, gate, _ = self.more(x).split([x.shape[-1], 1, 3], dim=-1)
        return y * gate


class _InPlace(nn.Module):
    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x += 1
        x[:, 0] = 0
        return x


class _Conv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class _Table(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, width))
        self.register_buffer("steps", torch.arange(float(width)) / width, persistent=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        scale, shift = self.table[None, 1:].unbind(1)
        return x * (1 + scale) + shift + self.steps


class _Const(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = torch.linspace(-1, 1, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x + self.offset.to(x.dtype) * torch.tensor(0.5, device=x.device)


class _OtherBias(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.other = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight, self.other)


class _Idle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.never = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x


class _Seq(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        for i, part in enumerate(parts):
            self.add_module(f"p{i}", part)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = part(x, context)
        return x


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x, context)


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x, context), context)


# ---------------------------------------------------------------------------------------------- whole models


@dataclass(frozen=True)
class Spec:
    """A model: `repeat` blocks of one structure between an embedding and a head.

    Attributes:
        view: each block also returns a view of a parameter of its own, which the next one reads.
        labels: a class id a sample, through an nn.Embedding.
        tied: "" or what shares a weight: "linears" (two layers), "embedding" (with the head), "module" (one
            layer registered in every block).
        visits: how often the list of blocks is run through.
    """

    block: _Part
    repeat: int = 2
    width: int = 12
    view: bool = False
    labels: bool = False
    tied: str = ""
    visits: int = 1

    def build(self) -> Tiny:
        """In eval mode, and frozen: whether a weight requires grad decides how some CPU kernels round."""
        with seeded(len(repr(self))):
            return Tiny(self).eval().requires_grad_(False)

    def inputs(self, batch: int = 2, tokens: int = 5, context: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
        with seeded(seed):
            call = {"x": torch.randn(batch, tokens, FEATURES), "context": torch.randn(batch, context, CONTEXT)}
            if self.labels:
                call["labels"] = torch.randint(0, CLASSES, (batch,))
        return call


class Block(nn.Module):
    def __init__(self, spec: Spec, shared: nn.Linear | None) -> None:
        super().__init__()
        self.body = spec.block.build(spec.width)
        self.shared = shared
        self.handed_on = nn.Parameter(torch.randn(2, spec.width)) if spec.view else None

    def forward(
        self, x: torch.Tensor, context: torch.Tensor, handed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if handed is not None:
            x = x + handed
        x = self.body(x, context)
        if self.shared is not None:
            x = x + self.shared(x)
        return x, None if self.handed_on is None else self.handed_on[1]


class Tiny(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.visits = spec.visits
        self.embed = nn.Linear(FEATURES, spec.width)
        self.classes = nn.Embedding(CLASSES, spec.width) if spec.labels else None
        shared = nn.Linear(spec.width, spec.width) if spec.tied == "module" else None
        self.blocks = nn.ModuleList([Block(spec, shared) for _ in range(spec.repeat)])
        self.pre = nn.Linear(spec.width, spec.width)
        self.post = nn.Linear(spec.width, spec.width)
        if spec.tied == "linears":
            self.post.weight = self.pre.weight
        self.head = nn.Linear(spec.width, CLASSES, bias=False)
        if spec.tied == "embedding" and self.classes is not None:
            self.head.weight = self.classes.weight

    def forward(self, x: torch.Tensor, context: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.pre(self.embed(x))
        if self.classes is not None:
            x = x + self.classes(labels)[:, None]
        handed = None
        for _ in range(self.visits):
            for block in self.blocks:
                x, handed = block(x, context, handed)
        if handed is not None:
            x = x - handed
        return self.head(self.post(x))


class Function(nn.Module):
    """A model whose forward(x) is `body(self, x)`, with these parameters and modules."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any], **state: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.body = body
        for name, value in state.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


_LEAVES = st.one_of(
    st.builds(Mlp, st.sampled_from([5, 8, 16, 33]), st.booleans()),
    st.sampled_from([Norm(), Attend(), Gate(), Split(), InPlace(), Drop(), Conv(), Table(), Const(), OtherBias(), Idle()]),
)
_BLOCKS = st.recursive(
    _LEAVES,
    lambda part: st.one_of(
        st.builds(Residual, part),
        st.builds(Twice, part),
        st.builds(Seq, st.lists(part, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=4,
)


def specs() -> st.SearchStrategy[Spec]:
    """Models of up to 4 blocks with up to 4 operations each, any of the odd features at once."""
    return st.builds(
        Spec,
        block=_BLOCKS,
        repeat=st.integers(1, 4),
        width=st.sampled_from([7, 8, 12]),
        view=st.booleans(),
        labels=st.booleans(),
        tied=st.sampled_from(["", "", "linears", "embedding", "module"]),
        visits=st.sampled_from([1, 1, 2]),
    )


few = settings(max_examples=6, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""A capture takes a second, so there are few examples, and a failing one (which prints in a line) is not shrunk."""

EXAMPLES = (
    Spec(Seq((Residual(Seq((Norm(), Attend()))), Residual(Mlp(33)))), repeat=3),
    Spec(
        Seq((Residual(Seq((Norm(), Gate(), Drop()))), OtherBias(), Twice(Mlp(5, bias=False)))),
        view=True,
        labels=True,
        tied="embedding",
        visits=2,
    ),
    Spec(Seq((InPlace(), Split(), Table(), Mlp(16), Idle())), tied="module"),
    Spec(Seq((Conv(), Const())), repeat=1, tied="linears"),
)
"""Ordinary blocks; views, tied weights and two visits; writing in place and a shared layer; no block at all."""


# ------------------------------------------------------------------------------------ cached, by spec


@dataclass(frozen=True)
class Staged:
    """A model, its slab, and the graph after each pass."""

    model: nn.Module
    slab: Slab
    graphs: dict[str, fx.GraphModule]
    dequantized: nn.Module


def make_slab(model: nn.Module, example_inputs: Any = None, **options: Any) -> Slab:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return squareq_fx.build_slab(model, scratch("slab"), example_inputs=example_inputs, progress=False, **options)


def make_staged(model: nn.Module, example_inputs: Any = None, until: str | None = None) -> Staged:
    slab = make_slab(model, example_inputs)
    graph = squareq_fx.capture(model, example_inputs, slab=slab)
    final = squareq_fx.run(graph, squareq_fx.default_passes(slab), until=until)
    graphs = {stage.name: stage.graph for stage in program(final).history}
    return Staged(model, slab, graphs, dequantized(model, slab))


@functools.cache
def staged(spec: Spec) -> Staged:
    return make_staged(spec.build(), spec.inputs())


@functools.cache
def training(spec: Spec, save: Save = "recompute", inputs: tuple[str, ...] = ("x", "context"), **options: Any) -> Staged:
    """`staged`, with adapters on every Linear layer and the backward.

    Args:
        save, inputs: of `Differentiate`.
        options: of `Lora` and of `default_passes`.
    """
    models = staged(spec)
    lora = Lora(**{"rank": 3, "targets": "all", **{k: options.pop(k) for k in list(options) if hasattr(Lora(), k)}})
    passes = squareq_fx.default_passes(models.slab, lora=lora, save=save, inputs=inputs, **{"slots": 4, **options})
    final = squareq_fx.run(models.graphs["capture"], passes)
    graphs = {stage.name: stage.graph for stage in program(final).history}
    return Staged(models.model, models.slab, graphs, models.dequantized)


def dequantized(model: nn.Module, slab: Slab) -> nn.Module:
    """The model with every slab layer's weight replaced by what the slab says it is.

    A weight that two layers share is quantised once and stays shared; one shared with an embedding becomes the
    layer's own, because only the layer is quantised.
    """
    result = copy.deepcopy(model)
    layers = dict(result.named_modules(remove_duplicate=False))
    for name, entry in slab.layers.items():
        parts = (slab.tensor(key) for key in (entry.qweight_key, entry.scale_key, entry.zero_point_key))
        weight = dequantize(*parts, entry.orig_shape[1])
        layers[name].weight = nn.Parameter(weight.to(layers[name].weight.dtype), requires_grad=False)
    return result
