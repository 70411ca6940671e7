"""Which layers multiply int8 with int8, how that was decided, and the file it is kept in.

"w8a16" multiplies the activations as they are with the widened weight; "w8a8" first quantises each row of the activations to
int8 (`squareq.quantize_rows`), which is faster where the matrix units have an int8 mode and less exact everywhere.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from squareq_fx.durable import write_whole
from squareq_fx.errors import PassError, SquareQError
from squareq_fx.kernels.arguments import COMPUTES
from squareq_fx.lora import matches, near_names
from squareq_fx.slab.paths import SlabPaths
from squareq_fx.slab.reader import Slab

__all__ = ["ERROR_BUDGET", "Compute", "Decision", "Decisions", "Measured", "decide", "modes_of", "role_of", "slab_id"]

Compute = Literal["w8a16", "w8a8"]

ERROR_BUDGET = 0.03
"""Largest relative L2 error of a layer's output, against w8a16, that "auto" accepts.

Measured with normally distributed weights and 256 rows of 1,024, 3,072 and 15,360 values: normally distributed rows cost 0.008
to 0.009, the same after a GELU 0.012 to 0.014, and with one value of fifty standard deviations in each 0.06 to 0.11. The budget
lies between: it lets ordinary rows through and stops rows that a few channels dominate."""

SPEEDUP = 1.03
"""How much faster w8a8 must be to be chosen: repeated measurements differ by a percent or two."""

SPLIT_SHARE = 0.25
"""If more of a role's layers than this are over the budget, the whole role stays w8a16 and its blocks go on sharing."""

_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """What is known of a layer: `error` of w8a8 against w8a16 (relative L2), the `rows` of its input that it was timed with,
    and the milliseconds of one call."""

    error: float
    rows: int
    ms_w8a16: float
    ms_w8a8: float


@dataclass(frozen=True)
class Decision:
    """How one layer computes, what that rests on (None: not measured), and the reason in words."""

    mode: Compute
    reason: str
    error: float | None = None
    rows: int | None = None
    ms_w8a16: float | None = None
    ms_w8a8: float | None = None


