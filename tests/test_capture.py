"""Capture: the graph computes what the model computes, for every size, and says plainly what it cannot."""

from __future__ import annotations

import gc
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
from backbones import FAMILIES, backbone, calls
from compiled import emitted, family_slab
from hypothesis import example, given
from models import EXAMPLES, SIZES, Function, Mlp, Residual, Spec, few, make_slab, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx.calls import flatten_call
from squareq_fx.emit import emit
from squareq_fx.errors import BindingError, CaptureError
from squareq_fx.ir import Level, functions, info, program, weight_inputs
from squareq_fx.passes import Outline, Stream
from squareq_fx.specs import short_spec
from squareq_fx.verify import check, fingerprint


def module_of(model: nn.Module, graph: fx.GraphModule) -> nn.Module:
    """The captured graph as a module, the model's own weights in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return emit(graph, model, make_slab(model))


def captured(body: Callable[..., Any], *xs: torch.Tensor, **state: Any) -> tuple[nn.Module, nn.Module]:
    """A model of one input and the module captured from it, equal bit for bit for each of `xs`; the first is the example."""
    model = Function(body, **state)
    module = module_of(model, squareq_fx.capture(model, (xs[0],)))
    for x in xs:
        assert laws.same(laws.eager(module, (x,)), laws.eager(model, (x,)))
    return model, module


def vals(graph: fx.GraphModule) -> dict[str, str]:
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder" and info(n).kind == "input"]
    return {str(info(n).key): short_spec(n.meta["val"]) for n in nodes}


# -------------------------------------------------------------------------------------------- the same numbers


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_random_models(spec: Spec) -> None:
    models = staged(spec)
    graph = models.graphs["capture"]
    check(graph)
    assert program(graph).level == Level.CAPTURED and not list(graph.children())
    assert all(n.op in ("placeholder", "call_function", "output") for n in graph.graph.nodes)
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        assert laws.same(laws.evaluate(graph, models, call), laws.eager(models.model, call))


# Chroma's forward makes a Python list as long as the batch, and PixArt and DiT have a table for one size of picture.
BATCHES = {family: (1,) if family == "chroma" else (1, 2, 3) for family in FAMILIES}
PATCHES = {"pixart": [(8, 8)], "dit": [(4, 4)]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_of_every_family_from_one_capture(family: str) -> None:
    model, module = backbone(family), emitted(family, until="capture")
    for batch in BATCHES[family]:
        for height, width in PATCHES.get(family, [(3, 5), (4, 2)]):
            call = calls(family, batch, height, width, tokens=4 + batch)
            assert laws.same(laws.eager(module, call), laws.eager(model, call)), (batch, height, width)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_of_a_family_are_symbols(family: str) -> None:
    graph = emitted(family, until="capture").history[0].graph
    check(graph)
    symbolic = {key: len(re.findall(r"\bs\d+", text)) for key, text in vals(graph).items()}
    expected = {"chroma": 1, "pixart": 2, "dit": 1}.get(family, 2)
    name = "encoder_hidden_states" if "encoder_hidden_states" in symbolic else "hidden_states"
    assert symbolic[name] == expected
    assert program(graph).model_class.endswith(type(backbone(family)).__name__)


# ----------------------------------------------------------------------------------------------- example inputs


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return self.layer(x) * factor + y


X, Y = torch.randn(2, 4), torch.randn(2, 4)


@pytest.mark.parametrize(
    "given_as",
    [{"x": X, "y": Y}, (X, Y), ((X,), {"y": Y}), [X, Y], ([X], {"y": Y}), {"y": Y, "x": X}, ((), {"x": X, "y": Y})],
    ids=["dict", "tuple", "pair", "list", "list_pair", "other_order", "empty_pair"],
)
def test_ways_to_give_the_example(given_as: Any) -> None:
    model = Pair()
    module = module_of(model, squareq_fx.capture(model, given_as))
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(module(x, y), model(x, y)) and torch.equal(module(y=y, x=x), model(x, y))


def test_only_sizes_and_dtypes_of_the_example_are_read() -> None:
    model = Pair()
    graphs = [squareq_fx.capture(model, (f(X), f(Y))) for f in (lambda t: t, lambda t: t * torch.nan, lambda t: t.to("meta"))]
    assert laws.text(graphs[0]) == laws.text(graphs[1]) == laws.text(graphs[2])


def test_the_slabs_record_is_the_second_choice_and_the_argument_the_first() -> None:
    model = Pair()
    slab = make_slab(model, (X, Y))
    recorded = squareq_fx.capture(model, slab=slab)
    given_too = squareq_fx.capture(model, (X, Y, 3.0), slab=slab)
    assert dict(program(recorded).call.literals) == {} and dict(program(given_too).call.literals) == {"factor": 3.0}


def test_one_timestep_for_all_samples_leaves_the_other_sizes_to_the_family() -> None:
    """A UNet halves its sample at each level; without the family's "2*height" its sizes are nested floor divisions, and from
    three levels on a backward finds one size in two spellings."""
    model, call = backbone("sdxl"), calls("sdxl", 2)
    own = vals(squareq_fx.capture(model, example_inputs={**call, "timestep": torch.tensor([0.5, 0.5])}))
    one = vals(squareq_fx.capture(model, example_inputs={**call, "timestep": torch.tensor(0.5)}))
    assert own.pop("timestep") == "f32[s69]" and one.pop("timestep") == "f32[]"
    assert one == own and one["sample"] == "f32[s69, 4, 2*s39, 2*s79]"


def test_the_family_is_the_third_choice() -> None:
    model = backbone("dit")
    assert set(vals(squareq_fx.capture(model))) == {"hidden_states", "timestep", "class_labels"}
    recorded = make_slab(model, {**calls("dit", 2), "timestep": torch.zeros(2, dtype=torch.float64)})
    assert vals(squareq_fx.capture(model, slab=recorded))["timestep"].startswith("f64")


@pytest.mark.parametrize(
    ("example_inputs", "words"),
    [
        (None, r"not known what to call Pair\(x: 'torch.Tensor', y: .*example_inputs="),
        ({"x": X}, "example_inputs of Pair: missing a required argument: 'y'; the signature is"),
        ({"x": X, "z": Y}, "example_inputs of Pair: .*'y'|unexpected"),
        ((X, Y, 1.0, 2.0), "example_inputs of Pair: too many positional arguments"),
        (X, "example_inputs is a Tensor; give a dict of keyword arguments"),
        ("x", "example_inputs is a str"),
        ({"x": 1.0, "y": 2.0}, "Pair: the example inputs hold no tensor"),
    ],
    ids=["none", "missing", "unknown", "too_many", "tensor", "text", "no_tensor"],
)
def test_examples_that_do_not_fit(example_inputs: Any, words: str) -> None:
    with pytest.raises((CaptureError, BindingError), match=words):
        squareq_fx.capture(Pair(), example_inputs)


def test_containers_literals_and_nones() -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor, more: dict[str, Any], pair: Any = None, flag: bool = False) -> dict[str, Any]:
            y = x + more["a"] + pair[1][0]
            return {"y": y * more["scale"] if flag else y, "none": None, "list": [x * 2, 7]}

    model = Nested().eval()
    call = {"x": X, "more": {"a": Y, "scale": 3, "text": "t"}, "pair": (None, [Y]), "flag": True}
    graph = squareq_fx.capture(model, call)
    assert list(vals(graph)) == ["x", "more['a']", "pair[1][0]"]
    assert program(graph).call.literals == {"more['scale']": 3, "more['text']": "t", "pair[0]": None, "flag": True}
    found, expected = module_of(model, graph)(**call), model(**call)
    assert torch.equal(found["y"], expected["y"]) and found["none"] is None and found["list"][1] == 7
    assert list(flatten_call(call))[:2] == ["x", "more['a']"]


# ------------------------------------------------------------------------------------------------------- sizes


def test_a_batch_of_one_gives_a_graph_for_every_batch() -> None:
    x = [torch.randn(n, 6, 4) for n in (1, 2, 5)]
    captured(lambda m, x: m.a(x).softmax(1), *x, a=nn.Linear(4, 3))


def test_a_model_that_takes_one_sample_only_is_captured_with_a_warning() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 1, "one sample only"
        return x * 2

    model = Function(body)
    with pytest.warns(UserWarning, match="Function: a batch of 2 could not be traced, so .* takes batch 1 only"):
        graph = squareq_fx.capture(model, (torch.randn(1, 6),))
    module = module_of(model, graph)
    assert torch.equal(module(torch.ones(1, 6)), torch.full((1, 6), 2.0))


def test_a_model_that_treats_one_sample_in_another_way_is_captured_for_one() -> None:
    """Its trace for 2 would be refused for the very sizes of the example."""
    model = Function(_one_by_hand)
    with pytest.warns(UserWarning, match="its forward does something else for a batch of 2, so .* takes batch 1 only"):
        graph = squareq_fx.capture(model, (torch.randn(1, 6),))
    module = module_of(model, graph)
    assert torch.equal(module(torch.ones(1, 9)), torch.full((1, 9), 2.0))
    with pytest.raises(BindingError, match="dimension 0 of x is 2, the graph was captured for 1"):
        module(torch.ones(2, 6))


def test_sizes_that_are_divided_keep_one_spelling() -> None:
    """torch writes a stride now as n, now as Max(1, n); every pass compares types, so that must be one."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.norm, self.layer = nn.Conv2d(4, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.Linear(8, 8)
            self.eval().requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.cut(nn.functional.pad(x, (0, 1, 0, 1))).flatten(2).transpose(1, 2)
            x = self.norm(self.layer(x).transpose(1, 2)).transpose(1, 2)
            return self.layer(x).view(x.shape[0], -1, 2, 4).transpose(1, 2)

    model, x = Patches(), torch.randn(2, 4, 6, 8)
    module = squareq_fx.compile(model, make_slab(model, (x,)), progress=False)
    for sizes in ((2, 4, 6, 8), (1, 4, 10, 4), (3, 4, 4, 12)):
        assert laws.l2(module(torch.ones(sizes)), model(torch.ones(sizes))) < 2e-2


