"""What the gradients of adapters should be: torch's autograd through the dequantised model with LoRA's formula in each layer.

Nothing of squareq_fx's differentiation is used here; the branches are put in where the model calls `F.linear`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from laws import Replay, l2
from models import Staged, dequantized, make_slab, seeded
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import squareq_fx
from squareq_fx import Lora
from squareq_fx.calls import flatten_call
from squareq_fx.ir import adapter_inputs, program
from squareq_fx.passes import Adapt, Canonicalize, Differentiate, Outline, Quantize, Schedule, Stream

__all__ = [
    "Found",
    "adapters_for",
    "assert_equal",
    "by_autograd",
    "by_graph",
    "cotangents_for",
    "differentiated",
]

Key = tuple[str, str]


@dataclass(frozen=True)
class Found:
    """A model's outputs, and gradients by ("adapter" or "input", key); None where there is no dependence."""

    outputs: list[torch.Tensor]
    gradients: dict[Key, torch.Tensor | None]


def adapters_for(gm: fx.GraphModule, rank: int = 3, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random values for the graph's adapter inputs. The first size of rank is `rank`, each further one is larger by one.

    The branches are half as large as the layers, so that a deep model does not blow up and rounding with it.
    """
    ranks: dict[str, int] = {}
    values = {}
    with seeded(seed):
        for key, node in adapter_inputs(gm).items():
            shape = node.meta["val"].shape
            sizes = [ranks.setdefault(str(s), rank + len(ranks)) if isinstance(s, torch.SymInt) else s for s in shape]
            values[key] = (torch.randn(sizes) / (3 * max(sizes[1], 1)) ** 0.5).to(node.meta["val"].dtype)
    return values


def cotangents_for(outputs: Sequence[torch.Tensor], seed: int = 9) -> list[torch.Tensor]:
    with seeded(seed):
        return [torch.randn(o.shape).to(o.dtype) for o in outputs]


class _Branches(TorchFunctionMode):
    """y = F.linear(x, W, b)  ->  y + F.linear(F.linear(x, A), B) for the layers that have a pair."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        modules = dict(model.named_modules(remove_duplicate=False))
        layers = {key.removesuffix(".lora_A.weight") for key in adapters if key.endswith(".lora_A.weight")}
        self.layers = {id(modules[name].weight): name for name in layers}
        assert len(self.layers) == len(layers), "two layers of the dequantised model share a weight"
        self.adapters = adapters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.layers:
            name = self.layers[id(args[1])]
            down, up = (self.adapters[f"{name}.{side}.weight"] for side in ("lora_A", "lora_B"))
            result = result + (args[0] @ down.t()) @ up.t()
        return result


def by_autograd(
    staged: Staged,
    call: Mapping[str, Any],
    adapters: Mapping[str, torch.Tensor],
    cotangents: Sequence[torch.Tensor] | None = None,
    inputs: Iterable[str] = (),
    *,
    double: bool = False,
) -> Found:
    """The reference. `cotangents` are by default those `cotangents_for` gives; `double` computes it in float64."""

    def fresh(value: torch.Tensor) -> torch.Tensor:
        return value.detach().clone().to(torch.float64 if double and value.is_floating_point() else value.dtype)

    model = copy.deepcopy(staged.dequantized).double() if double else staged.dequantized
    leaves = {key: fresh(value).requires_grad_() for key, value in adapters.items()}
    call = {path: fresh(value).requires_grad_(path in set(inputs)) for path, value in call.items()}
    with _Branches(model, leaves):
        result = model(**call)
    outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    given = cotangents_for(outputs) if cotangents is None else cotangents
    wanted: dict[Key, torch.Tensor] = {("adapter", key): leaf for key, leaf in leaves.items()}
    wanted |= {("input", path): flatten_call(call)[path] for path in inputs}
    pairs = [(o, c) for o, c in zip(outputs, given, strict=True) if o.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [c for _, c in pairs], allow_unused=True)
    return Found([o.detach() for o in outputs], dict(zip(wanted, found)))


def by_graph(
    gm: fx.GraphModule,
    staged: Staged,
    call: Mapping[str, Any],
    adapters: Mapping[str, torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    **options: Any,
) -> Found:
    """The graph with its backward, run by `laws.Replay`, which holds every read against the loads and evicts."""
    results = Replay(gm, staged, given=adapters, cotangents=cotangents, **options).run(call)
    names = program(gm).gradients
    count = len(results) - len(names)
    return Found(results[:count], dict(zip(names, results[count:])))


def assert_equal(
    found: Found, expected: Found, limit: float = 1e-5, exact: Callable[[], Found] | None = None
) -> None:
    """Outputs and every gradient within `limit` in relative L2, the same ones missing.

    Args:
        exact: gives the same in float64. Some random models lose digits whoever computes them: then an error may be four times
            that of torch's own float32.
    """
    assert {key for key, g in expected.gradients.items() if g is not None} == set(found.gradients)
    pairs = [(f"output {i}", o, expected.outputs[i]) for i, o in enumerate(found.outputs)]
    pairs += [(key, g, expected.gradients[key]) for key, g in found.gradients.items()]  # type: ignore[misc]
    far = []
    for i, (name, value, wanted) in enumerate(pairs):
        assert value.shape == wanted.shape and value.dtype == wanted.dtype, name
        if l2(value, wanted) > limit:
            far.append((i, name, l2(value, wanted)))
    if not far:
        return
    assert exact is not None, far
    true = exact()
    truths = [*true.outputs, *(true.gradients[key] for key in found.gradients)]
    for i, name, error in far:
        _, value, wanted = pairs[i]
        assert l2(value, truths[i]) <= max(limit, 4 * l2(wanted, truths[i])), (name, error)  # type: ignore[arg-type]


def differentiated(
    model: nn.Module,
    *calls: Mapping[str, Any],
    lora: Lora | None = None,
    limit: float = 1e-5,
    **options: Any,
) -> tuple[Staged, fx.GraphModule]:
    """The graph with its backward, after its gradients were seen to be autograd's, streamed and placed too.

    Args:
        calls: the model's arguments, at one size or several; captured with the first.
        lora: adapters; None for none.
        options: of `Differentiate`.
    """
    slab = make_slab(model, calls[0])
    adapt = () if lora is None else (Adapt(lora),)
    passes = (Canonicalize(), Quantize(slab), *adapt, Outline(), Differentiate(**options), Stream(hold=2), Schedule(slots=4))
    final = squareq_fx.run(squareq_fx.capture(model, calls[0]), passes)
    graphs = {stage.name: stage.graph for stage in program(final).history}
    models = Staged(model, slab, graphs, dequantized(model, slab))
    for call in calls:
        adapters = adapters_for(final)
        expected = by_autograd(models, call, adapters, inputs=options.get("inputs", ()))
        for name in ("differentiate", "schedule"):
            found = by_graph(graphs[name], models, call, adapters, cotangents_for(expected.outputs))
            assert_equal(found, expected, limit)
    return models, graphs["differentiate"]
