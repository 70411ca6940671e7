"""attention: the kernel is named in the graph, takes every size, and computes what torch's own choice computes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import EXAMPLES, SIZES, Function, Spec, Staged, few, make_staged, seeded, specs, staged, training
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import squareq_fx
from squareq_fx.attention_op import attention, attention_summary, explicit_attention
from squareq_fx.attention_rules import BACKENDS, refusal
from squareq_fx.errors import PassError, RuntimeStateError
from squareq_fx.ir import functions, program
from squareq_fx.passes import Attention
from squareq_fx.specs import spec
from squareq_fx.verify import check

SDPA = torch.ops.aten.scaled_dot_product_attention.default
CPU = ("flash", "math")
HOPPER = {"device": "cuda", "capability": (9, 0)}


@dataclass(frozen=True)
class Call:
    """One call of attention: sizes, and how its tensors lie in memory."""

    batch: int = 2
    heads: int = 4
    tokens: int = 5
    keys: int = 5
    size: int = 8
    groups: int = 1
    mask: str = ""
    causal: bool = False
    scale: float | None = None
    swapped: bool = True

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
        with seeded(self.size):
            shapes = [(self.heads, self.tokens), (self.heads // self.groups, self.keys), (self.heads // self.groups, self.keys)]
            made = [torch.randn(self.batch, n, heads, self.size) for heads, n in shapes]
            qkv = [t.transpose(1, 2) if self.swapped else t.transpose(1, 2).contiguous() for t in made]
            mask: Any = None
            if self.mask:
                shape = (self.batch, 1, 1, self.keys) if "keys" in self.mask else (self.tokens, self.keys)
                mask = torch.rand(shape) < 0.7
                mask[..., :1] = True
                mask = mask if "bool" in self.mask else torch.randn(shape).masked_fill(~mask, float("-inf")).to(dtype)
        options = {"is_causal": self.causal, "scale": self.scale, "enable_gqa": self.groups > 1}
        tensors = [t.to(device, dtype) for t in qkv] + [mask.to(device) if mask is not None else None]
        return tensors, options


calls = st.builds(
    Call,
    batch=st.integers(1, 3),
    heads=st.sampled_from([2, 4]),
    tokens=st.sampled_from([0, 1, 5, 9]),
    keys=st.sampled_from([0, 1, 5, 12]),
    size=st.sampled_from([4, 7, 8, 16]),
    groups=st.sampled_from([1, 1, 2]),
    mask=st.sampled_from(["", "", "bool", "bool keys", "float", "float keys"]),
    scale=st.sampled_from([None, 0.0, 0.3]),
    swapped=st.booleans(),
)
calls |= st.builds(Call, tokens=st.sampled_from([1, 5, 9]), keys=st.sampled_from([1, 5]), causal=st.just(True))


# ------------------------------------------------------------------------------------------------------- the operation


@given(calls, st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=150)
def test_it_computes_what_torch_computes_bit_for_bit(call: Call, dtype: torch.dtype) -> None:
    tensors, options = call.build(dtype)
    chosen = next(b for b in CPU if refused(b, tensors, options) is None)
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(*tensors, **options)
        found = attention(*tensors, **options, backend=chosen)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(torch.nan_to_num(found.contiguous()), torch.nan_to_num(expected.contiguous()))


@given(calls, st.sampled_from(CPU))
@settings(max_examples=100)
def test_its_type_is_that_of_its_result(call: Call, backend: str) -> None:
    tensors, options = call.build()
    if refused(backend, tensors, options) is not None:
        return
    found = attention(*tensors, **options, backend=backend)
    stated = attention(*(t if t is None else t.to("meta") for t in tensors), **options, backend=backend)
    sizes = zip(found.shape, found.stride(), stated.stride())
    assert found.shape == stated.shape and found.dtype == stated.dtype
    assert all(size < 2 or real == want for size, real, want in sizes) or not found.numel()


def refused(backend: str, tensors: list[Any], options: dict[str, Any], **where: Any) -> str | None:
    kept = {k: v for k, v in options.items() if k != "scale"}
    return refusal(backend, *tensors, **kept, **(where or {"device": "cpu"}))


@given(calls)
@settings(max_examples=100)
def test_the_kernels_of_the_cpu_are_those_torch_would_take(call: Call) -> None:
    tensors, options = call.build()
    if call.tokens and call.keys:
        choice = torch._fused_sdp_choice(*tensors, 0.0, options.pop("is_causal"), **options)
        options["is_causal"] = call.causal
        assert (choice == SDPBackend.FLASH_ATTENTION.value) == (refused("flash", tensors, options) is None)


def test_each_backend_says_why_it_refuses() -> None:
    half, _ = Call(size=64).build(torch.float16)
    for backend in BACKENDS:
        assert refused(backend, half, {}, **HOPPER) is None
    single, _ = Call(size=64).build()
    assert refused("efficient", single, {}, **HOPPER) is None
    assert "not in torch.float32" in str(refused("flash", single, {}, **HOPPER))
    odd, _ = Call(size=7).build(torch.float16)
    assert refused("flash", odd, {}, **HOPPER) is None
    assert "multiple" in str(refused("cudnn", odd, {}, **HOPPER))
    assert "multiples" in str(refused("efficient", odd, {}, **HOPPER))
    masked, _ = Call(size=64, mask="bool keys").build(torch.float16)
    assert [b for b in BACKENDS if refused(b, masked, {}, **HOPPER) is None] == ["efficient", "math"]
    wide, _ = Call(size=256).build(torch.float16)
    assert [b for b in BACKENDS if refused(b, wide, {}, **HOPPER) is None] == ["flash", "efficient", "math"]
    cross, _ = Call(size=64, keys=9).build(torch.float16)
    assert [b for b in BACKENDS if refused(b, cross, {"is_causal": True}, **HOPPER) is None] == ["efficient", "math"]
    assert [b for b in BACKENDS if refused(b, half, {}, device="cuda", capability=(7, 5)) is None] == ["efficient", "math"]
    grouped, _ = Call(size=64, groups=2).build(torch.float16)
    assert "heads" in str(refused("cudnn", grouped, {}, **HOPPER))
    assert refused("cudnn", grouped, {"enable_gqa": True}, **HOPPER) is None
    assert "does not run on cpu" in str(refused("cudnn", half, {}))
    assert "no such backend" in str(refused("fast", half, {}, **HOPPER))
    flat = [t.flatten(0, 1) for t in half[:3]]
    assert "4 dimensions" in str(refused("flash", flat, {}, **HOPPER))
    spread = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in half[:3]]
    assert "together in memory" in str(refused("flash", spread, {}, **HOPPER))


def test_a_kernel_that_fails_is_named() -> None:
    tensors, options = Call().build()
    with pytest.raises(RuntimeStateError, match=r"attention by 'cudnn' of query \[2, 4, 5, 8\]"):
        attention(*tensors, **options, backend="cudnn")
    with pytest.raises(RuntimeError, match="no backend 'fast'"):
        attention(*(t if t is None else t.to("meta") for t in tensors), backend="fast")


def test_it_does_not_cut_a_gradient() -> None:
    tensors, options = Call().build()
    tensors[1].requires_grad_()
    with pytest.raises(RuntimeStateError, match="would cut a gradient"):
        attention(*tensors, **options, backend="flash")
    with torch.no_grad():
        attention(*tensors, **options, backend="flash")


@pytest.mark.parametrize("backend", CPU)
def test_its_decomposition_traces(backend: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    (query, key, value, mask), options = Call(mask="bool").build()

    def body(*tensors: torch.Tensor) -> torch.Tensor:
        return attention(*tensors, **options, backend=backend)

    traced = make_fx(body, decomposition_table={attention: explicit_attention})(query, key, value, mask)
    assert not any(n.target is attention for n in traced.graph.nodes)
    assert torch.equal(traced(query, key, value, mask), body(query, key, value, mask))


# ------------------------------------------------------------------------------------------------------------ the pass


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for g in (gm, *functions(gm).values()) for n in g.graph.nodes if n.target in (attention, SDPA)]


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
def test_laws(spec: Spec) -> None:
    models = staged(spec)
    before = models.graphs["stream"]
    after = laws.apply(Attention(), before, models)
    assert all(n.target is attention for n in attentions(after)) and len(attentions(after)) == len(attentions(before))
    assert program(after).level == program(before).level
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        found = laws.evaluate(after, models, call)
        assert laws.same(found, laws.evaluate(before, models, call))
        assert laws.same(laws.printed(after, models, call), found)


class Heads(nn.Module):
    """Several heads, and what a model can make of them afterwards."""

    def __init__(self, width: int, heads: int, key: str) -> None:
        super().__init__()
        self.heads, self.key = heads, key
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        projected = self.q(x), self.k(context), self.v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        if self.key == "contiguous":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self.key == "spread":
            q = q.transpose(2, 3).contiguous().transpose(2, 3)
        mask = (context.mean(-1) > -1e9)[:, None, None] if self.key == "masked" else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.key == "causal")
        return x + self.o(y.transpose(1, 2).reshape(x.shape))


class Stack(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Heads(16, 2, key) for _ in range(2)])
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, context)
        return x


KINDS = ("", "contiguous", "causal", "masked", "spread")


@functools.cache
def stack(key: str) -> Staged:
    with seeded(3):
        return make_staged(Stack(key), inputs(), until="stream")


def inputs(batch: int = 2, tokens: int = 5, context: int = 3) -> dict[str, torch.Tensor]:
    with seeded(1):
        return {"x": torch.randn(batch, tokens, 16), "context": torch.randn(batch, context, 16)}


@pytest.mark.parametrize("key", KINDS)
def test_heads_of_every_layout(key: str) -> None:
    models = stack(key)
    before = models.graphs["stream"]
    after = laws.apply(Attention(), before, models)
    assert {n.kwargs["backend"] for n in attentions(after)} == {"math" if key == "spread" else "flash"}
    for sizes in ((2, 5, 3), (1, 9, 4), (3, 4, 1)):
        call = inputs(*sizes)
        assert laws.same(laws.evaluate(after, models, call), laws.evaluate(before, models, call))


@pytest.mark.parametrize("key", KINDS)
def test_math_leaves_another_layout_and_the_types_follow(key: str) -> None:
    """The same numbers to rounding, and every type after it true again."""
    models = stack(key)
    before = models.graphs["stream"]
    after = laws.apply(Attention(backend="math"), before, models)
    assert {n.kwargs["backend"] for n in attentions(after)} == {"math"}
    call = inputs(2, 7, 4)
    (found,), (expected,) = laws.evaluate(after, models, call), laws.evaluate(before, models, call)
    assert laws.l2(found, expected) < 1e-6


class Returning(nn.Module):
    """A block that ends with attention, so its layout is that of the function's result."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x.transpose(1, 2).flatten(2)).unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y)


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Returning(), Returning()])
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_layout_is_restored_where_a_function_returns_it() -> None:
    with seeded(4):
        models = make_staged(Returned(), {"x": torch.randn(3, 2, 5, 8)}, until="stream")
    before = models.graphs["stream"]
    after = laws.apply(Attention(backend="math"), before, models)
    copies = [n for g in (after, *functions(after).values()) for n in g.graph.nodes if n.target is torch.ops.aten.clone.default]
    assert len(copies) == 1 and len(attentions(after)) == 2, "the first is followed by what takes any layout"
    for a, b in zip(functions(before).values(), functions(after).values()):
        assert spec(result(a)) == spec(result(b))
    call = {"x": torch.randn(4, 2, 7, 8)}
    (found,), (expected,) = laws.evaluate(after, models, call), laws.evaluate(before, models, call)
    assert laws.l2(found, expected) < 1e-6


