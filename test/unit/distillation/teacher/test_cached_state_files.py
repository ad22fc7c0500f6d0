"""Files of cached states: values come back to the bit, and the processes of a machine share the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from data_processing.batching import Collator
from data_processing.cache import Cache
from data_processing.features import Features
from distillation.evaluation import Predictor
from distillation.runtime.device import Process
from distillation.runtime.full_precision import Precision
from distillation.teacher.cached_states import CachedStates, load_or_compute_states
from distillation.teacher.query import TeacherQuery
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.heads import TinyBertOutput

CPU = torch.device("cpu")
LENGTHS = np.array([5, 17, 1, 9, 9, 2, 30, 9])


class BitPatterns(torch.nn.Module):
    """A teacher whose states and scores are random bit patterns of a type, the same for the same example.

    computed: the number of each example that it was called for; `numbers` is the first token of each.
    """

    def __init__(self, states: torch.dtype, scores: torch.dtype) -> None:
        super().__init__()
        self.config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        self.types = states, scores
        self.computed: list[int] = []

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor, **wanted: Any) -> TinyBertOutput:
        numbers, length = ids[:, 0].tolist(), ids.shape[1]
        self.computed += numbers
        states = [self.states(numbers, layer, length) for layer in wanted["hidden_layers"]]
        scores = [
            torch.stack([bits(self.types[1], number + 1000, 2, length, length) for number in numbers])
            for _ in wanted["attention_layers"]
        ]
        return TinyBertOutput(None, tuple(scores), tuple(states))

    def states(self, numbers: list[int], layer: int, length: int) -> Tensor:
        return torch.stack([bits(self.types[0], 10 * number + layer, 64, 16)[:length] for number in numbers])


def bits(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    limits, generator = torch.iinfo(integers), torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max, shape, dtype=integers, generator=generator).view(dtype)


def query_of(teacher: Any, folder: Path, process: Process) -> TeacherQuery:
    """The query for examples of LENGTHS, each of which begins with its number."""
    ends = np.cumsum(LENGTHS)
    tokens = np.full(ends[-1], 99, dtype=np.uint16)
    tokens[ends - LENGTHS] = np.arange(8)
    features = Features(tokens, np.concatenate([[0], ends]), LENGTHS.astype(np.int32), np.zeros(8, dtype=np.int64))
    predictor = Predictor(Collator(False, 64), 3, process, Precision())
    return TeacherQuery(teacher, "weights", features, predictor, Cache(folder, 10**9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cached_values_are_equal_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Infinities, NaN and denormals too; padding is 0."""
    teacher = BitPatterns(dtype, torch.bfloat16)
    query = query_of(teacher, tmp_path, Process(CPU))
    found = load_or_compute_states(query, ((0, 2), (1,)))
    assert isinstance(found, CachedStates)
    for examples in ([6], [3, 4, 7], [0, 6, 2, 1], list(range(8)), []):
        batch = found.add_to(query.collator.collate(query.features, np.array(examples, dtype=np.int64)))
        output = found.output(batch.to(CPU), (2, 0), (1,))
        width = max((int(LENGTHS[example]) for example in examples), default=1)
        assert output.hidden_states[0].shape == (len(examples), width, 16)
        assert output.attention_scores[0].shape == (len(examples), 2, width, width)
        assert output.attention_scores[0].dtype == torch.bfloat16
        for row, example in enumerate(examples):
            for state, layer in zip(output.hidden_states, (2, 0), strict=True):
                (expected,) = teacher.states([example], layer, int(LENGTHS[example]))
                assert state.dtype == dtype
                real = state[row, : len(expected)].contiguous()
                assert real.view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
                assert not state[row, len(expected) :].any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scores", lambda values: np.roll(values, 1)),
        ("hidden", lambda values: np.where(np.arange(len(values)) == len(values) - 1, np.float32(np.nan), values)),
        ("hidden", lambda values: values.view(np.int32)),
        ("hidden", lambda values: values[:-1]),
        ("checksums", lambda values: values[::-1]),
    ],
)
def test_an_entry_with_other_values_is_named_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, change: Any
) -> None:
    teacher = BitPatterns(torch.float32, torch.float32)
    query = query_of(teacher, tmp_path, Process(CPU))
    load_or_compute_states(query, ((0, 2), (1,)))
    (entry,) = (tmp_path / "teacher_states").iterdir()
    expected = {file.name: file.read_bytes() for file in entry.iterdir()}
    np.save(entry / f"{name}.npy", change(np.load(entry / f"{name}.npy")))
    for computes in (True, False):
        teacher.computed.clear()
        load_or_compute_states(query, ((0, 2), (1,)))
        assert bool(teacher.computed) is computes
    assert caplog.text.count(str(entry)) == 1
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == expected


def test_a_file_that_is_cut_during_a_run_is_one_line(tmp_path: Path) -> None:
    """Reading the lost part would kill the process. A file that is removed to make room stays readable."""
    query = query_of(BitPatterns(torch.float32, torch.float32), tmp_path, Process(CPU))
    states = load_or_compute_states(query, ((0,), (1,)))
    assert states is not None
    (path,) = tmp_path.glob("teacher_states/*/hidden.npy")
    path.rename(tmp_path / "removed.npy")
    batch = query.collator.collate(query.features, np.arange(8))
    assert states.add_to(batch).teacher_states is not None
    (tmp_path / "removed.npy").rename(path)
    with path.open("rb+") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=str(path)):
        states.add_to(batch)


def compute(rank: int, folder: str, machines: list[int]) -> None:
    """One process of those on several machines, with a cache folder for each machine; saves what it computed."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(machines))
    process = Process(CPU, rank, len(machines), rank - machines.index(machines[rank]))
    teacher = BitPatterns(torch.float32, torch.float32)
    states = load_or_compute_states(query_of(teacher, Path(folder) / str(machines[rank]), process), ((0,), ()))
    assert states is not None
    torch.save((teacher.computed, states.sample_digest()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_the_processes_of_each_machine_share_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes on two machines, whose second has a process alone: each machine gets all examples."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(compute, (str(tmp_path), [0, 0, 1]), nprocs=3)
    (first, second, alone), digests = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(3)), strict=True)
    assert len(set(digests)) == 1
    first, second, alone = first[1:], second[1:], alone[1:]  # each process computes one example to learn the types
    assert sorted(alone) == sorted(first + second) == list(range(8))
    assert min(len(first), len(second)) == 3
