"""A compiled module is called as the model is: same arguments, same answers; anything else is refused with a reason."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import calls
from compiled import Compiled, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import l2
from models import Function, make_slab, seeded
from torch import nn

import squareq_fx
from squareq_fx import BindingError

_FAMILIES = ("flux", "sdxl")


@pytest.fixture(scope="module")
def flux() -> Compiled:
    return compiled("flux")


@pytest.fixture(scope="module")
def sdxl() -> Compiled:
    return compiled("sdxl")


def _positional(model: nn.Module, call: dict[str, Any]) -> tuple[Any, ...]:
    """The whole signature by position, up to the last argument of the call."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    last = max(i for i, p in enumerate(parameters) if p.name in call)
    return tuple(call.get(p.name, p.default) for p in parameters[: last + 1])


# ------------------------------------------------------------------------------------------------ the same calls


@pytest.mark.parametrize("family", _FAMILIES)
def test_the_signature_is_the_models(family: str) -> None:
    one = compiled(family)
    assert inspect.signature(one.module.forward) == inspect.signature(one.model.forward)


@pytest.mark.parametrize("family", _FAMILIES)
def test_positions_keywords_and_both(family: str) -> None:
    one, call = compiled(family), calls(family, 2)
    expected = one.module(**call).sample
    positional = _positional(one.model, call)
    assert torch.equal(one.module(*positional).sample, expected)
    names = list(inspect.signature(one.model.forward).parameters)
    rest = {k: v for k, v in call.items() if k not in names[:2]}
    assert torch.equal(one.module(*positional[:2], **rest).sample, expected)
    assert torch.equal(one.module(**dict(reversed(call.items()))).sample, expected)


@pytest.mark.parametrize("family", _FAMILIES)
def test_defaults_that_are_written_out(family: str) -> None:
    one, call = compiled(family), calls(family, 2)
    defaults = {
        p.name: p.default
        for p in inspect.signature(one.model.forward).parameters.values()
        if p.name not in call and p.default is not inspect.Parameter.empty
    }
    assert {"flux": "joint_attention_kwargs", "sdxl": "cross_attention_kwargs"}[family] in defaults
    assert torch.equal(one.module(**call, **defaults).sample, one.module(**call).sample)


@pytest.mark.parametrize("family", _FAMILIES)
def test_return_dict_and_the_models_own_output_class(family: str) -> None:
    one, call = compiled(family), calls(family, 1)
    expected = one.model(**call)
    found = one.module(**call)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert type(one.module(**call, return_dict=True)) is type(expected)
    as_tuple = one.module(**call, return_dict=False)
    assert type(as_tuple) is tuple and len(as_tuple) == 1
    assert torch.equal(as_tuple[0], found.sample)
    assert as_tuple[0].shape == expected.sample.shape and as_tuple[0].dtype == expected.sample.dtype


@pytest.mark.parametrize("number", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7])])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_timestep_for_the_whole_batch(sdxl: Compiled, number: Any, batch: int) -> None:
    call = {**calls("sdxl", batch), "timestep": number}
    found = sdxl.module(**call).sample
    assert l2(found, sdxl.expected(**call)) < 1e-5
    assert torch.equal(found, sdxl.module(**{**call, "timestep": torch.full((batch,), 7)}).sample)


def test_integer_timesteps_a_sample(sdxl: Compiled) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        call = {**calls("sdxl", 3), "timestep": torch.tensor([3, 99, 250], dtype=dtype)}
        assert l2(sdxl.module(**call).sample, sdxl.expected(**call)) < 1e-5


def test_a_scalar_does_not_stick(sdxl: Compiled) -> None:
    """Sizes that were seen before take a shorter way through the binding; values must not."""
    call = calls("sdxl", 2)
    first, second = (sdxl.module(**{**call, "timestep": t}).sample for t in (3, 900))
    assert not torch.equal(first, second)
    assert l2(second, sdxl.expected(**{**call, "timestep": 900})) < 1e-5
    assert torch.equal(sdxl.module(**{**call, "timestep": 3}).sample, first)


@settings(max_examples=12)
@given(
    family=st.sampled_from(_FAMILIES),
    batch=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    tokens=st.integers(1, 12),
)
def test_any_size_from_one_compile(family: str, batch: int, height: int, width: int, tokens: int) -> None:
    one, call = compiled(family), calls(family, batch, height, width, tokens)
    found = one.module(**call).sample
    expected = one.expected(**call)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert l2(found, expected) < 1e-5


# --------------------------------------------------------------------------------------------- everything else


def _without(call: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in call.items() if k != name}


