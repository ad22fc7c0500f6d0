"""How many operations a training step needs, and how many the machine's matrix products reach."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from distillation.runtime.device import synchronize
from transformer.configuration import BertConfig

_SECONDS = 0.3
_SIZES = {"cpu": 1024}  # of the square matrices; else:
_LARGE = 8192


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of products of large square matrices: the limit of what a step can reach.

    On a shared machine it is another from minute to minute, so it belongs beside every figure.
    """
    size = _SIZES.get(device.type, _LARGE)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = left @ right  # its kernel is made
    synchronize(device)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _SECONDS:
        for _ in range(10):
            torch.mm(left, right, out=product)
        synchronize(device)
        count += 10
    return count * 2 * size**3 / (time.perf_counter() - begin)


def forward_operations(
    config: BertConfig, lengths: Sequence[int] | np.ndarray, first_token_only: bool = False
) -> float:
    """Operations of the encoder's matrix products for texts of these many tokens, nothing padded: their sum.

    Args:
        config: the encoder's.
        first_token_only: whether of the last layer the first token alone is wanted, as for a pooler.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    hidden, wide = config.hidden_size, config.intermediate_size
    keys_and_values = 2 * tokens * 2 * hidden**2

    def queries(count: np.ndarray) -> np.ndarray:
        """What so many tokens cost that ask: their linear maps, and attention's two products with all keys."""
        return 2 * count * (2 * hidden**2 + 2 * hidden * wide) + 2 * 2 * count * tokens * hidden

    whole = keys_and_values + queries(tokens)
    last = keys_and_values + queries(np.ones_like(tokens)) if first_token_only else whole
    return float(((config.num_hidden_layers - 1) * whole + last).sum())


def step_operations(
    stage: str, teacher: BertConfig, student: BertConfig, lengths: Sequence[int] | np.ndarray, asked: bool
) -> float:
    """Operations of a step on texts of these many tokens; heads, which are next to nothing, are left out.

    Args:
        stage: `intermediate`, with all layers mapped up to the teacher's last, or `prediction`.
        asked: whether the teacher is computed, or what it says is remembered.
    """
    logits_only = stage == "prediction"
    learned = forward_operations(student, lengths, logits_only)
    if not logits_only:  # each layer's and the embedding's states in the teacher's size
        states = student.num_hidden_layers + 1
        learned += states * 2.0 * float(np.sum(lengths)) * student.hidden_size * teacher.hidden_size
    # A gradient takes two products for each one of the forward pass.
    return 3 * learned + (forward_operations(teacher, lengths, logits_only) if asked else 0.0)
