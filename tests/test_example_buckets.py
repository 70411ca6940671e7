"""The trainer's aspect-ratio buckets, and the order of its batches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import example_pipelines  # noqa: F401  puts the examples on the path
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_trainer.buckets import crop_to, make_buckets, nearest_bucket
from lora_trainer.cache import Entry
from lora_trainer.data import Batches, plan_epoch

from squareq_fx.errors import SquareQError

SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
STEPS = st.sampled_from([8, 16, 32, 64])
MAKE = {"steps": STEPS, "sides": st.integers(1, 20), "max_aspect": st.floats(1, 4)}


@given(**MAKE)
def test_buckets_are_as_large_as_they_may_be(steps: int, sides: int, max_aspect: float) -> None:
    resolution = steps * sides
    buckets = make_buckets(resolution, steps, max_aspect)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
    assert buckets == sorted(buckets, key=lambda size: size[0] / size[1])
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % steps == height % steps == 0
        assert max(width, height) <= max_aspect * min(width, height)
        assert width * height <= resolution**2 < min(width, height) * (max(width, height) + steps)


def test_the_buckets_of_sdxl() -> None:
    buckets = make_buckets(1024)
    assert {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (768, 1344), (1344, 768)} <= set(buckets)


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(100, 64, 2), (0, 64, 2), (64, 0, 2), (-64, 64, 2), (64, 64, 0.5)])
def test_buckets_that_cannot_be(resolution: int, step: int, aspect: float) -> None:
    with pytest.raises(SquareQError, match="must be a multiple|largest aspect ratio"):
        make_buckets(resolution, step, aspect)


@given(size=SIZES, **MAKE)
def test_the_nearest_bucket(size: tuple[int, int], steps: int, sides: int, max_aspect: float) -> None:
    buckets = make_buckets(steps * sides, steps, max_aspect)
    bucket = nearest_bucket(size, buckets)

    def distance(other: tuple[int, int]) -> float:
        return abs(math.log(other[0] / other[1] * size[1] / size[0]))

    assert bucket in buckets
    assert distance(bucket) <= min(map(distance, buckets)) + 1e-12
    assert all(nearest_bucket(other, buckets) == other for other in buckets)


@given(size=SIZES, **MAKE)
def test_a_crop_lies_within_and_loses_nothing_it_need_not(size: Any, steps: int, sides: int, max_aspect: float) -> None:
    bucket = nearest_bucket(size, make_buckets(steps * sides, steps, max_aspect))
    crop = crop_to(size, bucket)
    for resized, side, offset in zip(crop.resized, bucket, (crop.left, crop.top)):
        assert 0 <= offset <= resized - side
        assert abs(resized - side - 2 * offset) <= 1
    assert crop.resized[0] == bucket[0] or crop.resized[1] == bucket[1]
    scale = max(to / side for to, side in zip(bucket, size))
    assert all(abs(resized - scale * side) <= 0.5 + 1e-6 for resized, side in zip(crop.resized, size))
    assert crop_to(bucket, bucket).resized == bucket


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_sample_once_and_one_bucket_a_batch(buckets: list[int], size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(buckets, size, seed, epoch)
    assert sorted(itertools.chain(*plan)) == list(range(len(buckets)))
    assert all(len({buckets[i] for i in batch}) == 1 and len(batch) <= size for batch in plan)
    assert len(plan) == sum(-(-buckets.count(bucket) // size) for bucket in set(buckets))
    assert plan == plan_epoch(buckets, size, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    plans = [plan_epoch([0] * 20, 2, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(plan) for plan in plans}) == 9


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    folder = tmp_path_factory.mktemp("samples")
    entries = []
    for i in range(11):
        bucket = (32, 32) if i % 3 else (16, 64)
        shape = (1, bucket[1] // 2, bucket[0] // 2)
        safetensors.torch.save_file({"latents": torch.full(shape, float(i))}, folder / f"{i}.safetensors")
        entries.append(Entry(folder / f"{i}.safetensors", "flux", "", bucket, str(i), {"latents": shape}))
    return entries


def numbers(batches: Batches, count: int) -> list[list[float]]:
    return [batch["latents"][:, 0, 0, 0].tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_goes_on_where_it_was(samples: list[Entry], workers: int) -> None:
    """Across epochs, and whatever the worker processes have read ahead."""
    whole = numbers(Batches(samples, batch_size=2, seed=1), 20)
    for used in (0, 1, 5, 6, 7, 13):
        first = Batches(samples, batch_size=2, seed=1, workers=workers)
        assert numbers(first, used) == whole[:used]
        state = first.state_dict()
        second = Batches(samples, batch_size=2, seed=1)
        second.load_state_dict(state)
        assert second.epoch == used / 6
        assert numbers(second, 20 - used) == whole[used:]


def test_batches_leave_random_numbers_alone(samples: list[Entry]) -> None:
    before = torch.get_rng_state()
    numbers(Batches(samples, batch_size=3, seed=1), 9)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"seed": 2}, {"samples": slice(1, None)}])
def test_a_position_in_other_data_is_refused(samples: list[Entry], change: dict[str, Any]) -> None:
    state = Batches(samples, batch_size=2, seed=1).state_dict()
    fewer = samples[change.pop("samples", slice(None))]
    other = Batches(fewer, **{"batch_size": 2, "seed": 1, **change})
    with pytest.raises(SquareQError, match="is not that of the run to be resumed"):
        other.load_state_dict(state)


