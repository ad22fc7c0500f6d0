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


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in fp32 whatever the input's type: BERT's eps, 1e-12, is 0 in fp16."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(device_type=input.device.type, enabled=False):
            normalised = functional.layer_norm(
                input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
            )
        return normalised.to(input.dtype)


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

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
    """Multi-head self-attention up to, and without, its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the context [batch, length, hidden] and the scores [batch, heads, query, key]."""
        query, key, value = (self._split(linear(hidden)) for linear in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask.to(query.dtype)
        # The softmax runs in fp32; its result is as exact as the values it weighs.
        probabilities = functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        context = self.dropout(probabilities) @ value
        return context.transpose(1, 2).flatten(2), scores

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class ResidualOutput(nn.Module):
    """A linear map back to the hidden size, dropout, the residual connection and its LayerNorm."""

    def __init__(self, config: BertConfig, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class BertAttention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        context, scores = self.self(hidden, mask)
        return self.output(context, hidden), scores


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

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attended, scores = self.attention(hidden, mask)
        return self.output(self.intermediate(attended), attended), scores


class BertEncoder(nn.Module):
    """The stack of layers. Layers are counted from 1; 0 is the embedding output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, mask: Tensor, hidden_layers: Sequence[int], attention_layers: Sequence[int], depth: int
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Runs the first `depth` layers; returns the last state and the states and scores asked for."""
        states, scores = {0: hidden}, {}
        for number, layer in enumerate(self.layer[:depth], start=1):
            hidden, layer_scores = layer(hidden, mask)
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
