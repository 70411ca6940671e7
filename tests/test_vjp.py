"""The vector-Jacobian product of one function: every operation models use, at sizes it was not traced at, as a clean graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import differentiated
from models import EXAMPLES, Function, staged
from torch import nn

from squareq_fx import Lora, ops
from squareq_fx.gradients.pullback import recomputing, saving
from squareq_fx.gradients.vjp import trace_vjp
from squareq_fx.ir import fake_mode, functions, info, operation_name, program
from squareq_fx.passes import Adapt, Outline
from squareq_fx.specs import spec as type_of
from squareq_fx.verify import fingerprint

WIDTH = 12
ALL = Lora(rank=3, targets="all")


def heads(y: torch.Tensor, count: int = 3) -> torch.Tensor:
    return y.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(y: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (heads(part) for part in (y, y.roll(1, -1), y * 0.5))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def rotary(y: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(y.shape[1], device=y.device)[:, None] * torch.linspace(0.1, 1, WIDTH // 2)
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(2)


def complex_rotary(y: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(y.shape[1], device=y.device)[:, None] * torch.linspace(0.1, 1, WIDTH // 2)
    turned = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(2)


def written_in_place(y: torch.Tensor) -> torch.Tensor:
    y = y * 2
    y += 1
    y[:, 0] = 0
    y[..., 1:3] *= 3
    y.clamp_(-2, 2)
    return y


def image(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(1, 2).unflatten(-1, (2, -1))


OPERATIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda m, y: F.gelu(y, approximate="tanh"),
    "silu": lambda m, y: F.silu(y),
    "geglu": lambda m, y: torch.cat([y[..., :6] * F.gelu(y[..., 6:])] * 2, -1),
    "layer_norm": lambda m, y: m.norm(y),
    "rms_norm": lambda m, y: m.rms(y),
    "rms_by_hand": lambda m, y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group_norm": lambda m, y: m.group(y.transpose(1, 2)).transpose(1, 2),
    "softmax": lambda m, y: y.softmax(-1) + y.log_softmax(1),
    "attention": lambda m, y: attention(y),
    "attention_scaled": lambda m, y: attention(y, scale=0.3),
    "attention_causal": lambda m, y: attention(y, is_causal=True),
    "attention_masked": lambda m, y: attention(y, attn_mask=(y.mean(-1) > -9)[:, None, None, :]),
    "attention_by_hand": lambda m, y: (torch.baddbmm(y @ y.mT, y, y.mT, alpha=0.1).softmax(-1) @ y),
    "conv2d": lambda m, y: m.conv(image(y)).flatten(2).transpose(1, 2),
    "conv1d_depthwise": lambda m, y: m.depthwise(y.transpose(1, 2)).transpose(1, 2),
    "interpolate": lambda m, y: F.interpolate(image(y), scale_factor=2.0, mode="nearest").flatten(2).transpose(1, 2),
    "avg_pool": lambda m, y: F.avg_pool2d(image(y), (2, 1)).flatten(2).transpose(1, 2),
    "pixel_shuffle": lambda m, y: F.pixel_shuffle(image(y), 2).flatten(2).transpose(1, 2).repeat(1, 1, 4),
    "chunk": lambda m, y: y.chunk(2, -1)[1].repeat(1, 1, 2),
    "split_of_unequal_sizes": lambda m, y: torch.cat(y.split([5, 7], -1)[::-1], -1),
    "unbind_and_stack": lambda m, y: torch.stack(y.unflatten(-1, (2, 6)).unbind(-2)[::-1], -2).flatten(-2),
    "expand": lambda m, y: y.mean(1, keepdim=True).expand(-1, y.shape[1], -1) * y,
    "repeat_interleave": lambda m, y: y.repeat_interleave(2, 1),
    "einsum": lambda m, y: torch.einsum("bsi,bti->bst", y, y) @ y,
    "where": lambda m, y: torch.where(y > 0, y, 0.2 * y).masked_fill(y < -1, -1.0),
    "max": lambda m, y: y - y.amax(-1, keepdim=True) + y.max(1, keepdim=True).values,
    "rotary": lambda m, y: rotary(y),
    "complex_rotary": lambda m, y: complex_rotary(y),
    "pad_and_slice": lambda m, y: F.pad(y, (1, 1, 2, 0))[:, 1:, 1:-1],
    "flip_roll_permute": lambda m, y: y.flip(1).roll(2, -1).permute(1, 0, 2).movedim(0, 1),
    "cumsum": lambda m, y: y.cumsum(1),
    "gather": lambda m, y: y.gather(1, y.argsort(1)) + y[:, torch.arange(y.shape[1]).flip(0)],
    "embedding": lambda m, y: y + m.table(y.argmax(-1) % 5),
    "dropout": lambda m, y: F.dropout(y, 0.5, m.training),
    "written_in_place": lambda m, y: written_in_place(y),
    "index_put": lambda m, y: y.index_put((torch.tensor([0]),), y[:1] * 3),
    "casts": lambda m, y: (y.double() * 2).to(y.dtype) + y.to(torch.float64).sin().float(),
    "detached": lambda m, y: y * y.detach() + y,
    "round": lambda m, y: y + y.round(),
    "arithmetic": lambda m, y: torch.addcmul(y, y, y.sin(), value=0.1) / (1 + y.abs()) - y.exp().log1p() ** 1.5,
    "norm": lambda m, y: F.normalize(y, dim=-1) * y.norm(dim=1, keepdim=True),
    "float_of_a_size": lambda m, y: y / (y.shape[1] ** 0.5) + y.shape[0],
}


def model_of(operation: Callable[[Any, torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32) -> Function:
    return Function(
        lambda m, x: m.b(operation(m, m.a(x))),
        a=nn.Linear(7, WIDTH),
        b=nn.Linear(WIDTH, 5, bias=False),
        norm=nn.LayerNorm(WIDTH),
        rms=nn.RMSNorm(WIDTH),
        group=nn.GroupNorm(3, WIDTH),
        conv=nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        depthwise=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
        table=nn.Embedding(5, WIDTH),
    ).to(dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """Gradients of the input through the operation and two INT8 layers, at the traced size and for one longer sample."""
    sizes = ((3, 4), (1, 8))
    calls = [{"x": torch.randn(batch, tokens, 7)} for batch, tokens in sizes]
    differentiated(model_of(OPERATIONS[name]), *calls, inputs=("x",))


@pytest.mark.parametrize("name", ["attention", "layer_norm", "group_norm", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operations_in_half_precision(name: str, dtype: torch.dtype) -> None:
    call = {"x": torch.randn(3, 4, 7).to(dtype)}
    differentiated(model_of(OPERATIONS[name], dtype), call, lora=ALL, inputs=("x",), limit=4e-2)


def test_a_kernel_whose_strides_are_not_those_foretold() -> None:
    """Fake tensors keep the input's strides here, the kernel does not: the gradient is right all the same."""
    with torch.library._scoped_library("squareq_tests", "FRAGMENT") as library:
        library.define("halved(Tensor x) -> Tensor")
        library.impl("halved", lambda x: x.clone(memory_format=torch.contiguous_format) * 0.5, "CPU")
        torch.library.register_fake("squareq_tests::halved", torch.empty_like, lib=library)
        halved = torch.ops.squareq_tests.halved.default
        torch.library.register_autograd("squareq_tests::halved", lambda ctx, dy: halved(dy), lib=library)

        def operation(m: Any, y: torch.Tensor) -> torch.Tensor:
            return halved(y.transpose(1, 2)).transpose(1, 2)

        differentiated(model_of(operation), {"x": torch.randn(3, 4, 7)}, lora=ALL, inputs=("x",))


