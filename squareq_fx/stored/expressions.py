"""Sizes as JSON, and the symbols they are made of in a new `ShapeEnv`: same names, hints, ranges and conditions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from squareq_fx.stored.errors import DamagedError, UnstorableError

__all__ = ["Symbols", "decode_expression", "encode_expression", "new_mode", "symbol_entry"]

_SIZE = re.compile(r"s\d+")
_OF_SYMPY = (
    *("Add", "Mul", "Pow", "Abs", "floor", "ceiling", "Max", "Min", "Rational", "Float"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
)


@functools.cache
def _classes() -> dict[str, Any]:
    """Every class an expression may be built from, by the name it is written under."""
    import sympy
    from torch.utils._sympy import functions as of_torch

    found = {name: getattr(sympy, name) for name in _OF_SYMPY}
    for name, value in vars(of_torch).items():
        if isinstance(value, type) and issubclass(value, sympy.Basic) and value.__module__ == of_torch.__name__:
            found[f"torch.{name}"] = value
    return found


@functools.cache
def _tags() -> dict[Any, str]:
    return {cls: tag for tag, cls in _classes().items()}


def encode_expression(expr: Any) -> Any:
    """An expression of sizes as JSON: a number, a symbol's name, or [operation, operands...].

    Raises:
        UnstorableError: it has symbols that are only known at run time, or operations unknown here.
    """
    import sympy

    expr = sympy.sympify(expr)
    written = _encode(expr)
    if decode_expression(written, {str(s): s for s in expr.free_symbols}.__getitem__) != expr:
        raise UnstorableError(f"{expr} is not the same when it is read again")
    return written


def _encode(expr: Any) -> Any:
    import sympy
    from torch.utils._sympy.numbers import int_oo

    if expr.is_Symbol:
        if not _SIZE.fullmatch(expr.name):
            raise UnstorableError(f"the size {expr.name} is only known at run time")
        return expr.name
    if expr.is_Integer:
        return int(expr)
    if expr in (sympy.true, sympy.false):
        return ["bool", bool(expr)]
    if expr in (int_oo, -int_oo):
        return ["infinity", 1 if expr == int_oo else -1]
    if isinstance(expr, sympy.Rational):
        return ["Rational", int(expr.p), int(expr.q)]
    if isinstance(expr, sympy.Float):
        return ["Float", repr(float(expr))]
    tag = _tags().get(type(expr))
    if tag is None:
        raise UnstorableError(f"sizes with {type(expr).__name__} are not written")
    return [tag, *map(_encode, expr.args)]


def decode_expression(written: Any, symbol: Callable[[str], Any]) -> Any:
    """The expression that `encode_expression` wrote, in the symbols that `symbol` gives for their names.

    Raises:
        DamagedError: nothing writes this.
    """
    import sympy
    from torch.utils._sympy.numbers import int_oo

    if isinstance(written, str):
        return symbol(written)
    if isinstance(written, int):
        return sympy.Integer(written)
    match written:
        case ["bool", bool(value)]:
            return sympy.true if value else sympy.false
        case ["infinity", int(sign)]:
            return int_oo if sign > 0 else -int_oo
        case ["Rational", int(p), int(q)]:
            return sympy.Rational(p, q)
        case ["Float", str(text)]:
            return sympy.Float(float(text))
        case [str(tag), *operands] if tag in _classes():
            return _classes()[tag](*(decode_expression(o, symbol) for o in operands))
    raise DamagedError(f"{written!r} is no expression")


def symbol_entry(env: Any, symbol: Any) -> list[Any]:
    """A symbol as JSON: name, hint, lowest and highest value, whether it is known to be positive."""
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # older torch
    if symbol not in values:
        raise UnstorableError(f"the size {symbol} is only known at run time")
    bounds = env.var_to_range[symbol]
    return [symbol.name, int(values[symbol]), _encode(bounds.lower), _encode(bounds.upper), bool(symbol.is_positive)]


class Symbols:
    """The sizes of a stored graph, made anew.

    Args:
        entries: of `symbol_entry`.
        conditions: expressions that hold for all of them, by which sizes are simplified.
    """

    def __init__(self, entries: Sequence[Sequence[Any]], conditions: Sequence[Any]) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
        from torch.utils._sympy.value_ranges import ValueRanges

        class Named(ShapeEnv):  # the printed graph says the same of its sizes as the one that was stored
            wanted = 0

            def _generate_unique_id(self, source_name: str) -> int:
                self.unique_ids.add(self.wanted)
                return self.wanted

            def _get_user_frame(self) -> None:  # no line made these sizes, and to look for one imports all of torch.export
                return None

        self.env = Named(specialize_zero_one=False, duck_shape=False)
        self._symbols: dict[str, Any] = {}
        self._hints: dict[Any, int] = {}
        self._sizes: dict[str, Any] = {}
        for name, hint, low, high, positive in entries:
            if not _SIZE.fullmatch(name):
                raise DamagedError(f"{name!r} is no name of a size")
            bounds = ValueRanges(*(decode_expression(b, self._none) for b in (low, high)))
            self.env.wanted = int(name[1:])
            symbol = self.env.create_symbol(
                hint,
                ConstantSource(name),
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=StrictMinMaxConstraint(vr=bounds, warn_only=False),
                positive=positive or None,
                do_not_specialize_zero_one=True,
            )
            self._symbols[name], self._hints[symbol] = symbol, hint
        for written in conditions:
            if not bool(self.env.evaluate_expr(self.expression(written))):
                raise DamagedError(f"the condition {written} does not hold")

    def expression(self, written: Any) -> Any:
        return decode_expression(written, self._symbol)

    def size(self, written: Any) -> Any:
        """An int, or a `SymInt` of an expression."""
        if isinstance(written, int):
            return written
        key = repr(written)
        if key not in self._sizes:
            expr = self.expression(written)
            self._sizes[key] = self.env.create_symintnode(expr, hint=int(expr.xreplace(self._hints)))
        return self._sizes[key]

    def number(self, written: Any) -> Any:
        """A `SymFloat` of an expression."""
        expr = self.expression(written)
        return self.env.create_symfloatnode(expr, hint=float(expr.xreplace(self._hints)))

    def truth(self, written: Any) -> Any:
        """A `SymBool` of an expression."""
        return self.env.create_symboolnode(self.expression(written))

    def _symbol(self, name: str) -> Any:
        if name not in self._symbols:
            raise DamagedError(f"the size {name!r} is described nowhere")
        return self._symbols[name]

    def _none(self, name: str) -> Any:
        raise DamagedError(f"a bound that depends on the size {name}")


def new_mode(env: Any) -> Any:
    """Where the types of a graph that was read live."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