_Edit = Callable[[dict[str, Any]], dict[str, Any]]
_FLUX_REFUSALS: dict[str, tuple[_Edit, str]] = {
    "missing": (
        lambda c: _without(c, "hidden_states"),
        r"call of the compiled FluxTransformer2DModel: missing a required argument: 'hidden_states'; the signature",
    ),
    "missing optional": (
        lambda c: _without(c, "guidance"),
        r"guidance must be a tensor f32\[.*\], not None",
    ),
    "none": (
        lambda c: {**c, "timestep": None},
        r"timestep must be a tensor f32\[.*\], not None",
    ),
    "unknown name": (
        lambda c: {**c, "hidden_state": c["hidden_states"]},
        r"unexpected keyword argument 'hidden_state'; the signature is",
    ),
    "unknown tensor": (
        lambda c: {**c, "controlnet_block_samples": [torch.zeros(1)]},
        r"controlnet_block_samples\[0\] is a tensor, but the graph was captured without it.*that contain controlnet_block",
    ),
    "other literal": (
        lambda c: {**c, "controlnet_blocks_repeat": True},
        r"controlnet_blocks_repeat=True, but the graph was captured with False.*example_inputs that set",
    ),
    "new literal": (
        lambda c: {**c, "joint_attention_kwargs": {"scale": 0.5}},
        r"joint_attention_kwargs\['scale'\]=0\.5, but the graph was captured with nothing",
    ),
    "text": (
        lambda c: {**c, "timestep": "now"},
        r"timestep must be a tensor f32\[.*\], not 'now'",
    ),
    "dimensions": (
        lambda c: {**c, "hidden_states": c["hidden_states"][0]},
        r"hidden_states has 2 dimensions \[15, 8\], the graph wants f32\[",
    ),
    "channels": (
        lambda c: {**c, "hidden_states": torch.zeros(2, 15, 9)},
        r"dimension 2 of hidden_states is 9, the graph was captured for 8 \(f32\[.*\]\)\. Compile with example_inputs",
    ),
    "batch": (
        lambda c: {**c, "pooled_projections": torch.zeros(3, 20)},
        r"dimension 0 of pooled_projections is 3, other inputs imply 2",
    ),
    "tokens": (
        lambda c: {**c, "txt_ids": torch.zeros(8, 3)},
        r"dimension 0 of txt_ids is 8, other inputs imply 7",
    ),
    "dtype": (
        lambda c: {**c, "hidden_states": c["hidden_states"].double()},
        r"hidden_states is torch\.float64, the graph was captured for torch\.float32; that cast loses digits",
    ),
    "complex": (
        lambda c: {**c, "hidden_states": c["hidden_states"].to(torch.complex64)},
        r"hidden_states is torch\.complex64",
    ),
    "device": (
        lambda c: {**c, "hidden_states": c["hidden_states"].to("meta")},
        r"hidden_states is on meta, the graph runs on cpu; move it there",
    ),
}


@pytest.mark.parametrize("what", _FLUX_REFUSALS)
def test_flux_refuses(flux: Compiled, what: str) -> None:
    edit, message = _FLUX_REFUSALS[what]
    call = calls("flux", 2)
    flux.module(**call)  # so that the sizes that are right have been seen
    with pytest.raises(BindingError, match=message) as raised:
        flux.module(**edit(call))
    assert "FluxTransformer2DModel" in str(raised.value)
    flux.module(**call)


