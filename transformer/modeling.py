"""BERT's encoder and what it is made of.

Every module is named as the keys of the released checkpoints name it. An encoder gives out the
layers' hidden states and attention scores that its caller asks for, and no others. This file
holds no heads (`heads.py`), no losses and nothing about tasks or devices.

Shapes: batch, length (tokens, padding included), hidden, heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer.configuration import BertConfig

# Added to the scores of masked keys. Not -inf: a row that is all padding must stay finite.
MASKED_SCORE = -10000.0
_VECTOR = 16  # fp32 numbers in a CPU's vector register

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def activation(config: BertConfig) -> Callable[[Tensor], Tensor]:
    """The function that config.hidden_act names."""
    return _ACTIVATIONS[config.hidden_act]


class EncoderOutput(NamedTuple):
    """What `BertModel` gives out.

    hidden_states: a tensor [batch, length, hidden] for each layer asked for, in the order asked.
    attention_scores: a tensor [batch, heads, query, key] for each layer asked for: the scores
        query·key/√d plus the mask's, before the softmax (paper, section 3.1).
    pooled: [batch, hidden], tanh of a linear map of the first token's last hidden state; None
        where it was not asked for.
    """

    hidden_states: tuple[Tensor, ...]
    attention_scores: tuple[Tensor, ...]
    pooled: Tensor | None


def _has_cpu_kernels(device: torch.device) -> bool:
    """Whether torch's kernels are those of a CPU, whose slow and fast sides are others than an accelerator's."""
    return device.type == "cpu"


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in fp32 whatever the input's type: BERT's eps, 1e-12, is 0 in fp16."""

    def forward(self, input: Tensor) -> Tensor:
        # A CPU's kernel takes half precision as it is and computes in fp32; others would compute in the weights' type.
        states = input if _has_cpu_kernels(input.device) else input.float()
        with torch.autocast(device_type=input.device.type, enabled=False):
            normalised = functional.layer_norm(
                states, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
            )
        return normalised.to(input.dtype)


class Dropout(nn.Dropout):
    """Dropout; on a CPU with a quarter of torch's random numbers, which there take longer than all else of it.

    Each 64 random bits decide four values by 16 bits each, so the rate is a multiple of 2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self._is_ours(input):
            return super().forward(input)
        kept, scale = self._draw(input, input.dtype)
        return (input * kept) * scale

    def add(self, input: Tensor, residual: Tensor) -> Tensor:
        """Dropout of the input, plus a residual of its shape; on a CPU scaled and added in one pass."""
        if not self._is_ours(input):
            return super().forward(input) + residual
        kept, scale = self._draw(input, residual.dtype)
        return torch.addcmul(residual, input, kept, value=scale)

    def _is_ours(self, input: Tensor) -> bool:
        return self.training and self.p > 0.0 and _has_cpu_kernels(input.device)

    def _draw(self, input: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Ones where the input is kept and zeros where it is dropped, of its shape; and what makes up for those."""
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 65536 values
        count = input.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
        return bits.ge_(dropped - 2**15).view(input.shape).to(dtype), 2**16 / (2**16 - dropped)


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """[batch, length] ids and segment numbers -> [batch, length, hidden]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedded = (
            self.word_embeddings(input_ids)
            + self.position_embeddings(positions)
            + self.token_type_embeddings(token_type_ids)
        )
        return self.dropout(self.LayerNorm(embedded))


class BertSelfAttention(nn.Module):
    """Multi-head self-attention up to, and without, its output projection.

    fused: compute attention as one kernel on a CPU too where no scores are needed. `pack_linear_layers` turns it on. It
    is off in training, because in half precision the kernel rounds differently from the unfused computation.
    projections: query, key and value as one product, [..., hidden] -> [..., 3 · hidden], set by `pack_linear_layers`.
    """

    projections: Callable[[Tensor], Tensor] | None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.fused = False
        self.projections = None
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden: Tensor, mask: Tensor, with_scores: bool = True, queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the context [batch, query, hidden] and, where wanted, the scores [batch, heads, query, key].

        Args:
            hidden: [batch, length, hidden].
            mask: what is added to the scores, [batch, 1, 1, key].
            with_scores: whether the scores are wanted.
            queries: how many tokens, from the first, ask; None for all.
        """
        query, key, value = map(self._split, self._projected(hidden, queries))
        if not with_scores and (self.fused or _has_fused_attention(query.device)):
            dropped = self.dropout.p if self.training else 0.0
            context = functional.scaled_dot_product_attention(query, key, value, mask.to(query.dtype), dropped)
            return context.transpose(1, 2).flatten(2), None
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores + _as_wide_as(mask.to(scores.dtype), scores)
        context = self.dropout(_softmax(scores).to(value.dtype)) @ value
        return context.transpose(1, 2).flatten(2), scores

    def _projected(self, hidden: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query [batch, query, hidden], key and value [batch, length, hidden]."""
        hidden = _as_autocast_would(hidden)  # once, not for each of the three
        if self.projections is None:
            return self.query(hidden[:, :queries]), self.key(hidden), self.value(hidden)
        query, key, value = self.projections(hidden).chunk(3, dim=-1)
        return query[:, :queries], key, value

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


def _has_fused_attention(device: torch.device) -> bool:
    """Whether attention is faster in one kernel, which gives out no scores; on a CPU it is not for fp32."""
    return device.type == "cuda"


def _as_wide_as(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask [batch, 1, 1, key] to add to scores [batch, heads, query, key].

    In half precision a CPU adds a row of few keys to each query and head slowly, a page of queries and keys to each
    head fast.
    """
    half = scores.element_size() < 4
    if not (half and _has_cpu_kernels(scores.device) and scores.shape[-1] <= 4 * _VECTOR):
        return mask
    return mask.expand(-1, -1, scores.shape[-2], -1).contiguous()


def _as_autocast_would(states: Tensor) -> Tensor:
    """The states in the type that autocast gives a linear layer, outside of it as they are."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys, in fp32 whatever the type of the scores."""
    keys = scores.shape[-1]
    if _has_cpu_kernels(scores.device) and keys < _VECTOR:
        # Shorter rows than a vector register make torch's kernel ten times slower. exp of MASKED_SCORE is 0.
        scores = functional.pad(scores, (0, _VECTOR - keys), value=2 * MASKED_SCORE)
    return functional.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys]


