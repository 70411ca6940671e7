"""The manifest of a SquareQ V2 slab: exactly its keys, in its order, as text that equals the original
writer's.

Source: the SquareQ V2 slab format, sections "Manifest", "Signature" and "What a reader refuses".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from squareq_fx.errors import SlabError
from squareq_fx.kernels.reference import packed_width
from squareq_fx.slab import strict_json
from squareq_fx.slab.safetensors_header import TensorEntry

__all__ = [
    "KERNEL_ABI_VERSION",
    "LayerEntry",
    "Manifest",
    "check_tensors",
    "layer_entry",
    "make_manifest",
    "model_signature",
    "parse_manifest",
]

QUANT_VERSION = "squareq_bp8_v2"
KERNEL_ABI_VERSION = 1
RUNTIME_VERSION = "0.1.0"
_LARGEST = 2**62


@dataclass(frozen=True)
class LayerEntry:
    """One quantised Linear, fields as in the file. Shapes are [out, in] and [out, K'] (K' = in padded to
    pad_k).
    """

    canonical_name: str
    qweight_key: str
    scale_key: str
    zero_point_key: str
    bias_key: str | None
    orig_shape: tuple[int, int]
    packed_shape: tuple[int, int]
    pad_k: int
    quant_bits: int = 8
    quant_scheme: str = "per_row_symmetric"
    quant_axis: int = 0
    dtype_qweight: str = "int8"
    dtype_scale: str = "float32"
    dtype_zero_point: str = "float32"
    block_id: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of this layer's tensors: qweight, scale, zero_point and, if it has one, bias."""
        return (
            self.qweight_key,
            self.scale_key,
            self.zero_point_key,
            *(() if self.bias_key is None else (self.bias_key,)),
        )


@dataclass(frozen=True)
class Manifest:
    """A whole manifest, fields as in the file; layers are sorted by canonical_name."""

    model_signature: str
    architecture_id: str
    quant_version: str
    kernel_abi_version: int
    min_runtime_version: str
    layer_count: int
    total_qweight_bytes: int
    layers: tuple[LayerEntry, ...]

    def to_text(self) -> str:
        """The file's text: JSON, indent 2, no newline at the end."""
        return json.dumps(asdict(self), indent=2)


