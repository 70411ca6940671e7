"""Keys and tensors of a file, sorted into pairs of A and B; what is no LoRA of a Linear layer is reported, never dropped."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from squareq_fx.errors import AdapterError

__all__ = ["Group", "group", "no_such_layers", "without_text_encoders", "wrong_shape"]

_KEY = re.compile(r"(?P<name>.+)\.(?:lora_(?P<part>A|B|down|up)\.weight|alpha)")

_OTHER_KINDS = (
    (r"\.lora_magnitude_vector|\.dora_scale", "DoRA (a magnitude vector)"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.oft_|\.boft_", "OFT"),
    (r"\.lora_mid", "a convolution in Tucker form (lora_mid)"),
    (r"\.lora_embedding_", "an adapter of an embedding"),
    (r"\.lora_(A|B|down|up)\.bias$", "a bias in the adapter's branch (lora_bias)"),
    (r"\.diff(_b)?$", "a full difference of the weight"),
)


@dataclass(frozen=True)
class Group:
    """A pair as one name of the file has it: down float32 [r, in], up float32 [out, r], alpha if the file gives one."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


def without_text_encoders(tensors: Mapping[str, torch.Tensor], expression: str, where: str) -> dict[str, torch.Tensor]:
    """The tensors whose key does not begin with `expression`; a UserWarning says what was left out."""
    other = [key for key in tensors if re.match(expression, key)]
    if other:
        message = f"{where}: {len(other)} tensors belong to text encoders ({other[0]}, ...) and are not read"
        warnings.warn(message, UserWarning, stacklevel=4)
    return {key: tensor for key, tensor in tensors.items() if not re.match(expression, key)}


def group(tensors: Mapping[str, torch.Tensor], where: str, problems: list[str]) -> dict[str, Group]:
    """Pairs by their name in the file; whatever is wrong with one goes to `problems`, and the pair is left out.

    Args:
        tensors: by `<name>.lora_A.weight` (or `lora_down`) [r, in], `<name>.lora_B.weight` (or `lora_up`) [out, r] and,
            where the format has it, `<name>.alpha` with one element.

    Raises:
        AdapterError: not one key is a LoRA's.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    other_kinds: dict[str, None] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            kind = _other_kind(key)
            if kind is None:
                unknown.append(f"{key}: not a weight of a LoRA")
            else:
                other_kinds[kind] = None
            continue
        part = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}[match["part"]]
        parts = found.setdefault(match["name"], {})
        if part in parts:
            problems.append(f"{match['name']}: has {part} twice")
        parts[part] = tensor
    if not other_kinds and not any({"A", "B"} & parts.keys() for parts in found.values()):
        keys = ", ".join(list(tensors)[:3]) or "none"
        raise AdapterError(f"{where}: has no LoRA weights (<layer>.lora_A.weight or .lora_down.weight); its keys are {keys}")
    problems.extend([*other_kinds, *unknown])
    groups = {}
    for name, parts in found.items():
        faults = list(_faults(parts))
        problems.extend(f"{name}: {fault}" for fault in faults)
        if not faults:
            alpha = float(parts["alpha"]) if "alpha" in parts else None
            groups[name] = Group(_own(parts["A"]), _own(parts["B"]), alpha)
    return groups


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, for the caller's state dict may be that of a module that goes on training."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def _other_kind(key: str) -> str | None:
    for pattern, kind in _OTHER_KINDS:
        match = re.search(pattern, key)
        if match is not None:
            return f"{key[: match.start()]}: is {kind}; only LoRA of Linear layers is supported"
    return None


def _faults(parts: Mapping[str, torch.Tensor]) -> Iterable[str]:
    missing = [part for part in ("A", "B") if part not in parts]
    if missing:
        yield f"has {' and '.join(parts)} but no {' and no '.join(missing)}"
    pair = [parts[part] for part in ("A", "B") if part in parts]
    shapes = " and ".join(str(list(tensor.shape)) for tensor in pair)
    if any(tensor.dim() > 2 for tensor in pair):
        yield f"adapts a convolution ({shapes}); only Linear layers are supported"
    elif any(tensor.dim() != 2 or 0 in tensor.shape for tensor in pair):
        yield f"has the shapes {shapes}; A is [r, in] and B is [out, r]"
    elif len(pair) == 2 and pair[0].shape[0] != pair[1].shape[1]:
        yield f"A {list(pair[0].shape)} and B {list(pair[1].shape)} have different ranks"
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part != "alpha":
            yield f"{part} is {str(tensor.dtype).removeprefix('torch.')}, not a floating point type"
        elif not torch.isfinite(tensor.float()).all():
            yield f"{part} has NaN or infinite values"
        elif part == "alpha" and (tensor.numel() != 1 or float(tensor) <= 0):
            yield f"alpha must be one positive number, not {tensor.tolist()}"


def no_such_layers(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """A line for each, with near names; difflib takes milliseconds a name, so only the first five get them."""
    known = list(known)
    problems = []
    for i, name in enumerate(names):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6) if i < 5 else []
        hint = f"; near names: {', '.join(near)}" if near else ""
        problems.append(f"{name}: the model has no such Linear layer{hint}")
    return problems


def wrong_shape(name: str, pair: Group, size: tuple[int, int]) -> str | None:
    """The problem, if the pair does not fit a layer of `size` (out, in)."""
    if (pair.up.shape[0], pair.down.shape[1]) == tuple(size):
        return None
    return f"{name}: A {list(pair.down.shape)} and B {list(pair.up.shape)} do not fit the layer's weight {list(size)}"