def _added(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    added = {k: v for k, v in {**call["added_cond_kwargs"], **changes}.items() if v is not None}
    return {**call, "added_cond_kwargs": added}


_SDXL_REFUSALS: dict[str, tuple[_Edit, str]] = {
    "multiple": (
        lambda c: {**c, "sample": torch.zeros(2, 4, 7, 10)},
        r"dimension 2 of sample is 7, it must be a multiple of 2",
    ),
    "dict without an entry": (
        lambda c: _added(c, time_ids=None),
        r"added_cond_kwargs\['time_ids'\] must be a tensor f32\[.*6\], not None",
    ),
    "dict with another": (
        lambda c: _added(c, time_idz=torch.zeros(2, 6)),
        r"added_cond_kwargs\['time_idz'\] is a tensor.*did you mean added_cond_kwargs\['time_ids'\]\?",
    ),
    "entry of another size": (
        lambda c: _added(c, time_ids=torch.zeros(2, 5)),
        r"dimension 1 of added_cond_kwargs\['time_ids'\] is 5, the graph was captured for 6",
    ),
    "no dict": (
        lambda c: _without(c, "added_cond_kwargs"),
        r"added_cond_kwargs\['text_embeds'\] must be a tensor",
    ),
    "mask": (
        lambda c: {**c, "encoder_attention_mask": torch.ones(2, 7)},
        r"encoder_attention_mask is a tensor, but the graph was captured without it",
    ),
    "timesteps": (
        lambda c: {**c, "timestep": torch.zeros(3)},
        r"dimension 0 of timestep is 3, other inputs imply 2",
    ),
}


@pytest.mark.parametrize("what", _SDXL_REFUSALS)
def test_sdxl_refuses(sdxl: Compiled, what: str) -> None:
    edit, message = _SDXL_REFUSALS[what]
    with pytest.raises(BindingError, match=message):
        sdxl.module(**edit(calls("sdxl", 2)))


def test_too_many_arguments(flux: Compiled) -> None:
    with pytest.raises(BindingError, match=r"too many positional arguments; the signature is \("):
        flux.module(*[None] * 40)


def test_a_refused_call_is_not_remembered(flux: Compiled) -> None:
    wrong = {**calls("flux", 2), "txt_ids": torch.zeros(8, 3)}
    messages = []
    for _ in range(2):
        with pytest.raises(BindingError) as raised:
            flux.module(**wrong)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_exact_casts_are_made(flux: Compiled) -> None:
    """16-bit inputs and integers have a float32 of the same value."""
    call = calls("flux", 2)
    half = {k: v.half() if k == "hidden_states" else v for k, v in call.items()}
    back = {k: v.float() for k, v in half.items()}
    assert torch.equal(flux.module(**half).sample, flux.module(**back).sample)
    ids = {**call, "img_ids": call["img_ids"].long()}
    assert torch.equal(flux.module(**ids).sample, flux.module(**call).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_integer_is_never_rounded_to_sixteen_bits(dtype: torch.dtype) -> None:
    """A timestep of 999 is 1000 in bfloat16: the model itself would have got it right."""
    model = Function(lambda m, x: x.float() * 2)
    module = squareq_fx.compile(model, make_slab(model), example_inputs=(torch.ones(3, dtype=dtype),), progress=False)
    assert torch.equal(module(3), torch.tensor([6.0])) and torch.equal(module(True), torch.tensor([2.0]))
    for wrong in (torch.tensor([999, 2001, 1]), torch.tensor(7), 2049):
        with pytest.raises(BindingError, match=f"x is torch.int64, .* captured for {dtype}; that cast loses digits"):
            module(wrong)


# ------------------------------------------------------------------------------------------------- a toy


class Branching(nn.Module):
    """Odd inputs: a literal that is computed with, a branch on a size, a nested list, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2)])

    def forward(self, x: torch.Tensor, pair: list[torch.Tensor], gain: float = 2.0, *, shift: bool = False) -> Any:
        for block in self.blocks:
            x = x + block(x)
        x = x * gain + (1 if shift else 0)
        if x.shape[1] > 4:
            x = x * 3
        return {"x": x, "pair": (pair[0] + pair[1], None), "name": "toy"}


@functools.cache
def _toy() -> tuple[nn.Module, nn.Module]:
    with seeded(3):
        model = Branching().eval().requires_grad_(False)
    example = _toy_call(2, 7)
    slab = make_slab(model, example)
    return model, squareq_fx.compile(model, slab, example_inputs=example, progress=False)


def _toy_call(batch: int, tokens: int) -> dict[str, Any]:
    with seeded(batch + tokens):
        return {"x": torch.randn(batch, tokens, 6), "pair": [torch.randn(3), torch.randn(3)], "gain": 0.5}


def test_containers_literals_and_nones_come_back() -> None:
    model, module = _toy()
    found, expected = module(**_toy_call(3, 9)), model(**_toy_call(3, 9))
    assert found.keys() == expected.keys() and found["name"] == "toy" and found["pair"][1] is None
    assert l2(found["x"], expected["x"]) < 0.05
    assert torch.equal(found["pair"][0], expected["pair"][0])


def test_a_size_beyond_the_captured_branch_is_refused() -> None:
    _, module = _toy()
    with pytest.raises(BindingError, match=r"take another path through the model.*assumes.*example_inputs of these"):
        module(**_toy_call(2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gain": 2.0}, "gain=2.0, but the graph was captured with 0.5"),
        ({"shift": True}, "shift=True, but the graph was captured with False"),
        ({"pair": [torch.zeros(3)]}, "pair[1] must be a tensor"),
        ({"pair": [torch.zeros(3)] * 3}, "pair[2] is a tensor, but the graph was captured without it"),
        ({"pair": None}, "pair"),
    ],
)
def test_the_toy_refuses(changes: dict[str, Any], message: str) -> None:
    _, module = _toy()
    with pytest.raises(BindingError, match=re.escape(message)):
        module(**{**_toy_call(2, 7), **changes})


def test_a_default_that_was_not_captured_is_refused() -> None:
    """Leaving `gain` out means 2.0, not the captured 0.5."""
    _, module = _toy()
    call = _toy_call(2, 7)
    del call["gain"]
    with pytest.raises(BindingError, match=r"gain=2\.0, but the graph was captured with 0\.5"):
        module(**call)
