"""Everything about a slab that does not depend on the values of its tensors: known, checked and laid out
before any work.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from squareq_fx.blocks import block_paths
from squareq_fx.errors import SlabError
from squareq_fx.families import family_inputs
from squareq_fx.slab.extras import Extras
from squareq_fx.slab.inputs import describe_inputs, restore_inputs, split_inputs
from squareq_fx.slab.inventory import Group, find_groups, join, select_layers
from squareq_fx.slab.layout import segment_layout
from squareq_fx.slab.manifest import LayerEntry, Manifest, layer_entry, make_manifest, model_signature
from squareq_fx.slab.order import group_segments, record_execution
from squareq_fx.slab.safetensors_header import TensorEntry
from squareq_fx.slab.skeleton import Source

__all__ = ["BuildPlan", "CopyItem", "QuantizeItem", "make_plan"]

_LARGEST_PACK = 1 << 20


@dataclass(frozen=True)
class QuantizeItem:
    """Write one Linear: read `weight` and `bias` (names in the source), write the layer's three or four
    tensors.
    """

    layer: LayerEntry
    weight: str
    bias: str | None

    @property
    def name(self) -> str:
        return self.layer.canonical_name


@dataclass(frozen=True)
class CopyItem:
    """Copy one tensor as it is. Inf is refused in parameters; a buffer may hold it on purpose (an attention
    mask).
    """

    key: str
    source: str
    is_parameter: bool

    @property
    def name(self) -> str:
        return self.key


@dataclass(frozen=True)
class BuildPlan:
    """What to write and where.

    Attributes:
        manifest: final. manifest_text: its file's content.
        tensors: in file order, offsets final.
        extras: final but for checksums and fidelity, which are empty.
        items: the work, in file order.
        source_nbytes: how much there is to read for each item.
    """

    manifest: Manifest
    manifest_text: str
    tensors: tuple[TensorEntry, ...]
    extras: Extras
    items: tuple[QuantizeItem | CopyItem, ...]
    source_nbytes: tuple[int, ...]


def make_plan(
    source: Source,
    *,
    include_prefixes: Iterable[str] | None,
    exclude: Iterable[str],
    pack_k: int,
    block_pattern: str | None,
    passthrough: bool,
    example_inputs: Any,
    architecture_id: str | None,
) -> BuildPlan:
    """Decide what goes into the slab of `source`, and where.

    Raises:
        SlabError: listing everything that does not fit.
        CaptureError: from `block_paths`.
    """
    if not isinstance(pack_k, int) or isinstance(pack_k, bool) or pack_k > _LARGEST_PACK:
        raise SlabError(f"pack_k must be an integer up to {_LARGEST_PACK}, got {pack_k!r}")
    problems: list[str] = []
    linears = select_layers(source.model, include_prefixes, exclude, problems)
    groups = find_groups(source, linears, problems)
    if problems:
        raise SlabError(f"no slab can be built from {source.what}", problems)
    if source.stored is not None:
        _adopt_dtypes(source, groups)
    blocks = block_paths(source.model, block_pattern)
    signature, visits = _inputs_and_order(source.model, example_inputs)
    source_of = {use.name: group.source for group in groups for use in group.uses}
    entries = {
        name: layer_entry(name, *_matrix(linear), linear._parameters.get("bias") is not None, pack_k)
        for name, linear in linears.items()
    }
    items: dict[str, list[QuantizeItem | CopyItem]] = {}  # by owner
    for name, layer in entries.items():
        bias = source_of[join(name, "bias")] if layer.bias_key else None
        items.setdefault(name, []).append(QuantizeItem(layer, source_of[join(name, "weight")], bias))
    if passthrough:
        for group in groups:
            copied = CopyItem(group.key, group.source, any(use.is_parameter for use in group.uses))
            for owner in dict.fromkeys(use.owner for use in group.uses if not use.quantised):
                items.setdefault(owner, []).append(copied)
    owners = [path for path, _ in source.model.named_modules() if path in items]
    ordered, segments, tensors = _lay_out(source, group_segments(owners, visits, blocks), items)
    manifest = make_manifest(
        model_signature(source.model), architecture_id or type(source.model).__name__, list(entries.values())
    )
    text = manifest.to_text()
    extras = Extras(
        manifest_sha256=hashlib.sha256(text.encode()).hexdigest(),
        block_paths=blocks,
        input_signature=signature,
        aliases=_aliases(groups, {entry.name for entry in tensors}),
        fidelity={},
        segments=tuple(segments),
        checksums={},
    )
    sizes = tuple(_source_nbytes(item, source) for item in ordered)
    return BuildPlan(manifest, text, tuple(tensors), extras, tuple(ordered), sizes)


def _inputs_and_order(model: nn.Module, example_inputs: Any) -> tuple[Any, list[str] | None]:
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
    else:
        family = family_inputs(model)
        if family is None:
            return None, None
        args, kwargs = family.args, family.kwargs
    signature = describe_inputs(args, kwargs)
    return signature, record_execution(model, *restore_inputs(signature))


def _adopt_dtypes(source: Source, groups: list[Group]) -> None:
    """Give the skeleton's parameters the checkpoint's dtypes, so that the recorded inputs have them too."""
    for group in groups:
        for use in group.uses:
            if use.is_parameter and use.tensor.is_meta:
                use.tensor.data = torch.empty_like(use.tensor, dtype=source.tensors.specs[group.source].dtype)


def _lay_out(
    source: Source, segments: list[tuple[str, list[str]]], items: dict[str, list[QuantizeItem | CopyItem]]
) -> tuple[list[QuantizeItem | CopyItem], list[tuple[str, tuple[str, ...]]], list[TensorEntry]]:
    ordered: dict[tuple[type, str], QuantizeItem | CopyItem] = {}
    placed: list[tuple[str, tuple[str, ...]]] = []
    tensors: list[TensorEntry] = []
    end = 0
    for name, owners in segments:
        entries: list[TensorEntry] = []
        for item in (item for owner in owners for item in items[owner]):
            if (
                type(item),
                item.name,
            ) not in ordered:  # a tied tensor belongs to the first segment that uses it
                ordered[type(item), item.name] = item
                entries += _entries(item, source)
        by_key = {entry.name: entry for entry in entries}
        layout = segment_layout((entry.name, entry.nbytes) for entry in entries)
        tensors += [replace(by_key[key], offset=end + offset) for key, offset in layout]
        end += sum(entry.nbytes for entry in entries)
        if layout:
            placed.append((name, tuple(key for key, _ in layout)))
    clashes = [key for key, n in Counter(["__metadata__", *(e.name for e in tensors)]).items() if n > 1]
    if clashes:
        raise SlabError(
            f"no slab can be built from {source.what}",
            (f"{key}: two tensors would be stored under this name; rename one or exclude the layer" for key in clashes),
        )
    return list(ordered.values()), placed, tensors


def _entries(item: QuantizeItem | CopyItem, source: Source) -> list[TensorEntry]:
    if isinstance(item, CopyItem):
        spec = source.tensors.specs[item.source]
        return [TensorEntry(item.key, spec.dtype, spec.shape, 0, math.prod(spec.shape) * spec.dtype.itemsize)]
    out, packed = item.layer.packed_shape
    return [
        TensorEntry(item.layer.qweight_key, torch.int8, (out, packed), 0, out * packed),
        *(TensorEntry(key, torch.float32, (out,), 0, 4 * out) for key in item.layer.keys[1:]),
    ]


def _matrix(linear: nn.Linear) -> tuple[int, int]:
    out_features, in_features = linear.weight.shape
    return out_features, in_features


def _aliases(groups: list[Group], stored: set[str]) -> dict[str, str]:
    return {
        name: group.key
        for group in groups
        if group.key in stored or all(use.quantised for use in group.uses)
        for name in group.names
        if name != group.key
    }


def _source_nbytes(item: QuantizeItem | CopyItem, source: Source) -> int:
    spec = source.tensors.specs[item.source if isinstance(item, CopyItem) else item.weight]
    return math.prod(spec.shape) * spec.dtype.itemsize
