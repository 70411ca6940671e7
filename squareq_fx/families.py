"""Example inputs of known diffusers families, read off a model's config.

A family is recognised by the class name of the model or of one of its bases, and only its `config` is read, so this module
imports neither diffusers nor the model's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Dims", "FamilyInputs", "family_inputs", "usual_call"]

Dims = tuple["str | None", ...]
"""One entry a dimension: None is static, "batch" a symbol, "4*height" a multiple of one."""

_BATCH = 2


@dataclass(frozen=True)
class FamilyInputs:
    """What a model is called with.

    Attributes:
        kwargs: keyword arguments; every tensor lives on `meta`. Sizes are small, distinct and never 0 or 1, because
            `torch.export` specialises those.
        dims: the same nesting as `kwargs` with a `Dims` in the place of each tensor. Equal symbols are equal sizes.
    """

    kwargs: dict[str, Any]
    dims: dict[str, Any]
    args: tuple[Any, ...] = field(default=())


class _Builder:
    def __init__(self, dtype: torch.dtype, sizes: dict[str, int]) -> None:
        self.dtype, self.sizes = dtype, {"batch": _BATCH, **sizes}

    def tensor(self, *dims: int | str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, Dims]:
        shape = [d if isinstance(d, int) else self._size(d) for d in dims]
        symbols: Dims = tuple(None if isinstance(d, int) else d for d in dims)
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta"), symbols

    def _size(self, dim: str) -> int:
        factor, _, name = dim.rpartition("*")
        return int(factor or 1) * self.sizes[name]


def family_inputs(model: nn.Module) -> FamilyInputs | None:
    """Example inputs for `model`, or None if its family is not known.

    Times (`timestep`, `guidance`) are float32 because every family turns them into float32 first; a call may still pass
    integers, which are exact up to 2**24.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    for cls in type(model).__mro__:
        build = _FAMILIES.get(cls.__name__)
        if build is not None:
            if getattr(config, "class_embed_type", None) or getattr(config, "num_class_embeds", None):
                return None  # what the class ids mean is the user's to say
            pairs = build(config, _dtype(model))
            return FamilyInputs(_select(pairs, 0), _select(pairs, 1))
    return None


def usual_call(model: nn.Module) -> dict[str, Any] | None:
    """Keyword arguments for one sample at the resolution the model's config says it is made for, every tensor on `meta`; None
    if its family is not known. For sizes only: `family_inputs` are traced, and small.
    """
    family = family_inputs(model)
    return None if family is None else _at_usual_sizes(family.kwargs, family.dims, model.config)


def _at_usual_sizes(kwargs: dict[str, Any], dims: dict[str, Any], config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, dict):
            found[name] = _at_usual_sizes(value, dims[name], config)
        elif isinstance(value, torch.Tensor):
            sizes = [_usual_size(dim, size, dims[name], config) for dim, size in zip(dims[name], value.shape)]
            found[name] = torch.empty(sizes, dtype=value.dtype, device="meta")
        else:
            found[name] = value
    return found


