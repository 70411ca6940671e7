"""Adapters between files and memory, in the formats of diffusers, PEFT and Kohya."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from squareq_fx.adapters.kohya_files import read_kohya, write_kohya
from squareq_fx.adapters.peft_files import read_diffusers, read_peft, write_diffusers, write_peft
from squareq_fx.adapters.state import Adapter
from squareq_fx.adapters.storage import DIFFUSERS_WEIGHTS, Layout, open_adapter
from squareq_fx.errors import AdapterError

__all__ = ["Component", "Layout", "read_adapter", "write_adapter"]

Component = Literal["transformer", "unet"]

_READERS = {"diffusers": read_diffusers, "peft": read_peft, "kohya": read_kohya}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    layers: Mapping[str, tuple[int, int]],
    *,
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter in a file, a directory or a state dict, for the model with these layers; the format is recognised.

    - diffusers: `pytorch_lora_weights.safetensors`, with or without the component's name before the keys, also in the spellings
      before PEFT; ranks and alphas from its metadata, else alpha = rank.
    - PEFT: a directory with `adapter_config.json` and `adapter_model.safetensors`; `use_rslora` becomes an alpha.
    - Kohya: layers named after diffusers, the original UNet or Black Forest Labs, whose fused layers are split.

    Tensors that belong to text encoders are not read; a UserWarning says so.

    Args:
        source: path, or tensors by key.
        layers: the weight size (out, in) of every Linear layer of the model, by its path.
        config: for a state dict, whose alphas nothing else says: PEFT's `LoraConfig` as a dict.

    Returns:
        An `Adapter` of float32 copies, in the order of `layers`.

    Raises:
        AdapterError: the file is missing or not safetensors, has no adapter, or anything in it cannot be applied to the model
            as it is meant: unknown layers, other shapes, A without B, NaN, convolutions, DoRA, LoHa, LoKr, ... All problems of
            the file are in the one error.
    """
    stored = open_adapter(source, config)
    problems: list[str] = []
    found = _READERS[stored.layout](stored, layers, problems)
    if problems:
        raise AdapterError(f"{stored.where}: cannot be read as a LoRA of this model", problems)
    return Adapter({layer: found[layer] for layer in layers if layer in found})


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: Layout = "diffusers",
    component: Component | None = "transformer",
    dtype: torch.dtype = torch.float32,
    layers: Mapping[str, tuple[int, int]] | None = None,
) -> Path:
    """Write an adapter so that diffusers or PEFT itself loads it. A file appears whole or not at all.

    - "diffusers": keys `<component>.<layer>.lora_A.weight`, and the `LoraConfig` in the metadata entry `lora_adapter_metadata`,
      as `save_lora_weights(..., <component>_lora_adapter_metadata=...)` does; for `pipeline.load_lora_weights(directory)` and
      `model.load_lora_adapter(directory, prefix=component, use_safetensors=True)`.
    - "peft": `adapter_model.safetensors` and `adapter_config.json`, for `PeftModel.from_pretrained(model, directory)`.
    - "kohya": `lora_unet_<name>.lora_down.weight`, `.lora_up.weight`, `.alpha` (float32), for `pipeline.load_lora_weights` of
      SD, SDXL and Flux and for the programs that know only this format.
      A UNet's layers are named after diffusers, with underscores (but `label_emb_0_*` for `add_embedding.linear_*`), and all
      have the commonest alpha, with B rescaled where the alpha was another: diffusers 0.42 loses alphas that differ.
      Flux's and Chroma's are named after Black Forest Labs, so q, k, v (and the MLP of a single block) are one pair of the
      sum of their ranks; where their scalings differ, B is rescaled. Layers outside of the blocks are written and diffusers
      passes them over, which a UserWarning says.
      Other transformers' layers are diffusers' paths with underscores, which `read_adapter` reads and diffusers does not.

    Args:
        adapter: at least one layer; its tensors may be on any device.
        path: a directory, made if it is not there; for diffusers and Kohya also a file's name that ends in `.safetensors`.
        component: the model's name in a pipeline. None, for the diffusers format: no prefix, as `save_lora_adapter` writes.
        dtype: of A and B in the file: float32, float16 or bfloat16.
        layers: as for `read_adapter`; the Kohya format needs them for a transformer.

    Returns:
        The directory (PEFT) or the file.

    Raises:
        AdapterError: the adapter is empty, a value is not finite in `dtype`, the path is of the wrong kind, an argument is not
            one of those above, or the Kohya format has one name for two layers.
    """
    path = Path(path)
    if format not in get_args(Layout):
        raise AdapterError(f"{path}: format must be one of {', '.join(get_args(Layout))}, not {format!r}")
    if component not in (*get_args(Component), None) or (component is None and format == "kohya"):
        raise AdapterError(f"{path}: component must be 'transformer' or 'unet' (None only without Kohya's), not {component!r}")
    if dtype not in _DTYPES:
        raise AdapterError(f"{path}: dtype must be one of {', '.join(map(str, _DTYPES))}, not {dtype}")
    if not adapter.layers:
        raise AdapterError(f"{path}: the adapter has no layers")
    is_file = format != "peft" and path.suffix == ".safetensors"
    if path.is_dir() if is_file else path.exists() and not path.is_dir():
        raise AdapterError(f"{path}: is a {'directory' if is_file else 'file'}; give a {'file' if is_file else 'directory'}")
    if format == "peft":
        return write_peft(adapter, path, dtype)
    file = path if is_file else path / DIFFUSERS_WEIGHTS
    if format == "kohya":
        return write_kohya(adapter, file, component, dtype, layers)
    return write_diffusers(adapter, file, component, dtype)
