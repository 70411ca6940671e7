"""Kohya's files (sd-scripts): `lora_unet_<name>.lora_down.weight`, `.lora_up.weight`, `.alpha`, all in one safetensors file."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from squareq_fx.adapters.groups import Group, group, no_such_layers, without_text_encoders, wrong_shape
from squareq_fx.adapters.kohya_names import Names, Slot, bfl_names, diffusers_reads, is_flux_shaped
from squareq_fx.adapters.state import Adapter, LayerAdapter
from squareq_fx.adapters.storage import KOHYA_PREFIXES, Stored, packed, staged
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
        for slot, part in zip(slots, _split(pair, rows, fused_ranks.get(name))):
            if slot.layer in found:
                problems.append(f"{name}: is the layer {slot.layer}, which the file has under another name too")
            elif part is not None:
                found[slot.layer] = replace(part, up=_swap_halves(part.up)) if slot.swapped else part
    problems.extend(no_such_layers(unknown, names.by_underscores))
    return found


def write_kohya(
    adapter: Adapter, path: Path, component: str | None, dtype: torch.dtype, layers: Mapping[str, tuple[int, int]] | None
) -> Path:
    """See `write_adapter`.

    Raises:
        AdapterError: the model's layers are needed and not given, or two layers have one name in this format.
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
    metadata = {"format": "pt", **({_FUSED_RANKS: json.dumps(ranks)} if ranks else {})}
    with staged(path) as (partial,):
        save_file(tensors, partial, metadata)
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
    _refuse_equal(names)
    ignored = [layer for layer, name in names.items() if not diffusers_reads(name, layer)]
    return {names[layer]: _with_alpha(part, alpha) for layer, part in adapter.layers.items()}, ignored


def _transformer_pairs(
    adapter: Adapter, layers: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, LayerAdapter], dict[str, list[int]], list[str]]:
    """By name: the pairs, the ranks of the fused ones, and the layers that diffusers passes over."""
    table = bfl_names() if is_flux_shaped(layers) else {}
    pairs: dict[str, LayerAdapter] = {}
    ranks: dict[str, list[int]] = {}
    ignored: list[str] = []
    named: set[str] = set()
    for name, slots in table.items():
        parts = [adapter.layers.get(slot.layer) for slot in slots]
        if any(parts):
            named.update(slot.layer for slot in slots)
            ignored += [slot.layer for slot, part in zip(slots, parts) if part is not None and not slot.loaded]
            pairs[name] = _fuse(slots, parts, layers)
            if len(slots) > 1:
                ranks[f"lora_unet_{name}"] = [0 if part is None else part.rank for part in parts]
    names = {layer: layer.replace(".", "_") for layer in adapter.layers if layer not in named}
    _refuse_equal({**{layer: layer.replace(".", "_") for layer in layers}, **names})
    ignored += list(names) if table else []
    return {**pairs, **{name: adapter.layers[layer] for layer, name in names.items()}}, ranks, ignored


def _refuse_equal(names: Mapping[str, str]) -> None:
    counts = Counter(names.values())
    equal = sorted(layer for layer, name in names.items() if counts[name] > 1)
    if equal:
        raise AdapterError(f"the Kohya format has one name for {' and '.join(equal)}; use another format")


def _with_alpha(part: LayerAdapter, alpha: float) -> LayerAdapter:
    """The same function with another alpha; B takes up the difference, rounded once."""
    return part if part.alpha == alpha else LayerAdapter(part.down, (part.up.double() * (part.alpha / alpha)).float(), alpha)


def _fuse(
    slots: Sequence[Slot], parts: Sequence[LayerAdapter | None], layers: Mapping[str, tuple[int, int]]
) -> LayerAdapter:
    """One pair of the ranks' sum whose B is block-diagonal; the rows of a layer without adapter stay zero: it gets nothing."""
    parts = [part and replace(part, up=_swap_halves(part.up)) if slot.swapped else part for slot, part in zip(slots, parts)]
    present = [part for part in parts if part is not None]
    if len(slots) == 1:
        return present[0]
    scaling, rank = present[0].scaling, sum(part.rank for part in present)
    up = torch.zeros(sum(layers[slot.layer][0] for slot in slots), rank)
    row = column = 0
    for slot, part in zip(slots, parts):
        end = row + layers[slot.layer][0]
        if part is not None:
            up[row:end, column : column + part.rank] = _with_alpha(part, scaling * part.rank).up
            column += part.rank
        row = end
    return LayerAdapter(torch.cat([part.down for part in present]), up, scaling * rank)


def _split(pair: Group, rows: Sequence[int], ranks: Sequence[int] | None) -> Iterable[LayerAdapter | None]:
    """What each layer of a fused pair has; None for one that was written without an adapter."""
    alpha = float(pair.rank if pair.alpha is None else pair.alpha)
    if len(rows) == 1:
        return [LayerAdapter(pair.down, pair.up, alpha)]
    ups = pair.up.split(list(rows))
    equal = [pair.rank // len(rows)] * len(rows)
    for own in (ranks, equal):
        if own is not None and _is_block_diagonal(ups, pair.rank, own):
            blocks = zip(pair.down.split(list(own)), ups, own, _starts(own))
            return [
                LayerAdapter(down.clone(), up[:, start : start + rank].clone(), alpha * rank / pair.rank) if rank else None
                for down, up, rank, start in blocks
            ]
    return [LayerAdapter(pair.down.clone(), up.clone(), alpha) for up in ups]


def _is_block_diagonal(ups: Sequence[torch.Tensor], rank: int, ranks: Sequence[int]) -> bool:
    if (len(ranks), sum(ranks)) != (len(ups), rank) or min(ranks) < 0:
        return False
    outside = (
        bool(up[:, :start].any() or up[:, start + own :].any()) for up, own, start in zip(ups, ranks, _starts(ranks))
    )
    return not any(outside)


def _starts(ranks: Sequence[int]) -> list[int]:
    return [sum(ranks[:i]) for i in range(len(ranks))]


def _swap_halves(up: torch.Tensor) -> torch.Tensor:
    first, second = up.chunk(2)
    return torch.cat([second, first])
