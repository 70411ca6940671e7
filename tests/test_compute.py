"""Compute modes: which layers multiply int8 with int8, how "auto" decides, calibration, the file of decisions, the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from backbones import backbone, calls
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONTEXT, EXAMPLES, Attend, Function, Mlp, Residual, Seq, Spec, make_slab, scratch, staged
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import squareq_fx
from squareq_fx import cli, ops
from squareq_fx.auto import deciding as auto
from squareq_fx.auto.calibration import calibrate, inputs_id
from squareq_fx.auto.timings import machine
from squareq_fx.cli import app
from squareq_fx.compute import Decision, Decisions, Measured, decide, modes_of, role_of, slab_id
from squareq_fx.errors import PassError, SquareQError
from squareq_fx.families import family_inputs, usual_call
from squareq_fx.ir import functions, info, program
from squareq_fx.kernels import dispatch
from squareq_fx.passes import Quantize
from squareq_fx.slab import Slab
from squareq_fx.weights import WeightValues

SPEC = Spec(Residual(Mlp(16)), repeat=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUAREQ_CACHE_DIR", str(tmp_path / "cache"))


def slab_of(spec: Spec = SPEC) -> tuple[nn.Module, Slab]:
    """A model and a slab of its own, beside which a test may write."""
    model = spec.build()
    return model, make_slab(model, spec.inputs())


def modes_in(gm: Any) -> dict[str, str]:
    flat = next(s.graph for s in program(gm).history if s.name == "quantize")
    found = [n for n in flat.graph.nodes if n.target is ops.int8_linear]
    return {str(info(n).layer): str(n.args[5]) if len(n.args) > 5 else "w8a16" for n in found}


# ---------------------------------------------------------------------------------------------------- decisions


def decided(measured: dict[str, Measured], **options: Any) -> Decisions:
    models = staged(SPEC)
    blocks = program(models.graphs["capture"]).block_paths
    how = {"machine": "here", "dtype": "float32", "inputs": "1 calibration input", "inputs_id": "x", "blocks": blocks}
    return decide(models.slab, measured, **{**how, **options})


def measured(**changes: Measured) -> dict[str, Measured]:
    """Every layer of the model twice as fast in w8a8, with an error of 1 %; `blocks_1_body_inner_up=...` changes one."""
    layers = dict.fromkeys(staged(SPEC).slab.layers, Measured(0.01, 10, 2.0, 1.0))
    for name, entry in changes.items():
        (layer,) = (key for key in layers if key.replace(".", "_") == name)
        layers[layer] = entry
    return layers


def test_the_faster_way_within_the_budget() -> None:
    nan = Measured(math.nan, 1, 2.0, 1.0)
    found = decided(measured(head=Measured(0.031, 10, 2.0, 1.0), pre=Measured(0.01, 10, 1.0, 1.0), post=nan))
    assert {name for name, mode in found.modes.items() if mode == "w8a16"} == {"head", "pre", "post"}
    assert found.layers["head"].reason == "1 of 1 such layers are over the error budget of 0.03"
    assert found.layers["pre"].reason == "w8a8 would be 1.00x as fast"
    assert found.layers["embed"] == Decision("w8a8", "2.00x as fast", 0.01, 10, 2.0, 1.0)
    assert "9 of 12 layers in w8a8, decided on here with an error budget of 0.03 and 1 calibration input" in found.notes[0]


def test_a_role_is_decided_by_its_sum_and_split_for_a_few_only() -> None:
    slow = Measured(0.01, 10, 1.0, 1.5)
    found = decided(measured(blocks_1_body_inner_up=slow))
    assert all(mode == "w8a8" for mode in found.modes.values()), "one slow layer would cost another function"
    bad = Measured(0.2, 10, 2.0, 1.0)
    found = decided(measured(blocks_1_body_inner_up=bad))
    assert {n for n, mode in found.modes.items() if mode == "w8a16"} == {"blocks.1.body.inner.up"}
    assert found.layers["blocks.1.body.inner.up"].reason == "its error is over the budget of 0.03"
    found = decided(measured(blocks_1_body_inner_up=bad, blocks_2_body_inner_up=bad))
    assert {n for n, mode in found.modes.items() if mode == "w8a16"} == {f"blocks.{i}.body.inner.up" for i in range(4)}


def test_what_was_not_measured_or_is_kept_stays() -> None:
    some = measured()
    del some["head"]
    found = decided(some, keep=("up", r"p.+"))
    assert found.layers["head"] == Decision("w8a16", "never called while calibrating")
    assert found.layers["blocks.0.body.inner.up"].reason == "kept in 16 bits by 'up'"
    assert found.layers["pre"].reason == "kept in 16 bits by 'p.+'" and found.layers["pre"].error == 0.01
    fast = {n for n, mode in found.modes.items() if mode == "w8a8"}
    assert fast == {"embed", *(f"blocks.{i}.body.inner.down" for i in range(4))}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_decisions_obey_budget_and_keep(data: Any) -> None:
    number = st.floats(0.001, 0.1)
    entries = {
        name: Measured(data.draw(number), 10, 1.0, data.draw(st.floats(0.2, 3.0))) for name in staged(SPEC).slab.layers
    }
    budget, keep = data.draw(number), data.draw(st.sampled_from([(), ("up",), ("head", "down")]))
    found = decided(entries, error_budget=budget, keep=keep)
    assert list(found.layers) == list(staged(SPEC).slab.layers)
    for name, decision in found.layers.items():
        if decision.mode == "w8a8":
            assert decision.error is not None and decision.error <= budget
            assert not any(name.endswith(pattern) for pattern in keep)
    wider = decided(entries, error_budget=1.0, keep=keep)
    assert {n for n, m in found.modes.items() if m == "w8a8"} <= {n for n, m in wider.modes.items() if m == "w8a8"}
    path = scratch("decisions.json")
    found.save(path)
    assert Decisions.load(path) == found


@pytest.mark.parametrize("budget", [-0.1, math.nan, math.inf, True, "3%"])
def test_a_budget_that_is_none(budget: Any) -> None:
    with pytest.raises(PassError, match="error_budget must be a number of at least 0"):
        decided(measured(), error_budget=budget)


def test_roles() -> None:
    blocks = ("transformer_blocks.0", "transformer_blocks.1", "down.1.attentions.0.transformer_blocks.3")
    assert role_of("transformer_blocks.1.ff.net.2", blocks) == "transformer_blocks.*.ff.net.2"
    assert role_of("transformer_blocks.10.ff.net.2", blocks) == "transformer_blocks.10.ff.net.2"
    assert role_of("down.1.attentions.0.transformer_blocks.3.attn1.to_out.0", blocks).endswith(".*.attn1.to_out.0")
    assert role_of("proj_out", blocks) == "proj_out"


# ------------------------------------------------------------------------------------------------------ Quantize


def test_keep_is_a_suffix_or_a_whole_name() -> None:
    slab = staged(SPEC).slab
    modes = modes_of(slab, "w8a8", ("inner.up", r"blocks\.0\..+"))
    kept = {f"blocks.{i}.body.inner.up" for i in range(4)} | {"blocks.0.body.inner.down"}
    assert {n for n, m in modes.items() if m == "w8a16"} == kept
    gm = squareq_fx.run(staged(SPEC).graphs["capture"], squareq_fx.default_passes(slab, compute="w8a8", keep=["head"]))
    assert modes_in(gm) == modes_of(slab, "w8a8", ("head",)) and modes_in(gm)["head"] == "w8a16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "int4"}, "'int4' is no way to compute; there are 'w8a16', 'w8a8'"),
        ({"compute": {"heads": "w8a8"}}, "has no layer 'heads'; near names are head"),
        ({"compute": {"head": "auto"}}, "head: 'auto' is no way to compute"),
        ({"keep": ("nothing",)}, "keep: 'nothing' matches no layer"),
        ({"keep": ("(",)}, "keep: '\\(' is not a regular expression"),
    ],
)
def test_quantize_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Quantize(staged(SPEC).slab, **options)


def test_ensures_rejects_another_mode_than_was_decided() -> None:
    models = staged(SPEC)
    with pytest.raises(PassError, match="layer embed computes w8a16, not w8a8"):
        Quantize(models.slab, "w8a8").ensures(models.graphs["canonicalize"], models.graphs["quantize"])


# --------------------------------------------------------------------------------------------------- calibration


def test_errors_are_those_of_the_layers_own_inputs() -> None:
    models = staged(EXAMPLES[0])
    flat = models.graphs["quantize"]
    call = EXAMPLES[0].inputs()
    expected: dict[str, float] = {}

    def observe(node: Any, args: Any, y: torch.Tensor) -> None:
        if node.target is ops.int8_linear:
            error = laws.l2(dispatch.int8_linear(*args[:5], "w8a8"), y)
            expected[info(node).layer] = max(error, expected.get(info(node).layer, 0.0))

    laws.evaluate(flat, models, call, observe=observe)
    before = laws.text(flat)
    found = calibrate(flat, models.model, models.slab, [call], progress=False)
    assert laws.text(flat) == before
    assert found.keys() == expected.keys()
    assert all(found[name].error == pytest.approx(expected[name]) and found[name].error < 0.03 for name in found)
    assert found["embed"].rows == 2 * 5
    more = calibrate(flat, models.model, models.slab, [call, EXAMPLES[0].inputs(3, 9, 4)], progress=False)
    assert more["embed"].rows == 3 * 9 and all(more[name].error >= found[name].error for name in found)


def test_a_meta_model_and_a_slab_are_enough_and_weights_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is asked for once an operation, and nothing but that operation holds it."""
    import weakref

    model, slab = slab_of(EXAMPLES[1])
    call = EXAMPLES[1].inputs()
    real = Quantize(slab)(squareq_fx.capture(model, slab=slab))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    fetch = WeightValues.tensor

    def tensor(self: WeightValues, key: str, dtype: torch.dtype) -> torch.Tensor:
        nonlocal most
        value = fetch(self, key, dtype).clone()
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr(WeightValues, "tensor", tensor)
    on_meta = calibrate(real, model.to("meta"), slab, [call], progress=False)
    assert most <= 6, "one layer's four tensors, and those of the operation before"
    assert len(alive) > 12
    monkeypatch.undo()
    assert on_meta == calibrate(real, EXAMPLES[1].build(), slab, [call], progress=False)


