"""Tokenizers, that of the package among them: byte-level BPE, every digit a token of its own."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

DEFAULT_PATH = pathlib.Path(__file__).parent.parent / "assets" / "tokenizer.json"
PAD, END = "<|pad|>", "<|end|>"


class Tokenizer:
    """Text to tokens and back, with what the needle tasks must know about the vocabulary.

    Newlines are split from everything else before BPE, so a run of newlines is always one or
    more whole tokens, and text may be cut at any line end and encoded piece by piece.

    Attributes:
      vocab_size: number of token ids.
      pad_id, end_id: ids of the special tokens; encoding ordinary text never gives them.
      newline_id: id of a single newline.
      line_end: bool [vocab_size], true for tokens that consist of newlines.
      stop_ids: tokens that end an answer: the end of text and every newline token.
      sizes: bytes of UTF-8 of each token, int64 [vocab_size].
      newlines: of each token, int64 [vocab_size].
      fingerprint: SHA-256 of the definition, in hex.
    """

    def __init__(self, definition: str):
        self._definition = definition
        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()
        self.pad_id = self._special(PAD)
        self.end_id = self._special(END)
        pieces = [self._tokenizer.decode([index]) for index in range(self.vocab_size)]
        self.line_end = np.array([bool(piece) and not piece.strip("\n") for piece in pieces])
        self.newline_id = pieces.index("\n")
        self.stop_ids = (self.end_id, *np.flatnonzero(self.line_end).tolist())
        # Byte-level entries are written with a character for each byte.
        names = [self._tokenizer.id_to_token(index) or "" for index in range(self.vocab_size)]
        self.sizes = np.array([len(name) for name in names], np.int64)
        self.newlines = np.where(self.line_end, self.sizes, 0)
        self.fixed = functools.cache(self._fixed)

    def _special(self, name: str) -> int:
        index = self._tokenizer.token_to_id(name)
        if index is None:
            raise ValueError(f"it lacks {name}: make one with scripts/train_tokenizer.py")
        return index

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text, int32 [N]."""
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of several texts, each int32 [N]; faster than one by one."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _fixed(self, text: str) -> np.ndarray:
        tokens = self.encode(text)
        tokens.flags.writeable = False
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; special tokens are left out."""
        return self._tokenizer.decode([int(token) for token in tokens])

    def decode_batch(self, sequences: Sequence[np.ndarray]) -> list[str]:
        """Texts of several arrays of tokens; faster than one by one."""
        return self._tokenizer.decode_batch([tokens.tolist() for tokens in sequences])

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file that `load` reads; raises OSError where it cannot."""
        pathlib.Path(path).write_text(self._definition, encoding="utf-8")

    def __reduce__(self):
        return Tokenizer, (self._definition,)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer learned from texts; the same texts in the same order give the same one.

    Args:
      texts: UTF-8, in pieces that end at line ends.
      vocab_size: entries, the 256 bytes and 2 special ones among them.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())


def load(path: str | os.PathLike | None = None) -> Tokenizer:
    """Reads a tokenizer file (by default the one in the package).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no tokenizer, or lacks the special tokens.
    """
    path = pathlib.Path(path or DEFAULT_PATH)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={str(path)!r} is not a file: give a tokenizer.json")
    definition = path.read_text(encoding="utf-8")
    try:
        json.loads(definition)
        return Tokenizer(definition)
    except ValueError as error:
        raise ValueError(f"tokenizer={str(path)!r} cannot be read ({error})") from error
