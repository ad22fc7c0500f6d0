"""BERT with heads: masked language model, pre-training, and TinyBERT's models with a projection to a teacher's size.

Each model can be built, loaded and saved by itself:

    model = TinyBertForSequenceClassification.from_pretrained("TinyBERT_dir")
    logits, attention_scores, hidden_states = model(input_ids, token_type_ids, attention_mask)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer.configuration import LINEAR_HEAD_ARCHITECTURE, RELU_HEAD_ARCHITECTURE, BertConfig
from transformer.file_utils import CONFIG_NAME, read_weights, write_weights
from transformer.layers import ACTIVATIONS, LayerNorm
from transformer.loading import (
    LoadReport,
    NoNewWeights,
    check_weights,
    has_layer_projections,
    load_weights,
    num_labels_of,
    projection_size,
    with_encoder_prefix,
)
from transformer.modeling import BertModel, EncoderOutput

Model = TypeVar("Model", bound="PreTrainedModel")

_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
_DECODER, _DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_OUTPUT_BIAS = "cls.predictions.bias"


class PreTrainedModel(nn.Module):
    """Base of all models here: an encoder with initialisation, loading and saving."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)

    def init_weights(self) -> None:
        """Draw all weights from N(0, initializer_range²); biases are 0 and LayerNorm weights 1."""
        self.apply(self._init_module)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is None:
            return  # the masked-LM decoder: its weights are the word embeddings, which are drawn only once
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @classmethod
    def from_weights(cls: type[Model], config: BertConfig, weights: dict[str, Tensor]) -> Model:
        """Build the model that the weights' keys and shapes describe, without loading their values."""
        return cls(config)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path) -> Model:
        """Load FOLDER/config.json and the weights; heads that the file lacks keep random weights.

        Raises:
            UserError: a file is missing or broken, or the weights lack part of the encoder or do not fit it.
        """
        weights = read_weights(folder)
        config = BertConfig.from_pretrained(folder)
        with torch.device("meta"), NoNewWeights():  # wrong sizes are refused before memory is allocated for them
            check_weights(cls.from_weights(config, weights), with_encoder_prefix(weights), folder)
        model = cls.from_weights(config, weights)
        model.load(weights, folder)
        return model

    def load(self, weights: dict[str, Tensor], source: str | Path) -> LoadReport:
        """Copy a checkpoint's tensors into the model; report missing and unexpected keys (see `load_weights`)."""
        return load_weights(self, weights, source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write FOLDER/config.json and FOLDER/pytorch_model.bin."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, self.state_dict(), {CONFIG_NAME: self.config.to_json()})


class BertPredictionHeadTransform(nn.Module):
    """The hidden layer of the masked-LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden)))


class BertLMPredictionHead(nn.Module):
    """Masked-LM logits over the vocabulary; the output weights are the word embeddings."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = word_embeddings.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., hidden] to [..., vocabulary]."""
        return functional.linear(self.transform(hidden), self.decoder.weight, self.bias)


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)


