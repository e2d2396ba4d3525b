"""Turns text into token ids and back without losing a character."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sip_engine.data.bundled_tokenizer import BundledTokenizer
from sip_engine.data.sentencepiece import SentencePieceBackend, train_sentencepiece
from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_atomic
from sip_engine.utils.regular import read_bytes

MAX_TRAINING_BYTES = 256 * 2**20


class Tokenizer:
    """A lossless subword tokenizer: `decode(encode(t)) == t` for every text.

    Ids decode one by one, so `decode(a + b) == decode(a) + decode(b)` unless the split is inside a
    multi-byte character. Text never encodes to a control id, and control ids decode to "".
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """model: a serialised sentencepiece model, or the bundle of an imported model's tokenizer.

        `name` is what errors call it. Raises DataError.
        """
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model, in hex: equal fingerprints give equal ids."""
        self._backend = _open_backend(model, name)
        self.vocab_size = len(self._backend.token_bytes)
        self.bos_id = self._backend.bos_id
        self.eos_id = self._backend.eos_id
        """What ends a document."""
        self.eos_ids: tuple[int, ...] = getattr(self._backend, "eos_ids", (self.eos_id,))
        """All that end a text, `eos_id` first: a model may end a turn otherwise than a document."""
        adds_bos = getattr(self._backend, "adds_bos", True)
        self.begin = np.array([self.bos_id] if adds_bos else [], np.int32)
        """[1 or 0] int32: what its own rule puts in front of a text."""
        self.named_bos_id: int | None = getattr(self._backend, "named_bos_id", self.bos_id)
        """What a model's own settings call bos; None if nothing. A document of ours begins with `bos_id`."""
        self.named_eos_id: int | list[int] = getattr(self._backend, "named_eos_id", self.eos_id)
        """What a model's own settings call eos."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a model file. Raises DataError if it is missing, damaged or cannot be lossless."""
        try:
            model = read_bytes(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the tokenizer ({error.strerror}); check the path"
            ) from error
        return cls(model, str(path))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        out_path: str | Path,
        *,
        max_bytes: int = MAX_TRAINING_BYTES,
    ) -> Tokenizer:
        """Trains byte-pair encoding with byte fallback on `texts` and saves the model to `out_path`.

        The same texts give the same model. Only the first `max_bytes` of text are used.
        Raises DataError, naming the limit, if the texts cannot fill `vocab_size` pieces or need more.
        """
        tokenizer = cls(train_sentencepiece(texts, vocab_size, max_bytes))
        tokenizer.save(out_path)
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the model file, whole or not at all. Raises DataError where that cannot be done."""
        write_atomic(Path(path), self.model)

    def encode(self, text: str) -> np.ndarray:
        """Ids [num_tokens] int32 of a text, without bos and eos. Raises DataError for lone surrogates."""
        return self.encode_batch([text], num_threads=1)[0]

    def files(self) -> dict[str, bytes]:
        """The files of an imported model's tokenizer by name; none of one that was trained here."""
        if not self.model.startswith(b"{"):
            return {}
        from sip_engine.data.bundled_tokenizer import bundled_files  # it builds on this module

        return bundled_files(self.model, "tokenizer")

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Names and ids of the special tokens of an imported model."""
        return getattr(self._backend, "special_tokens", {})

    def encode_with_special(self, text: str) -> np.ndarray:
        """`encode` of a text in which the names of special tokens stand for them: never for a text of others."""
        ids: list[np.ndarray] = []
        names = sorted(self.special_tokens, key=len, reverse=True)
        whole = getattr(self._backend, "encode_with_special", None)
        if whole is not None or not names:
            return self.encode(text) if whole is None else whole(text)
        for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            known = piece in self.special_tokens
            ids.append(np.array([self.special_tokens[piece]], np.int32) if known else self.encode(piece))
        return np.concatenate(ids).astype(np.int32)

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[np.ndarray]:
        """`encode` of each text, on `num_threads` threads (default: one a core)."""
        for text in texts:
            if not _is_unicode(text):
                raise DataError(
                    f"text {text[:40]!r} has half of a surrogate pair, which no UTF-8 text has; drop it"
                )
        return self._backend.encode(texts, num_threads or os.cpu_count() or 1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids [n]. Bytes that are not whole characters become U+FFFD.

        Raises DataError for an id that is not in the vocabulary.
        """
        values = np.asarray(ids, dtype=np.int64)
        if values.size and (values.min() < 0 or values.max() >= self.vocab_size):
            bad = values[(values < 0) | (values >= self.vocab_size)][0]
            raise DataError(
                f"token id {bad} is not in this vocabulary of {self.vocab_size}; use the ids' own tokenizer"
            )
        token_bytes = self._backend.token_bytes
        return b"".join([token_bytes[token] for token in values.tolist()]).decode(errors="replace")

    def positions(self, ids: np.ndarray, text: str, ends: Sequence[int]) -> np.ndarray:
        """[n] int32: which of the tokens `ids` of `text` hold the last characters before `ends` [n]."""
        token_bytes = self._backend.token_bytes
        byte_ends = np.cumsum([len(token_bytes[token]) for token in ids.tolist()], dtype=np.int64)
        wanted = [len(text[:end].encode()) for end in ends]
        return np.searchsorted(byte_ends, wanted).astype(np.int32)


def _open_backend(model: bytes, name: str) -> SentencePieceBackend | BundledTokenizer:
    if model.startswith(b"{"):
        return BundledTokenizer(model, name)
    return SentencePieceBackend(model, name)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
