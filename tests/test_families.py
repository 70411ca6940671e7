"""Streaming blocks of the full-size models, and example inputs of every family that is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from backbones import FAMILIES, backbone, calls
from full_size import flux_dev, sdxl_unet
from models import Mlp, Spec
from torch import nn

from squareq_fx.blocks import block_paths
from squareq_fx.calls import flatten_call
from squareq_fx.errors import CaptureError
from squareq_fx.families import _FAMILIES, family_inputs
from squareq_fx.tracing.skeleton import skeleton

# ------------------------------------------------------------------------------------------------------ blocks


def test_sdxl_has_70_blocks() -> None:
    model = sdxl_unet()
    paths = block_paths(model)
    assert len(paths) == len(set(paths)) == 70
    assert {type(model.get_submodule(path)).__name__ for path in paths} == {"BasicTransformerBlock"}
    assert paths[0] == "down_blocks.1.attentions.0.transformer_blocks.0"
    registered = [name for name, _ in model.named_modules() if name in paths]
    assert list(paths) == registered, "registration order"


def test_flux_has_19_double_and_38_single_blocks() -> None:
    paths = block_paths(flux_dev())
    assert paths == tuple(
        [f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(38)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_blocks_that_do_not_nest(family: str) -> None:
    paths = block_paths(backbone(family))
    assert len(paths) >= 2
    assert not [(p, q) for p in paths for q in paths if q.startswith(p + ".")]


def test_a_pattern_matches_whole_paths() -> None:
    model = flux_dev()
    assert block_paths(model, r"transformer_blocks\.\d") == tuple(f"transformer_blocks.{i}" for i in range(10))
    assert block_paths(model, r".*blocks\.1") == ("transformer_blocks.1", "single_transformer_blocks.1")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[", "is not a regular expression"),
        ("blok", "matches no module; module paths look like embed, "),
        (r"blocks\.0.*", r"matches blocks\.0 and blocks\.0\.body inside it; blocks cannot nest"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        block_paths(Spec(Mlp(8)).build(), pattern)


def test_what_is_no_block() -> None:
    """One entry of a class, entries with little in their Linear layers, and named children are not."""
    assert block_paths(Spec(Mlp(8), repeat=1).build()) == ()
    convolutions = nn.ModuleList([nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
    assert block_paths(nn.Sequential(convolutions)) == ()


# ------------------------------------------------------------------------------------------------ example inputs


def test_the_backbones_of_the_tests_are_every_family() -> None:
    assert {type(backbone(family)).__name__ for family in FAMILIES} == set(_FAMILIES)
    assert all(hasattr(diffusers, name) for name in _FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_model_takes_them(family: str) -> None:
    model = skeleton(backbone(family))[0]
    inputs = family_inputs(model)
    assert inputs is not None
    tensors = _tensors(inputs.kwargs)
    assert tensors and {t.device.type for t in tensors.values()} == {"meta"}
    with torch.no_grad(), torch.device("meta"):
        found = model(*inputs.args, **inputs.kwargs).sample
        expected = model(**_to_meta(calls(family, 1))).sample
    assert found.device.type == "meta" and found.dim() == expected.dim()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_arguments_of_a_real_call(family: str) -> None:
    inputs = family_inputs(backbone(family))
    assert inputs is not None
    tensors, real = _tensors(inputs.kwargs), _tensors(calls(family, 2))
    assert tensors.keys() == real.keys()
    assert all(tensors[path].dim() == real[path].dim() for path in real)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_vary_are_distinct_and_never_one(family: str) -> None:
    inputs = family_inputs(backbone(family))
    assert inputs is not None
    sizes: dict[str, int] = {}
    dims = _dims(inputs.dims)
    for path, tensor in _tensors(inputs.kwargs).items():
        assert len(dims[path]) == tensor.dim(), path
        for symbol, extent in zip(dims[path], tensor.shape):
            if symbol is not None:
                factor, _, name = symbol.rpartition("*")
                assert extent % int(factor or 1) == 0
                assert sizes.setdefault(name, extent // int(factor or 1)) == extent // int(factor or 1)
    assert all(size > 1 for size in sizes.values())
    assert len(set(sizes.values())) == len(sizes), "equal sizes would be taken for one symbol"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_follow_the_model_and_times_stay_float32(dtype: torch.dtype) -> None:
    model = skeleton(backbone("sdxl"))[0].to(dtype)
    inputs = family_inputs(model)
    assert inputs is not None
    tensors = _tensors(inputs.kwargs)
    assert tensors.pop("timestep").dtype == torch.float32
    assert {t.dtype for t in tensors.values()} == {dtype}


def test_a_subclass_belongs_to_its_family() -> None:
    class Mine(diffusers.DiTTransformer2DModel):
        pass

    with torch.device("meta"):
        model = Mine(num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8)
    assert family_inputs(model) is not None


def test_models_that_nobody_knows() -> None:
    assert family_inputs(nn.Linear(2, 2)) is None
    stranger = nn.Linear(2, 2)
    stranger.config = SimpleNamespace(in_channels=4)  # type: ignore[assignment]
    assert family_inputs(stranger) is None


def test_class_conditions_are_the_users_to_say() -> None:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            num_class_embeds=10,
        )
    assert family_inputs(model) is None


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {path: leaf for path, leaf in flatten_call(arguments).items() if isinstance(leaf, torch.Tensor)}


def _dims(tree: dict[str, Any]) -> dict[str, tuple[str | None, ...]]:
    found = {}
    for name, value in tree.items():
        found.update({f"{name}['{k}']": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return found


def _to_meta(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _to_meta(value) if isinstance(value, dict) else value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
