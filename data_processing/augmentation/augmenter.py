"""Rows in, augmented rows out: the words of every text, their candidates, the new texts.

A block of rows is worked on at a time, so that memory does not grow with the file. What comes of a row depends on the
seed, its number and its texts, not on what else is worked on beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_processing.augmentation.glove import WordVectors
from data_processing.augmentation.masked_words import MaskedWords, Place, place_in
from data_processing.augmentation.replacements import is_replaceable, new_texts
from data_processing.examples import Row
from transformer.tokenization import BertTokenizer

BLOCK = 500  # rows; whole ones are what a run that goes on finds done


@dataclass(frozen=True)
class Settings:
    """n: new texts made of one, at most. m: candidates of a word, at most. p: how often a word is replaced."""

    n: int
    m: int
    p: float
    seed: int


@dataclass
class Augmenter:
    """Makes new texts of texts.

    vectors: of the words of several pieces; without them such words stay themselves.
    """

    settings: Settings
    tokenizer: BertTokenizer
    masked: MaskedWords
    vectors: WordVectors | None = None
    _neighbours: dict[str, list[str]] = field(default_factory=dict)

    def augment(self, rows: Sequence[Row], first: int) -> list[list[tuple[str, ...]]]:
        """The texts that come of each row: its own as they stand, then each side's new ones beside the other's own.

        Args:
            rows: a block of a file's rows.
            first: the number of the first of them in the file, from 0.
        """
        sides = list(zip(*(row.texts for row in rows), strict=True))
        words = [[self.tokenizer.basic_tokenize(text) for text in side] for side in sides]
        candidates = self.candidates([text for side in words for text in side])
        made: list[list[tuple[str, ...]]] = [[row.texts] for row in rows]
        for side, texts in enumerate(sides):
            for number, text in enumerate(texts):
                new = new_texts(
                    text,
                    words[side][number],
                    candidates[side * len(texts) + number],
                    self.settings.n,
                    self.settings.p,
                    f"{self.settings.seed} {first + number} {side}",
                )
                own = rows[number].texts
                made[number] += [(*own[:side], changed, *own[side + 1 :]) for changed in new]
        return made

    def candidates(self, texts: Sequence[Sequence[str]]) -> list[dict[int, list[str]]]:
        """For each text, given as its basic tokens, the candidates of the words that have any, by their places."""
        pieces = self._pieces({word for words in texts for word in words})
        places: list[dict[int, Place]] = []
        several: set[str] = set()
        for words in texts:
            cut = [piece for word in words for piece in pieces[word]]
            here, begin = {}, 0
            for number, word in enumerate(words):
                if is_replaceable(word):
                    if len(pieces[word]) == 1:
                        here[number] = place_in(cut, begin, self.masked.longest)
                    else:
                        several.add(word)
                begin += len(pieces[word])
            places.append(here)
        likely = self.masked.candidates([place for here in places for place in here.values()], self.settings.m)
        self._find_neighbours(several)
        result = []
        for words, here in zip(texts, places, strict=True):
            found = {number: likely[place] for number, place in here.items()}
            found |= {n: self._neighbours[word] for n, word in enumerate(words) if word in several}
            result.append({number: found[number] for number in sorted(found) if found[number]})
        return result

    def _pieces(self, words: set[str]) -> dict[str, list[int]]:
        distinct = sorted(words)
        return dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))

    def _find_neighbours(self, words: set[str]) -> None:
        new = sorted(words - self._neighbours.keys())
        # A file that tells case apart, as GloVe's 840B, has words that the tokenizer would not give.
        form = str.lower if self.tokenizer.do_lower_case else str
        found = self.vectors.neighbours(new, self.settings.m, form) if self.vectors is not None else {}
        for word in new:
            self._neighbours[word] = [other for other in found.get(word, []) if len(other.split()) == 1]
