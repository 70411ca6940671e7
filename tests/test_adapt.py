"""adapt: one pair of low-rank matrices beside every chosen layer, which change nothing until they are trained (gate 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import laws
import pytest
import torch
from backbones import backbone
from gradients import adapters_for, by_autograd
from hypothesis import example, given
from models import EXAMPLES, SIZES, Function, Mlp, Residual, Spec, Staged, dequantized, few, make_slab, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx import Lora, PassError, VerificationError, ops
from squareq_fx.ir import Level, adapter_inputs, clone, functions, info, program
from squareq_fx.passes import Adapt, Canonicalize, Outline, Quantize
from squareq_fx.specs import spec as type_of

LINEAR = torch.ops.aten.linear.default
ALL = Lora(rank=3, targets="all")
RANKS = (0, 1, 2, 5, 13, 64)


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    models = staged(spec)
    before = models.graphs["quantize"]
    after = laws.apply(Adapt(ALL), before, models)
    assert program(after).level == Level.QUANTIZED and program(after).lora == ALL
    assert_bijection(before, after)
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        adapters = adapters_for(after)
        found = laws.evaluate(after, models, call, given=adapters)
        assert laws.same(laws.printed(after, models, call, adapters), found)
        expected = by_autograd(models, call, adapters).outputs
        assert all(laws.l2(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
def test_the_identity_while_b_is_zero_at_every_rank(spec: Spec) -> None:
    models, call = staged(spec), spec.inputs()
    after = Adapt(ALL)(models.graphs["quantize"])
    base = laws.evaluate(models.graphs["quantize"], models, call)
    for rank in RANKS:
        adapters = adapters_for(after, rank)
        zero = {key: value * (0 if "lora_B" in key else 1) for key, value in adapters.items()}
        assert all(map(torch.equal, laws.evaluate(after, models, call, given=zero), base)), rank
        found = laws.evaluate(after, models, call, given=adapters)
        if rank:
            assert not all(map(torch.equal, found, base))
        expected = by_autograd(models, call, adapters).outputs
        assert all(laws.l2(a, b) < 1e-5 for a, b in zip(found, expected, strict=True)), rank


def modulo_order(gm: fx.GraphModule) -> list[str]:
    """`laws.normal_form` with the inputs in order of name: passes that add inputs in another order give the same graph."""
    lines = laws.normal_form(gm)
    inputs = sum(n.op == "placeholder" for n in gm.graph.nodes)
    return sorted(lines[:inputs]) + lines[inputs:]


@few
@given(specs().filter(lambda spec: spec.tied not in ("linears", "embedding")))
@example(EXAMPLES[0])
@example(EXAMPLES[2])
def test_it_commutes_with_canonicalize_and_quantize(spec: Spec) -> None:
    """Of layers that share a weight the float graph knows one name only, so there the order counts."""
    models = staged(spec)
    captured, quantize, adapt = models.graphs["capture"], Quantize(models.slab), Adapt(ALL)
    graphs = [
        adapt(quantize(Canonicalize()(captured))),
        quantize(adapt(Canonicalize()(captured))),
        quantize(Canonicalize()(adapt(captured))),
        Canonicalize()(adapt(quantize(captured))),
    ]
    assert len({tuple(modulo_order(graph)) for graph in graphs}) == 1
    assert all(program(graph).lora == ALL for graph in graphs)


def assert_bijection(before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Counted from the quantised graph alone: a pair for each layer, a branch for each call of it, and nothing else is new."""
    calls: dict[str, list[fx.Node]] = {}
    for node in before.graph.nodes:
        if node.target is ops.int8_linear:
            calls.setdefault(str(info(node).layer), []).append(node)
    pairs = adapter_inputs(after)
    assert list(pairs) == [f"{name}.{side}.weight" for name in calls for side in ("lora_A", "lora_B")]
    nodes = {n.name: n for n in after.graph.nodes}
    for name, found in calls.items():
        down, up = (pairs[f"{name}.{side}.weight"] for side in ("lora_A", "lora_B"))
        assert info(down).layer == info(up).layer == name and down.meta["val"].shape[0] == up.meta["val"].shape[1]
        assert type_of(down.meta["val"].shape[0]) == type_of(up.meta["val"].shape[1])
        assert len(down.users) == len(up.users) == len(found)
        for node in found:
            base = nodes[node.name]
            (total,) = base.users
            assert total.target is torch.ops.aten.add.Tensor and total.args[0] is base
            high = total.args[1]
            low = high.args[0]
            assert (low.target, high.target) == (LINEAR, LINEAR)
            assert low.args == (base.args[0], down) and high.args == (low, up)
            for new in (low, high, total):
                assert info(new).made_by == "adapt" and new.meta["stack_trace"] == base.meta["stack_trace"]
            assert type_of(total.meta["val"]) == type_of(base.meta["val"])
    added = sum(len(found) for found in calls.values())
    before_ops = [n.target for n in before.graph.nodes if n.op == "call_function"]
    after_ops = [n.target for n in after.graph.nodes if n.op == "call_function" and info(n).made_by != "adapt"]
    assert after_ops == before_ops
    assert sum(info(n).made_by == "adapt" for n in after.graph.nodes) == 3 * added + len(pairs)


