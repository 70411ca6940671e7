"""What a model holds and where each tensor will come from; everything that does not fit is found before any
work is done.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from squareq_fx.slab.safetensors_header import DTYPE_NAMES
from squareq_fx.slab.skeleton import Source, ignored_when_loading

__all__ = ["Group", "Use", "find_groups", "join", "select_layers"]

_QUANTISABLE = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_PIECE = 1 << 20  # elements


@dataclass
class Use:
    """A parameter or buffer as one module holds it.

    Attributes:
        owner: the module's first path; name: the tensor's under that path; names: under all of its paths.
        quantised: it is the weight or bias of a Linear that is quantised.
    """

    owner: str
    name: str
    tensor: torch.Tensor
    is_parameter: bool
    persistent: bool
    quantised: bool
    names: list[str] = field(default_factory=list)


@dataclass
class Group:
    """All uses of one tensor; more than one if it is tied.

    Attributes:
        source: the name it is read under, "" if there is none (a fault says so).
    """

    uses: list[Use]
    source: str = ""

    @property
    def key(self) -> str:
        """The name it is stored under: the first use that keeps the float tensor, else the first."""
        return next((use.name for use in self.uses if not use.quantised), self.uses[0].name)

    @property
    def names(self) -> Iterator[str]:
        return (name for use in self.uses for name in use.names)


def join(owner: str, leaf: str) -> str:
    """The dotted name of `leaf` in module `owner`."""
    return f"{owner}.{leaf}" if owner else leaf


def select_layers(
    model: nn.Module, include_prefixes: Iterable[str] | None, exclude: Iterable[str], problems: list[str]
) -> dict[str, nn.Linear]:
    """The Linear layers to quantise, a shared one once.

    Args:
        include_prefixes: names that start with one of them; None means all.
        exclude: names or fnmatch patterns of layers to leave as they are.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = linears
    if include_prefixes is not None:
        prefixes = _as_tuple(include_prefixes)
        chosen = {name: m for name, m in linears.items() if name.startswith(prefixes)}
        problems += [
            f"include_prefixes: no Linear layer's name starts with {prefix!r}{_nearest(prefix, linears)}"
            for prefix in prefixes
            if not any(name.startswith(prefix) for name in linears)
        ]
    for pattern in _as_tuple(exclude):
        matched = {name for name in linears if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            problems.append(f"exclude: {pattern!r} matches no Linear layer{_nearest(pattern, linears)}")
        chosen = {name: m for name, m in chosen.items() if name not in matched}
    for name, linear in chosen.items():
        if linear._parameters.get("weight") is None:
            problems.append(
                f"{name}: its weight is computed, not stored (a parametrisation?); remove that first, or exclude the layer"
            )
    return chosen


def find_groups(source: Source, layers: Iterable[str], problems: list[str]) -> list[Group]:
    """Group the model's tensors by identity, give each group the name it is read under, and report whatever
    does not fit.
    """
    quantised = {join(layer, leaf) for layer in layers for leaf in ("weight", "bias")}
    groups: dict[object, Group] = {}
    for use in _uses(source.model, quantised):
        groups.setdefault(_identity(use.tensor), Group([])).uses.append(use)
    expected: set[str] = set()
    for group in groups.values():
        _check_group(source, group, problems)
        expected.update(name for use in group.uses if use.persistent for name in use.names)
    problems += [
        f"{name}: unexpected, {type(source.model).__name__} has no such tensor"
        for name in sorted((source.stored or frozenset()) - expected)
        if not ignored_when_loading(source.model, name, "unexpected")
    ]
    return list(groups.values())


def _uses(model: nn.Module, quantised: set[str]) -> Iterable[Use]:
    first: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    uses: dict[str, Use] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            owner = first[id(module)]
            name = join(owner, leaf)
            is_parameter = leaf in module._parameters
            persistent = is_parameter or leaf not in module._non_persistent_buffers_set
            use = Use(owner, name, tensor, is_parameter, persistent, name in quantised)
            uses.setdefault(name, use).names.append(join(path, leaf))
    return uses.values()


def _identity(tensor: torch.Tensor) -> object:
    if isinstance(tensor, UninitializedTensorMixin) or tensor.layout != torch.strided:
        return id(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return id(tensor)
    place = tensor.untyped_storage()._cdata  # meta tensors have no address, but every storage is an object
    return place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_group(source: Source, group: Group, problems: list[str]) -> None:
    use = group.uses[0]
    if isinstance(use.tensor, UninitializedTensorMixin):
        problems.append(f"{use.name}: not initialised yet; run the model once before building")
        return
    if is_traceable_wrapper_subclass(use.tensor) or use.tensor.layout != torch.strided:
        problems.append(f"{use.name}: is a {type(use.tensor).__name__}, {use.tensor.layout}, not a plain tensor")
        return
    specs = source.tensors.specs
    if source.stored is None:
        if use.tensor.is_meta:
            problems.append(f"{use.name}: has no values, it is on meta; load the weights first")
            return
        group.source = use.name
    else:
        stored = [name for name in group.names if name in source.stored]
        group.source = stored[0] if stored else _from_skeleton(source, group)
        if not group.source:
            reason = "missing from the checkpoint" if use.persistent else "not stored, and the skeleton gives it no value"
            problems.append(f"{use.name}: {reason}")
            return
        for other in stored[1:]:
            if specs[other] != specs[stored[0]] or _differ(source, stored[0], other):
                problems.append(f"{other}: is tied to {stored[0]}, but the checkpoint holds different values for it")
    _check_spec(source, group, problems)


def _from_skeleton(source: Source, group: Group) -> str:
    for use in group.uses:
        allowed = not use.persistent or ignored_when_loading(source.model, use.name, "missing")
        if allowed and use.name in source.tensors.specs:
            return use.name
    return ""


def _check_spec(source: Source, group: Group, problems: list[str]) -> None:
    use, spec = group.uses[0], source.tensors.specs[group.source]
    shape, dtype = tuple(use.tensor.shape), use.tensor.dtype
    if spec.shape != shape:
        problems.append(f"{group.source}: has shape {list(spec.shape)}, the model needs {list(shape)}")
    if any(u.quantised for u in group.uses):
        if spec.dtype not in _QUANTISABLE:
            problems.append(f"{group.source}: dtype {spec.dtype} cannot be quantised, it must be floating point")
    elif spec.dtype not in DTYPE_NAMES:
        problems.append(f"{group.source}: dtype {spec.dtype} cannot be stored in a safetensors file")
    elif (spec.dtype.is_floating_point, spec.dtype.is_complex) != (dtype.is_floating_point, dtype.is_complex):
        problems.append(f"{group.source}: is stored as {spec.dtype}, the model needs {dtype}")


def _differ(source: Source, one: str, other: str) -> bool:
    total = torch.Size(source.tensors.specs[one].shape).numel()
    for start in range(0, total, _PIECE):
        stop = min(start + _PIECE, total)
        first = source.tensors.read(one, start, stop).clone().view(torch.uint8)
        if not torch.equal(first, source.tensors.read(other, start, stop).view(torch.uint8)):
            return True
    return False


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, 3, 0.0)
    return f"; the nearest are {', '.join(near)}" if near else "; the model has none"


def _as_tuple(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
