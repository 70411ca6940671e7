"""PEFT's `LoraConfig`, as JSON holds it: the alpha of every layer, and what we write.

The fields and how patterns match are PEFT's (`peft.tuners.lora.LoraConfig`, `peft.utils.other.get_pattern_key`, 0.21);
diffusers keeps the same dict in its files' metadata. PEFT itself is not needed to read one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from squareq_fx.adapters.state import Adapter

__all__ = ["alphas", "lora_config"]

_DEFAULT = 8
"""Of `r` and of `lora_alpha`, where a config leaves them out."""

_VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config"),
    *("arrow_config", "kasa_config", "lora_bias", "target_parameters", "trainable_token_indices", "modules_to_save"),
    "layer_replication",
)
"""Options that make something else of y = base(x) + scaling * B A x, or train more than A and B."""

_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
"""Initialisations that take their share out of the base weights, so that A and B do not go with the model's own."""


def alphas(config: Mapping[str, Any], ranks: Mapping[str, int], problems: list[str]) -> dict[str, float]:
    """Each layer's alpha, so that alpha / rank is the scaling PEFT computes (also with `use_rslora`).

    Args:
        config: the `LoraConfig`.
        ranks: rank of each layer's A and B, by the layer's path in the model.
        problems: gets whatever is not supported or does not agree; a layer without a good alpha is left out.
    """
    problems.extend(_unsupported(config))
    rank_patterns = _patterns(config, "rank_pattern", problems)
    alpha_patterns = _patterns(config, "alpha_pattern", problems)
    found = {}
    for layer, rank in ranks.items():
        expected = _lookup(rank_patterns, layer, config.get("r", _DEFAULT))
        alpha = _lookup(alpha_patterns, layer, config.get("lora_alpha", _DEFAULT))
        if expected != rank:
            problems.append(f"{layer}: A and B have rank {rank}, the configuration says {expected!r}")
        elif isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            problems.append(f"{layer}: alpha must be a positive number, the configuration says {alpha!r}")
        else:
            found[layer] = alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)
    return found


def lora_config(adapter: Adapter) -> dict[str, Any]:
    """What `peft.LoraConfig(**...)` takes: the commonest rank and alpha, and a pattern for each layer that has others."""
    rank = _commonest(part.rank for part in adapter.layers.values())
    alpha = _commonest(_whole(part.alpha) for part in adapter.layers.values())
    # PEFT takes a list of targets, and a pattern that is not anchored, for suffixes: "proj_out" would be every block's as well.
    names = {layer: f"^{re.escape(layer)}" for layer in adapter.layers}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {names[layer]: part.rank for layer, part in adapter.layers.items() if part.rank != rank},
        "alpha_pattern": {names[layer]: _whole(part.alpha) for layer, part in adapter.layers.items() if part.alpha != alpha},
        "target_modules": "|".join(re.escape(layer) for layer in adapter.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    on = [name for name in _VARIANTS if config.get(name)]
    problems = [f"the configuration has {name}={config[name]!r}, which is not supported" for name in on]
    kind = config.get("peft_type") or "LORA"
    if str(kind).rpartition(".")[2] != "LORA":
        problems.append(f"the configuration has peft_type={kind!r}; only LORA is supported")
    if config.get("bias") not in (None, "none"):
        problems.append(f"the configuration has bias={config['bias']!r}: biases of the model were trained too")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        problems.append(
            f"the configuration has init_lora_weights={start!r}, which changes the base weights; convert the adapter with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return problems


def _patterns(config: Mapping[str, Any], name: str, problems: list[str]) -> list[tuple[re.Pattern[str], Any]]:
    patterns = []
    for key, value in (config.get(name) or {}).items():
        try:
            patterns.append((re.compile(rf"(.*\.)?({key})$"), value))
        except re.error as error:
            problems.append(f"the configuration's {name} has {key!r}, not a regular expression: {error}")
    return patterns


def _lookup(patterns: list[tuple[re.Pattern[str], Any]], layer: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(layer)), default)


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
