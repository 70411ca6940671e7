"""Full-size models on `meta` and slabs of their exact layout as sparse files: structure without the gigabytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from squareq_fx.slab import Slab, open_slab
from squareq_fx.slab.checksums import checksum, raw_bytes
from squareq_fx.slab.extras import pack_slab_header
from squareq_fx.slab.plan import make_plan
from squareq_fx.slab.skeleton import Source, named_tensors
from squareq_fx.slab.sources import SourceTensor

__all__ = ["flux_dev", "sdxl_unet", "sparse_slab"]


def sdxl_unet() -> nn.Module:
    """SDXL's UNet: 743 Linear layers, 2.6 billion parameters, bf16, on `meta`."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return model.to(torch.bfloat16).eval()


def flux_dev() -> nn.Module:
    """Flux.1-dev: 504 Linear layers, 12 billion parameters, bf16, on `meta`."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    return model.to(torch.bfloat16).eval()


class _NoData:
    """The shapes of a model's tensors, with nothing in them; planning reads no more."""

    def __init__(self, model: nn.Module) -> None:
        self.specs: Mapping[str, SourceTensor] = {
            name: SourceTensor(t.dtype, tuple(t.shape)) for name, t in named_tensors(model).items()
        }

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError(f"a sparse slab holds no data, but {name} was read")

    def fingerprint(self) -> str:
        return "sparse"

    def close(self) -> None:
        pass


def _values(nbytes: int, is_scale: bool) -> torch.Tensor:
    return torch.full((nbytes // 4,), 1.0 if is_scale else 0.0)


def sparse_slab(model: nn.Module, path: Path) -> Slab:
    """A slab with `model`'s exact layout and all scales 1; the weights are a hole in the file and read as 0."""
    tensors = _NoData(model)
    plan = make_plan(
        Source(model, tensors, frozenset(tensors.specs), "a full-size model"),
        include_prefixes=None,
        exclude=(),
        pack_k=64,
        block_pattern=None,
        passthrough=True,
        example_inputs=None,
        architecture_id=None,
    )
    layers = [layer.canonical_name for layer in plan.manifest.layers]
    reserved = pack_slab_header(plan.tensors, plan.extras, layers)
    scales = {layer.scale_key for layer in plan.manifest.layers}
    sizes = {entry.name: entry.nbytes for entry in plan.tensors}
    small = [key for layer in plan.manifest.layers for key in layer.keys if key != layer.qweight_key]
    content = {key: _values(sizes[key], key in scales) for key in small}
    extras = replace(
        plan.extras,
        checksums={key: checksum(values) for key, values in content.items()},
        fidelity=dict.fromkeys(layers, (1.0, 0.0)),
    )
    header = pack_slab_header(plan.tensors, extras, length=len(reserved))
    with open(path.with_suffix(".safetensors"), "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for entry in plan.tensors:
            if entry.name in scales:
                os.pwrite(file.fileno(), raw_bytes(content[entry.name]), start + entry.offset)
        file.truncate(start + max(entry.offset + entry.nbytes for entry in plan.tensors))
    path.with_suffix(".manifest.json").write_text(plan.manifest_text)
    return open_slab(path)
