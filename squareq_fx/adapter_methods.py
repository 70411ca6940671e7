"""Adapters of a compiled module, in the words of diffusers' `PeftAdapterMixin`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from squareq_fx.adapters import Adapter
from squareq_fx.adapters.bank import AdapterBank
from squareq_fx.adapters.files import read_adapter, write_adapter
from squareq_fx.errors import RuntimeStateError
from squareq_fx.lora import Lora

__all__ = ["AdapterMethods"]


class AdapterMethods:
    """None of these captures or compiles anything again."""

    _bank: AdapterBank | None
    _component: str
    _linear_sizes: Callable[[], dict[str, tuple[int, int]]]  # (out, in) of every Linear layer of the model, by path

    @property
    def _adapters(self) -> AdapterBank:
        if self._bank is None:
            raise RuntimeStateError("this module was compiled without adapters; compile it with lora=squareq_fx.Lora(...)")
        return self._bank

    def add_adapter(self, lora: Lora, adapter_name: str = "default") -> None:
        """A new adapter on some of the layers the module was compiled for; it becomes the only active one.

        Raises:
            RuntimeStateError: the name is taken, or the module has no adapted layers.
            PassError: a target matches none of the adapted layers.
        """
        self._adapters.create(adapter_name, lora)

    def load_lora_adapter(
        self,
        source: str | os.PathLike[str] | Mapping[str, torch.Tensor] | Adapter,
        adapter_name: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> str:
        """An adapter from a diffusers, PEFT or Kohya file, a state dict, or its values; it becomes the only active one.

        Args:
            adapter_name: default: the first free `default_<n>`.
            config: of a state dict: PEFT's `LoraConfig` as a dict; without it alpha = rank.

        Returns:
            its name.

        Raises:
            AdapterError: the file is not an adapter of this model.
            RuntimeStateError: the name is taken, or a layer has no branch in the compiled module.
        """
        bank = self._adapters
        free = (f"default_{i}" for i in itertools.count(len(bank.names)))
        name = adapter_name or next(n for n in free if n not in bank.names)
        bank.load(name, source if isinstance(source, Adapter) else read_adapter(source, self._linear_sizes(), config=config))
        return name

    def save_lora_adapter(
        self, save_directory: str | os.PathLike[str], adapter_name: str = "default", *, format: str = "diffusers"
    ) -> Path:
        """Write one adapter, atomically, as "diffusers", "peft" or "kohya"; returns the path of the file or directory.

        Raises:
            RuntimeStateError: there is no adapter of that name.
            AdapterError: an unknown format.
        """
        return write_adapter(
            self.get_adapter(adapter_name),
            save_directory,
            format,  # type: ignore[arg-type]
            self._component,  # type: ignore[arg-type]
            layers=self._linear_sizes(),
        )

    def get_adapter(self, adapter_name: str = "default") -> Adapter:
        """An adapter's values, copies on the CPU. Raises RuntimeStateError if there is none of that name."""
        return self._adapters.extract(adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Which adapters count, side by side, each with a factor; only these train.

        Raises:
            RuntimeStateError: there is none of a name, or names and weights are of different number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        factors = [weights] * len(names) if isinstance(weights, int | float) else weights
        self._adapters.activate(names, factors)

    def active_adapters(self) -> list[str]:
        return list(self._adapters.active)

    def reset_adapter(self, adapter_name: str = "default") -> None:
        """Start an adapter anew: A random, B zero."""
        self._adapters.reset(adapter_name)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Raises RuntimeStateError if there is none of a name; then nothing is deleted."""
        self._adapters.delete([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def disable_lora(self) -> None:
        """Compute as the base model does until `enable_lora`."""
        self._adapters.enabled = False

    def enable_lora(self) -> None:
        self._adapters.enabled = True
