"""Named adapters of a compiled module: several at once, switched, rescaled and removed without another capture (gate 4)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from laws import l2
from lora_cases import linear_layers, make
from models import Attend, Mlp, Norm, Residual, Seq, Spec, Staged, seeded, staged
from torch import fx, nn
from torch.func import functional_call

import squareq_fx
from squareq_fx import CompiledModule, Lora, PassError, RuntimeStateError
from squareq_fx.adapters import Adapter, LayerAdapter
from squareq_fx.emit import emit

SPEC = Spec(Seq((Residual(Seq((Norm(), Attend()))), Residual(Mlp(33)))), repeat=3)
CALL = SPEC.inputs()
ALL = Lora(rank=4, alpha=8, targets="all", rank_pattern={"head": 2, "pre": 2})
RANKS = (1, 2, 5, 13, 64)


@functools.cache
def graph() -> fx.GraphModule:
    models = staged(SPEC)
    return squareq_fx.run(models.graphs["capture"], squareq_fx.default_passes(models.slab, lora=ALL))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompiledModule]:
    """Compiled, and run once in both ways; from here on nothing may be captured, traced or rewritten."""
    models = staged(SPEC)
    found = emit(graph(), models.model, models.slab)
    found(**CALL).sum().backward()
    with torch.no_grad():
        found(**CALL)
    code, halves = found.graph, found.training_step.halves  # type: ignore[union-attr]
    printed = found.code

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the module was compiled again")

    for target in (torch.export, fx.GraphModule, CompiledModule):
        monkeypatch.setattr(target, "export" if target is torch.export else "recompile", refused)
    yield found
    assert found.graph is code and found.code == printed and found.training_step.halves is halves  # type: ignore[union-attr]
    found.shutdown()


def layers() -> dict[str, tuple[int, int]]:
    sizes = linear_layers(staged(SPEC).dequantized)
    return {name: sizes[name] for name in staged(SPEC).slab.layers}


def adapter(rank: int, seed: int, alpha: float = 3.0, names: Any = None) -> Adapter:
    with seeded(seed):
        return Adapter(
            {
                name: LayerAdapter(torch.randn(rank, size[1]) * 0.2, torch.randn(size[0], rank) * 0.2 / rank**0.5, alpha)
                for name, size in layers().items()
                if names is None or name in names
            }
        )


def reference(adapters: Mapping[str, tuple[Adapter, float]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The dequantised model's output with W + sum of weight * alpha / r * B A, and the gradients of a loss by every A and B."""
    models: Staged = staged(SPEC)
    leaves: dict[str, torch.Tensor] = {}
    weights = {f"{name}.weight": p for name in layers() for p in [models.dequantized.get_parameter(f"{name}.weight")]}
    for name, (values, weight) in adapters.items():
        for layer, part in values.layers.items():
            down = leaves[f"{layer}.lora_A.{name}.weight"] = part.down.clone().requires_grad_()
            up = leaves[f"{layer}.lora_B.{name}.weight"] = part.up.clone().requires_grad_()
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + weight * part.scaling * (up @ down)
    output = functional_call(models.dequantized, weights, kwargs=CALL)
    if leaves:
        loss_of(output).backward()
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore[misc]


def loss_of(output: torch.Tensor) -> torch.Tensor:
    with seeded(2):
        return (output - torch.randn(output.shape)).square().mean()


def assert_is(module: CompiledModule, adapters: Mapping[str, tuple[Adapter, float]]) -> None:
    """The output and the gradients of all that is active; the rest has none."""
    expected, wanted = reference(adapters)
    module.zero_grad(set_to_none=True)
    output = module(**CALL)
    assert l2(output.detach(), expected) < 1e-5
    assert output.requires_grad == bool(adapters)
    if not adapters:
        return
    loss_of(output).backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() == module.adapter_parameters().keys()
    assert max(l2(found[name], wanted[name]) for name in wanted) < 1e-5
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(wanted)


