"""Adapters with random values, and what a model gives with one added to its weights by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from backbones import backbone, calls
from models import seeded
from torch import nn

from squareq_fx.adapters import Adapter, LayerAdapter

__all__ = [
    "assert_same",
    "assert_same_effect",
    "delta",
    "effect",
    "fresh",
    "linear_layers",
    "make",
    "output",
    "randomise",
    "with_weights_added",
]


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path to (out, in) of every Linear."""
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}  # type: ignore[misc]


def make(
    layers: Mapping[str, tuple[int, int]],
    names: Iterable[str] | None = None,
    rank: Callable[[int], int] = lambda i: 4,
    alpha: Callable[[int], float] = lambda i: 2.0,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """An adapter of the i-th layer's `rank(i)` and `alpha(i)`, its values exact in `dtype`."""
    with seeded(7):
        parts = {}
        for i, name in enumerate(layers if names is None else names):
            out, size = layers[name]
            down, up = torch.randn(rank(i), size) / 4, torch.randn(out, rank(i)) / 4
            parts[name] = LayerAdapter(down.to(dtype).float(), up.to(dtype).float(), alpha(i))
        return Adapter(parts)


def delta(part: LayerAdapter) -> torch.Tensor:
    return (part.alpha / part.rank) * (part.up.double() @ part.down.double())


def effect(part: LayerAdapter) -> torch.Tensor:
    """alpha / r * B A x, float64, for 16 random x: two adapters that agree on them are the same matrix, almost surely."""
    with seeded(11):
        x = torch.randn(part.down.shape[1], 16, dtype=torch.float64)
    return part.scaling * (part.up.double() @ (part.down.double() @ x))


def assert_same_effect(got: Mapping[str, LayerAdapter], expected: Mapping[str, LayerAdapter]) -> None:
    assert set(got) == set(expected)
    for name, part in expected.items():
        wanted = effect(part)
        torch.testing.assert_close(effect(got[name]), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def assert_same(got: Adapter, expected: Adapter) -> None:
    """Same layers, A, B and alpha, bit for bit."""
    assert set(got.layers) == set(expected.layers)
    for name, part in expected.layers.items():
        torch.testing.assert_close(got.layers[name].down, part.down, rtol=0, atol=0)
        torch.testing.assert_close(got.layers[name].up, part.up, rtol=0, atol=0)
        assert got.layers[name].alpha == part.alpha, name


def fresh(family: str) -> nn.Module:
    """A copy of the family's tiny model, for a test to change."""
    return copy.deepcopy(backbone(family))


def output(model: nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        call: dict[str, Any] = calls(family, 2)
        return model(**call, return_dict=False)[0]


def with_weights_added(family: str, adapter: Adapter) -> torch.Tensor:
    """The output with W + alpha / r * B A."""
    model = fresh(family)
    modules = dict(model.named_modules())
    for name, part in adapter.layers.items():
        modules[name].weight += delta(part).float()  # type: ignore[operator]
    return output(model, family)


def randomise(model: nn.Module) -> None:
    """B is zero after PEFT's injection; here it gets values."""
    with torch.no_grad(), seeded(3):
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
