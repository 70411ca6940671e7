"""Shared test set-up: one thread count, a derandomised hypothesis profile, GPU tests skipped without CUDA."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests that mean the cache of compiled graphs give it a folder.
os.environ["SQUAREQ_CACHE"] = "0"

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> Iterator[None]:
    """What modules prepared and share is not looked through again by every collection: in the end each took three seconds."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    """Inductor on one thread, without finding out about vector instructions, with a cache of the module's own."""
    from models import scratch
    from torch._inductor import config

    known = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch("inductor"))
    with config.patch({"cpp.simdlen": 1, "compile_threads": 1}):
        yield
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    if known is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = known
