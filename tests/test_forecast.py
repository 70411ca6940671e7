"""`squareq_fx.forecast`: what a call will hold on the device, against calls whose every tensor is counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from compiled import LORA, compiled, emitted, family_slab
from hypothesis import given
from hypothesis import strategies as st
from models import EXAMPLES, SIZES, Spec, few, specs, staged, training
from torch.utils import _pytree as pytree

import squareq_fx
from squareq_fx import BindingError, CompiledModule, RuntimeStateError
from squareq_fx.emit import emit
from squareq_fx.memory.forecast import _Allocations
from squareq_fx.memory.rehearsal import Rehearsal
from squareq_fx.memory.tracking import AllocationTracker

CPU = torch.device("cpu")


def counted(module: CompiledModule, call: Mapping[str, Any], *, train: bool) -> int:
    """Most bytes at a time of a call on real tensors: a second one, when the arena is there."""
    call = pytree.tree_map_only(torch.Tensor, torch.clone, dict(call))
    for _ in range(2):
        tracker = AllocationTracker(CPU, _Allocations(module))
        with tracker, torch.set_grad_enabled(train):
            output = module(**call)
            output = getattr(output, "sample", output)
            if train:
                output.backward(torch.ones_like(output))
        del output
        module.zero_grad(set_to_none=True)
    return tracker.peak


def assert_same(module: CompiledModule, call: Mapping[str, Any], *, train: bool) -> squareq_fx.Forecast:
    found = squareq_fx.forecast(module, call, training=train)
    given = {leaf.data_ptr() for leaf in pytree.tree_leaves(call)}
    converted = sum(t.nbytes for t in module._binding.tensors((), call)[0] if t.data_ptr() not in given)  # counted as inputs
    assert found.activations + converted == counted(module, call, train=train)
    assert found.peak == found.arena + found.resident + found.adapters + found.inputs + found.activations
    assert max(visit.peak for visit in (*found.visits, *found.backward)) <= found.activations
    assert bool(found.backward) == train
    return found


# -------------------------------------------------------------------------------------------------------------- the law


@few
@given(specs(), st.sampled_from(SIZES))
def test_a_forward_holds_what_was_forecast(spec: Spec, sizes: tuple[int, int, int]) -> None:
    models = staged(spec)
    module = emit(models.graphs["schedule"], models.model, models.slab)
    assert_same(module, spec.inputs(*sizes), train=False)
    module.shutdown()


@pytest.mark.parametrize("save", ("recompute", "save", "offload"))
@few
@given(st.sampled_from(EXAMPLES), st.sampled_from(SIZES))
def test_a_training_step_holds_what_was_forecast(save: Any, spec: Spec, sizes: tuple[int, int, int]) -> None:
    models = training(spec, save, slots=4)
    module = emit(models.graphs["schedule"], models.model, models.slab)
    found = assert_same(module, spec.inputs(*sizes), train=True)
    assert found.adapters == sum(p.nbytes for p in module.adapter_parameters().values())
    assert_same(module, spec.inputs(*sizes), train=False)
    module.shutdown()


@pytest.mark.parametrize("family", ("sdxl", "flux", "wan"))
def test_backbones(family: str) -> None:
    assert_same(compiled(family).module, calls(family, 2), train=False)


@few
@given(specs(), st.sampled_from(SIZES))
def test_a_function_counts_the_same_at_every_call(spec: Spec, sizes: tuple[int, int, int]) -> None:
    """Each is run once for each kind of arguments, and remembered; here nothing is."""
    models = staged(spec)
    module = emit(models.graphs["schedule"], models.model, models.slab)
    found = squareq_fx.forecast(module, spec.inputs(*sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "_made", lambda *_: None)
        plain = squareq_fx.forecast(module, spec.inputs(*sizes))
    assert found.activations == plain.activations and found.visits == plain.visits
    module.shutdown()


# ------------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("until", ("quantize", "stream", "schedule"))
@pytest.mark.parametrize("backing", ("host", "resident"))
def test_weights_are_counted_where_they_are(until: str, backing: Any) -> None:
    module = emitted("flux", until, backing)
    found = squareq_fx.forecast(module, calls("flux", 2))
    segments = sum(s.nbytes for s in module.runtime.store.segments.values()) if module.runtime is not None else 0
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    if until == "quantize":
        assert (found.arena, found.resident) == (0, held) and held > 0
    elif backing == "resident":
        assert (found.arena, found.resident) == (0, held + segments)
    elif until == "schedule":
        assert (found.arena, found.resident) == (module.runtime.arena_bytes, held)  # type: ignore[union-attr]
    else:  # without an arena each load takes memory of its own
        largest = max(s.nbytes for s in module.runtime.store.segments.values())  # type: ignore[union-attr]
        assert (found.arena, found.resident) == (0, held) and found.activations > largest


def test_sizes_are_read_and_nothing_else() -> None:
    module, call = compiled("flux").module, calls("flux", 2)
    on_meta = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), call)
    assert squareq_fx.forecast(module, on_meta) == squareq_fx.forecast(module, call)


def test_more_samples_take_more() -> None:
    spec = EXAMPLES[0]
    models = staged(spec)
    module = emit(models.graphs["schedule"], models.model, models.slab)
    peaks = [squareq_fx.forecast(module, spec.inputs(batch, 16, 8)).activations for batch in (1, 2, 4, 8)]
    assert peaks == sorted(set(peaks))


@pytest.mark.parametrize("suffix", (".png", ".svg"))
def test_it_can_be_looked_at(tmp_path: Path, suffix: str) -> None:
    models = training(EXAMPLES[0])
    module = emit(models.graphs["schedule"], models.model, models.slab)
    for train in (False, True):
        found = squareq_fx.forecast(module, EXAMPLES[0].inputs(), training=train)
        written = found.draw(tmp_path / "deep" / f"{train}{suffix}").read_bytes()
        assert written.startswith(b"\x89PNG") if suffix == ".png" else found.at[0].encode() in written or b"<svg" in written
    module.shutdown()


def test_recomputing_holds_less_than_saving() -> None:
    held = {}
    for save in ("recompute", "save", "offload"):
        models = training(EXAMPLES[0], save, slots=4)  # type: ignore[arg-type]
        module = emit(models.graphs["schedule"], models.model, models.slab)
        held[save] = squareq_fx.forecast(module, EXAMPLES[0].inputs(4, 32, 8), training=True).activations
    assert held["recompute"] < held["save"] and held["offload"] < held["save"]


# ---------------------------------------------------------------------------------------------------------------- errors


def test_a_wrong_call_is_refused_as_the_module_refuses_it() -> None:
    module, call = compiled("flux").module, calls("flux", 2)
    with pytest.raises(BindingError, match="hidden_states"):
        squareq_fx.forecast(module, call | {"hidden_states": call["hidden_states"][0]})
    with pytest.raises(BindingError, match="a dict of keyword arguments"):
        squareq_fx.forecast(module, call["hidden_states"])


def test_without_a_backward_there_is_none_to_forecast() -> None:
    with pytest.raises(RuntimeStateError, match="compile it with lora="):
        squareq_fx.forecast(compiled("flux").module, calls("flux", 2), training=True)


def test_nothing_is_computed_or_changed() -> None:
    spec = EXAMPLES[0]
    models = training(spec)
    module = emit(models.graphs["schedule"], models.model, models.slab)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    squareq_fx.forecast(module, spec.inputs(), training=True)
    assert module.last_step is None
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())


# --------------------------------------------------------------------------------------------------------------- tracker


def test_views_are_free_and_what_is_dropped_is_given_back() -> None:
    x = torch.zeros(100)
    tracker = AllocationTracker(CPU)
    with tracker:
        y = x + 1
        assert tracker.held == 400
        z = y.view(10, 10).t()
        assert tracker.held == 400
        del y
        assert tracker.held == 400
        z = z.contiguous()
        assert tracker.held == 400 and tracker.peak == 800
        with tracker.span():
            del z
            w = x * 2
            assert tracker.peak == tracker.held == 400
        assert tracker.peak == 800
        x.add_(w)
        assert tracker.held == 400
    del w
    assert tracker.held == 0


@pytest.mark.gpu
@pytest.mark.parametrize("train", (False, True))
def test_the_card_holds_what_was_forecast(train: bool) -> None:
    """torch's own count, after a first call; cuBLAS's workspace is there before."""
    family = "flux"
    model = backbone(family).to("cuda", torch.bfloat16)
    slab = family_slab(family)
    module = squareq_fx.compile(model, slab, lora=LORA if train else None, progress=False)
    call = {n: v.to("cuda", torch.bfloat16 if v.is_floating_point() else v.dtype) for n, v in calls(family, 2).items()}
    found = squareq_fx.forecast(module, call, training=train)
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(train):
            output = module(**call).sample
            if train:
                output.backward(torch.ones_like(output))
        del output
    measured = torch.cuda.max_memory_allocated() - before
    assert 0.8 * found.activations <= measured <= 1.2 * found.activations + 2**20
    module.shutdown()
