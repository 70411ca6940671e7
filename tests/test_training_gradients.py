"""Gradients of every adapter of diffusers backbones, against torch's autograd through PEFT on the dequantised model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from compiled import LORA, Trained, assert_gradients, trained
from models import seeded
from torch import nn

import squareq_fx
from squareq_fx import ops
from squareq_fx.ir import program

SIZES = ((2, 3, 5, 7), (1, 4, 3, 9))
LIMIT = 1e-5
SAVE: dict[str, Any] = {
    "flux": "recompute",
    "sdxl": {r".*transformer_blocks\.0": "save"},
    "sd3": "save",
    "wan": "recompute",
}
"""What is kept for the backward; it must not matter, so that each family tries another."""


@pytest.fixture(scope="module", params=SAVE)
def one(request: pytest.FixtureRequest) -> Iterator[tuple[str, Trained]]:
    found = trained(request.param, SAVE[request.param])
    yield request.param, found
    found.module.shutdown()


def test_every_gradient_is_pefts(one: tuple[str, Trained]) -> None:
    """From one compile, at two shapes, one of a single sample; twice, because nothing may be left over from a step."""
    family, both = one
    for sizes in (*SIZES, SIZES[0]):
        worst = assert_gradients(both, calls(family, *sizes), LIMIT)
        print(f"{family} {sizes}: worst relative error of {len(both.parameters())} gradients {worst:.1e}")


def test_the_targets_are_the_attention_layers(one: tuple[str, Trained]) -> None:
    family, both = one
    layers = {name.partition(".lora_")[0] for name in both.module.adapter_parameters()}
    linears = {name for name, m in backbone(family).named_modules() if isinstance(m, nn.Linear)}
    attention = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
    assert layers == {name for name in linears if ".attn" in name and name.endswith(attention)}
    assert set(LORA.layers(linears)) == layers


def test_without_gradients_the_output_is_the_same(one: tuple[str, Trained]) -> None:
    family, both = one
    call = calls(family, *SIZES[0])
    output = both.module(**call).sample
    with torch.no_grad():
        again = both.module(**call).sample
    if SAVE[family] == "recompute":
        assert torch.equal(again, output)
    torch.testing.assert_close(again, output.detach(), rtol=1e-5, atol=1e-6)


def test_both_directions_stream(one: tuple[str, Trained]) -> None:
    """Every load of the backward was announced; what ended the forward is not copied again."""
    family, both = one
    runtime = both.module.runtime
    assert runtime is not None
    call = calls(family, *SIZES[0])
    for _ in range(2):
        both.module(**call).sample.sum().backward()
    both.module.zero_grad()
    forward, backward = list(runtime.history)[-2:]
    segments = {name: packed[-1].offset + packed[-1].nbytes for name, packed in program(both.module).segments.items()}
    loaded = [n for n in both.module.training_step.halves.backward.graph.nodes if n.target is ops.load]  # type: ignore[union-attr]
    kept = [e.block for e in forward.events if e.kind == "keep"]
    assert forward.bytes_to_device == sum(segments.values())
    assert backward.bytes_to_device == sum(segments[str(n.args[0])] for n in loaded) - sum(segments[name] for name in kept)
    assert len(kept) == 2 and backward.bytes_to_device < forward.bytes_to_device
    assert forward.prefetch_misses <= 1 and backward.prefetch_misses == 0
    assert max(forward.peak_bytes_in_use, backward.peak_bytes_in_use) <= program(both.module).arena_bytes


def test_value_and_grad_gives_the_same(one: tuple[str, Trained]) -> None:
    family, both = one
    call = calls(family, *SIZES[1])
    output = both.module(**call).sample
    with seeded(5):
        target = torch.randn(output.shape)
    (output - target).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in both.module.adapter_parameters().items()}  # type: ignore[union-attr]
    both.module.zero_grad()
    step = squareq_fx.value_and_grad(both.module, lambda output, target: (output.sample - target).square().mean())
    loss, found = step(dict(both.module.adapter_parameters()), call, target)
    torch.testing.assert_close(loss, (output.detach() - target).square().mean())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))