def result(gm: fx.GraphModule) -> Any:
    output = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return [n.meta["val"] for n in (output if isinstance(output, tuple) else (output,))]  # type: ignore[union-attr]


def test_the_backward_keeps_its_kernels() -> None:
    models = training(EXAMPLES[0])
    before, after = models.graphs["stream"], models.graphs["attention"]
    backward = [str(n.target) for n in _nodes(before) if "_backward" in str(n.target) and "scaled_dot" in str(n.target)]
    assert backward == [str(n.target) for n in _nodes(after) if "_backward" in str(n.target) and "scaled_dot" in str(n.target)]
    assert backward and "flash" in attention_summary(after).partition("backward")[2]


def _nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for g in (gm, *functions(gm).values()) for n in g.graph.nodes]


def test_the_choice_is_printed() -> None:
    models = stack("")
    after = Attention()(models.graphs["stream"])
    text = squareq_fx.show(after)
    assert "squareq.attention(" in text and "backend='flash'" in text and "# attention: 2 x flash" in text
    assert attention_summary(models.graphs["stream"]) == "2 x chosen at run time"
    assert attention_summary(staged(EXAMPLES[3]).graphs["stream"]) == ""


def test_a_backend_that_cannot_is_refused_where_the_model_says() -> None:
    gm = stack("").graphs["stream"]
    with pytest.raises(PassError, match=r"cannot be computed by cudnn: it does not run on cpu(.|\n)*test_attention.py"):
        Attention(backend="cudnn")(gm)
    with pytest.raises(PassError, match="is none of auto, cudnn"):
        Attention(backend="fast")  # type: ignore[arg-type]


