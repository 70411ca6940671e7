"""collector: off inside `paused`, on inside `resumed`, and as it was afterwards, whatever happens."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from squareq_fx.collector import paused, resumed


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


def test_it_is_off_and_on_again() -> None:
    with paused():
        assert not gc.isenabled()
        with resumed():
            assert gc.isenabled()
        assert not gc.isenabled()
        with paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner one found it off"
    assert gc.isenabled()


def test_it_is_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), paused(), resumed():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with paused(), resumed():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_resumed_alone_does_nothing() -> None:
    with resumed():
        assert gc.isenabled()
    assert gc.isenabled()
