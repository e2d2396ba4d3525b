"""Turns text into token ids and back without losing a character."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from sip_engine.utils.errors import DataError
from sip_engine.utils.files import write_atomic

if TYPE_CHECKING:
    from sip_engine.data.bundled_tokenizer import BundledTokenizer

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

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a model file. Raises DataError if it is missing, damaged or cannot be lossless."""
        try:
            model = Path(path).read_bytes()
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
        tokenizer = cls(_train_sentencepiece(texts, vocab_size, max_bytes))
        tokenizer.save(out_path)
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the model file, whole or not at all. Raises DataError where that cannot be done."""
        write_atomic(Path(path), self.model)

    def encode(self, text: str) -> np.ndarray:
        """Ids [num_tokens] int32 of a text, without bos and eos. Raises DataError for lone surrogates."""
        return self.encode_batch([text], num_threads=1)[0]

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

    def places(self, ids: np.ndarray, text: str, ends: Sequence[int]) -> np.ndarray:
        """[n] int32: which of the tokens `ids` of `text` hold the last characters before `ends` [n]."""
        token_bytes = self._backend.token_bytes
        byte_ends = np.cumsum([len(token_bytes[token]) for token in ids.tolist()], dtype=np.int64)
        wanted = [len(text[:end].encode()) for end in ends]
        return np.searchsorted(byte_ends, wanted).astype(np.int32)


def _open_backend(model: bytes, name: str) -> _SentencePiece | BundledTokenizer:
    if model.startswith(b"{"):
        from sip_engine.data.bundled_tokenizer import BundledTokenizer  # it builds on this module

        return BundledTokenizer(model, name)
    return _SentencePiece(model, name)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# sentencepiece writes a space as U+2581, so a text's own U+2581 must never reach it.
_SPACE = "\u2581"

# A serialised `normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false,
# escape_whitespaces: true }`. Protobuf merges messages that follow one another: the last value wins.
_KEEP_WHITESPACE = b"\x1a\x06\x18\x00\x20\x00\x28\x01"

_LOSSLESS_PROBE = " A  \u2581\t\n\n\ufb01 \u00c5 A\u030a \uff21 \u3000 \u6f22 \U0001f600\r "


class _SentencePiece:
    """All that knows sentencepiece at run time: text to ids, and the bytes behind each id."""

    def __init__(self, model: bytes, name: str) -> None:
        self._processor = _load_processor(model, name)
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(self._processor.is_byte(token) for token in self._byte_ids):
            raise DataError(f"{name}: this tokenizer has no byte fallback; train it with byte_fallback")
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(f"{name}: this tokenizer has no bos or no eos; train it with both")
        self.token_bytes = [self._bytes_of(token) for token in range(self._processor.vocab_size())]
        self._separator = self._find_separator()
        (ids,) = self.encode([_LOSSLESS_PROBE], num_threads=1)
        if b"".join([self.token_bytes[token] for token in ids]) != _LOSSLESS_PROBE.encode():
            raise DataError(
                f"{name}: this tokenizer changes text; train it with normalization_rule_name=identity"
            )

    def encode(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        """Ids [num_tokens] int32 of each text; any str that is valid Unicode."""
        parts = [self._separator.split(text) for text in texts]
        plain = [part for text_parts in parts for part in text_parts[::2]]
        if num_threads == 1:  # a list would start a thread, which takes longer than most texts
            encoded = (self._processor.encode(part, out_type=int) for part in plain)
        else:
            encoded = iter(self._processor.encode(plain, out_type=int, num_threads=num_threads))
        return [self._join(text_parts, encoded) for text_parts in parts]

    def _join(self, parts: list[str], encoded: Iterator[list[int]]) -> np.ndarray:
        ids = next(encoded)
        for separator in parts[1::2]:
            ids.extend([self._byte_ids[byte] for byte in separator.encode()])
            ids.extend(next(encoded))
        return np.array(ids, dtype=np.int32)

    def _bytes_of(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        return (
            bytes([int(piece[3:5], 16)])
            if self._processor.is_byte(token)
            else piece.replace(_SPACE, " ").encode()
        )

    def _find_separator(self) -> re.Pattern[str]:
        """What is spelled in bytes: U+2581, and newlines if no piece holds one, as short lines are faster."""
        byte_ids = set(self._byte_ids)
        has_newline = any(b"\n" in raw for token, raw in enumerate(self.token_bytes) if token not in byte_ids)
        return re.compile(f"({_SPACE})" if has_newline else f"({_SPACE}|\n+)")


def _load_processor(model: bytes, name: str) -> SentencePieceProcessor:
    try:
        processor = SentencePieceProcessor(model_proto=model + _KEEP_WHITESPACE)
    except RuntimeError as error:
        raise DataError(f"{name}: not a sentencepiece model, or damaged; replace the file") from error
    return processor


# Characters that have a meaning inside the trainer. They are left to the bytes, like newlines and tabs.
_UNTRAINED = re.compile("[\0-\x1f\x7f\u2581\u2585]+")
_TRAINING_CHARS = 4096
_TRAINING_THREADS = 4  # recorded in the model, so a machine's own count would change the fingerprint


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, max_bytes: int) -> bytes:
    model = BytesIO()
    failures: list[Exception] = []
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts, max_bytes, failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            required_chars=_SPACE,  # spelled in bytes, a space would read as U+2581
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * _TRAINING_CHARS,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def _training_lines(texts: Iterable[str], max_bytes: int, failures: list[Exception]) -> Iterator[str]:
    """Short lines of plain text. The trainer hides exceptions of its input, so they go to `failures` too."""
    num_bytes = 0
    try:
        for text in texts:
            for line in _UNTRAINED.split(text):
                for start in range(0, len(line), _TRAINING_CHARS):
                    part = line[start : start + _TRAINING_CHARS]
                    num_bytes += len(part.encode())
                    if num_bytes > max_bytes:
                        return
                    yield part
    except Exception as error:
        failures.append(error)
        raise


def _training_error(message: str, vocab_size: int) -> DataError:
    if largest := re.search(r"too high.*<= (\d+)", message):
        return DataError(f"vocab_size {vocab_size} is more than this text can fill; use at most {largest[1]}")
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"vocab_size {vocab_size} cannot hold this text's characters; use at least {smallest[1]}"
        )
    if "sentences_.empty()" in message:
        return DataError("no text to train a tokenizer on; give documents with printable characters")
    return DataError(f"the tokenizer cannot be trained with vocab_size {vocab_size} ({message}); change it")
