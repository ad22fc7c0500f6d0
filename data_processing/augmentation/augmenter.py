"""Augment rows: find the words of every text and their candidates, and make new texts.

Rows are processed in blocks, so that memory does not grow with the file. The new texts of a row depend on the seed, the
row's number and its texts, not on the other rows of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_processing.augmentation.glove import WordVectors
from data_processing.augmentation.masked_words import MaskedWords, Place, place_in
from data_processing.augmentation.replacements import is_replaceable, new_texts
from data_processing.examples import Row
from transformer.tokenization import BertTokenizer

BLOCK = 500  # rows; a run can be resumed after each block


@dataclass(frozen=True)
class Settings:
    """n: most new texts per text. m: most candidates per word. p: probability that a word is replaced."""

    n: int
    m: int
    p: float
    seed: int


@dataclass
class Augmenter:
    """Makes new texts by replacing words.

    masked: predicts words of one piece. vectors: of words of several pieces, which stay as they are without vectors.
    """

    settings: Settings
    tokenizer: BertTokenizer
    masked: MaskedWords
    vectors: WordVectors | None = None
    _neighbours: dict[str, list[str]] = field(default_factory=dict)

    def augment(self, rows: Sequence[Row], first: int) -> list[list[tuple[str, ...]]]:
        """Return the texts for each row: the original ones, then each new text beside the original other side.

        Args:
            rows: a block of a file's rows.
            first: the number of the first of them in the file, from 0.
        """
        sides = list(zip(*(row.texts for row in rows), strict=True))
        words = [[self.tokenizer.basic_tokenize(text) for text in side] for side in sides]
        candidates = iter(self.candidates([text for side in words for text in side]))
        n, p, seed = self.settings.n, self.settings.p, self.settings.seed
        augmented: list[list[tuple[str, ...]]] = [[row.texts] for row in rows]
        for side, texts in enumerate(sides):
            for number, text in enumerate(texts):
                key = f"{seed} {first + number} {side}"
                row = rows[number].texts
                for new in new_texts(text, words[side][number], next(candidates), n, p, key):
                    augmented[number].append((*row[:side], new, *row[side + 1 :]))
        return augmented

    def candidates(self, texts: Sequence[Sequence[str]]) -> list[dict[int, list[str]]]:
        """Return the candidates of each text's words that have any, by the word's index; texts are basic tokens."""
        pieces = self._pieces({word for words in texts for word in words})
        places: list[dict[int, Place]] = []
        several: set[str] = set()  # words of several pieces
        for words in texts:
            encoded = [piece for word in words for piece in pieces[word]]
            of_text, begin = {}, 0
            for number, word in enumerate(words):
                if is_replaceable(word):
                    if len(pieces[word]) == 1:
                        of_text[number] = place_in(encoded, begin, self.masked.longest)
                    else:
                        several.add(word)
                begin += len(pieces[word])
            places.append(of_text)
        predicted = self.masked.candidates([p for of_text in places for p in of_text.values()], self.settings.m)
        self._find_neighbours(several)
        result = []
        for words, of_text in zip(texts, places, strict=True):
            found = {number: predicted[place] for number, place in of_text.items()}
            found |= {n: self._neighbours[word] for n, word in enumerate(words) if word in several}
            result.append({number: found[number] for number in sorted(found) if found[number]})
        return result

    def _pieces(self, words: set[str]) -> dict[str, list[int]]:
        distinct = sorted(words)
        return dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))

    def _find_neighbours(self, words: set[str]) -> None:
        new = sorted(words - self._neighbours.keys())
        # A case-sensitive file, as GloVe's 840B, has words that a lower-casing tokenizer cannot return.
        form = str.lower if self.tokenizer.do_lower_case else str
        found = self.vectors.neighbours(new, self.settings.m, form) if self.vectors is not None else {}
        for word in new:
            self._neighbours[word] = [other for other in found.get(word, []) if len(other.split()) == 1]
