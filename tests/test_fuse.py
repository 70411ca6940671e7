"""fuse: layers of one input become one product, and what follows a product becomes its epilogue."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from backbones import backbone, calls
from compiled import family_slab
from gradients import adapters_for, assert_equal, by_graph, cotangents_for
from hypothesis import example, given
from hypothesis import strategies as st
from models import EXAMPLES, Spec, Staged, dequantized, few, make_slab, seeded, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx import Lora, ops
from squareq_fx.edit import arguments
from squareq_fx.errors import PassError
from squareq_fx.ir import clone, functions, info, layers, program
from squareq_fx.kernels import cpu, dispatch
from squareq_fx.kernels.reference import activate, quantize_rows, quantize_weight
from squareq_fx.passes import Fuse

PRODUCTS = (ops.int8_matmul, ops.int8_linear, ops.int8_linear_parts)


# -------------------------------------------------------------------------- random functions with shared inputs

AFTER = ("", "gelu", "tanh", "silu", "add", "radd", "gelu_add", "div_add", "add_gelu", "add2", "wide_add", "twice")


@dataclass(frozen=True)
class Branch:
    """One layer of the block's input (or of the context), and what reads its result."""

    name: str
    width: int
    bias: bool
    after: str
    context: bool = False


class Block(nn.Module):
    def __init__(self, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.attn = nn.ModuleDict({b.name: nn.Linear(12, b.width, bias=b.bias) for b in branches})
        self.out = nn.Linear(sum(b.width for b in branches), 12)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        results = [_after(b.after, self.attn[b.name](context if b.context else x), x) for b in self.branches]
        return x + self.out(torch.cat(results, -1))


def _after(kind: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    other = torch.cat([x, x], -1)[..., : y.shape[-1]]  # a view with strides of its own
    if kind in ("gelu", "gelu_add"):
        y = F.gelu(y)
    if kind == "tanh":
        y = F.gelu(y, approximate="tanh")
    if kind == "silu":
        y = F.silu(y)
    if kind == "div_add":
        y = y / 1.0
    if kind == "radd":
        return other + y
    if kind in ("add", "gelu_add", "div_add", "add_gelu"):
        y = y + other
    if kind == "add2":
        y = torch.add(other, y, alpha=2)
    if kind == "wide_add":
        y = y + other[:, :1]
    if kind == "add_gelu":
        y = F.gelu(y)
    return y * y.sin() if kind == "twice" else y


class Net(nn.Module):
    def __init__(self, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(branches) for _ in range(2)])
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, context)
        return x


NAMES = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "gate", "up")
BRANCHES = st.lists(
    st.builds(
        Branch,
        st.sampled_from(NAMES),
        st.sampled_from([8, 16]),
        st.booleans(),
        st.sampled_from(("", "", *AFTER)),
        st.booleans(),
    ),
    min_size=2,
    max_size=6,
    unique_by=lambda b: b.name,
).map(tuple)
QKV = tuple(Branch(name, 16, True, "") for name in ("to_q", "to_k", "to_v"))


def net_inputs(batch: int = 2, tokens: int = 3) -> dict[str, torch.Tensor]:
    with seeded(batch):
        return {"x": torch.randn(batch, tokens, 12), "context": torch.randn(batch, tokens, 12)}


def staged_until_activations(model: nn.Module, call: dict[str, Any], compute: str, **options: Any) -> Staged:
    slab = make_slab(model, call)
    return run_until_activations(Staged(model, slab, {"capture": squareq_fx.capture(model, call)}, model), compute, **options)


def run_until_activations(models: Staged, compute: str, **options: Any) -> Staged:
    """A model's stages up to the one that `Fuse` gets."""
    passes = squareq_fx.default_passes(models.slab, compute=compute, **options)  # type: ignore[arg-type]
    last = squareq_fx.run(models.graphs["capture"], passes, until="activations")
    return Staged(models.model, models.slab, {s.name: s.graph for s in program(last).history}, models.dequantized)