def test_it_comes_after_the_backward() -> None:
    models = staged(EXAMPLES[0])
    with pytest.raises(PassError, match="needs a graph that is streamed"):
        squareq_fx.run(models.graphs["outline"], [Attention()])


def test_dropout_stays_as_it_is() -> None:
    def body(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = module.lin(x)[:, None]  # type: ignore[operator, union-attr]
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)[:, 0]

    models = make_staged(Function(body, lin=nn.Linear(8, 8)), {"x": torch.randn(2, 5, 8)}, until="stream")
    after = laws.apply(Attention(), models.graphs["stream"], models)
    assert [n.target for n in attentions(after)] == [SDPA]


def test_on_a_gpu_flux_would_get_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a Hopper card, on a machine that has none."""
    from squareq_fx.passes.attention import _order

    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    assert _order("cuda", (9, 0)) == ("cudnn", "flash", "efficient", "math")
    assert _order("cuda", (8, 9)) == ("flash", "efficient", "math")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert _order("cuda", (9, 0)) == ("flash", "efficient", "math")


# ------------------------------------------------------------------------------------------------------------- on a GPU

GPU_CALLS = (
    Call(2, 4, 130, 130, 64),
    Call(2, 4, 130, 130, 64, swapped=False),
    Call(2, 4, 130, 77, 64),
    Call(1, 4, 200, 200, 128, scale=0.3),
    Call(2, 4, 130, 130, 40),
    Call(2, 4, 130, 130, 20),
    Call(2, 4, 130, 130, 160),
    Call(2, 4, 130, 130, 64, causal=True),
    Call(2, 4, 130, 77, 64, causal=True),
    Call(2, 4, 130, 130, 64, groups=2),
    Call(2, 4, 130, 77, 64, groups=2, mask="bool keys"),
    Call(2, 4, 130, 77, 64, mask="bool keys"),
    Call(2, 4, 130, 77, 64, mask="bool"),
    Call(2, 4, 130, 77, 64, mask="float keys"),
    Call(2, 4, 130, 80, 64, mask="float"),
    Call(2, 4, 130, 1, 64),
    Call(2, 4, 1, 130, 64),
    Call(2, 4, 130, 0, 64),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", GPU_CALLS, ids=str)
def test_kernels_of_a_gpu(call: Call, backend: str, dtype: torch.dtype) -> None:
    """Each that takes the call gives what the definition gives, laid out in memory as its type says."""
    tensors, options = call.build(dtype, "cuda")
    where = {"device": "cuda", "capability": torch.cuda.get_device_capability()}
    reason = refused(backend, tensors, options, **where)
    if reason is not None:
        pytest.skip(reason)
    found = attention(*tensors, **options, backend=backend)
    exact, _ = call.build(torch.float64)
    mask = exact[3] if tensors[3] is None or tensors[3].dtype == torch.bool else tensors[3].cpu().double()
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*(t.cpu().double() for t in tensors[:3]), mask, **options)
    limit = {torch.float32: 5e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert laws.l2(found.cpu(), expected) < limit or not expected.any()
    stated = attention(*(t if t is None else t.to("meta") for t in tensors), **options, backend=backend)
    assert found.shape == stated.shape and found.dtype == stated.dtype
    assert all(n < 2 or a == b for n, a, b in zip(found.shape, found.stride(), stated.stride())) or not found.numel()


@pytest.mark.gpu
def test_the_pass_on_a_gpu() -> None:
    """A model captured for the card: its kernel is a fused one, the types hold, the numbers are torch's."""
    with seeded(3):
        model = Stack("").to("cuda", torch.bfloat16)
    call = {k: v.to("cuda", torch.bfloat16) for k, v in inputs(2, 130, 77).items()}
    models = make_staged(model, call, until="stream")
    before = models.graphs["stream"]
    after = Attention()(before)
    check(after)
    assert {n.kwargs["backend"] for n in attentions(after)} <= {"cudnn", "flash"}
    found = squareq_fx.compile(model, models.slab, example_inputs=call, progress=False)
    with torch.no_grad():
        assert laws.l2(found(**call).float(), models.dequantized.to("cuda")(**call).float()) < 2e-2
    found.shutdown()