def adapted(model: nn.Module, x: torch.Tensor, lora: Lora = ALL, **options: Any) -> fx.GraphModule:
    """The model's adapted graph, after it was seen to compute what the dequantised model with branches does."""
    slab = make_slab(model, (x,), **options)
    models = Staged(model, slab, {}, dequantized(model, slab))
    graph = Quantize(slab)(Canonicalize()(squareq_fx.capture(model, (x,))))
    after = laws.apply(Adapt(lora), graph, models)
    adapters = adapters_for(after)
    found = laws.evaluate(after, models, {"x": x}, given=adapters)
    limit = 1e-5 if x.dtype == torch.float32 else 3e-2
    assert all(laws.l2(a, b) < limit for a, b in zip(found, by_autograd(models, {"x": x}, adapters).outputs, strict=True))
    return after


def layers_of(gm: fx.GraphModule) -> list[str]:
    return [key.removesuffix(".lora_A.weight") for key in adapter_inputs(gm) if key.endswith(".lora_A.weight")]


def branches_of(gm: fx.GraphModule, layer: str) -> int:
    return len(adapter_inputs(gm)[f"{layer}.lora_A.weight"].users)


# ------------------------------------------------------------------------------------------------ which layers


def test_a_layer_called_twice_has_one_pair_and_two_branches() -> None:
    after = adapted(Function(lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6)), torch.randn(3, 6))
    assert layers_of(after) == ["a"] and branches_of(after, "a") == 2


def test_a_shared_module_has_one_pair_whatever_path_it_is_called_by() -> None:
    shared = nn.Linear(6, 6)
    model = Function(lambda m, x: m.two[0](m.one[0](x)), one=nn.Sequential(shared), two=nn.Sequential(shared))
    after = adapted(model, torch.randn(3, 6))
    assert layers_of(after) == ["one.0"] and branches_of(after, "one.0") == 2


def test_layers_that_share_a_weight_have_a_pair_each() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.weight = model.a.weight
    assert layers_of(adapted(model, torch.randn(3, 6))) == ["a", "b"]


def test_a_layer_that_is_never_called_has_none() -> None:
    after = adapted(Function(lambda m, x: m.a(x), a=nn.Linear(6, 6), never=nn.Linear(6, 2)), torch.randn(3, 6))
    assert layers_of(after) == ["a"]


def test_a_layer_that_stayed_float_can_be_adapted_too() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 5), b=nn.Linear(5, 4))
    assert layers_of(adapted(model, torch.randn(3, 6), exclude=["b"])) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_branch_computes_in_the_models_dtype(dtype: torch.dtype) -> None:
    after = adapted(Function(lambda m, x: m.a(x), a=nn.Linear(8, 4)).to(dtype), torch.randn(2, 8, dtype=dtype))
    assert {node.meta["val"].dtype for node in adapter_inputs(after).values()} == {dtype}


