"""The files of a teacher's states: they come back to the bit, and the processes of a machine share the writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_processing.batching import Collator
from data_processing.cache import Cache
from data_processing.features import Features
from distillation.runtime.device import Process
from distillation.runtime.precision import Precision
from distillation.teacher import cached_states
from distillation.teacher.cached_states import CachedStates, TeacherQuery, load_or_compute_states
from transformer.configuration import BertConfig

KEY = f"{7:032x}"


def test_the_processes_of_a_machine_take_turns_at_the_batches(tmp_path: Path) -> None:
    """Here those of the second machine of two."""
    starts = np.arange(0, 16, 2)
    tokens = np.array([[number, 99] for number in range(8)], dtype=np.uint16).flatten()
    features = Features(tokens, np.arange(0, 17, 2), np.full(8, 2, dtype=np.int32), np.zeros(8, dtype=np.int64))
    written = []
    for rank, expected in ((2, [0, 1, 2, 6, 7]), (3, [3, 4, 5])):
        teacher: Any = SaysBits(torch.float32, torch.float32)
        process = Process(torch.device("cpu"), rank, 4, rank - 2)
        question = TeacherQuery(teacher, features, Collator(False, 64), (0,), (), 3, process, Precision())
        layout = question.layout()
        making = Cache(tmp_path, 10**9).make("teacher_states", f"{rank:032x}", {"hidden": (256, np.dtype(np.float32))})
        question.write_answers(layout, making.folder, range(2, 4))
        assert sorted(number for number, _ in teacher.said) == expected
        values = np.load(making.folder / "hidden.npy").reshape(8, 32)
        written.append({number for number in range(8) if values[number].any()})
        assert layout.starts(layout.parts[0])[:8].tolist() == (starts * 16).tolist()
    assert written == [{0, 1, 2, 6, 7}, {3, 4, 5}]


@pytest.mark.parametrize(
    ("firsts", "peers"),
    [
        ([True], [(0, 1)]),
        ([True, False, False], [(0, 3)] * 3),
        ([True, False, True, True, False], [(0, 2)] * 2 + [(2, 3)] + [(3, 5)] * 2),
    ],
)
def test_the_processes_of_a_machine_know_each_other(firsts: list[bool], peers: list[tuple[int, int]]) -> None:
    class Gathered(Process):
        def gather(self, value: Any) -> list[Any]:
            assert value is firsts[self.rank]
            return firsts

    for rank, expected in enumerate(peers):
        process = Gathered(torch.device("cpu"), rank, len(firsts), int(not firsts[rank]))
        assert cached_states._peers(process) == range(*expected)


class SaysBits(torch.nn.Module):
    """A teacher whose states and scores are all bit patterns of a type there are, in turn."""

    def __init__(self, states: torch.dtype, scores: torch.dtype) -> None:
        super().__init__()
        self.config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        self.types = states, scores
        self.said: dict[tuple[int, int], Tensor] = {}

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor, **wanted: Any) -> Any:
        batch, length = ids.shape
        states = [self.say(self.types[0], batch, length, 16) for _ in wanted["hidden_layers"]]
        scores = [self.say(self.types[1], batch, 2, length, length) for _ in wanted["attention_layers"]]
        for row in range(batch):
            number = int(ids[row, 0])
            self.said |= {(number, layer): state[row, : mask[row].sum()] for layer, state in enumerate(states)}
        return cached_states.TinyBertOutput(None, tuple(scores), tuple(states))

    def say(self, dtype: torch.dtype, *shape: int) -> Tensor:
        bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
        limits = torch.iinfo(bits)
        return torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_teacher_says_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Infinities, NaN and denormals too; padding's are 0."""
    lengths = np.array([5, 17, 1, 9, 9, 2, 30, 9])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.full(ends[-1], 99, dtype=np.uint16)
    tokens[starts] = np.arange(8)
    features = Features(tokens, np.concatenate([[0], ends]), lengths.astype(np.int32), np.zeros(8, dtype=np.int64))
    teacher: Any = SaysBits(dtype, torch.bfloat16)
    padding, process = Collator(False, 64), Process(torch.device("cpu"))
    question = TeacherQuery(teacher, features, padding, (0, 2), (1,), 3, process, Precision())
    found = load_or_compute_states(question, KEY, Cache(tmp_path, 10**9))
    assert isinstance(found, CachedStates)
    for examples in ([6], [3, 4, 7], [0, 6, 2, 1], list(range(8)), []):
        batch = found.fetch(padding.collate(features, np.array(examples, dtype=np.int64)))
        said = found.output(batch.to(torch.device("cpu")), (2, 0), (1,))
        width = max((int(lengths[example]) for example in examples), default=1)
        assert said.hidden_states[0].shape == (len(examples), width, 16)
        assert said.attention_scores[0].shape == (len(examples), 2, width, width)
        assert said.attention_scores[0].dtype == torch.bfloat16
        for (number, layer), expected in teacher.said.items():
            if number in examples:
                state = said.hidden_states[1 - layer][examples.index(number)]
                assert state.dtype == dtype
                assert (
                    state[: len(expected)].contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
                )
                assert not state[len(expected) :].any()