@dataclass(frozen=True)
class Decisions:
    """How each layer of a slab computes on one machine.

    Attributes:
        layers: layer name to `Decision`, every layer of the slab.
        slab: `slab_id` of the slab.
        machine: device, driver, torch and Triton it was timed on.
        dtype: of the activations.
        error_budget, keep: what was asked for.
        inputs: what it was calibrated on, in words; `inputs_id` tells two sets of inputs apart.
    """

    layers: Mapping[str, Decision]
    slab: str
    machine: str
    dtype: str
    error_budget: float
    keep: tuple[str, ...]
    inputs: str
    inputs_id: str

    @property
    def modes(self) -> dict[str, Compute]:
        return {name: decision.mode for name, decision in self.layers.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """For the program: how many layers compute how, and on what ground."""
        count = sum(d.mode == "w8a8" for d in self.layers.values())
        return (
            f"compute: {count} of {len(self.layers)} layers in w8a8, decided on {self.machine} with an error budget of "
            f"{self.error_budget:g} and {self.inputs}",
        )

    @staticmethod
    def path_beside(slab: Slab) -> Path:
        """Where the decisions for a slab lie: `<slab>.compute.json`."""
        stem = SlabPaths.of(slab.path).stem
        return stem.with_name(f"{stem.name}.compute.json")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the decisions as JSON, whole or not at all. Raises OSError if the file cannot be written."""
        document = {"squareq_compute": _VERSION, **asdict(self)}
        document["layers"] = {name: asdict(decision) for name, decision in self.layers.items()}
        write_whole(Path(path), (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Decisions:
        """Read what `save` wrote.

        Raises:
            SquareQError: there is no such file, or it is not a file of decisions.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SquareQError(f"{path}: no decisions of compute modes can be read there: {error}") from error
        try:
            return cls._restored(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SquareQError(
                f"{path}: not a file of decisions of compute modes ({error}); delete it, and compute='auto' decides again"
            ) from error

    @classmethod
    def _restored(cls, document: Any) -> Decisions:
        version = document["squareq_compute"]
        if version != _VERSION:
            raise ValueError(f"its version is {version!r}, this package reads {_VERSION}")
        layers = {str(name): Decision(**entry) for name, entry in document["layers"].items()}
        for name, decision in layers.items():
            _check_mode(decision.mode, name)
        texts = (document[key] for key in ("slab", "machine", "dtype"))
        slab, machine, dtype = map(str, texts)
        return cls(
            layers=layers,
            slab=slab,
            machine=machine,
            dtype=dtype,
            error_budget=float(document["error_budget"]),
            keep=tuple(map(str, document["keep"])),
            inputs=str(document["inputs"]),
            inputs_id=str(document["inputs_id"]),
        )

    def check_slab(self, slab: Slab) -> None:
        """Raises PassError if the decisions were made for another slab."""
        if self.slab != slab_id(slab):
            raise PassError(
                f"these decisions of compute modes were made for another slab than {slab.path} ({self.slab}, not "
                f"{slab_id(slab)}); compute='auto' decides for this one"
            )

    def mismatches(self, slab: Slab, machine: str, dtype: str, error_budget: float, keep: Sequence[str]) -> tuple[str, ...]:
        """What they were made for and is not so now, in words; empty if they can be used as they are."""
        now = {
            "slab": (self.slab, slab_id(slab)),
            "machine": (self.machine, machine),
            "dtype": (self.dtype, dtype),
            "error budget": (self.error_budget, error_budget),
            "keep": (self.keep, tuple(keep)),
        }
        return tuple(f"{what} {old!r}, now {new!r}" for what, (old, new) in now.items() if old != new)


def decide(
    slab: Slab,
    measured: Mapping[str, Measured],
    *,
    machine: str,
    dtype: str,
    inputs: str,
    inputs_id: str,
    error_budget: float = ERROR_BUDGET,
    keep: Sequence[str] = (),
    blocks: Sequence[str] = (),
) -> Decisions:
    """For each layer the faster way to compute whose error is within the budget.

    Layers of one role (the same place in blocks of one kind, `role_of`, and the same size) are decided together by the sum of
    their times, so that blocks go on sharing functions. A layer over the budget stays w8a16, and its block then is a function
    of its own, shared with blocks of the same decisions; if that would be more than a quarter of a role's layers, the whole
    role stays. The time of w8a8 has the row quantisation in it, of layers that `fuse` merges their share of one; an upper
    bound, as a compiler may fold it into the norm before.

    Args:
        measured: by layer; a layer without an entry stays w8a16.
        machine, dtype, inputs, inputs_id: recorded; see `Decisions`.
        keep: patterns of layers that stay w8a16, as in `Quantize`.
        blocks: module paths of the streaming blocks.

    Raises:
        PassError: the budget is not a number of at least 0, or a pattern matches no layer.
    """
    if isinstance(error_budget, bool) or not isinstance(error_budget, int | float) or not 0 <= error_budget < math.inf:
        raise PassError(f"error_budget must be a number of at least 0 (0.03 is 3 %), not {error_budget!r}")
    kept = _kept(slab, keep)
    roles: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in slab.layers.items():
        if name in measured and name not in kept:
            roles.setdefault((role_of(name, blocks), tuple(layer.orig_shape)), []).append(name)
    found: dict[str, Decision] = {}
    for names in roles.values():
        found.update(_decide_role(names, measured, float(error_budget)))
    for name in slab.layers:
        if name in kept:
            found[name] = _decision("w8a16", f"kept in 16 bits by {kept[name]!r}", measured.get(name))
        elif name not in measured:
            found[name] = Decision("w8a16", "never called while calibrating")
    layers = {name: found[name] for name in slab.layers}
    return Decisions(layers, slab_id(slab), machine, dtype, float(error_budget), tuple(keep), inputs, inputs_id)


def _decide_role(names: list[str], measured: Mapping[str, Measured], budget: float) -> dict[str, Decision]:
    slow, fast = (sum(getattr(measured[n], f"ms_{mode}") for n in names) for mode in COMPUTES)
    over = [n for n in names if not measured[n].error <= budget]  # NaN is over
    if not fast * SPEEDUP < slow:
        return {n: _decision("w8a16", f"w8a8 would be {slow / fast if fast else 1:.2f}x as fast", measured[n]) for n in names}
    if len(over) > SPLIT_SHARE * len(names):
        why = f"{len(over)} of {len(names)} such layers are over the error budget of {budget:g}"
        return {n: _decision("w8a16", why, measured[n]) for n in names}
    return {
        n: _decision("w8a16", f"its error is over the budget of {budget:g}", measured[n])
        if n in over
        else _decision("w8a8", f"{slow / fast if fast else math.inf:.2f}x as fast", measured[n])
        for n in names
    }


def _decision(mode: Compute, reason: str, of: Measured | None) -> Decision:
    return Decision(mode, reason) if of is None else Decision(mode, reason, of.error, of.rows, of.ms_w8a16, of.ms_w8a8)


def role_of(layer: str, blocks: Sequence[str]) -> str:
    """A layer's path with the numbers of its block replaced: `transformer_blocks.*.ff.net.2`."""
    block = next((path for path in blocks if layer.startswith(f"{path}.")), None)
    if block is not None:
        return re.sub(r"\b\d+\b", "*", block) + layer[len(block) :]
    return layer


def modes_of(slab: Slab, compute: Compute | Mapping[str, Compute] | Decisions, keep: Sequence[str]) -> dict[str, Compute]:
    """How each layer of the slab computes; see `Quantize`.

    Raises:
        PassError: `compute` names a layer or a way that is none, or is of another slab; a pattern of `keep` matches no layer.
    """
    kept = _kept(slab, keep)
    if isinstance(compute, Decisions):
        compute.check_slab(slab)
        given: Mapping[str, Compute] = compute.modes
    elif isinstance(compute, Mapping):
        given = compute
        for name, mode in given.items():
            if name not in slab.layers:
                near = near_names(name, slab.layers)
                raise PassError(f"compute: {slab.path.name} has no layer {name!r}; near names are {near}")
            _check_mode(mode, name)
    else:
        _check_mode(compute, "compute")
        given = dict.fromkeys(slab.layers, compute)
    return {name: "w8a16" if name in kept else given.get(name, "w8a16") for name in slab.layers}


def _check_mode(mode: object, what: str) -> None:
    if mode not in COMPUTES:
        raise PassError(f"{what}: {mode!r} is no way to compute; there are {', '.join(map(repr, COMPUTES))}")


def _kept(slab: Slab, keep: Sequence[str]) -> dict[str, str]:
    """Layer to the first pattern that keeps it in 16 bits."""
    kept: dict[str, str] = {}
    for pattern in keep:
        try:
            found = [name for name in slab.layers if matches(name, pattern)]
        except re.error as error:
            raise PassError(f"keep: {pattern!r} is not a regular expression: {error}") from error
        if not found:
            near = near_names(pattern, slab.layers)
            raise PassError(f"keep: {pattern!r} matches no layer of {slab.path.name}; near names are {near}")
        for name in found:
            kept.setdefault(name, pattern)
    return kept


def slab_id(slab: Slab) -> str:
    """16 hex digits that differ between slabs of different contents: of the checksums, or of the scales where it has none."""
    return _slab_id(slab)


@functools.lru_cache(maxsize=8)
def _slab_id(slab: Slab) -> str:
    digest = xxhash.xxh3_64(slab.signature.encode())
    for segment in slab.segments:
        digest.update(segment.sha.encode())
    if not slab.segments:
        for layer in slab.layers.values():
            digest.update(slab.tensor(layer.scale_key, verify=False).contiguous().numpy().tobytes())
    return digest.hexdigest()