def test_outlier_channels_show() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(64, 64), b=nn.Linear(64, 8))
    x = torch.randn(32, 64)
    slab = make_slab(model, (x,))
    flat = Quantize(slab)(squareq_fx.capture(model, (x,)))
    spiked = x.clone()
    spiked[:, 3] *= 200
    calm, hit = (calibrate(flat, model, slab, [(v,)], progress=False)["a"].error for v in (x, spiked))
    assert calm < 0.012 and hit > calm / 2
    model.a.weight[:, 3] = 0  # the outlier matters to the step of its row, and not to the result
    slab = make_slab(model, (x,))
    flat = Quantize(slab)(squareq_fx.capture(model, (x,)))
    assert calibrate(flat, model, slab, [(spiked,)], progress=False)["a"].error > 0.3


def test_calibration_says_what_is_wrong() -> None:
    models = staged(SPEC)
    flat = models.graphs["quantize"]
    call = SPEC.inputs()
    with pytest.raises(SquareQError, match="runs a flat, quantised graph, this one is outlined"):
        calibrate(models.graphs["outline"], models.model, models.slab, [call])
    with pytest.raises(SquareQError, match="runs a flat, quantised graph, this one is captured"):
        calibrate(models.graphs["capture"], models.model, models.slab, [call])
    with pytest.raises(SquareQError, match="at least one input"):
        calibrate(flat, models.model, models.slab, [])
    with pytest.raises(SquareQError, match="calibration input 1 holds a tensor on 'meta'"):
        calibrate(flat, models.model, models.slab, [call, {k: v.to("meta") for k, v in call.items()}])
    with pytest.raises(SquareQError, match=r"layer embed gives values that are not finite.*\n  model source: .*models.py"):
        calibrate(flat, models.model, models.slab, [call | {"x": call["x"] * math.inf}])


