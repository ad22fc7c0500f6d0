"""Layers and operations with the numerical type and the kernel that suit the device.

`modeling.py` builds BERT from these. They differ from torch's own in two ways: some compute in fp32 whatever the
type of their input, and on a CPU some use fewer or faster kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

_VECTOR = 16  # fp32 numbers in a vector register of a CPU with AVX-512

# By the values that config.hidden_act may have.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def has_cpu_kernels(device: torch.device) -> bool:
    """Return whether the device is a CPU: torch's kernels for it are slow where those for a GPU are fast."""
    return device.type == "cpu"


def has_fast_fused_attention(device: torch.device) -> bool:
    """Return whether one kernel for all of attention, which returns no scores, is faster in every type."""
    return device.type == "cuda"


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, computed in fp32 whatever the input's type: BERT's eps, 1e-12, is 0 in fp16."""

    def forward(self, input: Tensor) -> Tensor:
        # The CPU kernel computes in fp32 from half precision too; the others would compute in the weights' type.
        states = input if has_cpu_kernels(input.device) else input.float()
        with torch.autocast(device_type=input.device.type, enabled=False):
            normalised = functional.layer_norm(
                states, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
            )
        return normalised.to(input.dtype)


class Dropout(nn.Dropout):
    """Dropout that on a CPU draws a quarter of torch's random numbers, because drawing them takes most of its time.

    Each 64 random bits decide about four values, by 16 bits each, so the rate is rounded to a multiple of 2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self._draws_16_bits(input):
            return super().forward(input)
        kept, scale = self._draw(input, input.dtype)
        return (input * kept) * scale

    def add(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return residual + dropout(input), both of one shape; on a CPU scaled and added in one pass."""
        if not self._draws_16_bits(input):
            return super().forward(input) + residual
        kept, scale = self._draw(input, residual.dtype)
        return torch.addcmul(residual, input, kept, value=scale)

    def _draws_16_bits(self, input: Tensor) -> bool:
        return self.training and self.p > 0.0 and has_cpu_kernels(input.device)

    def _draw(self, input: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Return a tensor of the input's shape, 1 where the input is kept and else 0, and the scale of kept values."""
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 65536 values
        count = input.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
        return bits.ge_(dropped - 2**15).view(input.shape).to(dtype), 2**16 / (2**16 - dropped)


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension, computed in fp32 whatever the type of the scores."""
    keys = scores.shape[-1]
    if has_cpu_kernels(scores.device) and keys < _VECTOR:
        # torch's kernel is slow for rows shorter than a vector register.
        scores = functional.pad(scores, (0, _VECTOR - keys), value=-torch.inf)
    return functional.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys]


def expand_mask(mask: Tensor, scores: Tensor) -> Tensor:
    """Return a mask [batch, 1, 1, key] in the shape that is added fastest to scores [batch, heads, query, key].

    In half precision a CPU is slow to broadcast a short row of keys over queries and heads, and fast to broadcast
    [query, key] over heads.
    """
    half = scores.element_size() < 4
    if not (half and has_cpu_kernels(scores.device) and scores.shape[-1] <= 4 * _VECTOR):
        return mask
    return mask.expand(-1, -1, scores.shape[-2], -1).contiguous()


def cast_for_autocast(states: Tensor) -> Tensor:
    """Return the states in the type that autocast gives a linear layer; outside of autocast as they are.

    Several linear layers that read the same states then share one cast.
    """
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states
