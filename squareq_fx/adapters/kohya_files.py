"""Kohya's files (sd-scripts): `lora_unet_<name>.lora_down.weight`, `.lora_up.weight`, `.alpha`, all in one safetensors file."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from squareq_fx.adapters.groups import group, no_such_layers, without_text_encoders, wrong_shape
from squareq_fx.adapters.kohya_fused import fuse, split, with_alpha
from squareq_fx.adapters.kohya_names import Names, bfl_names, diffusers_reads, is_flux_shaped
from squareq_fx.adapters.state import Adapter, LayerAdapter
from squareq_fx.adapters.storage import KOHYA_PREFIXES, Stored, packed, staged, write_tensors
from squareq_fx.errors import AdapterError

__all__ = ["read_kohya", "write_kohya"]

_FUSED_RANKS = "squareq_fx.fused_ranks"
"""Metadata entry of ours: for a name that is several layers, the rank of each, in the order of their rows."""

_EMBEDDINGS = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
"""Layers of a UNet that diffusers reads from a Kohya file under the original UNet's name only."""


def read_kohya(stored: Stored, layers: Mapping[str, tuple[int, int]], problems: list[str]) -> dict[str, LayerAdapter]:
    """Names as in `kohya_names`; without `.alpha` a layer has alpha = rank, as in sd-scripts.

    A name that is several layers (a fused qkv) has its B cut into rows. Where the cut B is block-diagonal, each layer keeps
    only its own rank; otherwise all of A goes to each of them, so the ranks add up, and the result is the same.

    Raises:
        AdapterError: not one key is a LoRA's.
    """
    tensors = without_text_encoders(stored.tensors, r"lora_te\d?_", stored.where)
    groups = group(tensors, stored.where, problems)
    if stored.config is not None:
        problems.append("a Kohya file has its alphas itself; no configuration goes with it")
    names, fused_ranks = Names(layers), _fused_ranks(stored, problems)
    found: dict[str, LayerAdapter] = {}
    unknown: list[str] = []
    for name, pair in groups.items():
        bare = next((name.removeprefix(prefix) for prefix in KOHYA_PREFIXES if name.startswith(prefix)), name)
        slots = names.slots(bare)
        if not slots:
            meant = names.by_underscores.get(bare, ())
            problems.extend([f"{bare}: may be {' or '.join(meant)}"] if meant else [])
            unknown.extend([] if meant else [bare])
            continue
        rows = [layers[slot.layer][0] for slot in slots]
        problem = wrong_shape(name, pair, (sum(rows), layers[slots[0].layer][1]))
        if problem is not None:
            problems.append(problem)
            continue
        for slot, part in zip(slots, split(pair, slots, rows, fused_ranks.get(name))):
            if slot.layer in found:
                problems.append(f"{name}: is the layer {slot.layer}, which the file has under another name too")
            elif part is not None:
                found[slot.layer] = part
    problems.extend(no_such_layers(unknown, names.by_underscores))
    return found


def write_kohya(
    adapter: Adapter, path: Path, component: str | None, dtype: torch.dtype, layers: Mapping[str, tuple[int, int]] | None
) -> Path:
    """See `write_adapter`.

    Raises:
        AdapterError: the model's layers are needed and not given, or lack one of the adapter's, or two of them have one name in
            this format.
    """
    if component == "unet":
        named, ignored = _unet_pairs(adapter)
        ranks: dict[str, list[int]] = {}
    elif layers is None:
        raise AdapterError(f"{path}: a Kohya file names a transformer's layers after the whole model; pass layers=")
    else:
        named, ranks, ignored = _transformer_pairs(adapter, layers)
    if ignored:
        warnings.warn(
            f"{path}: diffusers does not load {', '.join(ignored)} from a Kohya file (other programs do); "
            "its own format has them all",
            UserWarning,
            stacklevel=3,
        )
    tensors = packed({f"lora_unet_{name}.lora_down.weight": pair.down for name, pair in named.items()}, path, dtype)
    tensors |= packed({f"lora_unet_{name}.lora_up.weight": pair.up for name, pair in named.items()}, path, dtype)
    alphas = {f"lora_unet_{name}.alpha": torch.tensor(pair.alpha, dtype=torch.float64) for name, pair in named.items()}
    tensors |= packed(alphas, path, torch.float32)
    with staged(path) as (partial,):
        write_tensors(tensors, partial, {_FUSED_RANKS: json.dumps(ranks)} if ranks else {})
    return path


def _fused_ranks(stored: Stored, problems: list[str]) -> dict[str, list[int]]:
    try:
        ranks = json.loads(stored.metadata.get(_FUSED_RANKS, "{}"))
        return {str(name): [int(rank) for rank in own] for name, own in ranks.items()}
    except (ValueError, TypeError, AttributeError) as error:
        problems.append(f"the metadata entry {_FUSED_RANKS} has no lists of ranks by name: {error}")
        return {}


def _unet_pairs(adapter: Adapter) -> tuple[dict[str, LayerAdapter], list[str]]:
    """All with one alpha: where they differ, diffusers 0.42 loses those of the attention layers (their names do not match)."""
    alpha = Counter(part.alpha for part in adapter.layers.values()).most_common(1)[0][0]
    names = {layer: _EMBEDDINGS.get(layer, layer.replace(".", "_")) for layer in adapter.layers}
    _refuse_equal(names, names)
    ignored = [layer for layer, name in names.items() if not diffusers_reads(name, layer)]
    return {names[layer]: with_alpha(part, alpha) for layer, part in adapter.layers.items()}, ignored


def _transformer_pairs(
    adapter: Adapter, layers: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, LayerAdapter], dict[str, list[int]], list[str]]:
    """By name: the pairs, the ranks of the fused ones, and the layers that diffusers passes over."""
    strange = [layer for layer in adapter.layers if layer not in layers]
    if strange:
        raise AdapterError("the adapter has layers that are not in layers=", strange)
    table = bfl_names() if is_flux_shaped(layers) else {}
    pairs: dict[str, LayerAdapter] = {}
    ranks: dict[str, list[int]] = {}
    ignored: list[str] = []
    named: set[str] = set()
    for name, slots in table.items():
        parts = [adapter.layers.get(slot.layer) for slot in slots]
        if any(parts) and all(slot.layer in layers for slot in slots):
            named.update(slot.layer for slot in slots)
            ignored += [slot.layer for slot, part in zip(slots, parts) if part is not None and not slot.loaded]
            pairs[name] = fuse(slots, parts, [layers[slot.layer][0] for slot in slots])
            if len(slots) > 1:
                ranks[f"lora_unet_{name}"] = [0 if part is None else part.rank for part in parts]
    names = {layer: layer.replace(".", "_") for layer in adapter.layers if layer not in named}
    _refuse_equal(names, layers)
    ignored += list(names) if table else []
    return {**pairs, **{name: adapter.layers[layer] for layer, name in names.items()}}, ranks, ignored


def _refuse_equal(names: Mapping[str, str], layers: Iterable[str]) -> None:
    """`names` of the adapter's layers, among all `layers` of the model as far as they are known."""
    wanted = set(names.values())
    equal: dict[str, list[str]] = {}
    for layer in layers:
        equal.setdefault(names.get(layer, layer.replace(".", "_")), []).append(layer)
    problems = [" and ".join(found) for name, found in equal.items() if name in wanted and len(found) > 1]
    if problems:
        raise AdapterError("the Kohya format has only one name for several layers; use another format", problems)
