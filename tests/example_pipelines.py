"""Tiny SDXL and Flux pipelines with random weights, and pictures with captions, for the tests of the examples."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from models import seeded
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples are scripts; what lies beside them is not installed
cache_latents, train_lora = importlib.import_module("cache_latents"), importlib.import_module("train_lora")

__all__ = ["EXAMPLES", "SCALE", "WORDS", "cache_latents", "save_pictures", "save_pipeline", "train_lora"]

SCALE = 2
"""Pixels a latent."""
WORDS = ("a", "cat", "dog", "red", "blue", "house", "on", "the", "sea")


def save_pipeline(family: str, directory: Path) -> Path:
    """A whole pipeline directory, as `save_pretrained` writes it."""
    with seeded(7):
        (_sdxl if family == "sdxl" else _flux)().save_pretrained(directory)
    return directory


def save_pictures(directory: Path, sizes: list[tuple[int, int]]) -> Path:
    """Coloured gradients of these (width, height), captioned."""
    directory.mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        pixels = np.stack([x, y, np.full_like(x, 40 * i % 256)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"picture{i}.png")
        (directory / f"picture{i}.txt").write_text(f"a {WORDS[3 + i % 2]} {WORDS[1 + i % 2]} on the sea\n")
    return directory


def _sdxl() -> StableDiffusionXLPipeline:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13),
        text_encoder=_clip(CLIPTextModel, 12, 12),
        text_encoder_2=_clip(CLIPTextModelWithProjection, 12, 20),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(),
        scheduler=scheduler,
    )


def _flux() -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(2, scaling_factor=0.36, shift_factor=0.11),
        text_encoder=_clip(CLIPTextModel, 20, 20),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=_transformer(),
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    ).eval()


def _transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def _vae(channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        **config,
    ).eval()


def _clip(cls: Any, width: int, projection: int) -> Any:
    tokenizer = _clip_tokenizer()
    return cls(
        CLIPTextConfig(
            hidden_size=width,
            projection_dim=projection,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Letters are tokens; no merges."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=24)


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=10)