def _one_by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[0] == 1 else x - 1


@pytest.mark.parametrize(
    ("body", "works", "fails"),
    [
        (_one_by_hand, 3, 1),
        (lambda m, x: x + 1 if x.shape[0] > 4 else x - 1, 4, 5),
        (lambda m, x: x + 1 if x.shape[0] in (1, 7) else x - 1, 3, 7),
        (lambda m, x: x + 1 if x.shape[0] % 2 else x - 1, 4, 3),
    ],
    ids=["one", "more", "in", "odd"],
)
def test_a_size_that_takes_another_branch_is_refused_never_wrong(body: Callable[..., Any], works: int, fails: int) -> None:
    model = Function(body)
    module = module_of(model, squareq_fx.capture(model, (torch.randn(2, 4),)))
    assert torch.equal(module(X[:1].expand(works, 4)), model(X[:1].expand(works, 4)))
    with pytest.raises(BindingError, match="take another path through the model than the captured one"):
        module(torch.ones(fails, 4))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + torch.arange(x.shape[0], device=x.device)[:, None],
        lambda m, x: x * x.shape[0],
        lambda m, x: x / x.shape[0] ** 0.5,
        lambda m, x: x * max(x.shape[0], 4) + min(x.shape[0], 4),
        lambda m, x: x + torch.full((), x.shape[0], device=x.device),
        lambda m, x: x + torch.tensor([x.shape[0]], device=x.device),
        lambda m, x: x + x.new_tensor([x.shape[0], 1, 2, x.shape[1]]),
        lambda m, x: x + torch.zeros(x.shape[0], 4)[: x.shape[0] // 2].sum(),
        lambda m, x: torch.cat([x, x.flip(0)])[: x.shape[0] + 1],
        lambda m, x: x.reshape(-1, 2).repeat(1, 2)[: x.shape[0] * 2 - 1],
        lambda m, x: nn.functional.interpolate(x[None], scale_factor=2.0)[0],
    ],
)
def test_numbers_made_of_sizes_follow_the_size(body: Callable[..., Any]) -> None:
    captured(body, torch.randn(4, 4), torch.randn(5, 4), torch.randn(6, 4))


