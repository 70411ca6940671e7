"""The adapters of a compiled module: their float32 masters as parameters, and which of them count.

Changing any of it changes tensors only; the graph takes matrices of whatever rank they come to.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from squareq_fx.adapters.packing import Branch, Part, Slot, pack
from squareq_fx.adapters.state import Adapter, LayerAdapter
from squareq_fx.errors import RuntimeStateError
from squareq_fx.lora import Lora

__all__ = ["AdapterBank"]


@dataclass(frozen=True)
class _Masters:
    """A layer's pair. The modules are asked for their parameter each time: `load_state_dict(assign=True)` replaces it."""

    down_owner: nn.Module
    up_owner: nn.Module
    alpha: float

    @property
    def down(self) -> nn.Parameter:
        return self.down_owner.weight  # type: ignore[return-value]

    @property
    def up(self) -> nn.Parameter:
        return self.up_owner.weight  # type: ignore[return-value]

    @property
    def scaling(self) -> float:
        return self.alpha / self.down.shape[0]


class AdapterBank:
    """Named adapters on the layers a graph was compiled for.

    Args:
        slots: the graph's adapted layers, in its order.
        device: where the masters live.
        attach, detach: put a module under a path of the compiled one, and take it away.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        device: torch.device,
        attach: Callable[[str, nn.Module], None],
        detach: Callable[[str], None],
    ) -> None:
        self.slots = {slot.layer: slot for slot in slots}
        self.weights: dict[str, float] = {}
        self.enabled = True
        self._device = device
        self._attach, self._detach = attach, detach
        self._adapters: dict[str, dict[str, _Masters]] = {}
        self._packed: tuple[object, list[torch.Tensor]] | None = None
        self._branches: tuple[object, list[nn.Parameter], list[Branch]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that count now."""
        return tuple(self.weights) if self.enabled else ()

    def create(self, name: str, lora: Lora) -> None:
        """A new adapter: A Kaiming-uniform, B zero, as PEFT does; it becomes the only active one.

        Raises:
            RuntimeStateError: the name is taken or cannot be part of a parameter's.
            PassError: a target matches none of the layers the graph was compiled for.
        """
        self._check_new(name)
        values = {}
        for layer, entry in lora.layers(self.slots).items():
            slot = self.slots[layer]
            down = torch.empty(entry.rank, slot.in_features, device=self._device)
            up = torch.zeros(slot.out_features, entry.rank, device=self._device)
            values[layer] = LayerAdapter(_initial(down), up, entry.alpha)
        self._add(name, values)

    def load(self, name: str, adapter: Adapter) -> None:
        """An adapter from its values; it becomes the only active one.

        Raises:
            RuntimeStateError: the name is taken, the graph has no branch at one of its layers, or a shape does not fit.
        """
        self._check_new(name)
        problems = []
        for layer, value in adapter.layers.items():
            slot = self.slots.get(layer)
            if slot is None:
                near = difflib.get_close_matches(layer, self.slots, n=2)
                problems.append(f"{layer}: no branch was compiled there{f' (near: {near[0]})' if near else ''}")
            elif (value.up.shape[0], value.down.shape[1]) != (slot.out_features, slot.in_features):
                found = f"[{value.up.shape[0]}, {value.down.shape[1]}]"
                wanted = f"[{slot.out_features}, {slot.in_features}]"
                problems.append(f"{layer}: the adapter is for {found}, the layer is {wanted}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RuntimeStateError(
                f"adapter {name!r} does not fit the compiled module: {'; '.join(problems[:5])}{more}. Compile with lora "
                'targets that cover its layers ("attention", "attention+ff" or "all").'
            )
        self._add(name, {layer: adapter.layers[layer] for layer in self.slots if layer in adapter.layers})

    def extract(self, name: str) -> Adapter:
        """An adapter's values, detached copies on the CPU.

        Raises:
            RuntimeStateError: there is none of that name.
        """
        masters = self._named(name)
        return Adapter(
            {
                layer: LayerAdapter(m.down.detach().cpu().clone(), m.up.detach().cpu().clone(), m.alpha)
                for layer, m in masters.items()
            }
        )

    def reset(self, name: str) -> None:
        """Start an adapter anew: A random, B zero."""
        with torch.no_grad():
            for m in self._named(name).values():
                _initial(m.down)
                m.up.zero_()

    def delete(self, names: Iterable[str]) -> None:
        """Raises RuntimeStateError if there is none of a name; then nothing is deleted."""
        names = tuple(names)
        for name in names:
            self._named(name)
        for name in names:
            for layer in self._adapters.pop(name):
                self._detach(f"{layer}.lora_A.{name}")
                self._detach(f"{layer}.lora_B.{name}")
            self.weights.pop(name, None)
        self._packed = self._branches = None

    def activate(self, names: Sequence[str], weights: Sequence[float | None] | None) -> None:
        """Which adapters count, each with a factor on its branch; only their parameters train."""
        factors = [1.0] * len(names) if weights is None else [1.0 if w is None else float(w) for w in weights]
        if len(factors) != len(names):
            raise RuntimeStateError(f"{len(names)} adapters are named, {len(factors)} weights given")
        for name, factor in zip(names, factors):
            self._named(name)
            if not math.isfinite(factor):
                raise RuntimeStateError(f"the weight of adapter {name!r} is {factor}")
        self.weights = dict(zip(names, factors))
        for name, masters in self._adapters.items():
            for m in masters.values():
                m.down.requires_grad_(name in self.weights)
                m.up.requires_grad_(name in self.weights)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The masters of the active adapters by their names in the module."""
        return {
            f"{layer}.{side}.{name}.weight": value
            for name in self.active
            for layer, m in self._adapters[name].items()
            for side, value in (("lora_A", m.down), ("lora_B", m.up))
        }

    def branches(self, values: Mapping[str, torch.Tensor] | None = None) -> list[Branch]:
        """What every slot holds now.

        Args:
            values: to compute with instead of the masters, by the names `parameters` gives.
        """
        if values is not None:
            return [Branch(slot, tuple(self._parts(slot.layer, values))) for slot in self.slots.values()]
        # A step of SDXL asks for five hundred of them, nearly always the ones of the step before.
        masters = [m for name in self.active for m in self._adapters[name].values()]
        parameters = [parameter for m in masters for parameter in (m.down, m.up)]
        state = (tuple(self.weights.items()), self.enabled, [(id(p), p.shape) for p in parameters])
        if self._branches is None or self._branches[0] != state:  # the ids are those of tensors that are kept, so nobody else's
            self._branches = state, parameters, self.branches(self.parameters())
        return self._branches[2]

    def part_names(self) -> list[tuple[str, str]]:
        """The names of A and B of every part of every branch, in order."""
        return [
            (f"{layer}.lora_A.{name}.weight", f"{layer}.lora_B.{name}.weight")
            for layer in self.slots
            for name in self.active
            if layer in self._adapters[name]
        ]

    def packed(self, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """The graph's adapter inputs for what `branches()` gave.

        Frozen adapters are packed once. Those that train are packed at every call, and end what was kept: fused optimizers
        write to parameters without a trace in their version counters.
        """
        masters = [tensor for branch in branches for part in branch.parts for tensor in (part.down, part.up)]
        if any(tensor.requires_grad for tensor in masters):
            self._packed = None
            return pack(branches, self._device)
        state = (tuple(self.weights.items()), self.enabled, tuple((id(tensor), tensor._version) for tensor in masters))
        if self._packed is None or self._packed[0] != state:
            with torch.inference_mode(False):  # it may serve later calls outside that mode
                self._packed = state, pack(branches, self._device)
        return self._packed[1]

    def _parts(self, layer: str, values: Mapping[str, torch.Tensor]) -> Iterable[Part]:
        for name in self.active:
            masters = self._adapters[name].get(layer)
            if masters is not None:
                down, up = (values[f"{layer}.{side}.{name}.weight"] for side in ("lora_A", "lora_B"))
                yield Part(down, up, masters.scaling * self.weights[name])

    def _add(self, name: str, values: Mapping[str, LayerAdapter]) -> None:
        masters = {}
        for layer, value in values.items():
            owners = []
            for side, tensor in (("lora_A", value.down), ("lora_B", value.up)):
                owner = nn.Module()
                owner.register_parameter("weight", nn.Parameter(tensor.detach().to(self._device, torch.float32, copy=True)))
                self._attach(f"{layer}.{side}.{name}", owner)
                owners.append(owner)
            masters[layer] = _Masters(owners[0], owners[1], value.alpha)
        self._adapters[name] = masters
        self.activate([name], None)

    def _check_new(self, name: str) -> None:
        if not name or "." in name:
            raise RuntimeStateError(f"an adapter cannot be called {name!r}; its name becomes part of parameter names")
        if name in self._adapters:
            raise RuntimeStateError(f"there is an adapter {name!r} already; delete it first or choose another name")

    def _named(self, name: str) -> dict[str, _Masters]:
        if name not in self._adapters:
            raise RuntimeStateError(f"there is no adapter {name!r}; there are {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]


def _initial(down: torch.Tensor) -> torch.Tensor:
    return nn.init.kaiming_uniform_(down, a=math.sqrt(5))