def products(gm: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    return [(name, n) for name, f in functions(gm).items() for n in f.graph.nodes if n.target in PRODUCTS]


def parts(gm: fx.GraphModule) -> list[list[str]]:
    """The layers of each merged product, without their blocks' paths."""
    merged = [n for _, n in products(gm) if arguments(n).get("parts", 1) > 1]
    return [[name.rpartition(".")[2] for name in layers(n)] for n in merged]


def epilogues(gm: fx.GraphModule) -> Counter[tuple[str, bool]]:
    given = [arguments(n) for _, n in products(gm) if n.target is ops.int8_matmul]
    return Counter((g["activation"], g["addend"] is not None) for g in given)


@few
@given(BRANCHES, st.sampled_from(["w8a8", "w8a16"]))
@example(QKV, "w8a8")
@example(QKV, "w8a16")
@example(tuple(Branch(name, 16, True, "", name != "to_q") for name in ("to_q", "to_k", "to_v")), "w8a8")
def test_laws(branches: tuple[Branch, ...], compute: str) -> None:
    models = staged_until_activations(Net(branches), net_inputs(), compute)
    before = models.graphs["activations"]
    merged = laws.apply(Fuse(epilogue=False), before, models)
    after = laws.apply(Fuse(), before, models)
    assert laws.text(Fuse(merge=False)(merged)) == laws.text(after), "merging and folding do not depend on each other"
    assert_shared(after)
    for call in (net_inputs(), net_inputs(3, 5)):
        expected = laws.evaluate(before, models, call)
        found = laws.evaluate(merged, models, call)
        assert laws.same(found, expected) if compute == "w8a8" else near(found, expected)
        found = laws.evaluate(after, models, call)
        assert near(found, expected, 1e-5 if compute == "w8a16" else 1e-3)  # a different ulp may round to the next int8
        assert laws.same(laws.printed(after, models, call), found)
    for block in functions(after).values():
        counted = {name for n in block.graph.nodes if n.target in PRODUCTS for name in layers(n)}
        assert len({name.rpartition(".")[2] for name in counted}) == len(branches) + 1


def near(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float = 1e-6) -> bool:
    return all(a.dtype == b.dtype and laws.l2(a, b) <= limit for a, b in zip(found, expected, strict=True))


def assert_shared(gm: fx.GraphModule) -> None:
    """No input is quantised twice, no bytes are unpacked twice as the same type, and nothing is left to merge or fold."""
    for function in functions(gm).values():
        for target in (ops.quantize_rows, ops.unpack):
            made = [str(n.args) for n in function.graph.nodes if n.target is target]
            assert len(made) == len(set(made))
        for node in function.graph.nodes:
            if node.target is ops.int8_matmul and arguments(node)["parts"] == 1 and len(node.users) == 1:
                (reader,) = node.users
                assert str(reader.target) not in ("aten.gelu.default", "aten.silu.default") or arguments(node)["addend"]


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws_on_models_with_every_odd_feature(spec: Spec) -> None:
    models = run_until_activations(staged(spec), "w8a8")
    before = models.graphs["activations"]
    after = laws.apply(Fuse(), before, models)
    found, expected = (laws.evaluate(gm, models, spec.inputs()) for gm in (after, before))
    assert near(found, expected, 2e-2)


# ------------------------------------------------------------------------------------------------- what is merged


def fused(*branches: Branch, compute: str = "w8a8", **options: Any) -> fx.GraphModule:
    models = staged_until_activations(Net(branches), net_inputs(), compute)
    return laws.apply(Fuse(**options), models.graphs["activations"], models)


@pytest.mark.parametrize("compute", ["w8a8", "w8a16"])
def test_q_k_and_v_are_one_product(compute: str) -> None:
    after = fused(*QKV, compute=compute)
    assert parts(after) == [["to_q", "to_k", "to_v"]]
    (block,) = functions(after).values()
    (merged,) = (n for n in block.graph.nodes if n.name == "attn_to_q_k_v")
    assert merged.meta["val"].shape[0] == 3 and merged.meta["val"].shape[-1] == 16
    assert info(merged).layer == "blocks.0.attn.to_q+blocks.0.attn.to_k+blocks.0.attn.to_v"
    taken = [n for n in block.graph.nodes if str(n.target) == "aten.select.int"]
    assert [(n.name, n.args, info(n).layer) for n in taken] == [
        (f"attn_to_{x}", (merged, 0, i), f"blocks.0.attn.to_{x}") for i, x in enumerate("qkv")
    ]
    weights = [n for n in merged.args if isinstance(n, fx.Node) and n.target is ops.unpack]
    assert [n.name for n in weights] == [f"attn_to_q_k_v_{x}" for x in ("qweight", "scale", "zero_point", "bias")]
    assert [n.args[2] for n in weights] == [[48, 64], [48], [48], [48]]
    assert info(weights[0]).key == "attn.to_q.qweight+attn.to_k.qweight+attn.to_v.qweight"
    unpacked = Counter(n.target for n in block.graph.nodes)[ops.unpack]
    assert unpacked == 4 + 4, "the layers' own views are gone"


class Pair(nn.Module):
    """Linear layers of something put together; `how` says what of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.attn = nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Linear(12, 6), "c": nn.Linear(12, 4)})
        self.out = nn.Linear(12 if how == "rows" else 18 if how == "three" else 14, 12)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        a, b, c = (self.attn[name](x) for name in "abc")
        if self.how == "rows":
            return self.out(torch.cat((x, context), 1))[:, : x.shape[1]]
        both = torch.cat((a, b, c) if self.how == "three" else (a, b), 2 if self.how == "counted" else -1)
        y = self.out(both)
        return y + both.mean(-1, keepdim=True) if self.how == "two readers" else y


class PairNet(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Pair(how) for _ in range(2)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x, context)
        return x


@pytest.mark.parametrize(
    ("how", "sources"), [("last", 2), ("counted", 2), ("three", 1), ("rows", 1), ("two readers", 1)]
)
def test_two_side_by_side_are_quantised_where_they_are(how: str, sources: int) -> None:
    models = staged_until_activations(PairNet(how), net_inputs(), "w8a8")
    before = models.graphs["activations"]
    after = laws.apply(Fuse(merge=False, epilogue=False), before, models)
    for function in functions(after).values():
        (quantised,) = (n for n in function.graph.nodes if n.target is ops.quantize_rows and "out" in str(info(n).layer))
        assert len(quantised.args) == sources
        is_there = bool(function.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default))
        assert is_there == (sources == 1)
    for batch, tokens in ((2, 3), (1, 5)):
        call = net_inputs(batch, tokens)
        assert laws.same(laws.evaluate(after, models, call), laws.evaluate(before, models, call))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"to_q": {"context": True}}, [["to_k", "to_v"]]),
        ({"to_q": {"width": 8}}, [["to_k", "to_v"]]),
        ({"to_k": {"width": 8}}, [["to_q", "to_v"]]),
        ({"to_v": {"bias": False}}, [["to_q", "to_k"]]),
        ({"to_k": {"context": True}}, []),
        ({"to_k": {"bias": False}}, []),
    ],
)
def test_only_what_reads_one_input_and_lies_side_by_side(change: dict[str, dict[str, Any]], expected: list[list[str]]) -> None:
    branches = [Branch(**{**vars(b), **change.get(b.name, {})}) for b in QKV]
    assert parts(fused(*branches)) == expected


def test_options_leave_things_alone() -> None:
    branches = (*QKV, Branch("up", 8, True, "gelu"))
    assert parts(fused(*branches, merge=False)) == []
    assert epilogues(fused(*branches, epilogue=False)) == Counter({("none", False): 3})
    assert epilogues(fused(*branches)) == Counter({("none", False): 1, ("gelu", False): 1, ("none", True): 1})


# ------------------------------------------------------------------------------------------------- what is folded


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("", ("none", False)),
        ("gelu", ("gelu", False)),
        ("tanh", ("gelu_tanh", False)),
        ("silu", ("silu", False)),
        ("add", ("none", True)),
        ("radd", ("none", True)),
        ("gelu_add", ("gelu", True)),
        ("div_add", ("none", True)),
        ("add_gelu", ("none", True)),  # the addend comes last in the kernel
        ("add2", ("none", False)),  # alpha is 2
        ("wide_add", ("none", False)),  # the other summand is broadcast
        ("twice", ("none", False)),  # read twice
    ],
)
def test_one_reader_is_folded(after: str, expected: tuple[str, bool]) -> None:
    found = epilogues(fused(Branch("only", 8, True, after)))
    found.subtract([("none", True)])  # the block's own residual addition
    assert +found == Counter([expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@given(st.integers(0, 1000))
@few
def test_an_epilogue_rounds_once(activation: str, dtype: torch.dtype, seed: int) -> None:
    """|fused - unfused| <= u * (1.13 |y| + |a| + 2 |result|), with u, y and a as in `Fuse`."""
    with seeded(seed):
        x, w, bias = torch.randn(5, 24).to(dtype), torch.randn(16, 24), torch.randn(16)
        other = torch.randn(5, 16).to(dtype)
    weights = (*quantize_weight(w), bias)
    xq, sx = quantize_rows(x)
    once = cpu.int8_matmul(xq, sx, *weights, dtype, activation, other).double()
    y = cpu.int8_matmul(xq, sx, *weights, dtype)
    twice = (activate(y, activation) + other).double()
    u = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps  # and what float32 itself rounds within the kernel
    bound = u * (1.13 * y.double().abs() + activate(y, activation).double().abs() + 2 * torch.maximum(once.abs(), twice.abs()))
    assert bool(((once - twice).abs() <= bound + 1e-7).all())


@few
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 90), st.integers(1, 40), st.integers(2, 4), st.booleans())
def test_parts_are_the_layers(batch: int, rows: int, width: int, height: int, count: int, with_bias: bool) -> None:
    """The kernels' side: equal bits for int8_matmul; for int8_linear within the error of a float32 sum of `width` terms."""
    with seeded(width * height):
        x = torch.randn(batch, rows, width)
        each = [
            (*quantize_weight(torch.randn(height, width)), torch.randn(height) if with_bias else None) for _ in range(count)
        ]
    whole = [None if w[0] is None else torch.cat(w) for w in zip(*each)]
    xq, sx = quantize_rows(x)
    merged = dispatch.int8_matmul(xq, sx, *whole, torch.float32, parts=count)
    assert laws.same(list(merged), [dispatch.int8_matmul(xq, sx, *w, torch.float32) for w in each])
    merged = dispatch.int8_linear_parts(x, *whole, count)
    assert merged.shape == (count, batch, rows, height) and merged.is_contiguous()
    for y, (q, scale, zero, bias) in zip(merged, each):
        single = dispatch.int8_linear(x, q, scale, zero, bias)
        sums = (x.abs() @ (q[:, :width].abs().float() * scale[:, None]).t()) + (0 if bias is None else bias.abs())
        assert bool(((y - single).abs() <= 2 * (width + 2) * 2**-24 * sums).all())


# -------------------------------------------------------------------------------------------------------- backbones

Q, KV, ADDED = ["to_q", "to_k", "to_v"], ["to_k", "to_v"], ["add_q_proj", "add_k_proj", "add_v_proj"]
EXPECTED = {
    "flux": {"flux_transformer_block": [Q, ADDED], "flux_single_transformer_block": [Q]},
    "sd3": {"joint_transformer_block": [Q, ADDED]},
    "sdxl": {"basic_transformer_block": [Q, KV]},
    "wan": {"wan_transformer_block": [Q, KV]},
}


def family_stages(family: str, compute: str, **options: Any) -> Staged:
    model, slab = backbone(family), family_slab(family)
    captured = {"capture": squareq_fx.capture(model, calls(family, 2))}
    return run_until_activations(Staged(model, slab, captured, dequantized(model, slab)), compute, **options)


@pytest.mark.parametrize("family", EXPECTED)
def test_backbones(family: str) -> None:
    models = family_stages(family, "w8a8")
    before = models.graphs["activations"]
    after = laws.apply(Fuse(), before, models)
    for name, function in functions(after).items():
        base = re.sub(r"_\d+$", "", name)  # a block whose structure differs from the first is `<name>_2`
        merged = [n for n in function.graph.nodes if n.target is ops.int8_matmul and arguments(n)["parts"] > 1]
        found = [[layer.rpartition(".")[2] for layer in layers(n)] for n in merged]
        assert found == EXPECTED[family].get(base, []), name
    call = calls(family, 2, 4, 4, 5)
    found, expected = (laws.evaluate(gm, models, call) for gm in (after, before))
    assert near(found, expected, 1e-3)
    assert near(laws.evaluate(Fuse(epilogue=False)(before), models, call), expected, 0.0)


def test_gradients_of_a_backbone() -> None:
    models = family_stages("flux", "w8a8", lora=Lora(rank=3), slots=4)
    assert Q in parts(assert_gradients_stay(models, calls("flux", 2), 1e-3))


def test_gradients_of_16_bit_products() -> None:
    models = run_until_activations(staged(EXAMPLES[0]), "w8a16", lora=Lora(rank=3, targets="all"), slots=4)
    assert ["k", "v"] in parts(assert_gradients_stay(models, EXAMPLES[0].inputs(), 1e-5))


def assert_gradients_stay(models: Staged, call: dict[str, Any], limit: float) -> fx.GraphModule:
    before = models.graphs["activations"]
    after = laws.apply(Fuse(), before, models)
    cotangents = cotangents_for(laws.eager(models.model, call))
    expected, found = (by_graph(gm, models, call, adapters_for(before), cotangents) for gm in (before, after))
    assert_equal(found, expected, limit)
    return after


# ---------------------------------------------------------------------------------------------------------- ensures


def broken(change: Any) -> None:
    models = staged_until_activations(Net(QKV), net_inputs(), "w8a8")
    before = models.graphs["activations"]
    after = clone(Fuse()(before))
    (merged,) = (n for _, n in products(after) if arguments(n)["parts"] > 1)
    change(merged)
    Fuse().ensures(before, after)


def test_ensures_accepts_its_own_work() -> None:
    broken(lambda merged: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda merged: merged.update_arg(2, with_args(merged.args[2], 1, merged.args[2].args[1] + 64)),
        lambda merged: merged.meta.update(squareq=info_of(merged, "+".join(layers(merged)[::-1]))),
        lambda merged: merged.meta.update(squareq=info_of(merged, "+".join(layers(merged)[:2]))),
    ],
    ids=["other bytes", "another order", "a layer less"],
)
def test_ensures_refuses(change: Any) -> None:
    with pytest.raises(PassError, match=r"to_q|layers"):
        broken(change)


def with_args(node: fx.Node, index: int, value: Any) -> fx.Node:
    node.update_arg(index, value)
    return node


def info_of(node: fx.Node, layer: str) -> Any:
    return replace(info(node), layer=layer)


def test_a_graph_that_is_not_streamed_is_refused() -> None:
    models = staged_until_activations(Net(QKV), net_inputs(), "w8a8")
    with pytest.raises(PassError, match="pass fuse needs a graph that is streamed"):
        squareq_fx.run(models.graphs["outline"], [Fuse()])
