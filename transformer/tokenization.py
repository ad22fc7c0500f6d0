"""WordPiece tokenization with the ids of BERT's original Python tokenizer, at the speed of Rust.

The original has two steps (Devlin et al. 2019, section 3; WordPiece: Wu et al. 2016, section 4.1): it splits text into
basic tokens at spaces, punctuation and CJK ideographs, then each into the longest pieces of the vocabulary. The second
step is always done by the Rust `tokenizers` library. So is the first for text whose characters Rust and Python treat
alike (`_AGREEING`), which is nearly all text; other text takes the Python functions below.

[CLS] and [SEP], truncation and padding are not added here.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from transformer.file_utils import VOCAB_NAME, write_atomically
from transformer.vocabulary import LONGEST_WORD, SPECIAL_TOKENS, read_vocabulary, vocabulary_path

_SPECIAL_TOKENS = frozenset(SPECIAL_TOKENS.values())
_MOST_CACHED_CHARACTERS = 4_000_000  # of words in the cache: about 100 MB at most
_CHUNK = 4096  # texts per call into Rust: enough for all cores, few enough to bound memory

# Characters that Rust and Python split into the same basic tokens in any context. Left out of these blocks:
# "[" begins the special tokens, which the original keeps whole; control, format and unassigned characters are dropped
# and could hide one, as in "[MA\x00SK]"; combining marks are reordered by NFD; the lower case of a capital sigma
# depends on the letters after it. test_tokenization.py tries each code point.
_AGREEING = (
    "\t\n\r -Z\\\\-~"  # ASCII
    "\u00a0-\u00ac\u00ae-\u02ff\u1e00-\u1eff"  # Latin, phonetic letters
    "\u0384-\u038a\u038c\u038e-\u03a1\u03a4-\u03ff"  # Greek
    "\u0400-\u0482\u048a-\u052f"  # Cyrillic
    "\u0531-\u0556\u0561-\u0587\u10d0-\u10f8"  # Armenian, Georgian
    "\u05d0-\u05ea\u0621-\u063a\u0640-\u064a\u0660-\u066f"  # Hebrew, Arabic without vowel signs
    "\u2000-\u200a\u2010-\u2027\u202f-\u205f"  # spaces, general punctuation
    "\u2074-\u208e\u20a0-\u20bd"  # superscripts, subscripts, currencies
    "\u2100-\u2189\u2190-\u23f3\u2460-\u2b4c"  # letter-like, numbers, arrows, mathematics, symbols
    "\u3000-\u3029\u3030-\u303f\u3041-\u3096\u309b-\u30ff"  # CJK punctuation, kana
    "\u3105-\u312d\u3131-\u318e\uac00-\ud7a3"  # Bopomofo, Hangul
    "\u3400-\u4db5\u4e00-\u9fa5\uf900-\ufa6d"  # CJK ideographs
    "\uff01-\uff9f\uffe0-\uffe6"  # full- and half-width forms
    "\U0001f300-\U0001f64f\U0001f680-\U0001f6c5"  # pictographs, emoticons
)
_NEEDS_PYTHON = re.compile(f"[^{_AGREEING}]")

# The original's list; it lacks newer extensions and has a few characters that are not ideographs.
_IDEOGRAPHS = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")  # some are symbols to Unicode


@cache
def _clean(char: str) -> str:
    """Return the character, a space for white space, nothing for a control character, spaces around an ideograph."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    # Category C: control, format, surrogate, private use, and unassigned in this Python's tables.
    if category.startswith("C") or char == "\ufffd":
        return ""
    return f" {char} " if _IDEOGRAPHS.match(char) else char


@cache
def _strip_accents(char: str) -> str:
    """Return the character without accents: its NFD form without non-spacing marks.

    NFD of a whole word would also sort its marks, in quadratic time. The marks that would keep another order here
    (notes of music, Hangul tone marks) are in no BERT vocabulary: the word is [UNK] either way.
    """
    return "".join(part for part in unicodedata.normalize("NFD", char) if unicodedata.category(part) != "Mn")


@cache
def _split_punctuation(char: str) -> str:
    """Return the character, between spaces if it is punctuation."""
    punctuation = char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")
    return f" {char} " if punctuation else char


def _is_agreeing(text: str) -> bool:
    """Return whether all characters of the text are in `_AGREEING`."""
    return (text.isascii() and text.isprintable() and "[" not in text) or not _NEEDS_PYTHON.search(text)


