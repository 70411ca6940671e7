"""Tiny diffusers backbones with random weights, one of each family that `squareq_fx.families` knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from models import seeded
from torch import nn

__all__ = ["FAMILIES", "backbone", "calls"]


def _unet(**config: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "norm_num_groups": 8,
            **config,
        }
    )


def _sd15() -> nn.Module:
    return _unet(attention_head_dim=4)


def _sdxl() -> nn.Module:
    return _unet(
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=20,
        approximator_layers=1,
    )


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=24,
    )


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    )


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _images(channels: int, text: int, *, pooled: int = 0, time: str = "timestep") -> Callable[..., dict[str, Any]]:
    def call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
        inputs = {
            "hidden_states": torch.randn(batch, channels, 2 * height, 2 * width),
            "encoder_hidden_states": torch.randn(batch, tokens, text),
            "timestep": torch.rand(batch) * 1000,
        }
        if pooled:
            inputs["pooled_projections"] = torch.randn(batch, pooled)
        return inputs

    return call


def _tokens(*, axes: int = 3, pooled: int = 0, guidance: bool = False) -> Callable[..., dict[str, Any]]:
    def call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
        ids = torch.zeros(height * width, axes)
        ids[:, 1] = torch.arange(height).repeat_interleave(width)
        ids[:, 2] = torch.arange(width).repeat(height)
        inputs = {
            "hidden_states": torch.randn(batch, height * width, 8),
            "encoder_hidden_states": torch.randn(batch, tokens, 24),
            "timestep": torch.rand(batch),
            "img_ids": ids,
            "txt_ids": torch.zeros(tokens, axes),
        }
        if pooled:
            inputs["pooled_projections"] = torch.randn(batch, pooled)
        if guidance:
            inputs["guidance"] = torch.rand(batch) * 4
        return inputs

    return call


def _sd15_call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 2 * height, 2 * width),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, tokens, 24),
    }


def _sdxl_call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(batch, 20), "time_ids": torch.randint(0, 1024, (batch, 6)).float()}
    return {**_sd15_call(batch, height, width, tokens), "added_cond_kwargs": added}


def _dit_call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 1, 8, 8),
        "timestep": torch.randint(0, 1000, (batch,)),
        "class_labels": torch.randint(0, 10, (batch,)),
    }


def _pixart_call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    added = {"resolution": None, "aspect_ratio": None}
    return {**_images(4, 24)(batch, height, width, tokens), "added_cond_kwargs": added}


def _wan_call(batch: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, tokens % 3 + 1, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(batch, tokens, 24),
        "timestep": torch.rand(batch) * 1000,
    }


_Builder = tuple[Callable[[], nn.Module], Callable[..., dict[str, Any]]]
FAMILIES: dict[str, _Builder] = {
    "sd15": (_sd15, _sd15_call),
    "sdxl": (_sdxl, _sdxl_call),
    "flux": (_flux, _tokens(pooled=20, guidance=True)),
    "flux2": (_flux2, _tokens(axes=4, guidance=True)),
    "chroma": (_chroma, _tokens()),
    "sd3": (_sd3, _images(4, 24, pooled=20)),
    "dit": (_dit, _dit_call),
    "pixart": (_pixart, _pixart_call),
    "wan": (_wan, _wan_call),
}


@functools.cache
def backbone(family: str) -> nn.Module:
    """The family's tiny model, in eval mode; one object for all tests, which must not change it."""
    with seeded(1):
        return FAMILIES[family][0]().eval().requires_grad_(False)


def calls(family: str, batch: int, height: int = 3, width: int = 5, tokens: int = 7) -> dict[str, Any]:
    """Keyword arguments for a call; `height` and `width` count patches."""
    with seeded(batch * 1000 + height * 100 + width * 10 + tokens):
        return FAMILIES[family][1](batch, height, width, tokens)
