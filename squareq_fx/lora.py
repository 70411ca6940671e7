"""Which layers get a low-rank adapter, and of what rank.

Source: LoRA (arXiv 2106.09685); names and matching as in PEFT's `LoraConfig`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from squareq_fx.errors import PassError

__all__ = ["PRESETS", "Lora", "LoraLayer", "matches", "near_names"]

_ATTENTION = r"(.*\.)?((self_|cross_)?attn\d*|(self_|cross_)?attention\d*)\..+"
_FEED_FORWARD = r"(.*\.)?(ff\d*|ff_context|ffn|mlp|feed_forward)\..+|(.*\.)?single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"

PRESETS: Mapping[str, str] = {
    "attention": _ATTENTION,
    "attention+ff": f"{_ATTENTION}|{_FEED_FORWARD}",
    "all": ".+",
}
"""Preset to the regular expression that a whole layer path must match. "attention" is every Linear of an attention module
(queries, keys, values, output, and their text-stream twins), "attention+ff" also the feed-forward layers, "all" every
Linear."""


@dataclass(frozen=True)
class LoraLayer:
    """One adapted layer: y = base(x) + (alpha / rank) * up(down(x)), down [rank, in], up [out, rank]."""

    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Lora:
    """Adapters to train.

    Args:
        rank: inner dimension r.
        alpha: the branch is scaled by alpha / rank; default: rank, so by 1.
        targets: a preset ("attention", "attention+ff", "all"), a regular expression that matches whole layer paths, or a
            sequence of suffixes of them ("to_q", "attn1.to_k").
        rank_pattern, alpha_pattern: other ranks and alphas for the layers that match: suffix or regular expression of a whole
            path to value, as in PEFT; the first that matches counts. A rank of its own brings an alpha equal to it, unless
            `alpha` is given or an alpha pattern matches.

    Raises:
        PassError: a rank is no positive integer, an alpha no positive number, an expression not regular.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "attention"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise PassError(f"lora: rank must be a positive integer, not {rank!r}")
        for alpha in (*([] if self.alpha is None else [self.alpha]), *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise PassError(f"lora: alpha must be a positive number, not {alpha!r}")
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            raise PassError("lora: targets is empty; give a preset, a regular expression or a sequence of suffixes")
        for text in (*([self.targets] if isinstance(self.targets, str) else ()), *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(text)
            except re.error as error:
                raise PassError(f"lora: {text!r} is not a regular expression: {error}") from error

    def layers(self, available: Iterable[str]) -> dict[str, LoraLayer]:
        """The adapted layers among those a model has, in their order.

        Args:
            available: paths of the Linear layers the graph calls.

        Raises:
            PassError: a target or a pattern matches none of them; the message lists near names.
        """
        available = tuple(available)
        if isinstance(self.targets, str):
            expression = PRESETS.get(self.targets, self.targets)
            chosen = [name for name in available if re.fullmatch(expression, name)]
            if not chosen:
                raise PassError(_matches_nothing("targets", self.targets, available))
        else:
            for suffix in self.targets:
                if not any(_has_suffix(name, suffix) for name in available):
                    raise PassError(_matches_nothing("targets", suffix, available))
            chosen = [name for name in available if any(_has_suffix(name, suffix) for suffix in self.targets)]
        for what, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in chosen):
                    raise PassError(_matches_nothing(what, pattern, chosen))
        return {name: self._layer(name) for name in chosen}

    def _layer(self, name: str) -> LoraLayer:
        rank = next((value for key, value in self.rank_pattern.items() if matches(name, key)), self.rank)
        default = float(rank if self.alpha is None else self.alpha)
        return LoraLayer(rank, next((float(v) for key, v in self.alpha_pattern.items() if matches(name, key)), default))


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's path ends with `pattern` at a dot ("to_q", "attn1.to_k") or is matched by it as a whole."""
    return _has_suffix(name, pattern) or re.fullmatch(pattern, name) is not None


def near_names(wanted: str, available: Iterable[str]) -> str:
    """The leaf names and paths nearest to what was asked for, for a message."""
    available = tuple(available)
    leaves = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in available)
    near = difflib.get_close_matches(wanted, [*leaves, *available], n=5, cutoff=0.4) or list(leaves)[:8]
    return ", ".join(near) or "none"


def _matches_nothing(what: str, wanted: str, available: Iterable[str]) -> str:
    available = tuple(available)
    return (
        f"lora: {what} {wanted!r} matches none of the {len(available)} Linear layers the graph calls; near names are "
        f"{near_names(wanted, available)}. Presets are {', '.join(PRESETS)}; other strings are regular expressions of a whole "
        "path."
    )
