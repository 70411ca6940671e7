"""Calls of a compiled module: the original's arguments in, its output class out, everything else refused."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from squareq_fx.calls import bind, flatten_call
from squareq_fx.errors import BindingError
from squareq_fx.ir import fake_mode, info, program
from squareq_fx.specs import short_spec

__all__ = ["Binding"]


class Binding:
    """Between the original's call and the flat inputs and outputs of a graph.

    Args:
        gm: the graph; its input placeholders' types are what calls are held against.
        name: the model's class, for messages.
    """

    def __init__(self, gm: fx.GraphModule, name: str) -> None:
        import sympy  # half a second that importing this package must not take; torch has loaded it by now

        record = program(gm)
        self.call, self.device, self.name = record.call, record.device, name
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == "input"]
        self._vals = {str(info(n).key): n.meta["val"] for n in nodes}
        self._sizes = {key: [_expression(s) for s in val.shape] for key, val in self._vals.items()}
        shape_env = fake_mode(gm).shape_env
        self._guards = _Guards([sympy.sympify(shape_env.replace(g)) for g in record.guards])
        self._seen: set[tuple[Any, ...]] = set()

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], bool]:
        """The graph's inputs for a call, and whether the caller wants the output class (`return_dict`).

        Raises:
            BindingError: an argument is missing, unknown, of the wrong type or size, or not what was captured.
        """
        bound = bind(self.call.signature, args, kwargs, f"call of the compiled {self.name}")
        bound.apply_defaults()
        return_dict = bool(bound.arguments.pop("return_dict", True))
        given = flatten_call(bound.arguments)
        self._check_literals(given)
        values = [self._value(path, given) for path in self.call.input_paths]
        return self._fit(values), return_dict

    def output(self, flat: Sequence[torch.Tensor], return_dict: bool) -> Any:
        """The model's output from the graph's; a tuple when `return_dict` is False."""
        tensors = iter(flat)
        leaves = [next(tensors) if leaf is None else leaf[0] for leaf in self.call.output_leaves]
        output = pytree.tree_unflatten(leaves, self.call.output_spec)
        if return_dict:
            return output
        return output.to_tuple() if hasattr(output, "to_tuple") else output

    def concrete(self, val: torch.Tensor, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """The sizes that a value of the graph has in a call with these inputs."""
        return tuple(map(self.sizes(tensors), val.shape))

    def sizes(self, tensors: Sequence[torch.Tensor]) -> Callable[[Any], int]:
        """What a size of the graph, an integer or a symbol, is in a call with these inputs; KeyError if they do not tell."""
        symbols: dict[str, int] = {}
        for path, value in zip(self.call.input_paths, tensors):
            self._bind_sizes(path, value, symbols)
        return lambda size: _evaluate(_expression(size), symbols)

    def _check_literals(self, given: Mapping[str, Any]) -> None:
        for path, value in given.items():
            if path in self._vals:
                continue
            if isinstance(value, torch.Tensor):
                near = difflib.get_close_matches(path, self._vals, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise BindingError(
                    f"{self.name}: {path} is a tensor, but the graph was captured without it{hint}. Compile with "
                    f"example_inputs that contain {path}."
                )
            captured = self.call.literals.get(path, _default(self.call.signature, path))
            if value is not captured and value != captured and not (captured is _MISSING and value is None):
                shown = "nothing" if captured is _MISSING else repr(captured)
                raise BindingError(
                    f"{self.name}: {path}={value!r}, but the graph was captured with {shown}. Compile with example_inputs "
                    f"that set {path}={value!r}."
                )

    def _value(self, path: str, given: Mapping[str, Any]) -> torch.Tensor:
        expected = self._vals[path]
        value = given.get(path)
        if isinstance(value, bool | int | float):
            number = value
            value = torch.tensor(number, device=self.device)
            if isinstance(number, int) and torch.tensor(number, dtype=expected.dtype).item() == number:
                value = value.to(expected.dtype)
        if not isinstance(value, torch.Tensor):
            raise BindingError(f"{self.name}: {path} must be a tensor {short_spec(expected)}, not {value!r}")
        if value.dtype != expected.dtype:
            if not _is_exact(value.dtype, expected.dtype):
                raise BindingError(
                    f"{self.name}: {path} is {value.dtype}, the graph was captured for {expected.dtype}; that cast loses "
                    "digits, so it is yours to make"
                )
            value = value.to(expected.dtype)
        if value.device != self.device:
            if value.dim():
                raise BindingError(f"{self.name}: {path} is on {value.device}, the graph runs on {self.device}; move it there")
            value = value.to(self.device)
        # The graph was traced on contiguous inputs; what is compiled from it reads them by their strides.
        return value.contiguous()

    def _fit(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        shapes = tuple(tuple(v.shape) for v in values)
        paths = self.call.input_paths
        scalars = [v.dim() < 2 and v.numel() == 1 and len(self._sizes[p]) == 1 for p, v in zip(paths, values)]
        if shapes in self._seen and not any(scalars):
            return values
        symbols: dict[str, int] = {}
        for path, value, scalar in zip(paths, values, scalars):
            if not scalar:
                self._bind_sizes(path, value, symbols)
        for i, path in enumerate(paths):
            if scalars[i]:
                values[i] = self._expand(path, values[i], symbols)
        if shapes not in self._seen:
            self._check_derived(values, symbols)
            self._guards.check(symbols, self.name)
            self._seen.add(shapes)
        return values

    def _bind_sizes(self, path: str, value: torch.Tensor, symbols: dict[str, int]) -> None:
        sizes = self._sizes[path]
        if value.dim() != len(sizes):
            raise BindingError(
                f"{self.name}: {path} has {value.dim()} dimensions {list(value.shape)}, the graph wants "
                f"{short_spec(self._vals[path])}"
            )
        for dim, (size, extent) in enumerate(zip(sizes, value.shape)):
            symbol, factor = _linear(size)
            if symbol is None:
                continue
            if extent % factor:
                raise BindingError(f"{self.name}: dimension {dim} of {path} is {extent}, it must be a multiple of {factor}")
            if symbols.setdefault(symbol, extent // factor) != extent // factor:
                raise BindingError(
                    f"{self.name}: dimension {dim} of {path} is {extent}, other inputs imply {symbols[symbol] * factor}"
                )

    def _expand(self, path: str, value: torch.Tensor, symbols: dict[str, int]) -> torch.Tensor:
        """A scalar where the model takes one value a sample is that value for every sample."""
        size = self._sizes[path][0]
        symbol, factor = _linear(size)
        extent = int(size) if symbol is None else symbols.setdefault(symbol, value.numel()) * factor
        return value.reshape(1).expand(extent).contiguous()

    def _check_derived(self, values: list[torch.Tensor], symbols: dict[str, int]) -> None:
        for path, value in zip(self.call.input_paths, values):
            for dim, (size, extent) in enumerate(zip(self._sizes[path], value.shape)):
                expected = _evaluate(size, symbols)
                if extent != expected:
                    raise BindingError(
                        f"{self.name}: dimension {dim} of {path} is {extent}, the graph was captured for {expected} "
                        f"({short_spec(self._vals[path])}). Compile with example_inputs of that size."
                    )


def _is_exact(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Every value of one type is a value of the other. Integers count as float32, which timesteps (up to 2**24) fit in."""
    if torch.promote_types(given, wanted) != wanted:
        return False
    is_integer = not given.is_floating_point and not given.is_complex
    return not is_integer or not wanted.is_floating_point or given == torch.bool or wanted.itemsize > 2


