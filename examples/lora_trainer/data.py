"""The order of the batches: shuffled by epoch, one resolution a batch, and a position from which a run can go on."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset

from lora_trainer.cache import Entry
from squareq_fx.errors import SquareQError

__all__ = ["Batches", "plan_epoch"]


def plan_epoch(buckets: Sequence[Any], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as indices: every sample once, each batch of one bucket, all shuffled.

    The last batch of a bucket may be smaller. The same arguments give the same plan, and every epoch has as many batches.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(xxhash.xxh64_digest(f"{seed} {epoch}".encode())[:7], "big"))
    members: dict[Any, list[int]] = collections.defaultdict(list)
    for index in torch.randperm(len(buckets), generator=generator).tolist():
        members[buckets[index]].append(index)
    batches = [group[i : i + batch_size] for group in members.values() for i in range(0, len(group), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class Batches:
    """An endless iterator over batches of cached samples, with a state for checkpoints.

    A batch is a dict of the samples' tensors, stacked. What worker processes read ahead does not count as used.

    Args:
        samples: entries with a bucket.
        batch_size: at most so many samples a batch.
        workers: processes that read files; 0 reads in this one.
    """

    def __init__(self, samples: Sequence[Entry], *, batch_size: int, seed: int, workers: int = 0) -> None:
        self._buckets = [entry.bucket for entry in samples]
        self._batch_size, self._seed, self._workers = batch_size, seed, workers
        self._dataset = _Samples(samples)
        self._used = 0
        self._fingerprint = xxhash.xxh3_128_hexdigest(
            repr([batch_size, seed, *((entry.path.name, entry.source) for entry in samples)]).encode()
        )

    @property
    def epoch(self) -> float:
        """Epochs used so far, with the fraction of the current one."""
        return self._used / len(plan_epoch(self._buckets, self._batch_size, self._seed, 0))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._plan(self._used),
            num_workers=self._workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # without one, every start draws from the random numbers of the training
        )
        for batch in loader:
            self._used += 1
            yield batch

    def _plan(self, used: int) -> Iterator[list[int]]:
        per_epoch = len(plan_epoch(self._buckets, self._batch_size, self._seed, 0))
        epoch, position = divmod(used, per_epoch)
        yield from plan_epoch(self._buckets, self._batch_size, self._seed, epoch)[position:]
        for later in itertools.count(epoch + 1):
            yield from plan_epoch(self._buckets, self._batch_size, self._seed, later)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"used": self._used, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch used; takes effect in the next `iter`.

        Raises:
            SquareQError: it was a position in other data.
        """
        if state["fingerprint"] != self._fingerprint:
            raise SquareQError("the cache, the batch size or the seed is not that of the run to be resumed; begin a new run")
        self._used = state["used"]


class _Samples(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, samples: Sequence[Entry]) -> None:
        self._paths = [entry.path for entry in samples]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(self._paths[index])

    def __len__(self) -> int:
        return len(self._paths)


def _stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