def test_two_and_three_dimensional_inputs() -> None:
    model = Function(lambda m, x: m.a(x).sum(1) + m.a(x[:, 0]), a=nn.Linear(6, 5))
    after = adapted(model, torch.randn(3, 4, 6))
    assert sorted(len(n.args[0].meta["val"].shape) for n in adapter_inputs(after)["a.lora_A.weight"].users) == [2, 3]


def test_a_layer_called_with_two_types_is_refused() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        half = nn.functional.linear(x.bfloat16(), m.a.weight.bfloat16()).float()
        return m.a(x) + half

    model, x = Function(body, a=nn.Linear(6, 5)), torch.randn(3, 6)
    graph = squareq_fx.capture(model, (x,))
    broken = clone(graph)
    first, second = (n for n in broken.graph.nodes if n.target is LINEAR)
    for node in (first, second):
        node.args = (node.args[0], next(n for n in broken.graph.nodes if info(n).key == "a.weight"))
    with pytest.raises(PassError, match=r"layer a is called with torch\.bfloat16 and torch\.float32; its adapter can have one"):
        Adapt(ALL)(broken)


def _names(family: str) -> list[str]:
    return [name for name, module in backbone(family).named_modules() if isinstance(module, nn.Linear)]


ATTENTION: dict[str, tuple[str, ...]] = {
    "sdxl": ("to_q", "to_k", "to_v", "to_out.0"),
    "flux": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "sd3": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "wan": ("to_q", "to_k", "to_v", "to_out.0"),
}
FEED_FORWARD: dict[str, Callable[[str], bool]] = {
    "sdxl": lambda name: ".ff.net." in name,
    "flux": lambda name: ".ff" in name or (name.endswith(("proj_mlp", "proj_out")) and name.startswith("single_")),
    "sd3": lambda name: ".ff" in name,
    "wan": lambda name: ".ffn." in name,
}


@pytest.mark.parametrize("family", ATTENTION)
def test_presets_on_the_families(family: str) -> None:
    names = _names(family)
    attention = [n for n in names if n.endswith(tuple(f".{leaf}" for leaf in ATTENTION[family])) and ".attn" in n]
    assert list(Lora(targets="attention").layers(names)) == attention
    feed_forward = [n for n in names if FEED_FORWARD[family](n)]
    both = [n for n in names if n in {*attention, *feed_forward}]
    assert feed_forward and list(Lora(targets="attention+ff").layers(names)) == both
    assert list(Lora(targets="all").layers(names)) == names
    assert len(attention) < len(both) < len(names)


PATHS = ("a.to_q", "a.to_k", "a.to_q_proj", "b.attn1.to_q", "b.attn1.to_out.0", "to_q", "c.net.2")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("to_q",), ["a.to_q", "b.attn1.to_q", "to_q"]),
        (["to_q", "net.2"], ["a.to_q", "b.attn1.to_q", "to_q", "c.net.2"]),
        (("a.to_q",), ["a.to_q"]),
        (("net.2", "to_out.0", "to_k"), ["a.to_k", "b.attn1.to_out.0", "c.net.2"]),
        (r"a\..*", ["a.to_q", "a.to_k", "a.to_q_proj"]),
        (r".*\.to_[qk]", ["a.to_q", "a.to_k", "b.attn1.to_q"]),
        (r"to_q", ["to_q"]),
        ("attention", ["b.attn1.to_q", "b.attn1.to_out.0"]),
    ],
)
def test_suffixes_and_expressions_as_in_peft(targets: Any, expected: list[str]) -> None:
    assert list(Lora(targets=targets).layers(PATHS)) == expected


