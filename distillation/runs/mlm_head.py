"""A masked language model for data augmentation: load it from a folder, or train a head for an encoder without one.

The training loop is separate from `training/trainer.py`: it has no labels and no metric, draws new targets for every
batch, runs in one process, and takes minutes.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distillation.runtime.device import seed_process
from distillation.runtime.logs import Progress
from transformer.configuration import BertConfig
from transformer.errors import UserError
from transformer.file_utils import read_weights
from transformer.heads import BertForMaskedLM
from transformer.loading import NoNewWeights, check_weights, summarise, with_encoder_prefix
from transformer.optimization import BertAdam, decay_groups
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

HEAD = "cls.predictions."
IGNORED = -100  # target of tokens that are not predicted
_PREDICTED, _MASKED, _RANDOM = 0.15, 0.8, 0.1  # share of tokens; of those the shares replaced by [MASK], by any token
_BATCH, _WARMUP = 32, 0.1
_HEAD_RATE, _ENCODER_RATE = 1e-3, 1e-4
_LONGEST = 128  # pieces
_BATCHES_SORTED = 50  # the texts of so many batches are sorted by length before they are split into batches


class MaskedLM(NamedTuple):
    """A model, its tokenizer, and whether its checkpoint has the masked-LM head."""

    model: BertForMaskedLM
    tokenizer: BertTokenizer
    has_head: bool


def load_masked_lm(folder: Path, do_lower_case: bool, seed: int = 0) -> MaskedLM:
    """Load a BERT with its masked-LM head; a head that the folder lacks is initialized at random.

    Raises:
        UserError: a file is missing or broken, the vocabulary has no [MASK] or does not fit, or part of a head is
            missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a BERT with config.json, weights and vocab.txt")
    config = BertConfig.from_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary has {len(tokenizer)} tokens, vocab_size in config.json is {config.vocab_size}"
        )
    if tokenizer.mask_token_id is None:
        raise UserError(f"{folder}: the vocabulary has no [MASK], which replaces the words to predict")
    weights = with_encoder_prefix(read_weights(folder))
    has_head = any(key.startswith(HEAD) for key in weights)
    seed_process(seed, 0)
    with torch.device("meta"), NoNewWeights():  # check shapes before allocating memory
        check_weights(BertForMaskedLM(config), weights, folder)
    with NoNewWeights() if has_head else nullcontext():
        model = BertForMaskedLM(config)
    report = model.load(weights, folder)
    missing = [key for key in report.missing if key.startswith(HEAD)]
    if has_head and missing:
        raise UserError(f"{folder}: the masked-LM head lacks {summarise(missing)}")
    return MaskedLM(model.eval(), tokenizer, has_head)


def encode_texts(texts: Sequence[str], tokenizer: BertTokenizer, positions: int = _LONGEST) -> list[list[int]]:
    """Return the texts as ids with [CLS] and [SEP], truncated, without the texts that have no piece.

    Args:
        positions: of the model, which reads no longer texts.

    Raises:
        UserError: it has too few for one piece.
    """
    if positions < 3:
        raise UserError(f"--train_mlm_head: the model has only {positions} positions, too few for any text")
    longest = min(_LONGEST, positions) - 2
    encoded = tokenizer.encode_batch(texts)
    return [[tokenizer.cls_token_id, *ids[:longest], tokenizer.sep_token_id] for ids in encoded if ids]


