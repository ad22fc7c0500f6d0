"""Text to WordPiece ids, equal to those of BERT's original Python tokenizer, at the speed of Rust.

The original works in two steps (Devlin et al. 2019, section 3; WordPiece: Wu et al. 2016, section
4.1): basic tokens, cut at spaces, punctuation and CJK ideographs, then the longest pieces of the
vocabulary that make up each of them. The second step is always the Rust `tokenizers` library's.
The first is too where its Unicode tables and Python's agree for certain (`_AGREEING`), which is
nearly all text; any other text takes the plain Python functions below.

Not here: [CLS] and [SEP] around sentences, truncation, padding.
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
_MOST_KNOWN_CHARACTERS = 4_000_000  # in the words whose ids are remembered: some 100 MB at most
_CHUNK = 4096  # texts a call into Rust: enough for all cores, few enough to bound memory

# Characters of which both sides make the same basic tokens, whatever stands around them. Left out of
# these blocks, for one reason each: "[" begins the special tokens, which the original keeps whole;
# what is dropped (control, format and unassigned characters) could hide one, as in "[MA\x00SK]";
# combining marks are reordered by NFD; a capital sigma's lower case depends on the letters after it.
# test_tokenization.py tries each code point.
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

# The original's list, which leaves out the newer extensions and holds a few that are no ideographs.
_IDEOGRAPHS = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f]"
)
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")  # some are symbols to Unicode


@cache
def _clean(char: str) -> str:
    """The character itself, a space, nothing, or an ideograph between spaces."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    # Category C: control, format, surrogate, private use, and unassigned in this Python's tables.
    if category.startswith("C") or char == "\ufffd":
        return ""
    return f" {char} " if _IDEOGRAPHS.match(char) else char


@cache
def _strip_accents(char: str) -> str:
    """The character without its accents: NFD less the non-spacing marks.

    For a whole word NFD also sorts its marks, in quadratic time. Those that sorting could leave in
    another order here (notes of music, Hangul tone marks) are in no BERT vocabulary: [UNK] either way.
    """
    return "".join(part for part in unicodedata.normalize("NFD", char) if unicodedata.category(part) != "Mn")


@cache
def _part_punctuation(char: str) -> str:
    """The character, between spaces if it is punctuation."""
    punctuation = char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")
    return f" {char} " if punctuation else char


def _is_plain(text: str) -> bool:
    """Whether all its characters are among `_AGREEING`."""
    return (text.isascii() and text.isprintable() and "[" not in text) or not _NEEDS_PYTHON.search(text)


class BertTokenizer:
    """WordPieces and their ids, from a vocabulary file: vocab.txt, or a tokenizer.json that works as BERT's.

    `vocab` maps tokens to ids, which are 0 to n-1 in its order; `vocabulary_file` is what vocab.txt
    holds of it, one token a line. `mask_token_id` is None where the vocabulary has no [MASK]. With
    `do_lower_case`, whatever a tokenizer.json says, text is lower-cased and loses its accents.

    Raises UserError if the file cannot be read or is no vocabulary of a BERT (see `read_vocabulary`).
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

        # No special token is added to either: Rust would find it inside a word, the original does not.
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
        self._known: dict[str, list[int]] = {}
        self._known_characters = 0

    @classmethod
    def from_pretrained(cls, folder: str | Path, do_lower_case: bool = True) -> "BertTokenizer":
        """The tokenizer of a model folder, from its vocab.txt or, where there is none, its tokenizer.json.

        Raises UserError as the class does.
        """
        return cls(vocabulary_path(folder), do_lower_case)

    def __len__(self) -> int:
        return len(self._tokens)

    def basic_tokenize(self, text: str) -> list[str]:
        """The words, punctuation marks and ideographs of a text, before they are cut into pieces.

        Special tokens stay whole where they stand alone: "a [MASK] b", not "a[MASK]b".
        """
        words: list[str] = []
        for word in "".join(map(_clean, text)).split():
            if word in _SPECIAL_TOKENS:
                words.append(word)
                continue
            if self.do_lower_case:
                word = "".join(map(_strip_accents, word.lower()))
            words.extend("".join(map(_part_punctuation, word)).split())
        return words

    def tokenize(self, text: str) -> list[str]:
        """The WordPieces of a text, without [CLS] and [SEP]."""
        return self.convert_ids_to_tokens(self.encode_batch([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without [CLS] and [SEP], on all cores (see TOKENIZERS_PARALLELISM)."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            ids.extend(self._encode_chunk(texts[start : start + _CHUNK]))
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after the other, int32, and how many each has, int64 [texts]."""
        ids, lengths = [np.empty(0, dtype=np.int32)], np.empty(len(texts), dtype=np.int64)
        for start in range(0, len(texts), _CHUNK):
            encoded = self._encode_chunk(texts[start : start + _CHUNK])
            lengths[start : start + len(encoded)] = list(map(len, encoded))
            ids.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
        return np.concatenate(ids), lengths

    def _encode_chunk(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [_is_plain(text) for text in texts]
        words = [text.split() for text, agreed in zip(texts, plain, strict=True) if agreed]
        known = self._ids_of_words(set().union(*words))
        from_words = self._from_words.encode_batch_fast(
            [self.basic_tokenize(text) for text, agreed in zip(texts, plain, strict=True) if not agreed],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        fast, slow = iter(words), iter(from_words)
        return [
            list(chain.from_iterable([known[word] for word in next(fast)])) if agreed else next(slow).ids
            for agreed in plain
        ]

    def _ids_of_words(self, words: set[str]) -> dict[str, list[int]]:
        """The ids of what stands between spaces; what was met before is remembered.

        A text of plain characters is cut at spaces before all else, so its ids are those of its words.
        """
        new = [word for word in words if word not in self._known]
        if sum(map(len, new)) + self._known_characters > _MOST_KNOWN_CHARACTERS:
            self._known, self._known_characters = {}, 0
            new = list(words)
        encoded = self._from_text.encode_batch_fast(new, add_special_tokens=False)
        self._known.update(zip(new, (encoding.ids for encoding in encoded), strict=True))
        self._known_characters += sum(map(len, new))
        return self._known

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """The id of each token. Raises ValueError, naming it, for one the vocabulary lacks."""
        ids: list[int] = []
        for token in tokens:
            if token not in self.vocab:
                raise ValueError(f"token {token!r} is not in the vocabulary")
            ids.append(self.vocab[token])
        return ids

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """The token of each id. Raises ValueError, naming it, for one outside the vocabulary."""
        tokens: list[str] = []
        for index in ids:
            if not 0 <= index < len(self._tokens):
                raise ValueError(f"id {index} is outside the vocabulary of {len(self._tokens)} tokens")
            tokens.append(self._tokens[index])
        return tokens

    def save_vocabulary(self, folder: str | Path) -> Path:
        """Write vocab.txt, whole or not at all; one that was read is written byte for byte. Returns its path."""
        target = Path(folder) / VOCAB_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: file.write(self.vocabulary_file))
        return target