def test_several_adapters_side_by_side_are_the_sum_of_their_branches(module: CompiledModule) -> None:
    one, two, three = adapter(2, 1), adapter(5, 2, alpha=1.0), adapter(13, 3, names=["head", "blocks.1.body.p1.inner.up"])
    for name, values in (("one", one), ("two", two), ("three", three)):
        assert module.load_lora_adapter(values, name) == name
        assert module.active_adapters() == [name]
        assert_is(module, {name: (values, 1.0)})
    module.set_adapters(["one", "two", "three"], [0.5, -1.0, 2.0])
    assert_is(module, {"one": (one, 0.5), "two": (two, -1.0), "three": (three, 2.0)})
    module.set_adapters(["three", "one"])
    assert module.active_adapters() == ["three", "one"]
    assert_is(module, {"three": (three, 1.0), "one": (one, 1.0)})
    module.set_adapters("two", 0.25)
    assert_is(module, {"two": (two, 0.25)})
    module.set_adapters(["one", "two"], [None, 3])
    assert_is(module, {"one": (one, 1.0), "two": (two, 3.0)})
    module.set_adapters([])
    assert_is(module, {})


@pytest.mark.parametrize("rank", RANKS)
def test_any_rank_on_one_graph(rank: int, module: CompiledModule) -> None:
    values = adapter(rank, rank)
    module.load_lora_adapter(values, "other")
    assert_is(module, {"other": (values, 1.0)})
    module.add_adapter(Lora(rank=rank, targets="all", rank_pattern={"blocks.0.body.p1.inner.up": rank + 3}), "new")
    assert {p.shape[0] for name, p in module.adapter_parameters().items() if "lora_A" in name} == {rank, rank + 3}
    with torch.no_grad(), seeded(6):
        for p in module.adapter_parameters().values():
            p.copy_(torch.randn(p.shape) * 0.1)
    assert_is(module, {"new": (module.get_adapter("new"), 1.0)})
    module.set_adapters(["other", "new"], [1.0, 0.5])
    assert_is(module, {"other": (values, 1.0), "new": (module.get_adapter("new"), 0.5)})


def test_switching_takes_milliseconds(module: CompiledModule) -> None:
    first, second = adapter(4, 1), adapter(8, 2)
    module.load_lora_adapter(first, "first")
    start = time.perf_counter()
    module.load_lora_adapter(second, "second")
    for _ in range(10):
        module.set_adapters("first")
        module.set_adapters(["first", "second"], [0.3, 0.7])
        module.disable_lora()
        module.enable_lora()
    module.delete_adapters("second")
    assert time.perf_counter() - start < 1.0


@pytest.fixture
def base() -> Iterator[CompiledModule]:
    """The same model, compiled without adapters."""
    found = emit(staged(SPEC).graphs["schedule"], staged(SPEC).model, staged(SPEC).slab)
    found(**CALL)
    yield found
    found.shutdown()


def test_disabled_is_the_base_model_bit_for_bit(base: CompiledModule, module: CompiledModule) -> None:
    values = adapter(4, 1)
    module.load_lora_adapter(values, "one")
    module.disable_lora()
    assert module.active_adapters() == [] and module.adapter_parameters() == {}
    output = module(**CALL)
    assert not output.requires_grad and torch.equal(output, base(**CALL))
    module.enable_lora()
    assert module.active_adapters() == ["one"]
    assert_is(module, {"one": (values, 1.0)})
    module.delete_adapters(["one", "default"])
    assert torch.equal(module(**CALL), base(**CALL)) and dict(module.named_parameters()) == {}


def test_adding_and_removing_leaves_the_others_parameters_alone(module: CompiledModule) -> None:
    before = {name: (id(p), p.detach().clone()) for name, p in module.named_parameters()}
    module.load_lora_adapter(adapter(3, 1), "passing")
    module.delete_adapters("passing")
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(id(after[name]) == i and torch.equal(after[name], value) for name, (i, value) in before.items())
    assert module.active_adapters() == []
    module.set_adapters("default")
    assert all(p.requires_grad for p in module.parameters())


