"""A model that is asked and never trained, readied for a CPU with bf16 instructions.

Its linear layers keep their weights in the blocked layout that the CPU's matrix units read, in which
oneDNN would otherwise put them anew for every batch, and apply the activation that follows in the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer.modeling import BertIntermediate

# config.hidden_act -> oneDNN's name of it, and which form of gelu is meant. Other activations follow by themselves.
_FUSED = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}


class PackedLinear(nn.Module):
    """A linear layer in bf16, and the activation after it; it has no parameters and gives no gradients.

    Args:
        linear: whose weights and bias are taken.
        hidden_act: an activation of `_FUSED`, or None for none.
    """

    def __init__(self, linear: nn.Linear, hidden_act: str | None = None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16().contiguous())
        self._bias = linear.bias.detach().bfloat16()
        self._activation, self._form = _FUSED[hidden_act] if hidden_act else ("none", "")

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in bf16."""
        return torch.ops.mkldnn._linear_pointwise(
            input.bfloat16(), self._weight, self._bias, self._activation, [], self._form
        )


def can_pack() -> bool:
    """Whether this build of torch and this processor have what `pack` needs."""
    operations = torch.ops.mkldnn
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(operations, name) for name in needed)
        and bool(operations._is_mkldnn_bf16_supported())
    )


def pack(model: nn.Module) -> None:
    """Puts packed layers in the places of a frozen model's linear layers, whose parameters it then no longer has.

    A decoder that shares its weights with the embeddings, and so has no bias of its own, stays as it is.

    Args:
        model: on a CPU; its `config` names the activation.
    """
    _pack(model, model.config.hidden_act)  # type: ignore[union-attr, arg-type]


def _pack(module: nn.Module, hidden_act: str) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, BertIntermediate) and hidden_act in _FUSED:
            setattr(module, name, PackedLinear(child.dense, hidden_act))
        elif isinstance(child, nn.Linear) and child.bias is not None:
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child, hidden_act)