class BertPreTrainingHeads(BertOnlyMLMHead):
    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__(config, word_embeddings)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForMaskedLM(PreTrainedModel):
    """BERT with its masked-LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertOnlyMLMHead(config, self.bert.embeddings.word_embeddings)
        self.init_weights()

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Map ids [batch, length] to logits [batch, length, vocabulary]."""
        last = (self.config.num_hidden_layers,)
        encoded = self.bert(
            input_ids, token_type_ids, attention_mask, hidden_layers=last, attention_layers=(), pool=False
        )
        return self.cls.predictions(encoded.hidden_states[0])

    def encode_one(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the last hidden state of one token of each text; the texts have the same number of tokens.

        After the embeddings have added positions, attention does not depend on the order of tokens. So the chosen
        token is moved to the front, and the last layer is computed for it alone.

        Args:
            input_ids, token_type_ids: [batch, length], without padding.
            positions: [batch], the index of the chosen token.

        Returns:
            [batch, hidden].
        """
        embedded = self.bert.embeddings(input_ids, token_type_ids)
        order = torch.arange(input_ids.shape[1], device=input_ids.device).repeat(len(input_ids), 1)
        order.scatter_(1, positions[:, None], 0)
        order[:, 0] = positions
        embedded = embedded.gather(1, order[:, :, None].expand_as(embedded))
        mask = torch.zeros(len(input_ids), 1, 1, input_ids.shape[1], device=input_ids.device)
        last, _, _ = self.bert.encoder(embedded, mask, (), (), self.config.num_hidden_layers)
        return last[:, 0]

    def load(self, weights: dict[str, Tensor], source: str | Path) -> LoadReport:
        """Copy a checkpoint's tensors into the model, as `load_weights` does.

        The output weights stay tied to the word embeddings unless the checkpoint's differ from them. The output bias
        may be stored under the decoder, as the `transformers` library does.
        """
        weights = with_encoder_prefix(weights)
        predictions = self.cls.predictions
        bias = weights.pop(_DECODER_BIAS, None)
        if bias is not None:
            weights.setdefault(_OUTPUT_BIAS, bias)
        decoder, words = weights.get(_DECODER), weights.get(_WORD_EMBEDDINGS)
        if decoder is not None and words is not None and not torch.equal(decoder, words):
            predictions.decoder.weight = nn.Parameter(torch.empty_like(predictions.decoder.weight))
        return super().load(weights, source)


class BertForPreTraining(BertForMaskedLM):
    """BERT with both pre-training heads: masked LM and next-sentence prediction."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config, self.bert.embeddings.word_embeddings)
        self.init_weights()

    def forward(  # type: ignore[override]  # returns one more output than the masked LM
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return masked-LM logits [batch, length, vocabulary] and next-sentence logits [batch, 2]."""
        last = (self.config.num_hidden_layers,)
        encoded = self.bert(input_ids, token_type_ids, attention_mask, hidden_layers=last, attention_layers=())
        heads = self.cls
        assert isinstance(heads, BertPreTrainingHeads)
        return heads.predictions(encoded.hidden_states[0]), heads.seq_relationship(encoded.pooled)


class TinyBertOutput(NamedTuple):
    """The output of a TinyBERT model, in the original's order.

    logits: [batch, labels]; None without `with_logits`.
    attention_scores: [batch, heads, query, key] for each of `attention_layers`.
    hidden_states: [batch, length, hidden] for each of `hidden_layers`; with `is_student` [batch, length, fit_size].
    """

    logits: Tensor | None
    attention_scores: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...]


class DistilledModel(PreTrainedModel):
    """A model that can project its hidden states to a teacher's hidden size (TinyBERT, equation 8: W_h).

    The first release of TinyBERT has one projection for all layers, `fit_dense`; the second has one for the
    embeddings and one for each layer, `fit_denses.0` to `fit_denses.N`. With fit_size 0 there is none.
    """

    fit_dense: nn.Linear
    fit_denses: nn.ModuleList

    def __init__(self, config: BertConfig, fit_size: int, per_layer: bool) -> None:
        super().__init__(config)
        self.fit_size, self.per_layer = fit_size, per_layer
        if fit_size and per_layer:
            count = config.num_hidden_layers + 1
            self.fit_denses = nn.ModuleList(nn.Linear(config.hidden_size, fit_size) for _ in range(count))
        elif fit_size:
            self.fit_dense = nn.Linear(config.hidden_size, fit_size)

    def project(self, encoded: EncoderOutput, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Project the hidden states of `layers`; return [batch, length, fit_size] for each."""
        pairs = zip(layers, encoded.hidden_states, strict=True)
        return tuple((self.fit_denses[layer] if self.per_layer else self.fit_dense)(state) for layer, state in pairs)


class TinyBertForPreTraining(DistilledModel):
    """The student of general distillation, whose teacher is an encoder that was not fine-tuned."""

    def __init__(self, config: BertConfig, fit_size: int = 768, per_layer: bool = False) -> None:
        super().__init__(config, fit_size, per_layer)
        self.cls = BertPreTrainingHeads(config, self.bert.embeddings.word_embeddings)
        self.init_weights()

    @classmethod
    def from_weights(cls, config: BertConfig, weights: dict[str, Tensor]) -> TinyBertForPreTraining:
        return cls(config, projection_size(weights) or 768, has_layer_projections(weights))

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> TinyBertOutput:
        """Return the attention scores and projected hidden states of all layers."""
        encoded = self.bert(input_ids, token_type_ids, attention_mask, pool=False)
        layers = range(self.config.num_hidden_layers + 1)
        return TinyBertOutput(None, encoded.attention_scores, self.project(encoded, layers))


class TinyBertForSequenceClassification(DistilledModel):
    """A classifier over the pooled output; teacher and student are both of this class.

    The head is logits = W relu(pooled) + b, as in the original, unless the config names the architecture
    BertForSequenceClassification: then it is logits = W pooled + b.
    """

    def __init__(self, config: BertConfig, num_labels: int = 2, fit_size: int = 768, per_layer: bool = False) -> None:
        super().__init__(config, fit_size, per_layer)
        self.num_labels = num_labels
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.init_weights()

    @classmethod
    def from_weights(cls, config: BertConfig, weights: dict[str, Tensor]) -> TinyBertForSequenceClassification:
        labels = num_labels_of(weights) or len(config.id2label) or 2
        return cls(config, labels, projection_size(weights), has_layer_projections(weights))

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        is_student: bool = False,
        hidden_layers: Sequence[int] | None = None,
        attention_layers: Sequence[int] | None = None,
        with_logits: bool = True,
    ) -> TinyBertOutput:
        """Classify a batch; return logits, attention scores and hidden states.

        Args:
            input_ids, token_type_ids, attention_mask: [batch, length], as for `BertModel`.
            is_student: whether to project the hidden states to the teacher's size.
            hidden_layers, attention_layers: the layers to return, as for `BertModel`.
            with_logits: without it, pooler and classifier are not computed.
        """
        if hidden_layers is None:
            hidden_layers = range(self.config.num_hidden_layers + 1)
        encoded = self.bert(
            input_ids,
            token_type_ids,
            attention_mask,
            hidden_layers=hidden_layers,
            attention_layers=attention_layers,
            pool=with_logits,
        )
        logits = None
        if encoded.pooled is not None:
            pooled = torch.relu(encoded.pooled) if self.config.relu_head else encoded.pooled
            logits = self.classifier(pooled)
        states = self.project(encoded, hidden_layers) if is_student else encoded.hidden_states
        return TinyBertOutput(logits, encoded.attention_scores, states)

    def set_labels(self, names: Sequence[str], relu_head: bool) -> None:
        """Record the labels' names, in id order, and the form of the head in the config."""
        architecture = RELU_HEAD_ARCHITECTURE if relu_head else LINEAR_HEAD_ARCHITECTURE
        extra = {key: value for key, value in self.config.extra.items() if key != "problem_type"}  # of other labels
        self.config = replace(self.config, architectures=[architecture], id2label=dict(enumerate(names)), extra=extra)
