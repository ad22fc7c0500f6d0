"""The operations of a training step, and the rate that the machine's matrix products reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from transformer.heads import TinyBertForSequenceClassification


def matrix_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Return the operations per second of products of large square matrices: an upper limit for a step just now."""
    size = 1024 if device.type == "cpu" else 8192
    matrices = {name: torch.randn(size, size, device=device).to(dtype) for name in ("left", "right", "product")}
    timer = Timer("torch.mm(left, right, out=product)", globals=matrices, num_threads=threads)
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.3).median


def forward_operations(model: TinyBertForSequenceClassification, lengths: np.ndarray, **wanted: Any) -> float:
    """Return the operations of forward passes on texts of these many tokens, each by itself.

    Args:
        model: on the CPU.
        wanted: the arguments of its call beside the inputs.
    """
    samples, counts = (4, 8, 16), []  # the operations are a polynomial of degree 2 in the length
    for length in samples:
        ids = torch.ones(1, length, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, torch.zeros_like(ids), torch.ones_like(ids), **wanted)
        counts.append(counter.get_total_flops())
    return float(np.polyval(np.polyfit(samples, counts, 2), lengths.astype(np.float64)).sum())


def step_operations(
    stage: str,
    teacher: TinyBertForSequenceClassification,
    student: TinyBertForSequenceClassification,
    lengths: np.ndarray,
    cached: bool,
) -> float:
    """Return the operations of a step on texts of these many tokens; all layers of the student are mapped.

    Args:
        cached: whether the teacher's outputs are, so that only the student is computed.
    """
    student_call: dict[str, Any] = {"hidden_layers": (), "attention_layers": ()}
    teacher_call = student_call
    if stage == "intermediate":
        layers, last = range(1, student.config.num_hidden_layers + 1), (teacher.config.num_hidden_layers,)
        teacher_call = {"hidden_layers": last, "attention_layers": last, "with_logits": False}
        student_call = {**teacher_call, "is_student": True, "hidden_layers": (0, *layers), "attention_layers": layers}
    # The backward pass has two products for each one of the forward pass.
    operations = 3 * forward_operations(student, lengths, **student_call)
    return operations if cached else operations + forward_operations(teacher, lengths, **teacher_call)