def train_masked_lm(
    masked_lm: MaskedLM,
    texts: Sequence[Sequence[int]],
    steps: int,
    seed: int,
    half: torch.dtype | None = None,
    train_encoder: bool = True,
) -> float:
    """Train a model to predict masked words of texts (Devlin et al. 2019, section 3.1, task 1).

    The output weights stay tied to the word embeddings. The output bias of a new head starts at the logarithms of the
    tokens' frequencies, which saves the first hundreds of steps.

    Args:
        masked_lm: its model is on the device to train on.
        texts: from `encode_texts`; a twentieth of them, at most 500, is held out.
        steps: of 32 texts each; the learning rate rises for a tenth of them and then falls.
        half: dtype of the matrix products; None for fp32.
        train_encoder: whether to train the encoder too, or the head alone.

    Returns:
        The share of the held-out texts' masked tokens that are predicted correctly.

    Raises:
        UserError: there are too few texts, or the loss is not finite.
    """
    if len(texts) < 2:
        raise UserError("--train_mlm_head: there are too few texts to train on")
    model, tokenizer = masked_lm.model, masked_lm.tokenizer
    random = np.random.default_rng(seed)
    order = random.permutation(len(texts))
    held_out, training = np.split(order, [max(1, min(500, len(texts) // 20))])
    model.train()
    model.bert.requires_grad_(train_encoder)
    model.bert.pooler.requires_grad_(False)
    seed_process(seed, 0)
    if not masked_lm.has_head:
        model.cls.predictions.bias.data.copy_(_log_frequencies(texts, model.config.vocab_size))
    optimizer = _optimizer(model, steps, train_encoder)
    progress = Progress("training the masked-LM head", steps)
    losses: deque[Tensor] = deque(maxlen=100)
    for step, batch in zip(range(1, steps + 1), _batches(texts, training, random), strict=False):
        optimizer.zero_grad()
        loss = functional.cross_entropy(*_scores_and_targets(model, tokenizer, batch, random, half))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        progress.advance(partial(_mean_loss, losses))
        if (step % 100 == 0 or step == steps) and not math.isfinite(float(torch.stack(list(losses)).sum())):
            raise UserError(f"--train_mlm_head: the loss is not finite by step {step}")
    progress.close()
    model.eval().requires_grad_(True)
    return masked_accuracy(masked_lm, [texts[number] for number in held_out], seed, half)


def masked_accuracy(
    masked_lm: MaskedLM, texts: Sequence[Sequence[int]], seed: int, half: torch.dtype | None = None
) -> float:
    """Return the share of masked tokens that the model predicts correctly; the seed chooses the tokens."""
    random = np.random.default_rng(seed)
    correct = total = 0
    order = np.argsort([len(text) for text in texts], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            batch = [texts[number] for number in order[start : start + _BATCH]]
            scores, targets = _scores_and_targets(masked_lm.model, masked_lm.tokenizer, batch, random, half)
            correct += int((scores.argmax(dim=1) == targets).sum())
            total += len(targets)
    return correct / total


def _optimizer(model: BertForMaskedLM, steps: int, train_encoder: bool) -> BertAdam:
    """Return the optimizer of the head and, at a tenth of its rate, of the encoder with the tied output weights."""
    groups = [{**group, "lr": _ENCODER_RATE} for group in decay_groups(model.bert, 0.01)] if train_encoder else []
    in_encoder = {id(parameter) for group in groups for parameter in group["params"]}
    for group in decay_groups(model.cls, 0.01):
        own = [parameter for parameter in group["params"] if id(parameter) not in in_encoder]
        groups.append({**group, "params": own})
    return BertAdam(groups, lr=_HEAD_RATE, warmup=_WARMUP, t_total=steps, schedule="warmup_linear")


def _log_frequencies(texts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Return the logarithms [vocabulary] of the tokens' shares in the texts, each counted once more than it occurs."""
    counts = np.ones(vocabulary)
    for text in texts:
        np.add.at(counts, text[1:-1], 1)
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def _mean_loss(losses: Iterable[Tensor]) -> dict[str, str]:
    return {"loss": f"{float(torch.stack(list(losses)).mean()):.3f}"}


def _batches(
    texts: Sequence[Sequence[int]], numbers: np.ndarray, random: np.random.Generator
) -> Iterator[list[Sequence[int]]]:
    """Yield batches of texts of similar lengths without end; each epoch has every text once."""
    while True:
        order = random.permutation(numbers)
        for start in range(0, len(order), _BATCH * _BATCHES_SORTED):
            part = sorted(order[start : start + _BATCH * _BATCHES_SORTED], key=lambda number: len(texts[number]))
            batches = [part[begin : begin + _BATCH] for begin in range(0, len(part), _BATCH)]
            for index in random.permutation(len(batches)):
                yield [texts[number] for number in batches[index]]


def _scores_and_targets(
    model: BertForMaskedLM,
    tokenizer: BertTokenizer,
    batch: Sequence[Sequence[int]],
    random: np.random.Generator,
    half: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return the scores [masked, vocabulary] and the ids [masked] of the tokens to predict."""
    device = next(model.parameters()).device
    ids, mask, targets = masked_batch(batch, tokenizer, random)
    chosen = torch.from_numpy(targets != IGNORED)
    with torch.autocast(device.type, half, enabled=half is not None):
        encoded = model.bert(
            torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            hidden_layers=(model.config.num_hidden_layers,),
            attention_layers=(),
            pool=False,
        )
        scores = model.cls.predictions(encoded.hidden_states[0][chosen.to(device)])
    return scores.float(), torch.from_numpy(targets)[chosen].to(device)


def masked_batch(
    batch: Sequence[Sequence[int]], tokenizer: BertTokenizer, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a padded batch [texts, length] in which some tokens are masked.

    Of the pieces between [CLS] and [SEP] 15 % are to be predicted, at least one of each text: 80 % of them become
    [MASK], 10 % any token, 10 % stay.

    Returns:
        ids; mask: 1 at real tokens, 0 at padding; targets: the ids to predict, IGNORED elsewhere.
    """
    length = max(map(len, batch))
    ids = np.full((len(batch), length), tokenizer.pad_token_id, dtype=np.int64)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in batch])[:, None]
    positions = np.arange(length)[None, :]
    mask = (positions < lengths).astype(np.int64)
    draws = np.where((positions > 0) & (positions < lengths - 1), random.random(ids.shape), 2.0)
    chosen = (draws < _PREDICTED) | (draws == draws.min(axis=1, keepdims=True))
    targets = np.where(chosen, ids, IGNORED)
    kind, others = random.random(ids.shape), random.integers(0, len(tokenizer), ids.shape)
    assert tokenizer.mask_token_id is not None  # checked where the model was read
    ids = np.where(chosen & (kind < _MASKED), tokenizer.mask_token_id, ids)
    ids = np.where(chosen & (kind >= _MASKED) & (kind < _MASKED + _RANDOM), others, ids)
    return ids, mask, targets
