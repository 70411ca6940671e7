"""`value_and_grad`: the same numbers as `loss.backward()`, as a pure function with a graph of its own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from compiled import family_slab

import squareq_fx
from squareq_fx import CompiledModule, ops
from squareq_fx.errors import BindingError, RuntimeStateError


@functools.cache
def module() -> CompiledModule:
    gm = squareq_fx.compile(backbone("flux"), family_slab("flux"), lora=squareq_fx.Lora(rank=3, alpha=6), progress=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in gm.adapter_parameters().items():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=generator)
    return gm


def loss_fn(output: Any, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight.view(-1, 1, 1) * (output.sample - target).square()).mean()


def batch(size: int, height: int = 3, width: int = 5) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    call = calls("flux", size, height, width)
    generator = torch.Generator().manual_seed(size)
    with torch.no_grad():
        target = torch.randn(module()(**call).sample.shape, generator=generator)
    return call, target, torch.rand(size, generator=generator)


def backward(call: dict[str, Any], *arguments: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    params = module().adapter_parameters()
    for p in params.values():
        p.grad = None
    loss = loss_fn(module()(**call), *arguments)
    loss.backward()
    found = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    for p in params.values():
        p.grad = None
    return loss.item(), found


def test_it_gives_what_backward_gives_at_several_sizes_from_one_trace() -> None:
    step = squareq_fx.value_and_grad(module(), loss_fn)
    params = dict(module().adapter_parameters())
    for size, height, width in ((2, 3, 5), (1, 3, 5), (3, 4, 2)):
        call, target, weight = batch(size, height, width)
        loss, grads = step(params, call, target, weight)
        expected, reference = backward(call, target, weight)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert list(grads) == list(params) and set(reference) == set(params)
        for name, gradient in grads.items():
            assert gradient.dtype == torch.float32 and torch.allclose(gradient, reference[name], rtol=1e-4, atol=1e-8), name
    first = step.trace(*batch(2))
    assert first is step.trace(*batch(3, 4, 2)), "other sizes were traced again"


def test_it_reads_the_values_it_is_given_and_writes_to_none() -> None:
    step = squareq_fx.value_and_grad(module(), loss_fn)
    call, target, weight = batch(2)
    own = {name: p.detach().clone() for name, p in module().adapter_parameters().items()}
    other = {name: p * (1.5 if "lora_B" in name else 1.0) for name, p in own.items()}
    loss, _ = step(own, call, target, weight)
    moved, _ = step(other, call, target, weight)
    assert loss.item() != moved.item()
    assert step(own, call, target, weight)[0].item() == loss.item()
    assert all(p.grad is None and torch.equal(p, own[name]) for name, p in module().adapter_parameters().items())


def test_descending_along_its_gradient_lowers_the_loss() -> None:
    step = squareq_fx.value_and_grad(module(), loss_fn)
    call, target, weight = batch(2)
    params: dict[str, torch.Tensor] = {n: p.detach().clone() for n, p in module().adapter_parameters().items()}
    losses = []
    for _ in range(4):
        loss, grads = step(params, call, target, weight)
        losses.append(loss.item())
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        params = {name: p - 0.05 * grads[name] / norm for name, p in params.items()}
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_auxiliary_values_come_along() -> None:
    def with_aux(output: Any, target: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error = output.sample - target
        return error.square().mean(), {"worst": error.abs().amax(), "sample": output.sample}

    call, target, _ = batch(2)
    step = squareq_fx.value_and_grad(module(), with_aux, has_aux=True)
    (loss, aux), grads = step(dict(module().adapter_parameters()), call, target)
    with torch.no_grad():
        sample = module()(**call).sample
    assert torch.equal(aux["sample"], sample) and not aux["sample"].requires_grad
    assert aux["worst"].item() == pytest.approx((sample - target).abs().max().item())
    assert loss.item() == pytest.approx((sample - target).square().mean().item()) and grads


def test_the_graph_can_be_printed_and_waits_for_nothing() -> None:
    step = squareq_fx.value_and_grad(module(), loss_fn)
    graph = step.trace(*batch(2))
    targets = [n.target for n in graph.graph.nodes]
    assert ops.cotangent not in targets and ops.load in targets
    assert targets.count(ops.load) == targets.count(ops.evict)
    assert "loss" in graph.code and "squareq.load" in graph.code and "loss" in dict(graph.named_children())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, target, weight: output.sample - target, "scalar"),
        (lambda output, target, weight: 3.0, "scalar"),
        (lambda output, target, weight: target.mean(), "does not depend"),
        (lambda output, target, weight: output.sample.detach().mean(), "does not depend"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(BindingError, match=message):
        squareq_fx.value_and_grad(module(), loss)(dict(module().adapter_parameters()), *batch(1))


def test_wrong_params_are_all_named() -> None:
    params: dict[str, torch.Tensor] = dict(module().adapter_parameters())
    first, second, *_ = params
    params["transformer_blocks.0.attn.to_q.lora_C.default.weight"] = params.pop(first)
    params[second] = params[second][:, :1]
    with pytest.raises(BindingError) as error:
        squareq_fx.value_and_grad(module(), loss_fn)(params, *batch(1))
    assert f"{first} is missing" in str(error.value) and "lora_C" in str(error.value) and second in str(error.value)


def test_a_module_without_adapters_is_refused() -> None:
    gm = squareq_fx.compile(backbone("flux"), family_slab("flux"), progress=False)
    with pytest.raises(RuntimeStateError, match="lora="):
        squareq_fx.value_and_grad(gm, loss_fn)
    gm.shutdown()


def test_a_fused_optimizer_is_seen() -> None:
    """Fused AdamW writes to parameters without counting up their versions; what the module computes with must follow."""
    own = {name: p.detach().clone() for name, p in module().adapter_parameters().items()}
    call, target, _ = batch(1)
    optimizer = torch.optim.AdamW(module().adapter_parameters().values(), lr=0.05, fused=True)
    losses = []
    for _ in range(3):
        loss = (module()(**call).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append((module()(**call).sample - target).square().mean().item())
        for name, p in module().adapter_parameters().items():
            p.copy_(own[name])
    assert len(set(losses)) == len(losses), "the outputs did not follow the parameters"


def test_what_was_packed_before_a_training_does_not_come_back() -> None:
    call = batch(1)[0]
    params = module().adapter_parameters()
    own = {name: p.detach().clone() for name, p in params.items()}
    outputs = []
    for rate in (0.0, 0.05):
        optimizer = torch.optim.AdamW(params.values(), lr=rate, weight_decay=0.0, fused=True)
        module()(**call).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        module().requires_grad_(False)
        with torch.inference_mode():
            outputs.append(module()(**call).sample.clone())
        for p in params.values():
            p.requires_grad_(True)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(own[name])
    assert not torch.equal(*outputs)