def test_parameters_are_called_what_peft_calls_them(module: CompiledModule) -> None:
    import copy

    from peft import LoraConfig, inject_adapter_in_model

    module.add_adapter(Lora(rank=3, targets="all"), "style")
    injected = inject_adapter_in_model(
        LoraConfig(r=3, target_modules=list(layers())), copy.deepcopy(staged(SPEC).dequantized), "style"
    )
    theirs = {name: tuple(p.shape) for name, p in injected.named_parameters() if "lora_" in name}
    assert {name: tuple(p.shape) for name, p in module.adapter_parameters().items()} == theirs
    assert isinstance(module.get_submodule("blocks.0.body.p1.inner.up.lora_A.style"), nn.Module)


def test_a_new_adapter_starts_as_pefts_does(module: CompiledModule) -> None:
    module.add_adapter(Lora(rank=16, alpha=4, targets=("up", "q")), "style")
    assert module.active_adapters() == ["style"]
    found = module.get_adapter("style")
    chosen = [name for name in layers() if name.endswith((".up", ".q"))]
    assert list(found.layers) == chosen
    for part in found.layers.values():
        bound = 1 / part.down.shape[1] ** 0.5
        assert not part.up.any() and 0.6 * bound < float(part.down.abs().max()) <= bound
        assert part.scaling == 0.25
    base = reference({})[0]
    assert l2(module(**CALL).detach(), base) < 1e-5


def test_extract_and_reset(module: CompiledModule) -> None:
    values = adapter(4, 1, alpha=6.0)
    module.load_lora_adapter(values, "one")
    found = module.get_adapter("one")
    assert set(found.layers) == set(values.layers)
    for name, part in values.layers.items():
        copy = found.layers[name]
        assert torch.equal(copy.down, part.down) and torch.equal(copy.up, part.up) and copy.alpha == 6.0
        assert not copy.down.requires_grad
        copy.down.zero_()
    assert_is(module, {"one": (values, 1.0)})
    parameters = {name: id(p) for name, p in module.named_parameters()}
    module.reset_adapter("one")
    assert {name: id(p) for name, p in module.named_parameters()} == parameters, "an optimizer would lose its parameters"
    again = module.get_adapter("one")
    assert all(not part.up.any() and part.down.any() for part in again.layers.values())
    assert all(not torch.equal(again.layers[name].down, part.down) for name, part in values.layers.items())
    assert_is(module, {"one": (again, 1.0)})


def test_what_is_loaded_is_a_copy(module: CompiledModule) -> None:
    values = adapter(4, 1)
    module.load_lora_adapter(values, "one")
    expected = module(**CALL).detach()
    for part in values.layers.values():
        part.down.zero_()
    assert torch.equal(module(**CALL), expected)


@pytest.mark.parametrize("trained", [True, False])
def test_every_way_to_change_a_master_is_seen(trained: bool, module: CompiledModule) -> None:
    """What the graph takes is packed from the masters, and packed again when they change."""
    module.load_lora_adapter(adapter(4, 1), "one")
    module.requires_grad_(trained)
    name = "blocks.1.body.p1.inner.up.lora_B.one.weight"
    outputs = [module(**CALL).detach()]
    with torch.no_grad():
        module.get_parameter(name).mul_(2)
    outputs.append(module(**CALL).detach())
    module.load_state_dict({**module.state_dict(), name: torch.randn(33, 4)})
    outputs.append(module(**CALL).detach())
    module.load_state_dict({**module.state_dict(), name: torch.randn(33, 4)}, assign=True)
    outputs.append(module(**CALL).detach())
    module.set_adapters("one", 0.5)
    outputs.append(module(**CALL).detach())
    module.disable_lora()
    outputs.append(module(**CALL).detach())
    for i, a in enumerate(outputs):
        assert not any(torch.equal(a, b) for b in outputs[:i]), i
    if trained:
        module.enable_lora()
        assert_is(module, {"one": (module.get_adapter("one"), 0.5)})


