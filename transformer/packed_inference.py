"""A model that is asked and never trained, readied for a CPU with bf16 instructions.

Its linear layers keep their weights in the blocked layout that the CPU's matrix units read, in which
oneDNN would otherwise put them anew for every batch, and apply the activation that follows in the same pass.

oneDNN makes a kernel for each number of rows and keeps the last thousand of them, of one to two MB each. Where batches
come in ever new sizes, as in data augmentation, rows are therefore added up to one of few numbers.

On a processor with AMX, oneDNN as torch 2.13 has it lets one of two threads do a whole product of some hundred rows by
512 to 1,024 columns, as a BERT-base's are: such rows are parted, until both have work. It is not so with three threads
and more, nor without AMX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer.heads import BertPredictionHeadTransform
from transformer.modeling import BertIntermediate, BertSelfAttention

# config.hidden_act -> oneDNN's name of it, and which form of gelu is meant. Other activations follow by themselves.
_FUSED = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}


class PackedLinear(nn.Module):
    """A linear layer in bf16, and the activation after it; it has no parameters and gives no gradients.

    Args:
        linear: whose weights and bias are taken.
        hidden_act: an activation of `_FUSED`, or None for none.
        few_sizes: whether rows of zeros are added up to the next of `row_count`'s numbers.
    """

    def __init__(self, linear: nn.Linear, hidden_act: str | None = None, few_sizes: bool = False) -> None:
        super().__init__()
        self._few_sizes, self._columns = few_sizes, linear.out_features
        self._has_amx = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16().contiguous())
        self._bias = linear.bias.detach().bfloat16()
        self._activation, self._form = _FUSED[hidden_act] if hidden_act else ("none", "")

    def forward(self, input: Tensor) -> Tensor:
        """[rows, in] or [batch, rows, in] -> the same with [out] in bf16."""
        rows = input.bfloat16().flatten(0, -2)
        added = row_count(len(rows)) - len(rows) if self._few_sizes else 0
        product = self._product(functional.pad(rows, (0, 0, 0, added)) if added else rows)
        return product[: len(rows)].unflatten(0, input.shape[:-1])

    def _product(self, rows: Tensor) -> Tensor:
        threads = torch.get_num_threads() if self._has_amx else 1
        part = rows_at_once(len(rows), self._columns, threads)
        if part == len(rows):
            return self._multiplied(rows)
        return torch.cat([self._multiplied(some) for some in rows.split(part)])

    def _multiplied(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, self._activation, [], self._form)


def row_count(rows: int) -> int:
    """The next number from so many rows on that has a kernel: a multiple of 16, above 256 of 64."""
    step = 16 if rows <= 256 else 64
    return -(-rows // step) * step


def rows_at_once(rows: int, columns: int, threads: int) -> int:
    """Of how many rows a product by so many columns is taken in one piece on AMX, so that two threads share it."""
    if threads != 2 or not 512 <= columns <= 1024 or not 384 < rows < 1536:
        return rows
    parts = -(-rows // 320)
    return -(-rows // (32 * parts)) * 32


def can_pack() -> bool:
    """Whether this build of torch and this processor have what `pack` needs."""
    operations = torch.ops.mkldnn
    needed = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(operations, name) for name in needed)
        and bool(operations._is_mkldnn_bf16_supported())
    )


def pack_linear_layers(model: nn.Module, few_sizes: bool = False) -> None:
    """Puts packed layers in the places of a frozen model's linear layers, whose parameters it then no longer has.

    A decoder that shares its weights with the embeddings, and so has no bias of its own, stays as it is.

    Args:
        model: on a CPU; its `config` names the activation.
        few_sizes: as `PackedLinear`'s, for batches of many sizes; attention without scores then is one kernel, of
            which oneDNN keeps none either.
    """
    _pack(model, model.config.hidden_act, few_sizes)  # type: ignore[union-attr, arg-type]


def _pack(module: nn.Module, hidden_act: str, few_sizes: bool) -> None:
    if isinstance(module, BertSelfAttention):
        module.fused = few_sizes
        module.projections = PackedLinear(_beside([module.query, module.key, module.value]), few_sizes=few_sizes)
        del module.query, module.key, module.value
    for name, child in list(module.named_children()):
        if isinstance(child, BertIntermediate) and hidden_act in _FUSED:
            setattr(module, name, PackedLinear(child.dense, hidden_act, few_sizes))
        elif isinstance(child, BertPredictionHeadTransform) and hidden_act in _FUSED:
            child.dense = PackedLinear(child.dense, hidden_act, few_sizes)  # type: ignore[assignment]
            child.activation = nn.Identity()
        elif isinstance(child, nn.Linear) and child.bias is not None:
            setattr(module, name, PackedLinear(child, few_sizes=few_sizes))
        else:
            _pack(child, hidden_act, few_sizes)


def _beside(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer that gives out what these do, side by side."""
    columns = sum(linear.out_features for linear in linears)
    raise_on_all_ranks = nn.Linear(linears[0].in_features, columns, device="meta")
    raise_on_all_ranks.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]))
    raise_on_all_ranks.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return raise_on_all_ranks
