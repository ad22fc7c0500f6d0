"""A masked language model for data augmentation: read from a folder, or taught to an encoder that has none.

The loop here is a short one of its own: `trainer.py`'s teaches a classifier on labelled features, by a task's metric,
in several processes; this one has neither labels nor metric, draws its targets anew for every batch, and takes
minutes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
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
_SHARE, _AS_MASK, _AS_OTHER = 0.15, 0.8, 0.1  # of the tokens that are predicted; of those masked, and replaced
_BATCH, _WARMUP = 32, 0.1
_HEAD_RATE, _ENCODER_RATE = 1e-3, 1e-4
_LONGEST = 128  # pieces
_BATCHES_SORTED = 50  # texts of so many batches are sorted by length before they are cut into batches
IGNORED = -100


class MaskedLM(NamedTuple):
    """A model, its tokenizer, and whether its checkpoint has the head that predicts masked words."""

    model: BertForMaskedLM
    tokenizer: BertTokenizer
    has_head: bool


def load_masked_lm(folder: Path, do_lower_case: bool, seed: int = 0) -> MaskedLM:
    """Reads a BERT with its masked-LM head; a head that the folder lacks is drawn anew.

    Raises:
        UserError: a file is missing or broken, the vocabulary has no [MASK] or does not fit, or part of a head is
            missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a BERT's folder with config.json, weights and vocab.txt")
    config = BertConfig.from_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the vocabulary has {len(tokenizer)} tokens, config.json says vocab_size {config.vocab_size}"
        )
    if tokenizer.mask_token_id is None:
        raise UserError(f"{folder}: the vocabulary has no [MASK], which the words to be predicted are replaced by")
    weights = with_encoder_prefix(read_weights(folder))
    has_head = any(key.startswith(HEAD) for key in weights)
    seed_process(seed, 0)
    with torch.device("meta"), NoNewWeights():  # sizes that the weights lack are refused before they are made
        check_weights(BertForMaskedLM(config), weights, folder)
    with NoNewWeights() if has_head else nullcontext():
        model = BertForMaskedLM(config)
    report = model.load(weights, folder)
    missing = [key for key in report.missing if key.startswith(HEAD)]
    if has_head and missing:
        raise UserError(f"{folder}: the masked-LM head lacks {summarise(missing)}")
    return MaskedLM(model.eval(), tokenizer, has_head)


def pieces_of(texts: Sequence[str], tokenizer: BertTokenizer) -> list[list[int]]:
    """The texts as ids with [CLS] and [SEP], the longest cut, those without any piece left out."""
    encoded = tokenizer.encode_batch(texts)
    return [[tokenizer.cls_token_id, *ids[: _LONGEST - 2], tokenizer.sep_token_id] for ids in encoded if ids]


