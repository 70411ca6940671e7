"""The sizes a function is called with: as few integers as tell them all, and fake arguments over symbols of their own.

A compiler may put conditions on the sizes it is shown. What `fresh` gives has symbols of its own, so none of these conditions
reaches the graph; `Sizes.read` gives the values of the symbols at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Fresh", "Sizes", "fresh", "hint", "holds", "sizes_of"]

_NO_HINT = 13
"""Stands for a size that is only known at run time, as in `inference.new_size`."""
_LEAST = 2
"""What `torch.export` takes every dynamic size to be at least; the program it traced holds for 0 and 1 all the same."""


@dataclass(frozen=True)
class Sizes:
    """What the symbolic sizes of a function's arguments are made of.

    Attributes:
        names: one for each integer.
        hints: a value of each; by default the one that the graph was captured with.
        read: the integers, from the function's arguments.
        within: a size of the graph, in these names (sympy expressions).
    """

    names: tuple[str, ...]
    hints: tuple[int, ...]
    read: Callable[[Sequence[Any]], tuple[int, ...]]
    within: Callable[[Any], Any]


@dataclass(frozen=True)
class Fresh:
    """Fake arguments over symbols of their own.

    Attributes:
        mode: the `FakeTensorMode` they live in.
        sizes: one `SymInt` for each of `Sizes.names`.
        values: one for each value that was given.
    """

    mode: Any
    sizes: tuple[Any, ...]
    values: tuple[Any, ...]

    def fixed(self) -> tuple[int, ...]:
        """Positions of the sizes that by now are known to be one number."""
        env = self.mode.shape_env
        return tuple(i for i, size in enumerate(self.sizes) if env.replace(size.node.expr).is_number)

    def condition(self) -> str:
        """What has been assumed of the symbols, other than that they are 2 or more, for `holds`."""
        from torch.utils._sympy.numbers import int_oo
        from torch.utils._sympy.value_ranges import ValueRanges

        env = self.mode.shape_env
        for symbol, bounds in list(env.var_to_range.items()):
            if bounds.lower == _LEAST:
                env.var_to_range[symbol] = ValueRanges(int_oo * -1, bounds.upper)
        env._update_version_counter()
        return env.produce_guards_expression(self.sizes, ignore_static=False) or ""


def holds(condition: str) -> Callable[[Sequence[int]], bool]:
    """Whether values of the symbols satisfy a condition."""
    if not condition:
        return lambda sizes: True
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    return lambda sizes: bool(env.evaluate_guards_expression(condition, sizes))


def hint(size: Any) -> int:
    """The value that a size was captured with."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.hint
    return int(known) if isinstance(known, int) else _NO_HINT


def sizes_of(values: Sequence[Any], value_of: Callable[[Any], int] = hint) -> Sizes:
    """The integers that determine every size and stride in `values`.

    A size that is a symbol is one of them; a symbol that occurs in a sum or a multiple only is solved for; of what is left,
    the smallest expression counts as one integer, until nothing is left.

    Args:
        values: the `val`s of a function's arguments: fake tensors, and sizes.
        value_of: gives the number for each size that `Sizes.hints` are made from.
    """
    import sympy

    atoms: list[Any] = []
    code: list[str] = []
    hints: list[int] = []
    known: dict[Any, Any] = {}

    def within(expr: Any) -> Any:
        expr = sympy.sympify(expr)
        for old, new in known.items():
            expr = expr.xreplace({old: new}) if old.is_Symbol else expr.subs(old, new)
        return expr

    def add(source: str, value: int) -> Any:
        atom = sympy.Symbol(f"n{len(atoms)}", integer=True, positive=True)
        atoms.append(atom)
        code.append(source)
        hints.append(value)
        return atom

    waiting = [(size.node.expr, source, value_of(size)) for size, source in _sizes(values) if isinstance(size, torch.SymInt)]
    while waiting:
        left = []
        for expr, source, value in waiting:
            rest = within(expr)
            unknown = rest.free_symbols.difference(atoms)
            if len(unknown) != 1:
                left += [(expr, source, value)] if unknown else []
                continue
            (symbol,) = unknown
            factor, offset = rest.coeff(symbol, 1), sympy.expand(rest).coeff(symbol, 0)
            linear = factor.is_Integer and sympy.expand(factor * symbol + offset - rest) == 0
            if not linear or not offset.is_polynomial(*atoms):
                left.append((expr, source, value))
                continue
            at_hints = int(offset.subs(dict(zip(atoms, hints))))
            solved = source if rest == symbol else f"({source} - ({offset})) // {factor}"
            known[symbol] = add(solved, (value - at_hints) // int(factor))
        if len(left) == len(waiting):
            expr, source, value = min(left, key=lambda entry: within(entry[0]).count_ops())
            rest = within(expr)
            known[rest] = add(source, value)
            if within(expr).free_symbols.difference(atoms):
                raise AssertionError(f"{expr} is not determined by its own value")
        waiting = left
    names = tuple(str(atom) for atom in atoms)
    return Sizes(names, tuple(hints), _reader(names, code), within)


def _sizes(values: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield from ((size, f"a[{i}].shape[{dim}]") for dim, size in enumerate(value.shape))
        else:
            yield value, f"a[{i}]"
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            yield from ((step, f"a[{i}].stride({dim})") for dim, step in enumerate(value.stride()))


def _reader(names: Sequence[str], code: Sequence[str]) -> Callable[[Sequence[Any]], tuple[int, ...]]:
    """A function that is compiled once, as it runs at every call of every block."""
    lines = [f"    {name} = {source}" for name, source in zip(names, code)]
    text = "\n".join(["def read(a):", *lines, f"    return ({''.join(f'{name}, ' for name in names)})"])
    space: dict[str, Any] = {}
    exec(text, space)
    return space["read"]


def fresh(sizes: Sizes, hints: Sequence[int], values: Sequence[Any]) -> Fresh:
    """Fake tensors and sizes like `values`, over new symbols that nothing else knows.

    Args:
        hints: values of the new symbols, which a compiler may go by where it chooses among programs.
        values: their sizes are expressions of what `sizes` was made from.
    """
    import sympy
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env)
    symbols: dict[Any, Any] = {}
    for name, value in zip(sizes.names, hints):
        bounds = StrictMinMaxConstraint(vr=ValueRanges(sympy.Integer(min(_LEAST, value)), int_oo), warn_only=False)
        symbols[sympy.Symbol(name, integer=True, positive=True)] = env.create_symbol(
            value,
            ConstantSource(name),
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=bounds,
            do_not_specialize_zero_one=True,
        )
    at_hints = dict(zip(symbols, hints))

    def size(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        expr = sizes.within(value.node.expr)
        return env.create_symintnode(expr.xreplace(symbols), hint=int(expr.xreplace(at_hints)))

    def like(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return size(value)
        shape, strides = [size(s) for s in value.shape], [size(s) for s in value.stride()]
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    with mode, torch.no_grad():
        made = tuple(env.create_symintnode(symbol, hint=value) for symbol, value in zip(symbols.values(), hints))
        return Fresh(mode, made, tuple(like(value) for value in values))