def test_inputs_are_told_apart_by_value() -> None:
    a, b = {"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2)}
    ids = [inputs_id([a]), inputs_id([b]), inputs_id([a, a]), inputs_id([{"x": torch.ones(2, 3)}]), inputs_id([a | {"n": 1}])]
    assert len(set(ids)) == 5 and inputs_id([a]) == inputs_id([{"x": torch.zeros(2, 3)}])


def test_usual_sizes_of_the_families() -> None:
    flux = usual_call(backbone("flux"))
    assert flux is not None and flux["hidden_states"].shape == (1, 4096, 8) and flux["txt_ids"].shape == (512, 3)
    sdxl = usual_call(backbone("sdxl"))  # made for 16 x 16
    assert sdxl is not None and sdxl["sample"].shape == (1, 4, 16, 16)
    assert sdxl["added_cond_kwargs"]["text_embeds"].shape == (1, 20)
    wan = usual_call(backbone("wan"))
    assert wan is not None and wan["hidden_states"].shape == (1, 4, 21, 60, 104)
    assert usual_call(nn.Linear(2, 2)) is None
    for family in ("sd15", "flux2", "chroma", "sd3", "dit", "pixart"):
        traced = family_inputs(backbone(family))
        assert traced is not None and (usual_call(backbone(family)) or {}).keys() == traced.kwargs.keys()


# -------------------------------------------------------------------------------------------------------- "auto"


@pytest.fixture
def w8a8_is_faster(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As on a card with int8 matrix units; on the CPU it never is. Returns the layers that were timed."""
    timed: list[Any] = []

    def times(layers: Any, device: torch.device, table: Any, *, progress: bool) -> dict[Any, tuple[float, float]]:
        timed.extend(layers)
        return dict.fromkeys(timed, (2.0, 1.0))

    monkeypatch.setattr(auto, "layer_times", times)
    return timed


def test_on_the_cpu_auto_measures_and_stays_with_16_bits() -> None:
    """Times are measured there too, with the code that measures on a card."""
    model, slab = slab_of(Spec(Residual(Mlp(33)), repeat=1, width=8))
    gm = squareq_fx.compile(model, slab, compute="auto", progress=False)
    found = Decisions.load(Decisions.path_beside(slab))
    assert found == program(gm).decisions and found.machine == machine("cpu") and found.dtype == "float32"
    assert all(d.ms_w8a16 and d.ms_w8a8 and d.error is not None and d.rows == 10 for d in found.layers.values())
    assert "random normal inputs, timed at the sizes of the slab's recorded inputs" in program(gm).notes[-1]
    assert any((Path(f"{slab.path}").parent).glob("*.compute.json"))


def test_auto_is_decided_once(w8a8_is_faster: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, slab = slab_of()
    call = SPEC.inputs()
    first = squareq_fx.compile(model, slab, compute="auto", calibration=[call], progress=False)
    assert set(modes_in(first).values()) == {"w8a8"} and w8a8_is_faster
    y, exact = first(**call), squareq_fx.compile(model, slab, progress=False)(**call)
    assert torch.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.999 and not torch.equal(y, exact)
    count = len(w8a8_is_faster)
    for options in ({}, {"calibration": [call]}):
        again = squareq_fx.compile(model, slab, compute="auto", progress=False, **options)
        assert program(again).decisions == program(first).decisions
    assert len(w8a8_is_faster) == count, "read from the file"
    for options in ({"error_budget": 0.02}, {"keep": ("head",)}, {"calibration": [SPEC.inputs(seed=1)]}):
        squareq_fx.compile(model, slab, compute="auto", progress=False, **options)
        assert len(w8a8_is_faster) > count
        count = len(w8a8_is_faster)
    monkeypatch.setattr(auto, "machine", lambda device: "another card")
    squareq_fx.compile(model, slab, compute="auto", progress=False)
    assert len(w8a8_is_faster) > count
    assert Decisions.load(Decisions.path_beside(slab)).machine == "another card"


def test_layers_that_will_be_merged_are_timed_as_one(w8a8_is_faster: list[Any]) -> None:
    """k and v read the context and share a quantisation and a product, in each block; q reads something else."""
    model, slab = slab_of(Spec(Seq((Attend(), Residual(Mlp(24)))), repeat=2, width=8))
    gm = squareq_fx.compile(model, slab, compute="auto", progress=False)
    found = program(gm).decisions
    assert found is not None
    for name, entry in found.layers.items():
        share = 2 if name.endswith((".k", ".v")) else 1
        assert (entry.ms_w8a16, entry.ms_w8a8) == (2.0 / share, 1.0 / share), name
    assert {width for _, _, width, inner in w8a8_is_faster if inner == CONTEXT} == {16}


def test_a_budget_keeps_layers_in_16_bits(w8a8_is_faster: list[Any]) -> None:
    model, slab = slab_of()
    call = SPEC.inputs()
    first = squareq_fx.compile(model, slab, compute="auto", calibration=[call], progress=False)
    errors = sorted(d.error for d in program(first).decisions.layers.values())  # type: ignore[union-attr]
    budget = (errors[0] + errors[-1]) / 2  # type: ignore[operator]
    gm = squareq_fx.compile(model, slab, compute="auto", calibration=[call], error_budget=budget, progress=False)
    decisions = program(gm).decisions
    assert decisions is not None and set(modes_in(gm).values()) == {"w8a8", "w8a16"}
    assert modes_in(gm) == {name: decisions.layers[name].mode for name in modes_in(gm)}
    assert all(d.error <= budget for d in decisions.layers.values() if d.mode == "w8a8")  # type: ignore[operator]


def test_decisions_are_given_as_a_file_or_an_object_and_belong_to_a_slab(w8a8_is_faster: list[Any], tmp_path: Path) -> None:
    model, slab = slab_of()
    squareq_fx.compile(model, slab, compute="auto", keep=("up",), progress=False)
    found = Decisions.load(Decisions.path_beside(slab))
    found.save(tmp_path / "mine.json")
    for compute in (found, tmp_path / "mine.json", str(tmp_path / "mine.json"), found.modes):
        gm = squareq_fx.compile(model, slab, compute=compute, progress=False)
        assert modes_in(gm) == found.modes
    other_model, other = slab_of(replace(SPEC, width=8))
    assert slab_id(other) != slab_id(slab)
    with pytest.raises(PassError, match="made for another slab than .*compute='auto' decides for this one"):
        squareq_fx.compile(other_model, other, compute=found, progress=False)


def test_what_compile_refuses() -> None:
    models = staged(SPEC)
    how: dict[str, Any] = {"example_inputs": SPEC.inputs(), "progress": False}
    with pytest.raises(SquareQError, match="compute='w8a4' is none of 'w8a16', 'w8a8', 'auto', a mapping by layer"):
        squareq_fx.compile(models.model, models.slab, compute="w8a4", **how)
    with pytest.raises(SquareQError, match="options of the default passes"):
        squareq_fx.compile(models.model, models.slab, compute="w8a8", passes=squareq_fx.default_passes(models.slab), **how)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"squareq_compute": 2}', '{"squareq_compute": 1, "layers": {"a": {}}}']
)
def test_a_damaged_file(text: str, tmp_path: Path, w8a8_is_faster: list[Any]) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(SquareQError, match="bad.json: no"):
        Decisions.load(tmp_path / "bad.json")
    model, slab = slab_of(Spec(Mlp(8), repeat=1))
    Decisions.path_beside(slab).write_text(text)
    with pytest.warns(UserWarning, match="deciding again"):
        squareq_fx.compile(model, slab, compute="auto", progress=False)
    assert Decisions.load(Decisions.path_beside(slab)).modes


def test_a_folder_that_cannot_be_written(w8a8_is_faster: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, slab = slab_of(Spec(Mlp(8), repeat=1))

    def refuse(self: Decisions, path: Path) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(Decisions, "save", refuse)
    with pytest.warns(UserWarning, match="cannot be kept beside the slab .read only."):
        gm = squareq_fx.compile(model, slab, compute="auto", progress=False)
    assert set(modes_in(gm).values()) == {"w8a8"}


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_backbones_in_w8a8(family: str) -> None:
    model = backbone(family)
    slab = make_slab(model)
    modules = [squareq_fx.compile(model, slab, compute=mode, progress=False) for mode in ("w8a16", "w8a8")]
    assert len(functions(modules[0])) == len(functions(modules[1])), "equal decisions share functions as before"
    exact, coarse = (m(**calls(family, 2)).sample for m in modules)
    assert torch.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0) > 0.999


# ----------------------------------------------------------------------------------------------------- printing


def test_explain(w8a8_is_faster: list[Any]) -> None:
    model, slab = slab_of()
    plain = squareq_fx.explain(squareq_fx.compile(model, slab, progress=False))
    assert plain.startswith("12 int8 layers: 12 w8a16\n")
    gm = squareq_fx.compile(model, slab, compute="auto", keep=("head",), progress=False)
    lines = squareq_fx.explain(gm).splitlines()
    assert lines[0] == "12 int8 layers: 1 w8a16, 11 w8a8" and lines[1].startswith("compute: 11 of 12 layers")
    (up,) = (line for line in lines if line.startswith("blocks.*.body.inner.up"))
    for part in (" 4 ", "16 x 12, f32", "w8a8", "8.000", "4.000", "2.00x as fast"):
        assert part in up
    assert any("kept in 16 bits by 'head'" in line for line in lines)
    assert len(squareq_fx.explain(gm, by_layer=True).splitlines()) == 3 + 12
    assert "not quantised" in squareq_fx.explain(staged(SPEC).graphs["capture"])


def test_inspect_prints_decisions_that_lie_beside_the_slab(
    w8a8_is_faster: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_out", Console(width=250))  # whatever it was made with
    model, slab = slab_of()
    run = CliRunner().invoke
    stem = str(slab.path).removesuffix(".safetensors")
    assert "w8a8" not in run(app, ["inspect", stem]).output
    assert json.loads(run(app, ["inspect", stem, "--json"]).output)["compute"] is None
    squareq_fx.compile(model, slab, compute="auto", progress=False)
    output = run(app, ["inspect", stem]).output
    assert "12 of 12 layers in w8a8" in output and "blocks.*.body.inner.up" in output and "2.00x as fast" in output
    assert json.loads(run(app, ["inspect", stem, "--json"]).output)["compute"]["head"]["mode"] == "w8a8"