class ResidualOutput(nn.Module):
    """A linear map back to the hidden size, dropout, the residual connection and its LayerNorm."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout.add(self.dense(states), residual))


class BertAttention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden: Tensor, mask: Tensor, with_scores: bool = True, queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        context, scores = self.self(hidden, mask, with_scores, queries)
        return self.output(context, hidden[:, :queries]), scores


class BertIntermediate(nn.Module):
    """The widening half of the feed-forward network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


class BertLayer(nn.Module):
    """One Transformer layer: attention, then the feed-forward network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = ResidualOutput(config, config.intermediate_size)

    def forward(
        self, hidden: Tensor, mask: Tensor, with_scores: bool = True, queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The next state of the first `queries` tokens (None: of all), which see all; scores as wanted."""
        attended, scores = self.attention(hidden, mask, with_scores, queries)
        return self.output(self.intermediate(attended), attended), scores


class BertEncoder(nn.Module):
    """The stack of layers. Layers are counted from 1; 0 is the embedding output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, mask: Tensor, hidden_layers: Sequence[int], attention_layers: Sequence[int], depth: int
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Runs the first `depth` layers; returns the last state and the states and scores asked for.

        Where nothing of the deepest layer is asked for, the last state is that of the first token alone,
        [batch, 1, hidden]: a pooler reads no other, and the layer costs a fraction.
        """
        states: dict[int, Tensor] = {0: hidden}
        scores: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layer[:depth], start=1):
            wanted = number < depth or number in hidden_layers or number in attention_layers
            hidden, layer_scores = layer(hidden, mask, number in attention_layers, None if wanted else 1)
            if number in hidden_layers:
                states[number] = hidden
            if number in attention_layers:
                scores[number] = layer_scores
        return hidden, tuple(states[n] for n in hidden_layers), tuple(scores[n] for n in attention_layers)


class BertPooler(nn.Module):
    """tanh of a linear map of the first token's state."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden] -> [batch, hidden]."""
        return torch.tanh(self.dense(hidden[:, 0]))


class BertModel(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        hidden_layers: Sequence[int] | None = None,
        attention_layers: Sequence[int] | None = None,
        pool: bool = True,
    ) -> EncoderOutput:
        """Encodes a batch.

        Args:
            input_ids: [batch, length] ids of the vocabulary.
            token_type_ids: [batch, length] segment numbers; all 0 where not given.
            attention_mask: [batch, length], 1 at real tokens and 0 at padding; all 1 where not given.
            hidden_layers: the layers whose hidden states are wanted, 0 (the embedding output) to the
                number of layers; all of them where not given.
            attention_layers: the layers whose attention scores are wanted, 1 to the number of layers;
                all of them where not given.
            pool: whether the pooled output is wanted. Without it no layer beyond the deepest one asked
                for is computed.
        """
        layers = self.config.num_hidden_layers
        hidden_layers = range(layers + 1) if hidden_layers is None else hidden_layers
        attention_layers = range(1, layers + 1) if attention_layers is None else attention_layers
        depth = layers if pool else max([0, *hidden_layers, *attention_layers])
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = (1.0 - attention_mask[:, None, None, :].float()) * MASKED_SCORE
        embedded = self.embeddings(input_ids, token_type_ids)
        last, states, scores = self.encoder(embedded, mask, hidden_layers, attention_layers, depth)
        return EncoderOutput(states, scores, self.pooler(last) if pool else None)
