"""Seconds by part: nested parts, iterators, synchronization. Bounds come from the clock, whatever the load."""

import time

import pytest

from distillation.runtime.timings import Timings


def test_a_nested_part_does_not_count_for_the_outer_one():
    timings, begin = Timings(), time.perf_counter()
    with timings.part("outer"):
        with timings.part("inner"):
            time.sleep(0.05)
        time.sleep(0.01)
    elapsed = time.perf_counter() - begin
    assert timings.seconds["inner"] >= 0.05
    assert 0.01 <= timings.seconds["outer"] <= elapsed - 0.05
    assert sum(timings.seconds.values()) <= elapsed


def test_a_part_that_raises_is_closed():
    timings, begin = Timings(), time.perf_counter()
    with pytest.raises(KeyError), timings.part("one"):
        raise KeyError
    elapsed = time.perf_counter() - begin
    with timings.part("two"):
        time.sleep(0.01)
    assert timings.seconds["one"] <= elapsed
    assert timings.seconds["two"] >= 0.01


def test_an_iterator_counts_only_the_time_until_its_items():
    def slow_items():
        for number in range(2):
            time.sleep(0.01)
            yield number

    timings, begin = Timings(), time.perf_counter()
    for _ in timings.iterate("data", slow_items()):
        time.sleep(0.05)
    assert 0.02 <= timings.seconds["data"] <= time.perf_counter() - begin - 2 * 0.05


def test_a_device_is_synchronized_at_both_ends_of_a_part():
    calls = []
    timings = Timings(lambda: calls.append(dict(timings.seconds)))
    with timings.part("teacher"):
        assert len(calls) == 1
    assert len(calls) == 2
