"""Where each weight of a graph comes from: the slab's bytes, the model's own tensors, or a captured constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from squareq_fx.errors import SlabError
from squareq_fx.ir import Packed
from squareq_fx.kernels.reference import dequantize
from squareq_fx.runtime import Piece, Segment
from squareq_fx.slab.manifest import model_signature
from squareq_fx.slab.reader import Slab

__all__ = ["WeightValues", "check_same_model", "check_same_weights"]

_SAMPLED_ROWS = 3


class WeightValues:
    """Finds the value of every weight key.

    A quantised layer's tensors are the slab's. Anything else is the model's own tensor if it holds data (the slab's bytes are
    used where they are the same), else the slab's passthrough tensor. Nothing is ever filled in.
    """

    def __init__(self, model: nn.Module, slab: Slab, constants: Mapping[str, torch.Tensor]) -> None:
        self._slab = slab
        self._constants = constants
        self._quantised = {key for layer in slab.layers.values() for key in layer.keys}
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        self._own = {k: t.detach() for k, t in own.items() if t.device.type != "meta"}
        self._in_slab: dict[tuple[str, torch.dtype], bool] = {}

    def source(self, key: str, dtype: torch.dtype) -> int | torch.Tensor:
        """An offset into the slab's data, or a CPU tensor of `dtype`.

        Raises:
            SlabError: the weight is nowhere.
        """
        stored = self._stored(key)
        if stored is not None and self._use_slab(key, stored, dtype):
            return self._slab.tensors[stored].offset
        return self.tensor(key, dtype)

    def tensor(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a CPU tensor of `dtype`; shares the slab's or the model's memory where it can.

        Raises:
            SlabError: the weight is nowhere, or its bytes in the slab are damaged.
        """
        if key in self._constants:
            value = self._constants[key]
        elif key in self._own and key not in self._quantised:
            value = self._own[key]
        else:
            stored = self._stored(key)
            if stored is None:
                raise SlabError(self._nowhere([key]))
            value = self._slab.tensor(stored)
        return value.detach().to("cpu", dtype)

    def require(self, keys: Iterable[str]) -> None:
        """Raises SlabError naming every key that has no value."""
        missing = [k for k in keys if k not in self._constants and k not in self._own and self._stored(k) is None]
        if missing:
            raise SlabError(self._nowhere(missing), missing)

    def segment(self, name: str, packed: tuple[Packed, ...]) -> Segment:
        """The flat buffer of one streamed segment, as ranges of the slab where possible."""
        pieces = tuple(Piece(p.offset, p.nbytes, self.source(p.key, p.dtype)) for p in packed)
        return Segment(name, packed[-1].offset + packed[-1].nbytes, pieces)

    def slab_keys(self, packed: Iterable[Packed]) -> tuple[str, ...]:
        """The slab tensors whose bytes a segment is made of; what has to be verified before its first use."""
        found = (self._stored(p.key) for p in packed if p.key not in self._constants)
        return tuple(k for k in found if k is not None)

    def _stored(self, key: str) -> str | None:
        key = self._slab.aliases.get(key, key)
        return key if key in self._quantised or key in self._slab.passthrough else None

    def _use_slab(self, key: str, stored: str, dtype: torch.dtype) -> bool:
        if key in self._constants or self._slab.tensors[stored].dtype != dtype:
            return False  # a layer's bias, which the slab holds in float32, may also be read in the model's own type
        if key in self._quantised:
            return True
        own = self._own.get(key)
        if own is None:
            return True
        if (key, dtype) not in self._in_slab:
            saved = self._slab.tensor(stored)
            same = own.dtype == dtype and own.shape == saved.shape
            self._in_slab[key, dtype] = same and torch.equal(_bits(own.cpu()), _bits(saved))
        return self._in_slab[key, dtype]

    def _nowhere(self, keys: list[str]) -> str:
        return (
            f"{len(keys)} weights have no value: the model holds them on 'meta' and {self._slab.path.name} does not store them "
            f"({', '.join(keys[:3])}). Load the model's weights, or build the slab with passthrough=True."
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_same_model(model: nn.Module, slab: Slab) -> None:
    """The slab was built from this architecture, and holds what the model leaves on `meta`; asked before a long capture.

    Raises:
        SlabError: another model's signature, or weights that are nowhere.
    """
    signature = model_signature(model)
    if signature != slab.signature:
        raise SlabError(
            f"{slab.path} was built from another model: its signature is {slab.signature}, that of {type(model).__name__} is "
            f"{signature}. Build a slab from this model with squareq_fx.build_slab."
        )
    if slab.passthrough:
        return
    quantised = {f"{name}.{leaf}" for name in slab.layers for leaf in ("weight", "bias")}
    missing = [k for k, p in model.named_parameters() if p.device.type == "meta" and k not in quantised]
    if missing:
        raise SlabError(
            f"the model holds {len(missing)} weights on 'meta' and {slab.path.name} stores none but the quantised ones. Load "
            "the model's weights, or build the slab with passthrough=True.",
            missing,
        )


def check_same_weights(model: nn.Module, slab: Slab) -> None:
    """A few rows of every layer the model holds are what the slab says, within one quantisation step.

    The signature only covers names and shapes; this tells a fine-tuned model from the one the slab was built from.

    Raises:
        SlabError: naming the layers that differ.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    different = []
    for name, layer in slab.layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear) or module.weight.device.type == "meta" or not layer.orig_shape[0]:
            continue
        rows = torch.linspace(0, layer.orig_shape[0] - 1, _SAMPLED_ROWS).long().unique()
        own = module.weight.detach()[rows.to(module.weight.device)].float().cpu()
        keys = (layer.qweight_key, layer.scale_key, layer.zero_point_key)
        q, scale, zero = (slab.tensor(key, verify=False)[rows] for key in keys)
        stored = dequantize(q, scale, zero, layer.orig_shape[1])
        if not bool(((own - stored).abs() <= scale[:, None] * 1.001).all()):
            different.append(name)
    if different:
        raise SlabError(
            f"{slab.path} was built from other weights than the model now holds ({len(different)} of {len(slab.layers)} layers "
            "differ by more than one quantisation step); build a new slab, or pass the model on 'meta' to use the slab's",
            different,
        )
