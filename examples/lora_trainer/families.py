"""What differs between SDXL and Flux: the text, the call of the model, the sampling of a picture."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FluxPipeline
from torch import nn

from lora_trainer.cache import Takes
from squareq_fx.errors import SquareQError

__all__ = ["FAMILIES", "Batch", "Family", "Flux", "Sdxl", "family_of"]

Batch = Mapping[str, torch.Tensor]
"""The tensors of some samples, as `cache.py` has them, with a batch dimension in front."""

Latents = torch.Tensor
"""[batch, channels, height, width], scaled as the model wants them; a Flux model's packing is its own business."""


class Family(ABC):
    """One kind of pipeline. Its methods have no state."""

    name: str
    pipeline_class: str
    backbone: str
    backbone_class: str

    @abstractmethod
    def takes(self, config: Any) -> Takes:
        """What a model of this config must be given."""

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Embeddings of prompts: `prompt_embeds` [batch, tokens, features], `pooled_prompt_embeds` [batch, features]."""

    def conditions(self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> dict[str, torch.Tensor]:
        """What the model is told of a picture's sizes, each (height, width); the crop is (top, left)."""
        return {}

    @abstractmethod
    def predict(self, model: Any, noisy: Latents, timesteps: torch.Tensor, batch: Batch, guidance: float) -> Latents:
        """The model's prediction, shaped as the latents, in the model's dtype.

        Args:
            timesteps: [batch], 0 is clean and 1000 is noise.
            guidance: the scale that a guidance-distilled model is told.
        """

    @abstractmethod
    def sample(self, pipeline: Any, prompt: Batch, empty: Batch, **options: Any) -> Latents:
        """Latents of one picture, from noise.

        Args:
            prompt, empty: embeddings of the prompt, and of the empty one for classifier-free guidance.
            options: width, height, num_inference_steps, guidance_scale, generator.
        """

    def assemble(self, model: Any, vae: nn.Module, scheduler: Any) -> Any:
        """A pipeline around the model that is trained; without text encoders, for its prompts are embeddings."""
        cls = getattr(diffusers, self.pipeline_class)
        absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        return cls(**{self.backbone: model}, vae=vae, scheduler=scheduler, **absent)

    def load_encoders(self, pipeline_dir: Path, dtype: torch.dtype) -> Any:
        """The pipeline without its largest part; the VAE is in float32, for SDXL's overflows in float16."""
        cls = getattr(diffusers, self.pipeline_class)
        without: dict[str, Any] = {self.backbone: None}
        dtypes = {"vae": torch.float32, "default": dtype}
        return cls.from_pretrained(pipeline_dir, torch_dtype=dtypes, local_files_only=True, **without)

    def config(self, pipeline_dir: Path) -> dict[str, Any]:
        """The model's config.

        Raises:
            SquareQError: it is missing.
        """
        path = pipeline_dir / self.backbone / "config.json"
        if not path.is_file():
            raise SquareQError(f"{path} is missing: {pipeline_dir} is not a whole pipeline directory")
        return dict(getattr(diffusers, self.backbone_class).load_config(path.parent, local_files_only=True))

    def skeleton(self, pipeline_dir: Path, dtype: torch.dtype) -> nn.Module:
        """The model on `meta`: its weights come from the slab."""
        cls = getattr(diffusers, self.backbone_class)
        with torch.device("meta"):
            model = cls.from_config(self.config(pipeline_dir))
        nn.Module.to(model, dtype)  # diffusers' own `to` warns of modules to keep in float32, of which neither family has any
        return model.eval().requires_grad_(False)


class Sdxl(Family):
    """Stable Diffusion XL (arXiv 2307.01952): a UNet that is told the picture's original size and where it was cut."""

    name = "sdxl"
    pipeline_class, backbone, backbone_class = "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel"

    def takes(self, config: Any) -> Takes:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes = {
            "latents": (config["in_channels"], None, None),
            "prompt_embeds": (None, config["cross_attention_dim"]),
            "pooled_prompt_embeds": (pooled,),
            "time_ids": (6,),
        }
        return Takes(self.name, shapes, latent_multiple=2 ** (len(config["block_out_channels"]) - 1))

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * said.view(-1, 1, 1), pooled * said.view(-1, 1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def conditions(self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"time_ids": torch.tensor([*original, *crop, *target], dtype=torch.float32)}

    def predict(self, model: Any, noisy: Latents, timesteps: torch.Tensor, batch: Batch, guidance: float) -> Latents:
        added = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"].to(noisy.dtype)}
        return model(
            noisy,
            timesteps,
            encoder_hidden_states=batch["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def sample(self, pipeline: Any, prompt: Batch, empty: Batch, **options: Any) -> Latents:
        return pipeline(
            prompt_embeds=prompt["prompt_embeds"],
            pooled_prompt_embeds=prompt["pooled_prompt_embeds"],
            negative_prompt_embeds=empty["prompt_embeds"],
            negative_pooled_prompt_embeds=empty["pooled_prompt_embeds"],
            output_type="latent",
            **options,
        ).images


class Flux(Family):
    """FLUX.1: a transformer over 2x2 patches of the latents, trained with a guidance scale as an input."""

    name = "flux"
    pipeline_class, backbone, backbone_class = "FluxPipeline", "transformer", "FluxTransformer2DModel"

    def takes(self, config: Any) -> Takes:
        shapes = {
            "latents": (config["in_channels"] // 4, None, None),
            "prompt_embeds": (None, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }
        return Takes(self.name, shapes, latent_multiple=2)

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        longest = min(512, pipeline.tokenizer_2.model_max_length)
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=longest)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, model: Any, noisy: Latents, timesteps: torch.Tensor, batch: Batch, guidance: float) -> Latents:
        count, channels, height, width = noisy.shape
        text = batch["prompt_embeds"]
        guided = bool(model.config["guidance_embeds"])
        packed = model(
            hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / 1000,
            guidance=torch.full_like(timesteps, guidance) if guided else None,
            pooled_projections=batch["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, torch.float32),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)

    def sample(self, pipeline: Any, prompt: Batch, empty: Batch, **options: Any) -> Latents:
        packed = pipeline(
            prompt_embeds=prompt["prompt_embeds"],
            pooled_prompt_embeds=prompt["pooled_prompt_embeds"],
            output_type="latent",
            **options,
        ).images
        return FluxPipeline._unpack_latents(packed, options["height"], options["width"], pipeline.vae_scale_factor)


FAMILIES: dict[str, Family] = {family.name: family for family in (Sdxl(), Flux())}


def family_of(pipeline_dir: Path) -> Family:
    """The family of a directory that `DiffusionPipeline.save_pretrained` wrote.

    Raises:
        SquareQError: it is none, or of a pipeline that is neither SDXL's nor Flux's.
    """
    index = pipeline_dir / "model_index.json"
    if not index.is_file():
        raise SquareQError(f"{pipeline_dir} is no pipeline directory: {index.name} is missing; give what save_pretrained wrote")
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    for family in FAMILIES.values():
        if name == family.pipeline_class:
            return family
    known = " and ".join(family.pipeline_class for family in FAMILIES.values())
    raise SquareQError(f"{pipeline_dir} holds a {name}; this trainer knows {known}")


