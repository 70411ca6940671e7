"""A model becomes a flat graph whose every parameter, buffer and constant is an explicit input.

`torch.export` (non-strict) traces a skeleton of the model: the same modules with all tensors on `meta`. No weight is read,
copied or moved, so a model that fits no memory can be captured. Afterwards the graph is moved to the device it will run
on. Source: https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from squareq_fx.blocks import block_paths
from squareq_fx.calls import bind, flatten_call, normalise_example, rebuild_call
from squareq_fx.errors import BindingError, CaptureError
from squareq_fx.families import family_inputs
from squareq_fx.ir import CallSpec, Level, Program, fake_mode, set_program
from squareq_fx.slab.inputs import restore_inputs
from squareq_fx.slab.manifest import model_signature
from squareq_fx.slab.reader import Slab
from squareq_fx.stored.identity import NoIdentityError, identity
from squareq_fx.tracing.explicit import explicit, relocate, tied_names
from squareq_fx.tracing.export import Skeleton, on_meta

__all__ = ["capture"]

_LOG = logging.getLogger(__name__)


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    slab: Slab | None = None,
    device: torch.device | str | None = None,
    block_pattern: str | None = None,
) -> fx.GraphModule:
    """The model's forward as a flat graph of aten operations.

    Args:
        model: any module `torch.export` can trace, real or on `meta`; it is neither changed nor moved. Dropout and the
            like are captured in eval mode.
        example_inputs: a dict (keywords), a tuple (positions) or a pair of both. Only sizes and dtypes are read. Every
            size is dynamic as far as the model allows. Default: the slab's recorded inputs, else those of a known
            diffusers family.
        slab: consulted for example inputs and block paths.
        device: where the graph will run; default: where the model's parameters are, the CPU for `meta`.
        block_pattern: see `block_paths`.

    Returns:
        A GraphModule with one placeholder for each tensor argument, then one for each weight; its output is a tuple of
        the tensors in the model's output. It computes what the model computes in eval mode.

    Raises:
        CaptureError: no example inputs are known, or `torch.export` cannot trace the model (with its reason).
    """
    from squareq_fx.tracing.multiples import wanted_multiples  # here: it loads sympy, which importing this package must not

    target = _device(model, device)
    arguments, signature, dims = _example(model, example_inputs, slab)
    paths = [p for p, leaf in flatten_call(arguments).items() if isinstance(leaf, torch.Tensor)]
    tensors = [leaf for leaf in flatten_call(arguments).values() if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise CaptureError(f"{type(model).__name__}: the example inputs hold no tensor, so there is nothing to trace")
    start = time.perf_counter()
    stored = slab.block_paths if slab is not None and block_pattern is None else ()
    blocks = tuple(stored) or block_paths(model, block_pattern)
    build = rebuild_call(signature, arguments)
    gm, traced = _traced(model, build, dims, blocks, tensors, paths)
    again = wanted_multiples(gm) if dims is None else None
    if again is not None:
        try:
            gm, traced = _traced(model, build, again[0], blocks, again[1], paths)
        except CaptureError as error:
            _LOG.info("the sizes of %s stay as the first trace has them: %s", type(model).__name__, error)
    guards = tuple(dict.fromkeys((*(guard.expr for guard in fake_mode(gm).shape_env.guards), *traced.branches)))
    relocate(gm, target)
    literals = {p: v for p, v in flatten_call(arguments).items() if not isinstance(v, torch.Tensor) and p != "return_dict"}
    return set_program(
        gm,
        Program(
            level=Level.CAPTURED,
            call=CallSpec(signature, tuple(paths), literals, traced.output_leaves, traced.output_spec),
            model_class=f"{type(model).__module__}.{type(model).__qualname__}",
            model_signature=model_signature(model),
            block_paths=blocks,
            device=target,
            dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
            guards=guards,
            capture_seconds=time.perf_counter() - start,
            constants=traced.constants,
            tied=tied_names(model),
        ),
    )


def _traced(
    model: nn.Module,
    build: Callable[[Any], inspect.BoundArguments],
    dims: dict[str, tuple[str | None, ...]] | None,
    blocks: tuple[str, ...],
    tensors: list[torch.Tensor],
    paths: list[str],
) -> tuple[fx.GraphModule, Skeleton]:
    """The explicit graph and what it was traced from: equal blocks once or, where that does not go, each of them."""
    tied = {name for pair in tied_names(model).items() for name in pair}
    alone = [path for path in blocks if not any(name.startswith(f"{path}.") for name in tied)]
    for once in (True, False):
        traced = Skeleton(model, build, dims)
        if once and not traced.trace_once(alone, _identity):
            continue
        traced.name_arguments(blocks)
        try:
            return explicit(traced.export(tensors), traced, paths, model), traced
        except Exception as error:
            if not once:
                raise
            _LOG.info("the blocks of %s are traced one by one: %s", type(model).__name__, error)
    raise AssertionError("the second way returns or raises")


def _identity(block: nn.Module) -> str | None:
    try:
        return identity([block])
    except NoIdentityError:
        return None


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        first = next((t.device for t in model.parameters()), torch.device("cpu"))
        device = "cpu" if first.type == "meta" else first
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CaptureError(f"device={str(device)!r}, but torch sees no CUDA device here; leave device out to run on the CPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _example(
    model: nn.Module, example_inputs: Any, slab: Slab | None
) -> tuple[dict[str, Any], inspect.Signature, dict[str, tuple[str | None, ...]] | None]:
    """Bound arguments with every tensor on `meta`; for a known family also the symbols of each tensor's dimensions."""
    signature = inspect.signature(model.forward)
    family = family_inputs(model)
    recorded = slab.input_signature if slab is not None else None
    if example_inputs is not None:
        args, kwargs = normalise_example(example_inputs)
    elif recorded is not None:
        args, kwargs = restore_inputs(recorded, device="meta")
        if not _has_type_of(model, (args, kwargs)):  # a family knows which inputs keep their type
            args, kwargs = _in_the_type_of(model, (args, kwargs)) if family is None else (family.args, family.kwargs)
    elif family is not None:
        args, kwargs = family.args, family.kwargs
    else:
        raise CaptureError(
            f"it is not known what to call {type(model).__name__}{signature} with: pass "
            "example_inputs={'argument': tensor, ...} (the tensors may live on 'meta')"
        )
    try:
        arguments = dict(bind(signature, args, kwargs, f"example_inputs of {type(model).__name__}").arguments)
    except BindingError as error:
        raise CaptureError(str(error)) from error
    arguments = pytree.tree_map_only(torch.Tensor, on_meta, arguments)
    if "return_dict" in signature.parameters:
        arguments["return_dict"] = True  # a tuple can be made from the output class, not the other way round
    if family is None:
        return arguments, signature, None
    known, symbols = flatten_call(family.kwargs), _flatten_dims(family.dims)
    given = {p: t for p, t in flatten_call(arguments).items() if isinstance(t, torch.Tensor)}
    if not all(p in known and isinstance(known[p], torch.Tensor) and t.dim() in (0, known[p].dim()) for p, t in given.items()):
        return arguments, signature, None
    # The family knows which sizes vary: trace at its sizes, which are distinct and never 1, with the dtypes given. One timestep
    # for all samples has no size.
    symbols = {p: symbols[p] if t.dim() else () for p, t in given.items()}
    sizes = {p: _family_size(known[p], symbols[p], t) if t.dim() else () for p, t in given.items()}
    fresh = iter([torch.empty(sizes[p], dtype=t.dtype, device="meta") for p, t in given.items()])
    arguments = pytree.tree_map_only(torch.Tensor, lambda _: next(fresh), arguments)
    return arguments, signature, symbols


def _has_type_of(model: nn.Module, call: Any) -> bool:
    """Is one of the call's tensors of the model's floating point type? If not, the slab was built from the model in another."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return dtype is None or any(isinstance(t, torch.Tensor) and t.dtype == dtype for t in pytree.tree_leaves(call))


def _in_the_type_of(model: nn.Module, call: Any) -> Any:
    """Recorded inputs of a model that has been cast since: floating point ones follow it."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, call)


def _flatten_dims(dims: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    """A family's `dims` by the same paths as `flatten_call` gives its tensors."""
    result: dict[str, tuple[str | None, ...]] = {}
    for name, value in dims.items():
        if isinstance(value, dict):
            result.update({f"{name}['{k}']": v for k, v in value.items()})
        else:
            result[name] = value
    return result


def _family_size(known: torch.Tensor, symbols: tuple[str | None, ...], given: torch.Tensor) -> list[int]:
    return [k if s is not None else g for k, s, g in zip(known.shape, symbols, given.shape)]
