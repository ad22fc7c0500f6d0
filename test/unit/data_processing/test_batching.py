"""Batches: each example once per epoch, however steps are divided; padding; prefetching."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from data_processing.batching import Collator, LossDenominators, TrainingPlan, bucketed_length, prefetch
from data_processing.features import Features

LENGTHS = np.array([3, 9, 4, 12, 2, 7, 5, 5, 11, 6, 2, 10, 8, 3, 4, 6, 9])
LONGEST = Collator(to_maximum=False, max_seq_length=12)
MAXIMUM = Collator(to_maximum=True, max_seq_length=12)


@pytest.fixture
def features() -> Features:
    """Examples of LENGTHS tokens; token k of example i is 100·i + k + 1, the first third is segment 0."""
    tokens = np.concatenate([100 * i + np.arange(1, length + 1) for i, length in enumerate(LENGTHS)])
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return Features(tokens.astype(np.int32), offsets, LENGTHS // 3 + 1, np.arange(len(LENGTHS)) % 3)


def plan(**changes) -> TrainingPlan:
    return TrainingPlan(**{"lengths": LENGTHS, "batch_size": 5, "collator": LONGEST, "seed": 42, **changes})


def epoch(number: int = 0, **changes) -> list[list[int]]:
    """The example numbers of each step of an epoch, in order."""
    return [np.concatenate(step.micro_batches).tolist() for step in plan(**changes).epoch(number)]


@pytest.mark.parametrize("batch_size", [1, 5, 16, 17, 18, 100])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_has_every_example_once(batch_size, group_by_length):
    """The original drops the last partial batch."""
    for number in range(3):
        steps = epoch(number, batch_size=batch_size, group_by_length=group_by_length)
        assert sorted(itertools.chain(*steps)) == list(range(len(LENGTHS)))
        assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
        assert len(steps) == plan(batch_size=batch_size).steps_per_epoch


@pytest.mark.parametrize("group_by_length", [False, True])
def test_the_order_depends_on_seed_and_epoch_alone(group_by_length):
    """Trap 6."""
    orders = [epoch(number, group_by_length=group_by_length) for number in range(4)]
    assert orders == [epoch(number, group_by_length=group_by_length) for number in range(4)]
    assert len({str(order) for order in orders}) == 4
    others = [epoch(number, seed=43, group_by_length=group_by_length) for number in range(4)]
    assert all(a != b for a, b in zip(orders, others, strict=True))
    assert epoch(1, seed=42) != epoch(0, seed=43)  # seed and epoch are not just added


@pytest.mark.parametrize("padding", [LONGEST, MAXIMUM], ids=["longest", "max_length"])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (3, 1), (2, 2), (8, 1), (3, 4)])
def test_processes_and_micro_batches_divide_each_step(world_size, accumulation, padding):
    """A step has the same examples, each once, and the same denominators however it is divided."""
    whole = list(plan(collator=padding).epoch(1))
    cut = {"world_size": world_size, "accumulation": accumulation, "collator": padding}
    ranks = [list(plan(rank=rank, **cut).epoch(1)) for rank in range(world_size)]
    for number, step in enumerate(whole):
        parts = [part for rank in ranks for part in rank[number].micro_batches]
        assert len(parts) == world_size * accumulation
        assert all(len(rank[number].micro_batches) == accumulation for rank in ranks)
        assert sorted(np.concatenate(parts).tolist()) == sorted(step.micro_batches[0].tolist())
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert {rank[number].denominators for rank in ranks} == {step.denominators}


def test_denominators_count_real_tokens_or_all_positions():
    """N = Σ n_i, P = Σ n_i²; padded to the maximum B·L and B·L²."""
    lengths = np.array([2, 5, 12])
    assert LONGEST.denominators(lengths) == LossDenominators(3, 19, 4 + 25 + 144)
    assert MAXIMUM.denominators(lengths) == LossDenominators(3, 36, 3 * 144)
    short = list(plan().epoch(0))[-1]
    assert short.denominators == LONGEST.denominators(LENGTHS[short.micro_batches[0]])
    assert short.denominators.examples == 2


def test_grouping_by_length_reduces_padding():
    lengths = np.random.default_rng(0).integers(2, 60, size=4000)
    positions = {}
    for grouped in (False, True):
        steps = plan(lengths=lengths, batch_size=32, group_by_length=grouped).epoch(0)
        positions[grouped] = sum(len(s.micro_batches[0]) * lengths[s.micro_batches[0]].max() for s in steps)
    assert positions[True] < 1.1 * lengths.sum() < positions[False]
    first = [
        lengths[s.micro_batches[0]].max() for s in plan(lengths=lengths, batch_size=32, group_by_length=True).epoch(0)
    ]
    assert first != sorted(first)  # the short ones are not all first


@pytest.mark.parametrize("padding", [LONGEST, MAXIMUM], ids=["longest", "max_length"])
@pytest.mark.parametrize("chosen", [[0], [4, 10], [3, 0, 16, 8], list(range(17))], ids=str)
def test_collated_batches_equal_a_plain_loop(features, padding, chosen):
    padding = Collator(padding.to_maximum, padding.max_seq_length, pad_token_id=99)
    batch = padding.collate(features, np.array(chosen))
    width = 12 if padding.to_maximum else max(LENGTHS[i] for i in chosen)
    assert all(tensor.dtype == torch.int64 for tensor in batch[:5])
    assert batch[5:] == (None, None)
    assert batch.input_ids.shape == batch.token_type_ids.shape == batch.attention_mask.shape == (len(chosen), width)
    for row, i in enumerate(chosen):
        for k in range(width):
            real = k < LENGTHS[i]
            assert batch.input_ids[row, k] == (100 * i + k + 1 if real else 99)
            assert batch.attention_mask[row, k] == int(real)
            assert batch.token_type_ids[row, k] == int(real and k >= LENGTHS[i] // 3 + 1)
        assert batch.labels[row] == i % 3


def test_bucketed_lengths_are_an_eighth_longer_at_most():
    lengths = range(1, 513)
    padded = [bucketed_length(length) for length in lengths]
    assert padded[:16] == list(range(1, 17))
    assert all(length <= padded_length <= 1.125 * length for length, padded_length in zip(lengths, padded, strict=True))
    assert padded == sorted(padded)
    assert len(set(padded)) == 16 + 5 * 8  # to 16, 32, 64, 128, 256, 512


@pytest.mark.parametrize(("longest", "width"), [(2, 2), (17, 18), (33, 36), (37, 37)])
def test_bucketed_lengths_do_not_exceed_the_maximum(longest, width):
    lengths = np.array([1, longest])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, starts[-1] + 1, dtype=np.uint16)
    texts = Features(tokens, starts, lengths, np.zeros(2, dtype=np.int64))
    few, plain = (Collator(False, 37, 99, bucketed_lengths=few).collate(texts, np.arange(2)) for few in (True, False))
    assert few.input_ids.shape == (2, width)
    for padded, unpadded, added in zip(few.inputs, plain.inputs, (99, 0, 0), strict=True):
        assert torch.equal(padded[:, :longest], unpadded)
        assert (padded[:, longest:] == added).all()


@pytest.mark.parametrize("padding", [LONGEST, MAXIMUM], ids=["longest", "max_length"])
def test_a_batch_may_be_empty(features, padding):
    """A process without examples takes part in a short last batch."""
    batch = padding.collate(features, np.array([], dtype=np.int64))
    assert batch.labels.shape == (0,)
    assert batch.input_ids.shape[0] == 0
    assert batch.input_ids.shape[1] >= 1


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetched_results_are_in_order(workers):
    def slow_square(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number**2

    assert list(prefetch(slow_square, range(20), workers)) == [n**2 for n in range(20)]
    assert list(prefetch(slow_square, [], workers)) == []


@pytest.mark.parametrize(("workers", "most"), [(0, 0), (1, 2), (3, 6)])
def test_workers_prefetch_two_items_each(workers, most):
    """Trap 12: in the original --workers was read and not used."""
    taken, threads = [], set()

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def note(number: int) -> int:
        threads.add(threading.current_thread())
        return number

    iterator = prefetch(note, items(), workers)
    for done in range(5):
        assert next(iterator) == done
        assert done + 1 <= len(taken) <= done + 1 + most
    iterator.close()
    assert (threading.main_thread() in threads) == (workers == 0)
    assert len(threads) <= max(workers, 1)
    if workers:
        assert len(taken) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_raised_after_the_results_before_it(workers):
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise KeyError("three")
        return number

    iterator = prefetch(fail_at_three, range(10), workers)
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(iterator)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_closing_the_iterator_ends_the_threads():
    iterator = prefetch(lambda number: number, range(1000), 2)
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