def model_signature(model: nn.Module) -> str:
    """First 16 hex digits of the sha256 over every Linear's "name:in:out:has_bias", sorted and joined with
    "|".
    """
    lines = [
        f"{name}:{m.in_features}:{m.out_features}:{m.bias is not None}"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    return hashlib.sha256("|".join(sorted(lines)).encode("utf-8")).hexdigest()[:16]


def layer_entry(name: str, out_features: int, in_features: int, has_bias: bool, pack_k: int) -> LayerEntry:
    """The entry V2 gives a Linear called `name`."""
    return LayerEntry(
        canonical_name=name,
        qweight_key=f"{name}.qweight",
        scale_key=f"{name}.scale",
        zero_point_key=f"{name}.zero_point",
        bias_key=f"{name}.bias" if has_bias else None,
        orig_shape=(out_features, in_features),
        packed_shape=(out_features, packed_width(in_features, pack_k)),
        pad_k=pack_k,
    )


def make_manifest(signature: str, architecture_id: str, layers: list[LayerEntry]) -> Manifest:
    """The manifest over `layers`, which may come in any order."""
    return Manifest(
        model_signature=signature,
        architecture_id=architecture_id,
        quant_version=QUANT_VERSION,
        kernel_abi_version=KERNEL_ABI_VERSION,
        min_runtime_version=RUNTIME_VERSION,
        layer_count=len(layers),
        total_qweight_bytes=sum(e.packed_shape[0] * e.packed_shape[1] for e in layers),
        layers=tuple(sorted(layers, key=lambda e: e.canonical_name)),
    )


def parse_manifest(raw: bytes, name: str, problems: list[str]) -> Manifest | None:
    """Read a manifest; every fault is appended to `problems`.

    Returns:
        The manifest, without those layers that make no sense at all; None if nothing in it can be compared
        with the tensors. It is right only if no problem was added.
    """
    try:
        document = strict_json.loads(raw, name)
    except SlabError as error:
        problems.append(str(error))
        return None
    if not _has_keys(document, Manifest, name, problems):
        return None
    _check_head(document, problems)
    layers = document["layers"]
    if not isinstance(layers, list):
        problems.append(f"layers must be a list, got {_show(layers)}")
        return None
    entries = [e for i, item in enumerate(layers) if (e := _parse_layer(item, i, problems)) is not None]
    if document["layer_count"] != len(layers):
        problems.append(f"layer_count is {_show(document['layer_count'])} but {len(layers)} layers are listed")
    total = sum(e.packed_shape[0] * e.packed_shape[1] for e in entries)
    if len(entries) == len(layers) and document["total_qweight_bytes"] != total:
        problems.append(f"total_qweight_bytes is {_show(document['total_qweight_bytes'])} but the layers sum to {total}")
    names = [e.canonical_name for e in entries]
    problems += [f"layer {name!a} is listed twice" for name, n in Counter(names).items() if n > 1]
    if names != sorted(names):
        problems.append("layers are not sorted by canonical_name")
    head = {field.name: document[field.name] for field in fields(Manifest)}
    return Manifest(**{**head, "layers": tuple(entries)})


def check_tensors(manifest: Manifest, tensors: dict[str, TensorEntry], problems: list[str]) -> None:
    """Compare the layers with what the tensor file holds: presence, dtype and shape of each tensor."""
    for layer in manifest.layers:
        out = layer.packed_shape[0]
        wanted: list[tuple[str | None, torch.dtype, tuple[int, ...]]] = [
            (layer.qweight_key, torch.int8, layer.packed_shape),
            (layer.scale_key, torch.float32, (out,)),
            (layer.zero_point_key, torch.float32, (out,)),
            (layer.bias_key, torch.float32, (out,)),
        ]
        for key, dtype, shape in wanted:
            if key is None:
                continue
            entry = tensors.get(key)
            if entry is None:
                problems.append(f"tensor {key!a} of layer {layer.canonical_name!a} is missing")
            elif (entry.dtype, entry.shape) != (dtype, shape):
                problems.append(f"tensor {key!a} is {entry.dtype} {list(entry.shape)}, should be {dtype} {list(shape)}")


def _check_head(document: dict[str, Any], problems: list[str]) -> None:
    signature, abi = document["model_signature"], document["kernel_abi_version"]
    if not isinstance(signature, str) or not re.fullmatch(r"[0-9a-f]{16}", signature):
        problems.append(f"model_signature must be 16 hex digits, got {_show(signature)}")
    if not isinstance(document["architecture_id"], str):
        problems.append(f"architecture_id must be a string, got {_show(document['architecture_id'])}")
    if document["quant_version"] != QUANT_VERSION:
        problems.append(f"quant_version is {_show(document['quant_version'])}, this reader knows {QUANT_VERSION!r}")
    if not strict_json.plain_int(abi) or abi < 1:
        problems.append(f"kernel_abi_version must be a positive integer, got {_show(abi)}")
    elif abi > KERNEL_ABI_VERSION:
        problems.append(f"kernel_abi_version {abi} is newer than this reader's {KERNEL_ABI_VERSION}; update squareq_fx")
    runtime = document["min_runtime_version"]
    if not isinstance(runtime, str) or not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", runtime, re.ASCII):
        problems.append(f"min_runtime_version must be like {RUNTIME_VERSION!r}, got {_show(runtime)}")
    elif _version(runtime) > _version(RUNTIME_VERSION):
        problems.append(f"min_runtime_version {runtime} is newer than this reader's {RUNTIME_VERSION}; update squareq_fx")
    for key in ("layer_count", "total_qweight_bytes"):
        if not strict_json.plain_int(document[key]) or document[key] < 0:
            problems.append(f"{key} must be an integer, got {_show(document[key])}")


def _parse_layer(item: Any, index: int, problems: list[str]) -> LayerEntry | None:
    """What V2 says the entry must be, by its name, original shape, padding and bias; every difference is a
    problem.
    """
    name = item.get("canonical_name") if isinstance(item, dict) else None
    where = f"layer {name!a}" if isinstance(name, str) and name else f"layers[{index}]"
    if not _has_keys(item, LayerEntry, where, problems):
        return None
    if not isinstance(name, str):
        problems.append(f"{where}: canonical_name must be a string, got {_show(name)}")
        return None
    faults = []
    shape = item["orig_shape"]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(strict_json.plain_int(d) and 0 <= d <= _LARGEST for d in shape)
    ):
        faults.append(f"orig_shape must be two sizes, got {_show(shape)}")
    if not strict_json.plain_int(item["pad_k"]):
        faults.append(f"pad_k must be an integer, got {_show(item['pad_k'])}")
    if faults:
        problems += [f"{where}: {fault}" for fault in faults]
        return None
    entry = layer_entry(name, shape[0], shape[1], item["bias_key"] is not None, item["pad_k"])
    if isinstance(item["block_id"], str):
        entry = replace(entry, block_id=item["block_id"])
    for key, value in asdict(entry).items():
        expected = list(value) if isinstance(value, tuple) else value
        if type(item[key]) is not type(expected) or item[key] != expected:
            hint = "; this reader has kernels for 8 only" if key == "quant_bits" else f", should be {_show(expected)}"
            problems.append(f"{where}: {key} is {_show(item[key])}{hint}")
    return entry


def _has_keys(item: Any, kind: type[Manifest] | type[LayerEntry], where: str, problems: list[str]) -> bool:
    if not isinstance(item, dict):
        problems.append(f"{where} must be an object, got {_show(item)}")
        return False
    wanted = [field.name for field in fields(kind)]
    problems += [f"{where}: the key {key} is missing" for key in wanted if key not in item]
    problems += [f"{where}: unknown key {_show(key)}" for key in item if key not in wanted]
    return all(key in item for key in wanted)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in (text + ".0.0.0").split("."))[:4]


def _show(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
