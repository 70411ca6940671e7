"""The models that `training.py` measures: Flux.1-dev and SDXL with random weights, or toys of the same classes on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from streaming import SDXL, inputs
from torch import nn

from squareq_fx.kernels.reference import dequantize
from squareq_fx.slab import Slab

__all__ = ["MODELS", "Subject"]

MODELS = ("flux", "sdxl")
_CONFIGS: dict[tuple[str, bool], dict[str, Any]] = {
    ("flux", False): {"guidance_embeds": True},
    ("flux", True): {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    ("sdxl", False): SDXL,
    ("sdxl", True): SDXL
    | {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24,
        "transformer_layers_per_block": (1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
}


@dataclass(frozen=True)
class Subject:
    """One model and what it is called with.

    Args:
        name: "flux" or "sdxl".
        tiny: a toy in float32 on the CPU instead of the full size in bfloat16 on the current CUDA device.
        size: pixels a side; a toy's are its own.
        batch: samples a step.
    """

    name: str
    tiny: bool = False
    size: int = 1024
    batch: int = 1

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    def on_meta(self) -> nn.Module:
        """The architecture in `dtype`, in eval mode and frozen, without weights."""
        from diffusers import FluxTransformer2DModel, UNet2DConditionModel

        model_class: Any = FluxTransformer2DModel if self.name == "flux" else UNet2DConditionModel
        with torch.device("meta"):
            model = model_class(**_CONFIGS[self.name, self.tiny])
        return model.to(self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def random(self) -> nn.Module:
        """The model on `device` with random weights of a trained model's size, the same ones each time."""
        model = self.on_meta().to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.7 * parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if key.endswith("bias") else 1.0)
        return model

    @torch.no_grad()
    def dequantised(self, slab: Slab) -> nn.Module:
        """The model on `device` with every weight as the slab has it, each INT8 one rounded to `dtype` after dequantising."""
        model = self.on_meta().to_empty(device=self.device)
        for name, layer in slab.layers.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            keys = (layer.qweight_key, layer.scale_key, layer.zero_point_key)
            q, scale, zero = (slab.tensor(key).to(self.device) for key in keys)
            linear.weight.copy_(dequantize(q, scale, zero, layer.orig_shape[1]))
            if layer.bias_key is not None:
                linear.bias.copy_(slab.tensor(layer.bias_key))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.rpartition(".")[0] not in slab.layers:
                tensor.copy_(slab.tensor(name))
        return model

    def call(self) -> dict[str, Any]:
        """Keyword arguments of one training step's forward, the same ones each time."""
        torch.manual_seed(1)
        if not self.tiny:
            return inputs(self.name, self.batch, self.size)
        text = torch.randn(self.batch, 7, 24)
        if self.name == "sdxl":
            added = {"text_embeds": torch.randn(self.batch, 20), "time_ids": torch.full((self.batch, 6), 64.0)}
            sample = torch.randn(self.batch, 4, 8, 8)
            return {"sample": sample, "timestep": torch.tensor(500), "encoder_hidden_states": text, "added_cond_kwargs": added}
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        return {
            "hidden_states": torch.randn(self.batch, len(ids), 8),
            "encoder_hidden_states": text,
            "pooled_projections": torch.randn(self.batch, 20),
            "timestep": torch.full((self.batch,), 0.5),
            "guidance": torch.full((self.batch,), 3.5),
            "img_ids": ids,
            "txt_ids": torch.zeros(7, 3),
        }

    def target(self, call: dict[str, Any]) -> torch.Tensor:
        """What the output is pulled towards: float32 noise of its shape."""
        sample = call["sample" if self.name == "sdxl" else "hidden_states"]
        return torch.randn(sample.shape, device=self.device, generator=torch.Generator(self.device).manual_seed(2))