def test_suffixes_and_expressions_match_as_pefts_do() -> None:
    """Against PEFT's own matcher, for every target above and every path."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for targets in (["to_q"], ["a.to_q"], ["net.2", "to_k"], r"a\..*", r".*\.to_[qk]", "to_q"):
        config = LoraConfig(target_modules=targets)
        expected = [path for path in PATHS if check_target_module_exists(config, path)]
        assert list(Lora(targets=targets).layers(PATHS)) == expected, targets


@pytest.mark.parametrize("order", [1, -1])
def test_ranks_and_alphas_of_their_own(order: int) -> None:
    lora = Lora(
        rank=4,
        alpha=2,
        targets="all",
        rank_pattern=dict([("to_k", 8), (r"b\..*", 16)][::order]),
        alpha_pattern={"attn1.to_q": 32},
    )
    found = {name: (e.rank, e.alpha, e.scaling) for name, e in lora.layers(PATHS).items()}
    assert found["a.to_q"] == (4, 2, 0.5)
    assert found["a.to_k"] == (8, 2, 0.25)
    assert found["b.attn1.to_q"] == (16, 32, 2.0)
    assert found["b.attn1.to_out.0"] == (16, 2, 0.125)


def test_alpha_is_the_rank_where_nothing_is_said() -> None:
    found = Lora(rank=4, targets="all", rank_pattern={"to_k": 8}).layers(PATHS)
    assert {e.scaling for e in found.values()} == {1.0} and found["a.to_k"].alpha == 8


def test_layers_of_one_rank_have_one_size_of_rank_in_the_graph() -> None:
    model = Function(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6))
    after = adapted(model, torch.randn(3, 6), Lora(rank=4, targets="all", rank_pattern={"b": 8}))
    sizes = [type_of(adapter_inputs(after)[f"{name}.lora_A.weight"].meta["val"].shape[0]) for name in "abc"]
    assert sizes[0] == sizes[2] != sizes[1]


@pytest.mark.parametrize(
    ("lora", "what", "near"),
    [
        ({"targets": ("to_qq",)}, "targets 'to_qq'", "to_q"),
        ({"targets": ("to_q", "to_outt.0")}, "targets 'to_outt.0'", "to_out.0"),
        ({"targets": r"b\.attn2\..*"}, "targets 'b", "b.attn1.to_q"),
        ({"targets": "all", "rank_pattern": {"to_kk": 4}}, "rank_pattern 'to_kk'", "to_k"),
        ({"targets": ("to_q",), "alpha_pattern": {"to_k": 4}}, "alpha_pattern 'to_k'", "to_q"),
    ],
)
def test_a_target_that_matches_nothing_lists_near_names(lora: Mapping[str, Any], what: str, near: str) -> None:
    with pytest.raises(PassError) as error:
        Lora(**lora).layers(PATHS)
    message = str(error.value)
    assert what in message and near in message and "attention, attention+ff, all" in message


def test_the_pass_says_which_targets_match_nothing() -> None:
    models = staged(EXAMPLES[0])
    with pytest.raises(PassError, match=r"pass adapt: lora: targets 'attention' matches none of the \d+ Linear .* embed"):
        squareq_fx.run(models.graphs["quantize"], [Adapt(Lora())])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, not 0"),
        ({"rank": -3}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"rank_pattern": {"a": 0}}, "rank must be"),
        ({"alpha": 0}, "alpha must be a positive number, not 0"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"alpha_pattern": {"a": -1}}, "alpha must be"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ""}, "targets is empty"),
        ({"targets": ("a", "")}, "targets is empty"),
        ({"targets": "a("}, "'a\\(' is not a regular expression"),
        ({"rank_pattern": {"[": 3}}, "is not a regular expression"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Lora(**options)


# -------------------------------------------------------------------------------------------------- where it goes


@pytest.mark.parametrize("after", ["capture", "canonicalize", "quantize"])
def test_anywhere_on_a_flat_graph(after: str) -> None:
    models = staged(EXAMPLES[0])
    call = EXAMPLES[0].inputs()
    adapt = Adapt(ALL)
    default = squareq_fx.default_passes(models.slab)
    passes = (adapt, *default) if after == "capture" else squareq_fx.insert_after(default, after, adapt)
    graph = squareq_fx.run(models.graphs["capture"], passes)
    usual = squareq_fx.run(models.graphs["capture"], squareq_fx.insert_after(default, "quantize", adapt))
    assert sorted(functions(graph)) == sorted(functions(usual))
    adapters = adapters_for(graph)
    found = laws.evaluate(graph, models, call, given=adapters)
    assert laws.same(found, laws.evaluate(usual, models, call, given=adapters))
    expected = by_autograd(models, call, adapters).outputs
    assert all(laws.l2(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_after_outline_it_is_refused() -> None:
    models = staged(Spec(Mlp(8)))
    with pytest.raises(PassError, match="adapt works on a flat graph; put it before outline"):
        Adapt(ALL)(models.graphs["outline"])


def test_equal_blocks_still_share_one_function() -> None:
    """An adapter is an argument of the block's function, behind its weights and its data."""
    models = staged(EXAMPLES[0])
    outlined = laws.apply(Outline(), Adapt(ALL)(models.graphs["quantize"]), models)
    calls = [n for n in outlined.graph.nodes if n.op == "call_module" and str(info(n).key).startswith("blocks.")]
    assert len(calls) == 3 and len({n.target for n in calls}) == 1
    for call in calls:
        kinds = [{"weight": 0, "adapter": 2}.get(info(a).kind, 1) for a in call.args]
        assert kinds == sorted(kinds)
        keys = [str(info(a).key) for a in call.args if info(a).kind == "adapter"]
        assert keys and all(key.startswith(f"{info(call).key}.") for key in keys)
    flat = squareq_fx.inline(outlined)
    assert laws.normal_form(flat) == laws.normal_form(Adapt(ALL)(models.graphs["quantize"]))


