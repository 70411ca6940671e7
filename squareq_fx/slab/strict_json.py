"""JSON read without mercy: what Python's own reader lets through quietly is refused here."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from squareq_fx.errors import SlabError

__all__ = ["loads", "plain_int"]

_LONGEST_INT = 20  # digits of 2**64; longer ones only serve to make the conversion slow


def loads(raw: bytes | str, what: str) -> Any:
    """Parse JSON.

    Args:
        raw: bytes (must be UTF-8) or text.
        what: how the error names the document, such as "the manifest of a.safetensors".

    Raises:
        SlabError: not UTF-8, not JSON, a key twice in one object, NaN or Infinity, an integer of more than 20
            digits, nesting too deep, or half of a surrogate pair (a string that cannot be printed or written
            again).
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_short_int)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise SlabError(f"{what} is not valid UTF-8: {error}") from error
    except RecursionError as error:
        raise SlabError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise SlabError(f"{what} is not valid JSON: {error}") from error
    return value


def plain_int(value: object) -> bool:
    """True for an int that is not a bool; JSON's true would otherwise pass for 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!a} occurs twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _short_int(digits: str) -> int:
    if len(digits) > _LONGEST_INT:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
