"""Sizes that a forward wants to be multiples: said in a second trace where the first has one size in two spellings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Function, make_slab, seeded
from test_capture import vals
from torch import nn
from torch.nn import functional as F

import squareq_fx
from squareq_fx import BindingError
from squareq_fx.ir import program


class Mix(nn.Module):
    """A residual layer over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.down(F.gelu(self.up(tokens))).transpose(1, 2).unflatten(2, x.shape[2:])


class Levels(nn.Module):
    """A UNet of three levels that nobody knows."""

    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        self.asks = asks
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.halve = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(2))
        self.join = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))
        self.blocks = nn.ModuleList(Mix(8) for _ in range(3))

    def forward(self, sample: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.asks and (sample.shape[2] % 4 or sample.shape[3] % 4):
            raise ValueError("height and width must be multiples of 4")
        whole = self.first(sample if bias is None else sample + bias)
        half = self.blocks[0](self.halve[0](whole))
        x = self.blocks[1](self.halve[1](half))
        x = self.blocks[2](self.join[0](torch.cat([F.interpolate(x, scale_factor=2.0), half], dim=1)))
        return self.last(self.join[1](torch.cat([F.interpolate(x, scale_factor=2.0), whole], dim=1)))


def levels(**options: Any) -> Levels:
    with seeded(0):
        return Levels(**options).eval().requires_grad_(False)


@pytest.mark.parametrize(("asks", "batch"), [(True, 1), (True, 2), (False, 2)])
def test_a_unet_of_three_levels_trains_at_every_size_it_takes(asks: bool, batch: int) -> None:
    """Before, its backward found the gradient of a skip in one spelling and its size in another."""
    model, call = levels(asks=asks), {"sample": torch.randn(batch, 3, 8, 12)}
    lora = squareq_fx.Lora(rank=2, targets="all")
    slab = make_slab(model)
    options: Any = {"block_pattern": r"blocks\.\d", "progress": False, "cache": False}
    gm = squareq_fx.compile(model, slab, example_inputs=call, lora=lora, **options)
    assert vals(gm.history[0].graph) == {"sample": "f32[s69, 3, 4*s39, 4*s79]"}
    for shape in ((1, 3, 8, 8), (3, 3, 4, 16), (2, 3, 20, 12)):
        x = torch.randn(shape)
        output = gm(x)
        assert torch.nn.functional.cosine_similarity(output.flatten(), model(x).flatten(), dim=0) > 0.999
        output.square().mean().backward()
        gradients = [p.grad for name, p in gm.adapter_parameters().items() if "lora_B" in name]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)
        gm.zero_grad(set_to_none=True)
    with pytest.raises(BindingError, match="dimension 3 of sample is 10, it must be a multiple of 4"):
        gm(torch.randn(1, 3, 8, 10))


def test_inputs_of_one_size_keep_one_symbol() -> None:
    call = {"sample": torch.randn(2, 3, 8, 12), "bias": torch.randn(1, 1, 8, 12)}
    graph = squareq_fx.capture(levels(), example_inputs=call, block_pattern=r"blocks\.\d")
    found = vals(graph)
    assert found["sample"] == "f32[s69, 3, 4*s39, 4*s79]"
    assert found["bias"].endswith("1, 4*s39, 4*s79]")


def test_too_small_a_size_stays_as_it_was_traced() -> None:
    """Half of 4 is 2, half of that would be 1, which torch takes for a size that never varies."""
    model, x = levels(), torch.randn(2, 3, 4, 4)
    graph = squareq_fx.capture(model, example_inputs=(x,), block_pattern=r"blocks\.\d")
    assert "*" not in vals(graph)["sample"] and "s" in vals(graph)["sample"]


@pytest.mark.parametrize(
    "model",
    [
        Function(lambda m, x: x.view(x.shape[0], -1, 4).sum(-1)),
        Function(lambda m, x: F.avg_pool1d(x[None], 2)[0] if x.shape[1] % 2 == 0 else x),
    ],
    ids=["a view", "one spelling"],
)
def test_others_are_traced_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from squareq_fx.tracing.export import Skeleton

    traces: list[object] = []
    export = Skeleton.export
    monkeypatch.setattr(Skeleton, "export", lambda self, tensors: (traces.append(self), export(self, tensors))[1])
    graph = squareq_fx.capture(model, example_inputs=(torch.randn(3, 8),))
    assert len(traces) == 1 and program(graph).level == squareq_fx.ir.Level.CAPTURED