def test_an_optimizer_keeps_training_after_others_came_and_went(module: CompiledModule) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for i in range(6):
        if i == 2:
            module.load_lora_adapter(adapter(3, 1), "passing")
            module.set_adapters("default")
        if i == 4:
            module.delete_adapters("passing")
        optimizer.zero_grad()
        loss = loss_of(module(**CALL))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["", "a.b", "."])
def test_names_that_cannot_be_part_of_a_parameters_name(name: str, module: CompiledModule) -> None:
    for add in (lambda: module.add_adapter(ALL, name), lambda: module._adapters.load(name, adapter(2, 1))):
        with pytest.raises(RuntimeStateError, match="an adapter cannot be called"):
            add()
    assert_nothing_changed(module)


def assert_nothing_changed(module: CompiledModule) -> None:
    assert module.active_adapters() == ["default"]
    assert {name.split(".")[-2] for name, _ in module.named_parameters()} == {"default"}
    assert all(p.requires_grad for p in module.parameters())
    module.zero_grad()
    loss_of(module(**CALL)).backward()


def test_a_name_that_is_taken(module: CompiledModule) -> None:
    with pytest.raises(RuntimeStateError, match=r"there is an adapter 'default' already; delete it first or choose"):
        module.add_adapter(ALL)
    with pytest.raises(RuntimeStateError, match=r"'default' already"):
        module.load_lora_adapter(adapter(2, 1), "default")
    assert_nothing_changed(module)


def test_names_that_are_not_there(module: CompiledModule) -> None:
    for call in (
        lambda: module.set_adapters(["default", "nobody"]),
        lambda: module.delete_adapters(["default", "nobody"]),
        lambda: module.get_adapter("nobody"),
        lambda: module.reset_adapter("nobody"),
    ):
        with pytest.raises(RuntimeStateError, match=r"there is no adapter 'nobody'; there are default"):
            call()
        assert_nothing_changed(module)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [], [float("nan")], [float("inf")]])
def test_weights_that_mean_nothing(weights: list[float], module: CompiledModule) -> None:
    with pytest.raises(RuntimeStateError, match=r"1 adapters are named, \d weights given|the weight of adapter 'default' is"):
        module.set_adapters(["default"], weights)
    assert_nothing_changed(module)


def test_an_adapter_of_other_layers_or_shapes(module: CompiledModule) -> None:
    good = adapter(4, 1)
    wrong = make({"blocks.7.body.p1.inner.up": (33, 12), "head": (11, 13), "pre": (12, 12)})
    with pytest.raises(RuntimeStateError) as error:
        module.load_lora_adapter(wrong, "wrong")
    message = str(error.value)
    assert "blocks.7.body.p1.inner.up: no branch was compiled there (near: blocks." in message
    assert "head: the adapter is for [11, 13], the layer is [11, 12]" in message and "pre:" not in message
    assert 'targets that cover its layers ("attention"' in message
    assert_nothing_changed(module)
    module.load_lora_adapter(good, "wrong")
    with pytest.raises(PassError, match=r"targets 'to_q' matches none of the \d+ Linear layers"):
        module.add_adapter(Lora(targets=("to_q",)), "new")
    assert_is(module, {"wrong": (good, 1.0)})


def test_a_module_without_adapters_says_so(base: CompiledModule) -> None:
    for call in (
        lambda: base.add_adapter(ALL),
        lambda: base.load_lora_adapter(adapter(2, 1)),
        lambda: base.set_adapters("default"),
        lambda: base.active_adapters(),
        lambda: base.adapter_parameters(),
        lambda: base.disable_lora(),
        lambda: squareq_fx.value_and_grad(base, loss_of),
    ):
        with pytest.raises(RuntimeStateError, match=r"compile it with lora=squareq_fx\.Lora\(\.\.\.\)"):
            call()


def test_names_of_their_own(module: CompiledModule) -> None:
    """Without a name, one that is free."""
    found = [module.load_lora_adapter(adapter(2, i)) for i in range(3)]
    assert len(set(found)) == 3
    module.delete_adapters(found[0])
    assert module.load_lora_adapter(adapter(2, 9)) not in found[1:]