def test_sizes_that_must_agree_are_one_symbol() -> None:
    graph = squareq_fx.capture(Pair(), (X, Y))
    first, second = (re.findall(r"s\d+", text) for text in vals(graph).values())
    module = module_of(Pair(), graph)
    assert len(first) == len(second) == 1
    with pytest.raises(BindingError, match="dimension 0 of y is 4, other inputs imply 3|take another path"):
        module(torch.ones(3, 4), torch.ones(4, 4))


# --------------------------------------------------------------------------------------------------- constants


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.randn(4)
        self.many = [torch.randn(4), {"deep": torch.randn(4)}]
        self.register_buffer("buffer", torch.randn(4), persistent=False)
        self.child = nn.Linear(4, 4)
        self.child.attached = torch.randn(4).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.plain + self.many[0] * self.many[1]["deep"]
        return self.child(x) + self.buffer + self.child.attached


def test_tensor_attributes_are_constants_by_name() -> None:
    model = Attributes().eval().requires_grad_(False)
    graph = squareq_fx.capture(model, (X,))
    assert set(program(graph).constants) == {"plain", "many[0]", "many[1]['deep']", "child.attached"}
    assert program(graph).constants["plain"] is model.plain, "shared, not copied"
    slab = make_slab(model, (X,))
    for until in ("capture", "schedule"):
        module = squareq_fx.compile(model, slab, until=until)
        assert laws.l2(module(X), model(X)) < 1e-2


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + torch.tensor([1.0, -2.0, 3.5, 0.1]),
        lambda m, x: x + torch.tensor([1.0, -2.0, 3.5, 0.1], device=x.device),
        lambda m, x: x + torch.as_tensor([1, 2, 3, 4], dtype=x.dtype, device=x.device),
        lambda m, x: x + x.new_tensor([0.1, 0.2, 0.3, 0.4]),
        lambda m, x: x * torch.tensor(0.1),
        lambda m, x: x * torch.tensor(0.1, dtype=torch.float64, device=x.device).float(),
        lambda m, x: x + torch.ones(4) * torch.arange(4),
        lambda m, x: x @ torch.eye(4),
        lambda m, x: torch.cat([x, torch.zeros(x.shape[0], 1)], 1),
        lambda m, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0])[1].item(),
    ],
)
def test_constants_made_in_the_forward_keep_their_values(body: Callable[..., Any]) -> None:
    captured(body, torch.randn(2, 4), torch.randn(3, 4))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + torch.tensor([[0]] * 2).mul(torch.arange(4)).exp().to(x.dtype).to(x.device),
        lambda m, x: x + torch.tensor([0.5], device="cpu").to(x),
        lambda m, x: x + torch.ones(4, device="cpu").cumsum(0).to(x),
        lambda m, x: x * torch.tensor(0.1),
    ],
)
def test_what_is_made_on_the_cpu_moves_to_the_card(body: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Chroma's embedding of [0]: streamed, the constant is part of a buffer on the card."""
    monkeypatch.setattr(sys.modules["squareq_fx.capture"], "_device", lambda model, device: torch.device("cuda", 0))
    graph = squareq_fx.capture(Function(lambda m, x: m.layer(body(m, x)), layer=nn.Linear(4, 4)), (torch.randn(2, 4),))
    streamed = Stream()(Outline()(graph))
    check(streamed)
    for gm in (graph, streamed, *functions(streamed).values()):
        devices = [n.meta["val"].device.type for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        assert devices and set(devices) == {"cuda"}


def test_a_tied_weight_is_one_input_by_every_name() -> None:
    shared = nn.Linear(4, 4)
    model = Function(lambda m, x: m.two(m.one(x)), one=shared, two=shared)
    graph = squareq_fx.capture(model, (X,))
    assert list(weight_inputs(graph)) == ["one.weight", "one.bias"]
    assert dict(program(graph).tied) == {"two.weight": "one.weight", "two.bias": "one.bias"}


# ------------------------------------------------------------------------------------------------ nothing changes


def test_the_model_and_the_inputs_are_not_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    x = torch.randn(3, 4, requires_grad=True)
    state, modules, given_too = laws.frozen(model), [m.training for m in model.modules()], laws.frozen(x)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    graph = squareq_fx.capture(model, (x,))
    assert laws.frozen(model) == state and laws.frozen(x) == given_too and x.grad_fn is None
    assert [m.training for m in model.modules()] == modules and torch.equal(torch.get_rng_state(), random)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks and type(model) is nn.Sequential
    assert laws.same(laws.eager(module_of(model, graph), (x.detach(),)), laws.eager(model.eval(), (x.detach(),)))


def test_capturing_again_gives_the_same_graph() -> None:
    spec = Spec(Residual(Mlp(8)))
    model = spec.build()
    graphs = [squareq_fx.capture(model, spec.inputs()) for _ in range(2)]
    assert laws.text(graphs[0]) == laws.text(graphs[1])
    assert fingerprint(graphs[0])[0] != ()


def test_a_model_on_meta_gives_the_same_graph_for_the_cpu() -> None:
    spec = Spec(Residual(Mlp(8)))  # moving a model to meta unties its weights
    real = squareq_fx.capture(spec.build(), spec.inputs())
    meta = squareq_fx.capture(spec.build().to("meta"), spec.inputs())
    assert laws.text(real) == laws.text(meta) and program(meta).device == torch.device("cpu")
    assert "meta" not in laws.text(meta)


def test_torch_is_left_as_it_was_after_a_failure_too() -> None:
    before = torch.SymBool.__bool__
    with pytest.raises(CaptureError):
        squareq_fx.capture(Function(lambda m, x: x * 2 if x.sum() > 0 else x), (X,))
    assert torch.SymBool.__bool__ is before and gc.isenabled() and torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------------- refusals


class WritesToABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


def test_a_forward_that_keeps_state_is_refused() -> None:
    with pytest.raises(CaptureError, match="WritesToABuffer: forward writes to count; .* keeps no state between calls"):
        squareq_fx.capture(WritesToABuffer(), (X,))


def test_a_forward_that_changes_its_input_is_refused() -> None:
    with pytest.raises(CaptureError, match="Function: forward writes to"):
        squareq_fx.capture(Function(lambda m, x: x.add_(1)), (X,))


def test_writing_to_values_of_its_own_is_fine() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += 1
        y[:, 0] = 0
        y[1:].mul_(3)
        return y.relu_()

    captured(body, torch.randn(4, 4), torch.randn(5, 4))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * 2 if x.sum() > 0 else x,
        lambda m, x: x * float(x.max()),
        lambda m, x: x[: int(x[0, 0])],
    ],
    ids=["if", "float", "index"],
)
def test_control_flow_on_values_is_refused_with_a_readable_message(body: Callable[..., Any]) -> None:
    class Deciding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return body(self, x)

    with pytest.raises(CaptureError) as error:
        squareq_fx.capture(Deciding(), (X,))
    message = str(error.value)
    assert message.startswith("torch.export could not trace Deciding: ")
    assert "must not branch on tensor values" in message and len(message.splitlines()) < 20