def test_operations_that_save() -> None:
    """The same, from saved activations: everything in one model."""
    names = ("layer_norm", "attention", "geglu", "rotary", "written_in_place", "conv2d", "group_norm", "chunk", "where")

    def chain(m: Any, y: torch.Tensor) -> torch.Tensor:
        for name in names:
            y = OPERATIONS[name](m, y) + y
        return y

    call = {"x": torch.randn(2, 4, 7)}
    _, graph = differentiated(model_of(chain), call, {"x": torch.randn(1, 6, 7)}, lora=ALL, save="save")
    backward = next(f for name, f in functions(graph).items() if name.endswith("_vjp"))
    forward = {"gelu", "layer_norm", "native_layer_norm", "convolution", "_softmax", "int8_linear"}
    assert not {operation_name(n.target) for n in backward.graph.nodes if n.op == "call_function"} & forward


# ------------------------------------------------------------------------------------------------ as a clean graph


def blocks_and_more() -> list[Any]:
    found = []
    for spec in EXAMPLES[:3]:
        models = staged(spec)
        graph = Outline()(Adapt(ALL)(models.graphs["quantize"]))
        found += list(functions(graph).values())
    return found


def test_a_trace_is_functional_whole_and_says_where_everything_comes_from() -> None:
    traced_any = False
    for function in blocks_and_more():
        before = fingerprint(function)
        placeholders = [n for n in function.graph.nodes if n.op == "placeholder"]
        wrt = tuple(i for i, n in enumerate(placeholders) if info(n).kind != "weight" and n.meta["val"].is_floating_point())
        assumed = len(fake_mode(function).shape_env.guards)
        traced = trace_vjp(function, wrt, (0,), "differentiate")
        assert fingerprint(function) == before, "the function was changed"
        assert len(fake_mode(function).shape_env.guards) == assumed, "the trace assumes something of the sizes"
        assert [type_of(n.meta["val"]) for n in traced.inputs] == [type_of(n.meta["val"]) for n in placeholders]
        assert len(traced.cotangents) == 1 and len(traced.gradients) == len(wrt)
        seen = set()
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            assert node.op == "call_function" and info(node).made_by == "differentiate" and "val" in node.meta
            assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
            assert node.target not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
            call = (node.target, str(node.args), str(node.kwargs))
            assert call not in seen, "computed twice"
            seen.add(call)
            assert node.meta.get("stack_trace"), f"{node.name} does not say which line of the model it belongs to"
        for node in traced.graph.find_nodes(op="call_function", target=ops.int8_linear_dx):
            assert str(info(node).layer).endswith(str(info(node.args[1]).key).removesuffix(".qweight"))  # type: ignore[arg-type]
            assert re.search(r"_dx(_\d+)?$", node.name)
            traced_any = True
        for i, gradient in zip(wrt, traced.gradients):
            if gradient is not None:
                assert gradient.meta["val"].shape == placeholders[i].meta["val"].shape
                assert gradient.meta["val"].dtype == placeholders[i].meta["val"].dtype
    assert traced_any


