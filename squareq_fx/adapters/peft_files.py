"""Adapters by PEFT's keys, `<layer>.lora_A.weight`: PEFT's own directories, and diffusers' files with their older spellings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from squareq_fx.adapters.groups import Group, group, no_such_layers, without_text_encoders, wrong_shape
from squareq_fx.adapters.peft_config import alphas, lora_config
from squareq_fx.adapters.state import Adapter, LayerAdapter
from squareq_fx.adapters.storage import (
    DIFFUSERS_METADATA,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Stored,
    packed,
    staged,
    write_tensors,
)
from squareq_fx.errors import AdapterError

__all__ = ["read_diffusers", "read_peft", "write_diffusers", "write_peft"]

_COMPONENTS = ("transformer", "unet")
_OLDER_SPELLING = re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$")


def read_peft(stored: Stored, layers: Mapping[str, tuple[int, int]], problems: list[str]) -> dict[str, LayerAdapter]:
    """A PEFT directory: keys `base_model.model.<layer>.lora_A.weight`, ranks and alphas in `adapter_config.json`.

    Raises:
        AdapterError: there is no configuration, or not one key is a LoRA's.
    """
    if not stored.config:
        raise AdapterError(
            f"{stored.where}: these are PEFT's keys, and their alpha is in an {PEFT_CONFIG}, which is not beside it; "
            "for a state dict, pass config=LoraConfig.to_dict()"
        )
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in stored.tensors.items()}
    groups = group(tensors, stored.where, problems)
    return _adapters(groups, layers, stored.config, problems)


def read_diffusers(stored: Stored, layers: Mapping[str, tuple[int, int]], problems: list[str]) -> dict[str, LayerAdapter]:
    """A diffusers file: of `save_lora_weights`, where keys begin with the component's name, or of `save_lora_adapter`.

    Ranks and alphas are in the metadata entry `lora_adapter_metadata`, under the component's name too. A file without it has
    alpha = rank in every layer: that is how diffusers 0.42 reads it. The spellings before PEFT (`to_q_lora.down`,
    `to_q.lora.down`, `lora_linear_layer.down`) are translated by diffusers' own table.

    Raises:
        AdapterError: not one key is a LoRA's.
    """
    roots = {layer.split(".")[0] for layer in layers}
    tensors = dict(stored.tensors)
    if not any(root.startswith("text_encoder") for root in roots):
        tensors = without_text_encoders(tensors, r"text_encoder(_\d)?\.", stored.where)
    found = {key.split(".")[0] for key in tensors}
    if any(key.rsplit(".lora_", 1)[0] in layers for key in tensors):  # a model may have a part of a component's name
        found -= roots
    component = next((name for name in _COMPONENTS if name in found), None)
    prefix = f"{component}." if component else ""
    tensors = _newer_spelling({key.removeprefix(prefix): tensor for key, tensor in tensors.items()}, problems)
    groups = group(tensors, stored.where, problems)
    config = stored.config if stored.config is not None else _config_in(stored, problems)
    config = {key.removeprefix(prefix): value for key, value in (config or {}).items() if key.startswith(prefix)}
    return _adapters(groups, layers, config, problems)


def write_diffusers(adapter: Adapter, path: Path, component: str | None, dtype: torch.dtype) -> Path:
    """See `write_adapter`."""
    prefix = f"{component}." if component else ""
    config = {f"{prefix}{key}": value for key, value in lora_config(adapter).items()}
    tensors = packed(_pairs(adapter, prefix), path, dtype)
    with staged(path) as (partial,):
        write_tensors(tensors, partial, {DIFFUSERS_METADATA: json.dumps(config, indent=2, sort_keys=True)})
    return path


def write_peft(adapter: Adapter, directory: Path, dtype: torch.dtype) -> Path:
    """See `write_adapter`."""
    config = {**lora_config(adapter), "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
    tensors = packed(_pairs(adapter, PEFT_PREFIX), directory, dtype)
    with staged(directory / PEFT_WEIGHTS, directory / PEFT_CONFIG) as (weights, settings):
        write_tensors(tensors, weights, {})
        settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return directory


def _pairs(adapter: Adapter, prefix: str) -> dict[str, torch.Tensor]:
    down = {f"{prefix}{layer}.lora_A.weight": part.down for layer, part in adapter.layers.items()}
    return {**down, **{f"{prefix}{layer}.lora_B.weight": part.up for layer, part in adapter.layers.items()}}


def _adapters(
    groups: Mapping[str, Group], layers: Mapping[str, tuple[int, int]], config: Mapping[str, Any], problems: list[str]
) -> dict[str, LayerAdapter]:
    problems.extend(no_such_layers((name for name in groups if name not in layers), layers))
    known = {name: pair for name, pair in groups.items() if name in layers}
    for name, pair in known.items():
        problems.extend(filter(None, [wrong_shape(name, pair, layers[name])]))
        if config and pair.alpha is not None:
            problems.append(f"{name}: has an alpha of its own and one in the configuration")
    ranks = {name: pair.rank for name, pair in known.items()}
    configured = alphas(config, ranks, problems) if config else {}
    found = {}
    for name, pair in known.items():
        alpha = configured.get(name, pair.rank if pair.alpha is None else pair.alpha)
        found[name] = LayerAdapter(pair.down, pair.up, float(alpha))
    return found


def _newer_spelling(tensors: Mapping[str, torch.Tensor], problems: list[str]) -> dict[str, torch.Tensor]:
    older = [key for key in tensors if _OLDER_SPELLING.search(key)]
    if not older:
        return dict(tensors)
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        # The table has lora_linear_layer for text encoders only.
        (name,) = convert_unet_state_dict_to_peft({key.replace(".lora_linear_layer.", ".lora."): None})
        if name in renamed:
            problems.append(f"{key}: is {name}, which the file has under another spelling too")
        renamed[name] = tensor
    return renamed


def _config_in(stored: Stored, problems: list[str]) -> Mapping[str, Any] | None:
    text = stored.metadata.get(DIFFUSERS_METADATA)
    if not text:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        problems.append(f"the metadata entry {DIFFUSERS_METADATA} is not JSON: {error}")
        return None
    if isinstance(config, dict):
        return config
    problems.append(f"the metadata entry {DIFFUSERS_METADATA} is a {type(config).__name__}, not the object of a LoraConfig")
    return None
