"""Predict candidates for words with a masked language model: for many words of many texts at once.

The original code's input has two segments, the text with the word masked and the unmasked text (`with_original`); the
paper's algorithm 1 has the masked text alone.

All inputs of a batch have one length, so there is no padding, and the batches depend on the texts alone. Every batch
is computed by one thread, and threads share the batches: so on one machine the result is the same to the bit whatever
the number of threads and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer import packed_inference
from transformer.heads import BertForMaskedLM
from transformer.tokenization import BertTokenizer

Result = TypeVar("Result")

_TOKENS_PER_BATCH = {"cpu": 1600, "cuda": 32768, "npu": 32768}  # not a flag: it could change the result
# In half precision so many times the wanted number of words are preselected, and fp32 chooses among them.
_SHORTLIST = 4


class Place(NamedTuple):
    """The place of a one-piece word in a text.

    pieces: the text's ids, or those around the word if the text is too long. number: the word's index in them.
    """

    pieces: tuple[int, ...]
    number: int


def place_in(pieces: Sequence[int], index: int, longest: int) -> Place:
    """Return the place of a piece, with at most `longest` pieces of the text around it."""
    start = min(max(0, index - longest // 2), max(0, len(pieces) - longest))
    return Place(tuple(pieces[start : start + longest]), index - start)


class MaskedWords:
    """Predicts the words at places of texts with a masked language model.

    Args:
        model: in eval mode, on the device to use; its weights are changed if `half` is given.
        tokenizer: has the model's vocabulary, with a [MASK].
        with_original: whether the unmasked text is the second segment.
        half: the dtype of matrix products; None for fp32.
        threads: share the batches, on a CPU.
    """

    def __init__(
        self,
        model: BertForMaskedLM,
        tokenizer: BertTokenizer,
        with_original: bool,
        half: torch.dtype | None = None,
        threads: int = 1,
    ) -> None:
        self._model, self._tokenizer, self._with_original = model, tokenizer, with_original
        self._device = next(model.parameters()).device
        self._half, self._threads = half, threads if self._device.type == "cpu" else 1
        predictions = model.cls.predictions
        self._output, self._bias = predictions.decoder.weight.detach().float(), predictions.bias.detach().float()
        self._words = [_whole_word(token) for token in tokenizer.vocab]
        self._score: Callable[[Tensor], Tensor] = self._score_fp32
        if half is not None:
            self._prepare(half)

    @property
    def longest(self) -> int:
        """The largest number of a text's pieces that fit into the model's input."""
        positions = self._model.config.max_position_embeddings
        return (positions - 3) // 2 if self._with_original else positions - 2

    def candidates(self, places: Sequence[Place], count: int) -> dict[Place, list[str]]:
        """Return the whole words among the `count` most probable tokens of each place, in the vocabulary's order.

        Pieces of words, and tokens that are not text, as [SEP], count among the `count` but are left out.
        """
        places = sorted(set(places), key=lambda place: (len(place.pieces), place))
        lengths = [len(place.pieces) * (2 if self._with_original else 1) + 2 for place in places]
        numbers = equal_length_batches(lengths, _TOKENS_PER_BATCH[self._device.type])
        batches = [[places[number] for number in batch] for batch in numbers]

        def words(batch: list[Place]) -> list[list[str]]:
            tokens = self._most_probable(batch, min(count, len(self._words)))
            return [[self._words[i] for i in sorted(row) if self._words[i]] for row in tokens.tolist()]

        pairs = zip(batches, map_batches(words, batches, self._threads), strict=True)
        return {place: found for batch, rows in pairs for place, found in zip(batch, rows, strict=True)}

    def inputs(self, batch: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the model's ids and segments [batch, length], and the positions of the [MASK]s [batch]."""
        pieces = torch.tensor([place.pieces for place in batch], dtype=torch.long)
        index = torch.tensor([place.number for place in batch], dtype=torch.long)[:, None]
        mask_id = self._tokenizer.mask_token_id
        assert mask_id is not None  # checked where the model was read
        masked = pieces.scatter(1, index, mask_id)
        begin = torch.full_like(index, self._tokenizer.cls_token_id)
        end = torch.full_like(index, self._tokenizer.sep_token_id)
        parts = [begin, masked, end]
        if self._with_original:
            parts += [pieces, end]
        ids = torch.cat(parts, dim=1)
        segments = torch.zeros_like(ids)
        segments[:, pieces.shape[1] + 2 :] = 1
        return ids.to(self._device), segments.to(self._device), index[:, 0].to(self._device) + 1

    @torch.inference_mode()
    def _most_probable(self, batch: Sequence[Place], count: int) -> Tensor:
        """Return the ids [batch, count] of the most probable tokens, in no order."""
        with self._autocast():
            hidden = self._model.cls.predictions.transform(self._model.encode_one(*self.inputs(batch)))
            scores = self._score(hidden)
        if self._half is None:
            return scores.topk(count, sorted=False).indices
        near = scores.topk(min(_SHORTLIST * count, scores.shape[1]), sorted=False).indices
        exact = torch.einsum("bnh,bh->bn", self._output[near], hidden.float()) + self._bias[near]
        return near.gather(1, exact.topk(count, sorted=False).indices)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._half, enabled=self._half is not None)

    def _score_fp32(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._output[: len(self._words)], self._bias[: len(self._words)])

    def _prepare(self, half: torch.dtype) -> None:
        """Convert the weights of all matrix products to half precision."""
        rows = len(self._words)
        output = nn.Linear(self._output.shape[1], rows, device=self._device)
        output.weight, output.bias = nn.Parameter(self._output[:rows]), nn.Parameter(self._bias[:rows])
        if self._device.type == "cpu" and half == torch.bfloat16 and packed_inference.can_pack():
            packed_inference.pack_linear_layers(self._model, bucket_rows=True)
            self._score = packed_inference.PackedLinear(output, bucket_rows=True)
            return
        for module in self._model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.to(half)
        self._score = output.to(half)


def equal_length_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return batches of the numbers of inputs, the largest batch first; all inputs of a batch have one length.

    Args:
        lengths: of the inputs, in tokens.
        most: tokens in a batch; the last input may exceed it.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        if not batches or lengths[batches[-1][0]] != length or len(batches[-1]) * length >= most:
            batches.append([])
        batches[-1].append(number)
    return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])


def map_batches(function: Callable[[Any], Result], batches: Sequence[Any], threads: int) -> list[Result]:
    """Return the function's results, in the batches' order."""
    if threads == 1:
        return list(map(function, batches))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, batches))


def _whole_word(token: str) -> str:
    """Return the token as text; an empty string for a piece of a word or a token without text, as [PAD]."""
    no_text = token.startswith("##") or (len(token) > 2 and token.startswith("[") and token.endswith("]"))
    return "" if no_text or not token.strip() else token