def test_a_size_cannot_be_returned() -> None:
    with pytest.raises(CaptureError, match="Function: forward returns a size of its inputs"):
        squareq_fx.capture(Function(lambda m, x: (x, x.shape[0])), (X,))


def test_a_python_error_of_the_forward_is_told() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("a cat on the keyboard")

    with pytest.raises(CaptureError, match=r"could not trace Function: ValueError: a cat on the keyboard"):
        squareq_fx.capture(Function(body), (X,))


def test_a_wrong_block_pattern_is_told() -> None:
    with pytest.raises(CaptureError, match="block_pattern 'nothing' matches no module"):
        squareq_fx.capture(Pair(), (X, Y), block_pattern="nothing")


# ------------------------------------------------------------------------------------------------------- blocks


def test_blocks_come_from_the_pattern_the_slab_or_the_model() -> None:
    spec = Spec(Residual(Mlp(8)), repeat=3)
    model = spec.build()
    found = program(squareq_fx.capture(model, spec.inputs())).block_paths
    assert found == ("blocks.0", "blocks.1", "blocks.2")
    slab = make_slab(model, spec.inputs(), block_pattern=r"blocks\.[01]")
    assert program(squareq_fx.capture(model, slab=slab)).block_paths == ("blocks.0", "blocks.1")
    chosen = squareq_fx.capture(model, slab=slab, block_pattern=r"blocks\.2")
    assert program(chosen).block_paths == ("blocks.2",)


def test_the_graph_knows_the_slabs_signature() -> None:
    family = "dit"
    graph = emitted(family, until="capture").history[0].graph
    assert program(graph).model_signature == family_slab(family).signature