def test_blocks_with_other_targets_do_not_share_a_function() -> None:
    models = staged(Spec(Residual(Mlp(8)), repeat=3))
    outlined = Outline()(Adapt(Lora(targets=r"blocks\.2\..*"))(models.graphs["quantize"]))
    calls = [n for n in outlined.graph.nodes if n.op == "call_module" and str(info(n).key).startswith("blocks.")]
    assert calls[0].target == calls[1].target != calls[2].target


# ------------------------------------------------------------------------------------------------- its promises


def test_ensures_rejects_a_missed_call_and_a_stranger() -> None:
    models = staged(Spec(Mlp(8)))
    before, adapt = models.graphs["quantize"], Adapt(ALL)
    good = adapt(before)
    adapt.ensures(before, good)
    with pytest.raises(PassError, match="layer embed is called 1 times, its lora_A 0 times"):
        adapt.ensures(before, before)
    missed = clone(good)
    total = next(n for n in missed.graph.nodes if info(n).layer == "head.lora")
    total.replace_all_uses_with(total.args[0])
    missed.graph.eliminate_dead_code()
    with pytest.raises(PassError, match="layer head is called 1 times, its lora_A 0 times"):
        adapt.ensures(before, missed)
    stranger = clone(good)
    up = adapter_inputs(stranger)["head.lora_B.weight"]
    with stranger.graph.inserting_before(next(n for n in stranger.graph.nodes if n.op == "output")):
        stranger.graph.call_function(torch.ops.aten.neg.default, (up,))
    with pytest.raises(PassError, match="layer head is called 1 times, its lora_B 2 times"):
        adapt.ensures(before, stranger)


def test_a_pass_that_drops_adapters_without_saying_so_is_refused() -> None:
    models = staged(Spec(Mlp(8)))

    def forgetful(gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        for node in list(gm.graph.nodes):
            if str(info(node).layer) == "head.lora":
                node.replace_all_uses_with(node.args[0])
        gm.graph.eliminate_dead_code()
        for node in list(adapter_inputs(gm).values()):
            if not node.users:
                gm.graph.erase_node(node)
        return squareq_fx.edit.finish(gm)

    with pytest.raises(VerificationError, match=r"adapter inputs came or went \(head\.lora_A\.weight, head\.lora_B\.weight\)"):
        squareq_fx.run(Adapt(ALL)(models.graphs["quantize"]), [forgetful])