class BertTokenizer:
    """A WordPiece tokenizer with the vocabulary of a vocab.txt, or of a tokenizer.json that works like BERT's.

    vocab: tokens and their ids, 0 to n-1 in this order.
    vocabulary_file: the content of vocab.txt, one token a line.
    mask_token_id: None if the vocabulary has no [MASK].
    do_lower_case: lower-case text and strip its accents; it overrides tokenizer.json.

    Raises:
        UserError: the file cannot be read or is no vocabulary of a BERT (see `read_vocabulary`).
    """

    def __init__(self, vocab_file: str | Path, do_lower_case: bool = True) -> None:
        self.vocab, self.vocabulary_file = read_vocabulary(Path(vocab_file))
        self.do_lower_case = do_lower_case
        self.pad_token_id = self.vocab["[PAD]"]
        self.unk_token_id = self.vocab["[UNK]"]
        self.cls_token_id = self.vocab["[CLS]"]
        self.sep_token_id = self.vocab["[SEP]"]
        self.mask_token_id = self.vocab.get("[MASK]")
        self._tokens = list(self.vocab)

        # Special tokens are not registered: Rust would find them inside words too, unlike the original.
        pieces = WordPiece(self.vocab, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
        self._from_words = Tokenizer(pieces)
        self._from_text = Tokenizer(pieces)
        self._from_text.normalizer = BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=do_lower_case,
            lowercase=do_lower_case,
        )
        self._from_text.pre_tokenizer = BertPreTokenizer()
        self._cached: dict[str, list[int]] = {}
        self._cached_characters = 0

    @classmethod
    def from_pretrained(cls, folder: str | Path, do_lower_case: bool = True) -> "BertTokenizer":
        """Load the tokenizer of a model folder, from vocab.txt or else from tokenizer.json.

        Raises:
            UserError: as for the class.
        """
        return cls(vocabulary_path(folder), do_lower_case)

    def __len__(self) -> int:
        return len(self._tokens)

    def basic_tokenize(self, text: str) -> list[str]:
        """Split a text into words, punctuation marks and ideographs.

        A special token stays whole only between spaces: in "a [MASK] b", not in "a[MASK]b".
        """
        words: list[str] = []
        for word in "".join(map(_clean, text)).split():
            if word in _SPECIAL_TOKENS:
                words.append(word)
                continue
            if self.do_lower_case:
                word = "".join(map(_strip_accents, word.lower()))
            words.extend("".join(map(_split_punctuation, word)).split())
        return words

    def tokenize(self, text: str) -> list[str]:
        """Return the WordPieces of a text, without [CLS] and [SEP]."""
        return self.convert_ids_to_tokens(self.encode_batch([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without [CLS] and [SEP]; uses all cores (see TOKENIZERS_PARALLELISM)."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            ids.extend(self._encode_chunk(texts[start : start + _CHUNK]))
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, int32 [tokens], and the length of each text, int64 [texts]."""
        ids, lengths = [np.empty(0, dtype=np.int32)], np.empty(len(texts), dtype=np.int64)
        for start in range(0, len(texts), _CHUNK):
            encoded = self._encode_chunk(texts[start : start + _CHUNK])
            lengths[start : start + len(encoded)] = list(map(len, encoded))
            ids.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
        return np.concatenate(ids), lengths

    def _encode_chunk(self, texts: Sequence[str]) -> list[list[int]]:
        agreeing = [_is_agreeing(text) for text in texts]
        words = [text.split() for text, agrees in zip(texts, agreeing, strict=True) if agrees]
        ids = self._ids_of_words(set().union(*words))
        from_words = self._from_words.encode_batch_fast(
            [self.basic_tokenize(text) for text, agrees in zip(texts, agreeing, strict=True) if not agrees],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        fast, slow = iter(words), iter(from_words)
        return [
            list(chain.from_iterable([ids[word] for word in next(fast)])) if agrees else next(slow).ids
            for agrees in agreeing
        ]

    def _ids_of_words(self, words: set[str]) -> dict[str, list[int]]:
        """Return a dictionary that has the ids of at least these words, from the cache or computed.

        The words stand between spaces in text of `_AGREEING` characters: it is split there first, so its ids are those
        of its words.
        """
        new = [word for word in words if word not in self._cached]
        if sum(map(len, new)) + self._cached_characters > _MOST_CACHED_CHARACTERS:
            self._cached, self._cached_characters = {}, 0
            new = list(words)
        encoded = self._from_text.encode_batch_fast(new, add_special_tokens=False)
        self._cached.update(zip(new, (encoding.ids for encoding in encoded), strict=True))
        self._cached_characters += sum(map(len, new))
        return self._cached

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Return the id of each token. Raise ValueError for a token that the vocabulary lacks."""
        ids: list[int] = []
        for token in tokens:
            if token not in self.vocab:
                raise ValueError(f"token {token!r} is not in the vocabulary")
            ids.append(self.vocab[token])
        return ids

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the token of each id. Raise ValueError for an id outside the vocabulary."""
        tokens: list[str] = []
        for index in ids:
            if not 0 <= index < len(self._tokens):
                raise ValueError(f"id {index} is outside the vocabulary of {len(self._tokens)} tokens")
            tokens.append(self._tokens[index])
        return tokens

    def save_vocabulary(self, folder: str | Path) -> Path:
        """Write FOLDER/vocab.txt atomically, byte for byte as it was read; return its path."""
        target = Path(folder) / VOCAB_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: file.write(self.vocabulary_file))
        return target
