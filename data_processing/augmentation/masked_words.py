"""What a masked language model would put in a word's place: for many places of many texts at once.

The original code asks with two segments, the text with the word masked and the text as it stands
(`with_original`); the paper's algorithm 1 has the masked text alone.

One batch holds texts of one length, so nothing is padded, and which texts it holds depends on the texts asked about
alone. Each is worked on by one thread, and threads share out the batches: so what comes out is the same to the bit on
one machine however many threads and processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformer import packed_inference
from transformer.heads import BertForMaskedLM
from transformer.tokenization import BertTokenizer

_TOKENS_AT_ONCE = {"cpu": 1600, "cuda": 32768, "npu": 32768}  # of a batch; not a flag: it could change the result
# Of half precision's likeliest words some more than are wanted, which fp32 then chooses from.
_SHORTLIST = 4


class Place(NamedTuple):
    """A word of one piece in a text.

    pieces: the text's ids, or where that is too long those around the word. number: the word's among them, from 0.
    """

    pieces: tuple[int, ...]
    number: int


def place_in(pieces: Sequence[int], index: int, longest: int) -> Place:
    """A place in a text, of which the `longest` pieces around it are kept; a shorter text stays whole."""
    start = min(max(0, index - longest // 2), max(0, len(pieces) - longest))
    return Place(tuple(pieces[start : start + longest]), index - start)


class MaskedWords:
    """Asks a masked language model.

    Args:
        model: on the device that it is asked on, in eval mode; it is changed where `half` is given.
        tokenizer: of its vocabulary, which has a [MASK].
        with_original: whether the unmasked text is the second segment.
        half: the type of its matrix products; None for fp32.
        threads: that share out the batches, on a CPU.
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
        self._half, self._threads = half, threads
        self._device = next(model.parameters()).device
        predictions = model.cls.predictions
        self._output, self._bias = predictions.decoder.weight.detach().float(), predictions.bias.detach().float()
        self._words = [_whole_word(token) for token in tokenizer.vocab]
        self._score: Callable[[Tensor], Tensor] = self._exact
        if half is not None:
            self._prepare(half)

    @property
    def longest(self) -> int:
        """How many pieces of a text the model can be asked about."""
        positions = self._model.config.max_position_embeddings
        return (positions - 3) // 2 if self._with_original else positions - 2

    def candidates(self, places: Sequence[Place], count: int) -> dict[Place, list[str]]:
        """The whole words among the `count` likeliest tokens of each place, in the vocabulary's order.

        Pieces of words, and tokens that are no text, as [SEP], take a place among the `count` but are left out.
        """
        batches = self._batches(sorted(set(places), key=lambda place: (len(place.pieces), place)))

        def ask(batch: list[Place]) -> list[list[str]]:
            likeliest = self._likeliest(batch, min(count, len(self._words)))
            return [[self._words[i] for i in sorted(row) if self._words[i]] for row in likeliest.tolist()]

        if self._threads == 1 or self._device.type != "cpu":
            answers = list(map(ask, batches))
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                answers = list(pool.map(ask, batches))
        pairs = zip(batches, answers, strict=True)
        return {place: words for batch, answer in pairs for place, words in zip(batch, answer, strict=True)}

    def _batches(self, places: Sequence[Place]) -> list[list[Place]]:
        """Places of one length each, the costliest first."""
        batches: list[list[Place]] = []
        most = _TOKENS_AT_ONCE[self._device.type]
        for place in places:
            length = len(place.pieces) * (2 if self._with_original else 1) + 2
            if not batches or len(batches[-1][0].pieces) != len(place.pieces) or len(batches[-1]) * length >= most:
                batches.append([])
            batches[-1].append(place)
        return sorted(batches, key=lambda batch: -len(batch) * len(batch[0].pieces))

    def inputs(self, batch: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """The ids and segments [batch, length] that the model is asked with, and where its [MASK]s stand [batch]."""
        pieces = torch.tensor([place.pieces for place in batch], dtype=torch.long)
        index = torch.tensor([place.number for place in batch], dtype=torch.long)[:, None]
        masked = pieces.scatter(1, index, self._mask_id())
        begin = torch.full_like(index, self._tokenizer.cls_token_id)
        end = torch.full_like(index, self._tokenizer.sep_token_id)
        parts = [begin, masked, end]
        if self._with_original:
            parts += [pieces, end]
        ids = torch.cat(parts, dim=1)
        segments = torch.zeros_like(ids)
        segments[:, pieces.shape[1] + 2 :] = 1
        return ids.to(self._device), segments.to(self._device), index[:, 0].to(self._device) + 1

    def _mask_id(self) -> int:
        assert self._tokenizer.mask_token_id is not None  # checked where the model was read
        return self._tokenizer.mask_token_id

    @torch.inference_mode()
    def _likeliest(self, batch: Sequence[Place], count: int) -> Tensor:
        """[batch, count] ids."""
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

    def _exact(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._output[: len(self._words)], self._bias[: len(self._words)])

    def _prepare(self, half: torch.dtype) -> None:
        """Puts the weights of all matrix products into half precision once."""
        rows = len(self._words)
        output = nn.Linear(self._output.shape[1], rows, device=self._device)
        output.weight, output.bias = nn.Parameter(self._output[:rows]), nn.Parameter(self._bias[:rows])
        if self._device.type == "cpu" and half == torch.bfloat16 and packed_inference.can_pack():
            packed_inference.pack_linear_layers(self._model, few_sizes=True)
            self._score = packed_inference.PackedLinear(output, few_sizes=True)
            return
        for module in self._model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.to(half)
        self._score = output.to(half)


def _whole_word(token: str) -> str:
    """The token as text; nothing where it is a piece of a word, or stands for no text, as [PAD] or [unused7]."""
    no_text = token.startswith("##") or (len(token) > 2 and token.startswith("[") and token.endswith("]"))
    return "" if no_text or not token.strip() else token
