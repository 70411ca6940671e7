"""The layers of a model that a name in a Kohya file means.

A name is a path with underscores for dots, in one of three languages: diffusers' own (`down_blocks_1_attentions_0_...`), the
original UNet's (`input_blocks_4_1_...`, as sd-scripts trains SDXL), or Black Forest Labs' (`double_blocks_0_img_attn_qkv`,
where one name is up to four of diffusers' layers). Underscores are never turned back into dots by rule: a name
counts if a layer of the model at hand, or a translation by diffusers' own converters, gives it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

__all__ = ["Names", "Slot", "bfl_names", "diffusers_reads", "is_flux_shaped", "ldm_layer"]


@dataclass(frozen=True)
class Slot:
    """One of the layers a name stands for; their rows follow one another in its B.

    Args:
        layer: path in the model.
        swapped: the halves of B change places (shift and scale of a modulation).
        loaded: diffusers gives its translation the prefix without which its own pipeline passes a layer over.
    """

    layer: str
    swapped: bool = False
    loaded: bool = True


@dataclass(frozen=True)
class Names:
    """What the names of Kohya files mean in the model with these Linear layers."""

    layers: Mapping[str, tuple[int, int]]
    by_underscores: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, tuple[str, ...]] = {}
        for layer in self.layers:
            name = layer.replace(".", "_")
            found[name] = (*found.get(name, ()), layer)
        object.__setattr__(self, "by_underscores", found)

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The layers of `name` (without `lora_unet_`) in the order of their rows; none if the model has not got them all.

        Two layers whose paths differ only in dots and underscores cannot be told apart: then there are none either.
        """
        layer = self._layer(name)
        if layer is not None:
            return (Slot(layer),)
        if re.match(r"(input|output)_blocks_\d|middle_block_|time_embed_|label_emb_", name):
            layer = self._layer(ldm_layer(name, self._layers_per_block()) or "")
            return () if layer is None else (Slot(layer),)
        slots = bfl_names().get(name, ())
        return slots if all(slot.layer in self.layers for slot in slots) else ()

    def _layer(self, name: str) -> str | None:
        found = self.by_underscores.get(name.replace(".", "_"), ())
        return found[0] if len(found) == 1 else None

    def _layers_per_block(self) -> int:
        """Of a UNet, read off its first block's resnets; 0 if the model is none."""
        return len({m[1] for layer in self.layers if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", layer))})


def ldm_layer(name: str, layers_per_block: int) -> str | None:
    """The name of an original UNet's layer in diffusers' UNet, by diffusers' converters; None where they have no answer."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    key = f"lora_unet_{name}.lora_down.weight"
    if layers_per_block:
        try:
            # One key at a time: "input_blocks_1" would also take the keys of "input_blocks_10".
            (key,) = _maybe_map_sgm_blocks_to_diffusers({key: None}, SimpleNamespace(layers_per_block=layers_per_block))
        except (ValueError, IndexError):
            return None
    (key,) = convert_unet_state_dict_to_peft({_convert_unet_lora_key(key): None})
    return key.removesuffix(".lora_A.weight")


def diffusers_reads(name: str, layer: str) -> bool:
    """Whether diffusers' UNet loader takes `name` (without `lora_unet_`) to be `layer`."""
    return ldm_layer(name, 0) == layer


_DOUBLE = tuple(
    f"{stream}_{part}" for stream in ("img", "txt") for part in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
)
_SINGLE = ("linear1", "linear2", "modulation_lin")
_OUTSIDE = (
    *("img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1"),
    *(f"{module}_in_{part}_layer" for module in ("time", "vector", "guidance") for part in ("in", "out")),
)


@functools.cache
def bfl_names() -> Mapping[str, tuple[Slot, ...]]:
    """Flux's layers by Black Forest Labs' names, read off diffusers' converter, so that the table is not kept twice.

    The converter gets weights that say where they come from: A holds the number of the name, B the numbers of its rows. From
    what comes out, each of diffusers' layers gives away its name and its rows.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    names = [
        *(f"double_blocks_{i}_{part}" for i in range(19) for part in _DOUBLE),
        *(f"single_blocks_{i}_{part}" for i in range(38) for part in _SINGLE),
        *_OUTSIDE,
    ]
    probe = {}
    for number, name in enumerate(names):
        rows = 3 * 3072 + 12288 if name.endswith("linear1") else 6
        probe[f"lora_unet_{name}.lora_down.weight"] = torch.tensor([[float(number)]])
        probe[f"lora_unet_{name}.lora_up.weight"] = torch.arange(float(rows))[:, None]
    converted = _convert_kohya_flux_lora_to_diffusers(probe)
    found: dict[str, dict[float, Slot]] = {name: {} for name in names}
    for key, value in converted.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            rows_of = converted[f"{layer}.lora_B.weight"]
            slot = Slot(layer.removeprefix("transformer."), bool(rows_of[0] > rows_of[-1]), layer.startswith("transformer."))
            found[names[int(value)]][float(rows_of.min())] = slot
    return {name: tuple(slots[row] for row in sorted(slots)) for name, slots in found.items()}


def is_flux_shaped(layers: Iterable[str]) -> bool:
    """Whether every layer in a block has a name by Black Forest Labs, as in Flux.1 and Chroma."""
    layers = set(layers)
    double = {layer for layer in layers if layer.startswith("transformer_blocks.")}
    single = {layer for layer in layers if layer.startswith("single_transformer_blocks.")}
    if not double or not single or not {"x_embedder", "context_embedder"} <= layers:
        return False
    return double | single <= {slot.layer for slots in bfl_names().values() for slot in slots}
