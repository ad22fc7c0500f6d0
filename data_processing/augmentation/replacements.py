"""Choose the words of a text that may be replaced, and make new texts from candidates (paper, algorithm 1).

Candidates come from `masked_words.py` and `glove.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

# NLTK's English list without interrogatives (what, why, ...), and with 's and 're.
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves this that that'll these
    those am is are was were be been being have has had having do does did doing a an the and but if or because as
    until while of at by for with about against between into through during before after above below to from up down
    in out on off over under again further then once here there all any both each few more most other some such no
    nor not only own same so than too very s t can will just don don't should should've now d ll m o re ve y ain aren
    aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't
    mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't 's 're
    """.split()  # noqa: SIM905
)
_LETTERS = re.compile("[a-z]+")


def is_replaceable(word: str) -> bool:
    """Return whether a basic token may be replaced: it has only letters a-z and is not a stop word."""
    return word not in STOP_WORDS and _LETTERS.fullmatch(word) is not None


def new_texts(
    original: str, words: Sequence[str], candidates: Mapping[int, Sequence[str]], n: int, p: float, key: str
) -> list[str]:
    """Return up to `n` new texts, different from each other, from the original and from the original's joined words.

    In each of `n` passes every word with candidates is replaced, with probability `p`, by a random one of them.

    Args:
        original: the unchanged text.
        words: its basic tokens.
        candidates: of words, by their index in `words`. A word may be among its own candidates.
        key: seeds the draws: the same key gives the same texts.
    """
    if not candidates:
        return []
    draw = random.Random(key).random  # all bytes of a string seed it
    texts, known = [], {original, " ".join(words)}
    for _ in range(n):
        text = list(words)
        for index, choices in candidates.items():
            if draw() < p:
                text[index] = choices[int(draw() * len(choices))]
        joined = " ".join(text)
        if joined not in known:
            known.add(joined)
            texts.append(joined)
    return texts