def test_what_a_backward_takes_and_gives() -> None:
    for function in blocks_and_more():
        placeholders = [n for n in function.graph.nodes if n.op == "placeholder"]
        wrt = tuple(i for i, n in enumerate(placeholders) if info(n).kind == "adapter")
        if not wrt:
            continue
        for make in (recomputing, saving):
            parts = make(trace_vjp(function, wrt, (0,), "differentiate"))
            weights = [i for i, n in enumerate(placeholders) if info(n).kind == "weight"]
            assert set(weights) <= set(parts.inputs), "a segment's weights are one buffer, so all of them are taken"
            taken = [n for n in parts.backward.graph.nodes if n.op == "placeholder"]
            assert len(taken) == len(parts.inputs) + parts.saved + 1
            result = next(n for n in parts.backward.graph.nodes if n.op == "output").args[0]
            gradients = list(result) if isinstance(result, tuple) else [result]
            assert len(gradients) == len(parts.gradients) == len(wrt)
            assert all(g.meta["val"].is_contiguous() for g in gradients)
            saved = taken[len(parts.inputs) : -1]
            assert len({n.name for n in saved}) == len(saved)
            if make is recomputing:
                assert parts.forward is None and not saved
            else:
                given = next(n for n in parts.forward.graph.nodes if n.op == "output").args[0]  # type: ignore[union-attr]
                given = given[len(given) - len(saved) :]
                assert [type_of(n.meta["val"]) for n in given] == [type_of(n.meta["val"]) for n in saved]
                assert all(n.op == "call_function" for n in given)


def test_the_summary_of_the_pass_counts_the_products() -> None:
    models, _ = differentiated(model_of(OPERATIONS["gelu"]), {"x": torch.randn(3, 4, 7)}, lora=ALL)
    stage = next(s for s in program(models.graphs["schedule"]).history if s.name == "differentiate")
    assert "+1 squareq.int8_linear_dx.default" in stage.summary and "+1 squareq.cotangent.default" in stage.summary