class _Guards:
    """Conditions on sizes, compiled to one Python expression each."""

    def __init__(self, expressions: Sequence[Any]) -> None:
        self._conditions: list[tuple[str, Callable[..., bool], list[str]]] = []
        for expression in expressions:
            text = _text(expression)
            if text == "True":
                continue
            names = sorted(map(str, expression.free_symbols))
            self._conditions.append((text, _compiled(text, names), names))

    def check(self, symbols: Mapping[str, int], name: str) -> None:
        for text, condition, names in self._conditions:
            if all(n in symbols for n in names) and not condition(*(symbols[n] for n in names)):
                sizes = ", ".join(f"{n}={symbols[n]}" for n in names)
                raise BindingError(
                    f"{name}: these sizes ({sizes}) take another path through the model than the captured one, which "
                    f"assumes {text}. Compile with example_inputs of these sizes."
                )


def _compiled(text: str, names: list[str]) -> Callable[..., bool]:
    import math

    return eval(f"lambda {', '.join(names)}: {text}", {"math": math, "torch": torch, "min": min, "max": max})


def _evaluate(size: Any, symbols: Mapping[str, int]) -> int:
    text = _text(size)
    names = sorted(map(str, size.free_symbols))
    return int(_compiled(text, names)(*(symbols[n] for n in names)))


def _text(expression: Any) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(expression)


def _expression(size: Any) -> Any:
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _linear(size: Any) -> tuple[str | None, int]:
    """`4*s0` as ("s0", 4); (None, 1) for anything that is not one symbol times a constant."""
    if len(size.free_symbols) != 1:
        return None, 1
    (symbol,) = size.free_symbols
    factor = size.coeff(symbol)
    return (str(symbol), int(factor)) if size == factor * symbol and factor.is_Integer else (None, 1)


class _Missing:
    pass


_MISSING = _Missing()


def _default(signature: inspect.Signature, path: str) -> Any:
    parameter = signature.parameters.get(path)
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return _MISSING
    return parameter.default
