"""Inference in bf16 on a CPU, with linear layers whose weights are packed beforehand.

The weights are stored in the blocked layout that the CPU's matrix units read; otherwise oneDNN reorders them for every
batch. The activation after a linear layer is applied in the same pass.

oneDNN compiles a kernel for each number of rows and caches the last thousand, of one to two MB each. If batches come in
many sizes, as in data augmentation, rows are padded to one of few numbers.

On a processor with AMX and with exactly two threads, oneDNN (in torch 2.13) gives a whole product of a few hundred rows
by 512 to 1,024 columns, as a BERT-base has, to one thread. Such rows are split, so that both threads work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer.heads import BertPredictionHeadTransform
from transformer.modeling import BertIntermediate, BertSelfAttention

# config.hidden_act -> oneDNN's name and form of gelu. Other activations are applied after the product.
_FUSED = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}


class PackedLinear(nn.Module):
    """A linear layer in bf16 and the activation after it, without parameters and without gradients.

    Args:
        linear: its weights and bias are copied.
        hidden_act: an activation of `_FUSED`; None for none.
        bucket_rows: pad the rows with zeros to `row_count`'s next number.
    """

    def __init__(self, linear: nn.Linear, hidden_act: str | None = None, bucket_rows: bool = False) -> None:
        super().__init__()
        self._bucket_rows, self._columns = bucket_rows, linear.out_features
        self._has_amx = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16().contiguous())
        self._bias = linear.bias.detach().bfloat16()
        self._activation, self._form = _FUSED[hidden_act] if hidden_act else ("none", "")

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out] in bf16."""
        rows = input.bfloat16().flatten(0, -2)
        padding = row_count(len(rows)) - len(rows) if self._bucket_rows else 0
        product = self._multiply(functional.pad(rows, (0, 0, 0, padding)) if padding else rows)
        return product[: len(rows)].unflatten(0, input.shape[:-1])

    def _multiply(self, rows: Tensor) -> Tensor:
        threads = torch.get_num_threads() if self._has_amx else 1
        part = rows_per_product(len(rows), self._columns, threads)
        if part == len(rows):
            return self._multiply_part(rows)
        return torch.cat([self._multiply_part(piece) for piece in rows.split(part)])

    def _multiply_part(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, self._activation, [], self._form)


def row_count(rows: int) -> int:
    """Return the number of rows to pad to: the next multiple of 16, above 256 rows of 64."""
    step = 16 if rows <= 256 else 64
    return -(-rows // step) * step


def rows_per_product(rows: int, columns: int, threads: int) -> int:
    """Return how many of the rows to multiply at once on AMX, so that two threads share the work."""
    if threads != 2 or not 512 <= columns <= 1024 or not 384 < rows < 1536:
        return rows
    parts = -(-rows // 320)
    return -(-rows // (32 * parts)) * 32


def can_pack() -> bool:
    """Return whether this build of torch and this processor have what `pack_linear_layers` needs."""
    operations = torch.ops.mkldnn
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(operations, name) for name in needed)
        and bool(operations._is_mkldnn_bf16_supported())
    )


def pack_linear_layers(model: nn.Module, bucket_rows: bool = False) -> None:
    """Replace a model's linear layers by packed ones; their parameters are removed from the model.

    A decoder that shares its weights with the embeddings has no bias, and is kept as it is.

    Args:
        model: on a CPU, in eval mode; its `config` names the activation.
        bucket_rows: as in `PackedLinear`, for batches of many sizes. Attention without scores is then one kernel, since
            oneDNN would cache its products too.
    """
    _pack(model, model.config.hidden_act, bucket_rows)  # type: ignore[union-attr, arg-type]


def _pack(module: nn.Module, hidden_act: str, bucket_rows: bool) -> None:
    if isinstance(module, BertSelfAttention):
        module.fused = bucket_rows
        module.projections = PackedLinear(
            _concatenate([module.query, module.key, module.value]), bucket_rows=bucket_rows
        )
        del module.query, module.key, module.value
    for name, child in list(module.named_children()):
        if isinstance(child, BertIntermediate) and hidden_act in _FUSED:
            setattr(module, name, PackedLinear(child.dense, hidden_act, bucket_rows))
        elif isinstance(child, BertPredictionHeadTransform) and hidden_act in _FUSED:
            child.dense = PackedLinear(child.dense, hidden_act, bucket_rows)  # type: ignore[assignment]
            child.activation = nn.Identity()
        elif isinstance(child, nn.Linear) and child.bias is not None:
            setattr(module, name, PackedLinear(child, bucket_rows=bucket_rows))
        else:
            _pack(child, hidden_act, bucket_rows)


def _concatenate(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return one linear layer whose output is the outputs of these, concatenated."""
    columns = sum(linear.out_features for linear in linears)
    joined = nn.Linear(linears[0].in_features, columns, device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
    joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return joined