def _usual_size(dim: str | None, size: int, of: Dims, config: Any) -> int:
    if dim is None:
        return size
    factor, _, name = dim.rpartition("*")
    if name in ("height", "width"):
        if any(d is not None and d.endswith("frames") for d in of):
            extent = {"height": 60, "width": 104}[name]  # the latents of 480x832
        else:
            extent = getattr(config, "sample_size", None) or 128
        extent = extent if isinstance(extent, int) else extent[0]
        return max(1, extent // int(factor)) * int(factor)
    return _USUAL[name] * int(factor or 1)


_USUAL = {"batch": 1, "image_tokens": 4096, "text_tokens": 512, "tokens": 77, "frames": 21}
"""A picture of 1024x1024 as Flux sees it, its text, CLIP's, 81 frames of video."""


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _select(tree: dict[str, Any], index: int) -> dict[str, Any]:
    return {
        key: _select(value, index)
        if isinstance(value, dict)
        else value[index]
        if isinstance(value, tuple) and isinstance(value[0], torch.Tensor)
        else value
        if index == 0
        else None
        for key, value in tree.items()
    }


def _unet2d(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    factor = 2 ** (len(config.block_out_channels) - 1)
    b = _Builder(dtype, {"height": 6, "width": 10, "tokens": 77})
    cross = config.cross_attention_dim
    cross = cross if isinstance(cross, int) else cross[0]
    inputs: dict[str, Any] = {
        "sample": b.tensor("batch", config.in_channels, f"{factor}*height", f"{factor}*width"),
        "timestep": b.tensor("batch", dtype=torch.float32),
        "encoder_hidden_states": b.tensor("batch", "tokens", cross),
    }
    if config.addition_embed_type == "text_time":
        total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        time_ids = 5 if total - 5 * each == 1280 else 6  # the SDXL refiner has one size id less than the base
        pooled = total - time_ids * each
        inputs["added_cond_kwargs"] = {
            "text_embeds": b.tensor("batch", pooled),
            "time_ids": b.tensor("batch", time_ids),
        }
    return inputs


def _flux(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {"image_tokens": 48, "text_tokens": 20})
    inputs: dict[str, Any] = {
        "hidden_states": b.tensor("batch", "image_tokens", config.in_channels),
        "encoder_hidden_states": b.tensor("batch", "text_tokens", config.joint_attention_dim),
        "pooled_projections": b.tensor("batch", config.pooled_projection_dim),
        "timestep": b.tensor("batch", dtype=torch.float32),
        "img_ids": b.tensor("image_tokens", 3, dtype=torch.float32),
        "txt_ids": b.tensor("text_tokens", 3, dtype=torch.float32),
    }
    if config.guidance_embeds:
        inputs["guidance"] = b.tensor("batch", dtype=torch.float32)
    return inputs


def _flux2(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {"image_tokens": 48, "text_tokens": 20})
    axes = len(config.axes_dims_rope)
    inputs: dict[str, Any] = {
        "hidden_states": b.tensor("batch", "image_tokens", config.in_channels),
        "encoder_hidden_states": b.tensor("batch", "text_tokens", config.joint_attention_dim),
        "timestep": b.tensor("batch", dtype=torch.float32),
        "img_ids": b.tensor("image_tokens", axes, dtype=torch.float32),
        "txt_ids": b.tensor("text_tokens", axes, dtype=torch.float32),
    }
    if getattr(config, "guidance_embeds", True):
        inputs["guidance"] = b.tensor("batch", dtype=torch.float32)
    return inputs


def _chroma(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {"image_tokens": 48, "text_tokens": 20})
    batch = 1  # its forward makes a Python list of the batch's length, so a trace holds for one batch size: the pipeline's
    return {
        "hidden_states": b.tensor(batch, "image_tokens", config.in_channels),
        "encoder_hidden_states": b.tensor(batch, "text_tokens", config.joint_attention_dim),
        "timestep": b.tensor(batch, dtype=torch.float32),
        "img_ids": b.tensor("image_tokens", 3, dtype=torch.float32),
        "txt_ids": b.tensor("text_tokens", 3, dtype=torch.float32),
    }


def _sd3(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {"height": 6, "width": 10, "text_tokens": 20})
    patch = config.patch_size
    return {
        "hidden_states": b.tensor("batch", config.in_channels, f"{patch}*height", f"{patch}*width"),
        "encoder_hidden_states": b.tensor("batch", "text_tokens", config.joint_attention_dim),
        "pooled_projections": b.tensor("batch", config.pooled_projection_dim),
        "timestep": b.tensor("batch", dtype=torch.float32),
    }


def _dit(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {})
    size = config.sample_size  # its position table is a fixed buffer, so the spatial sizes are static
    return {
        "hidden_states": b.tensor("batch", config.in_channels, size, size),
        "timestep": b.tensor("batch", dtype=torch.float32),
        "class_labels": b.tensor("batch", dtype=torch.int64),
    }


def _pixart(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {"text_tokens": 20})
    size = config.sample_size  # a position table of any other size is made with numpy, so the spatial sizes are static
    inputs: dict[str, Any] = {
        "hidden_states": b.tensor("batch", config.in_channels, size, size),
        "encoder_hidden_states": b.tensor("batch", "text_tokens", config.caption_channels),
        "timestep": b.tensor("batch", dtype=torch.float32),
    }
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


def _wan(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    b = _Builder(dtype, {"frames": 3, "height": 6, "width": 10, "text_tokens": 20})
    t, h, w = config.patch_size
    return {
        "hidden_states": b.tensor("batch", config.in_channels, f"{t}*frames", f"{h}*height", f"{w}*width"),
        "timestep": b.tensor("batch", dtype=torch.float32),
        "encoder_hidden_states": b.tensor("batch", "text_tokens", config.text_dim),
    }


_FAMILIES: dict[str, Callable[[Any, torch.dtype], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet2d,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "ChromaTransformer2DModel": _chroma,
    "SD3Transformer2DModel": _sd3,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "WanTransformer3DModel": _wan,
}
