"""BERT's encoder (Devlin et al. 2019, section 3; Vaswani et al. 2017, section 3) and its parts.

Modules have the names that the keys of the released checkpoints have. An encoder returns the hidden states and
attention scores of the layers that its caller names, and computes no others. Heads are in `heads.py`, kernels for
special devices in `layers.py`.

Shapes: batch, length (tokens, padding included), hidden, heads; query and key are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer.configuration import BertConfig
from transformer.layers import (
    ACTIVATIONS,
    Dropout,
    LayerNorm,
    cast_for_autocast,
    expand_mask,
    has_fast_fused_attention,
    softmax,
)

# Added to the scores of masked keys. Not -inf: a row that is all padding must stay finite.
MASKED_SCORE = -10000.0


class EncoderOutput(NamedTuple):
    """The output of `BertModel`.

    hidden_states: [batch, length, hidden] for each of `hidden_layers`, in that order.
    attention_scores: [batch, heads, query, key] for each of `attention_layers`: query·key/√d plus the mask, before
        the softmax (TinyBERT, section 3.1).
    pooled: [batch, hidden], tanh of a linear map of the first token's last hidden state; None without `pool`.
    """

    hidden_states: tuple[Tensor, ...]
    attention_scores: tuple[Tensor, ...]
    pooled: Tensor | None


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings: summed, normalised, with dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Map ids and segment numbers [batch, length] to [batch, length, hidden]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedded = (
            self.word_embeddings(input_ids)
            + self.position_embeddings(positions)
            + self.token_type_embeddings(token_type_ids)
        )
        return self.dropout(self.LayerNorm(embedded))


class BertSelfAttention(nn.Module):
    """Multi-head self-attention without its output projection (Vaswani et al. 2017, section 3.2).

    fused: where no scores are needed, compute attention in one kernel on a CPU too. `pack_linear_layers` sets it. It
        is off in training, because in half precision that kernel rounds differently.
    projections: query, key and value as one product, [..., hidden] -> [..., 3 · hidden]; `pack_linear_layers` sets it.
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
        self, hidden: Tensor, mask: Tensor, with_scores: bool = True, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context [batch, query, hidden] and the scores [batch, heads, query, key].

        Args:
            hidden: [batch, length, hidden].
            mask: [batch, 1, 1, key], added to the scores.
            with_scores: otherwise None may be returned for the scores.
            num_queries: compute the context of so many tokens, from the first; None for all. Each attends to all keys.
        """
        query, key, value = map(self._split_heads, self._project(hidden, num_queries))
        if not with_scores and (self.fused or has_fast_fused_attention(query.device)):
            dropout = self.dropout.p if self.training else 0.0
            context = functional.scaled_dot_product_attention(query, key, value, mask.to(query.dtype), dropout)
            return context.transpose(1, 2).flatten(2), None
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores + expand_mask(mask.to(scores.dtype), scores)
        context = self.dropout(softmax(scores).to(value.dtype)) @ value
        return context.transpose(1, 2).flatten(2), scores

    def _project(self, hidden: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [batch, query, hidden], key and value [batch, length, hidden]."""
        hidden = cast_for_autocast(hidden)
        if self.projections is None:
            return self.query(hidden[:, :num_queries]), self.key(hidden), self.value(hidden)
        query, key, value = self.projections(hidden).chunk(3, dim=-1)
        return query[:, :num_queries], key, value

    def _split_heads(self, projected: Tensor) -> Tensor:
        """Map [batch, length, hidden] to [batch, heads, length, hidden / heads]."""
        return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class ResidualOutput(nn.Module):
    """A linear map to the hidden size, dropout, the residual connection and LayerNorm."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout.add(self.dense(states), residual))


class BertAttention(nn.Module):
    """Self-attention with its output projection and residual connection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden: Tensor, mask: Tensor, with_scores: bool = True, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        context, scores = self.self(hidden, mask, with_scores, num_queries)
        return self.output(context, hidden[:, :num_queries]), scores


class BertIntermediate(nn.Module):
    """The first linear map of the feed-forward network, with its activation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

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
        self, hidden: Tensor, mask: Tensor, with_scores: bool = True, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden state [batch, query, hidden] and the scores; arguments as in `BertSelfAttention`."""
        attended, scores = self.attention(hidden, mask, with_scores, num_queries)
        return self.output(self.intermediate(attended), attended), scores


class BertEncoder(nn.Module):
    """The stack of layers. They are numbered from 1; 0 is the output of the embeddings."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, mask: Tensor, hidden_layers: Sequence[int], attention_layers: Sequence[int], depth: int
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run the first `depth` layers; return the last hidden state, then the states and scores of the named layers.

        If nothing of the deepest layer is named, the last state is the first token's alone, [batch, 1, hidden]: the
        pooler reads no other token, and the layer costs a fraction.
        """
        states: dict[int, Tensor] = {0: hidden}
        scores: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layer[:depth], start=1):
            all_tokens = number < depth or number in hidden_layers or number in attention_layers
            hidden, layer_scores = layer(hidden, mask, number in attention_layers, None if all_tokens else 1)
            if number in hidden_layers:
                states[number] = hidden
            if number in attention_layers:
                scores[number] = layer_scores
        return hidden, tuple(states[n] for n in hidden_layers), tuple(scores[n] for n in attention_layers)


class BertPooler(nn.Module):
    """The tanh of a linear map of the first token's hidden state."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [batch, length, hidden] to [batch, hidden]."""
        return torch.tanh(self.dense(hidden[:, 0]))


class BertModel(nn.Module):
    """BERT without a head: embeddings, encoder and pooler."""

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
        """Encode a batch.

        Args:
            input_ids: [batch, length], ids of the vocabulary.
            token_type_ids: [batch, length], segment numbers; all 0 by default.
            attention_mask: [batch, length], 1 at real tokens and 0 at padding; all 1 by default.
            hidden_layers: the layers whose hidden states to return, from 0 (the output of the embeddings) to the
                number of layers; all by default.
            attention_layers: the layers whose attention scores to return, from 1 to the number of layers; all by
                default.
            pool: whether to return the pooled output. Without it no layer beyond the deepest named one is computed.
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