def train(
    masked_lm: MaskedLM,
    texts: Sequence[Sequence[int]],
    steps: int,
    seed: int,
    half: torch.dtype | None = None,
    train_encoder: bool = True,
) -> float:
    """Teaches a model to predict masked words of texts (Devlin et al. 2019, section 3.1, task 1).

    The output weights stay tied to the word embeddings. The output bias of a new head begins at the logarithms of the
    tokens' frequencies, which saves the first hundreds of steps.

    Args:
        masked_lm: its model is on the device that it is trained on.
        texts: as `pieces_of` gives them; a twentieth of them, 500 at most, is held out.
        steps: of 32 texts each, with a rate that rises for a tenth of them and then falls.
        half: the type of its matrix products; None for fp32.
        train_encoder: whether the encoder learns too, or the head alone.

    Returns:
        The share of the held-out texts' masked tokens that are predicted rightly.

    Raises:
        UserError: there are too few texts, or the loss is not finite.
    """
    if len(texts) < 2:
        raise UserError("--train_mlm_head: there are too few texts to learn from")
    model, tokenizer = masked_lm.model, masked_lm.tokenizer
    random = np.random.default_rng(seed)
    order = random.permutation(len(texts))
    held = order[: max(1, min(500, len(texts) // 20))]
    learned = order[len(held) :]
    model.train()
    model.bert.requires_grad_(train_encoder)
    model.bert.pooler.requires_grad_(False)
    seed_process(seed, 0)
    if not masked_lm.has_head:
        model.cls.predictions.bias.data.copy_(_log_frequencies(texts, model.config.vocab_size))
    groups = [{**group, "lr": _ENCODER_RATE} for group in decay_groups(model.bert, 0.01)] if train_encoder else []
    known = {id(parameter) for group in groups for parameter in group["params"]}
    for group in decay_groups(model.cls, 0.01):  # the output weights are the encoder's
        own = [parameter for parameter in group["params"] if id(parameter) not in known]
        groups.append({**group, "params": own})
    optimizer = BertAdam(groups, lr=_HEAD_RATE, warmup=_WARMUP, t_total=steps, schedule="warmup_linear")
    progress = Progress("training the masked-LM head", steps)
    losses: list[Tensor] = []
    for step, batch in zip(range(1, steps + 1), _batches(texts, learned, random), strict=False):
        optimizer.zero_grad()
        loss = _loss(model, tokenizer, batch, random, half)
        loss.backward()
        optimizer.step()
        losses = [*losses[-99:], loss.detach()]
        progress.advance(partial(_shown, losses))
        if step % 100 == 0 or step == steps:
            _check_finite(losses, step)
    progress.close()
    model.eval().requires_grad_(True)
    return masked_accuracy(masked_lm, [texts[number] for number in held], seed, half)


def masked_accuracy(
    masked_lm: MaskedLM, texts: Sequence[Sequence[int]], seed: int, half: torch.dtype | None = None
) -> float:
    """The share of masked tokens that the model predicts rightly; the seed chooses which are masked."""
    random = np.random.default_rng(seed)
    right = total = 0
    order = np.argsort([len(text) for text in texts], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            batch = [texts[number] for number in order[start : start + _BATCH]]
            scores, targets = _predicted(masked_lm.model, masked_lm.tokenizer, batch, random, half)
            right += int((scores.argmax(dim=1) == targets).sum())
            total += len(targets)
    return right / total


def _log_frequencies(texts: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """[vocabulary] how often each token stands in the texts, one more than counted so that none is never."""
    counts = np.ones(vocabulary)
    for text in texts:
        np.add.at(counts, text[1:-1], 1)
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def _shown(losses: Sequence[Tensor]) -> dict[str, str]:
    return {"loss": f"{float(torch.stack(list(losses)).mean()):.3f}"}


def _check_finite(losses: Sequence[Tensor], step: int) -> None:
    if not math.isfinite(float(torch.stack(list(losses)).sum())):
        raise UserError(f"--train_mlm_head: the loss is not finite by step {step}")


def _batches(
    texts: Sequence[Sequence[int]], numbers: np.ndarray, random: np.random.Generator
) -> Iterator[list[Sequence[int]]]:
    """Without end: batches of texts of like length, all texts once before any comes again."""
    while True:
        order = random.permutation(numbers)
        for start in range(0, len(order), _BATCH * _BATCHES_SORTED):
            part = sorted(order[start : start + _BATCH * _BATCHES_SORTED], key=lambda number: len(texts[number]))
            batches = [part[begin : begin + _BATCH] for begin in range(0, len(part), _BATCH)]
            for place in random.permutation(len(batches)):
                yield [texts[number] for number in batches[place]]


def _loss(
    model: BertForMaskedLM,
    tokenizer: BertTokenizer,
    batch: Sequence[Sequence[int]],
    random: np.random.Generator,
    half: torch.dtype | None,
) -> Tensor:
    scores, targets = _predicted(model, tokenizer, batch, random, half)
    return functional.cross_entropy(scores, targets)


def _predicted(
    model: BertForMaskedLM,
    tokenizer: BertTokenizer,
    batch: Sequence[Sequence[int]],
    random: np.random.Generator,
    half: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Scores [masked, vocabulary] and ids [masked] of the tokens that are to be predicted."""
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
    """A padded batch [texts, length] with some of its tokens masked.

    Of the pieces between [CLS] and [SEP] 15 % are to be predicted, one at least of each text: 80 % of them become
    [MASK], 10 % any token, 10 % stay.

    Returns:
        ids; mask, 1 at real tokens and 0 at padding; targets, the ids to be predicted and IGNORED elsewhere.
    """
    length = max(map(len, batch))
    ids = np.full((len(batch), length), tokenizer.pad_token_id, dtype=np.int64)
    for row, text in zip(ids, batch, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in batch])[:, None]
    places = np.arange(length)[None, :]
    mask = (places < lengths).astype(np.int64)
    draws = np.where((places > 0) & (places < lengths - 1), random.random(ids.shape), 2.0)
    chosen = (draws < _SHARE) | (draws == draws.min(axis=1, keepdims=True))
    targets = np.where(chosen, ids, IGNORED)
    kind, others = random.random(ids.shape), random.integers(0, len(tokenizer), ids.shape)
    assert tokenizer.mask_token_id is not None  # checked where the model was read
    ids = np.where(chosen & (kind < _AS_MASK), tokenizer.mask_token_id, ids)
    ids = np.where(chosen & (kind >= _AS_MASK) & (kind < _AS_MASK + _AS_OTHER), others, ids)
    return ids, mask, targets
