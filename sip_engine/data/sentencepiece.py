"""sentencepiece behind a `Tokenizer`: text to ids without loss, the bytes of each id, and training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from sip_engine.utils.errors import DataError

# sentencepiece writes a space as U+2581, so a text's own U+2581 must never reach it.
_SPACE = "\u2581"

# A serialised `normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false,
# escape_whitespaces: true }`. Protobuf merges messages that follow one another: the last value wins.
_KEEP_WHITESPACE = b"\x1a\x06\x18\x00\x20\x00\x28\x01"

LOSSLESS_PROBE = " A  \u2581\t\n\n\ufb01 \u00c5 A\u030a \uff21 \u3000 \u6f22 \U0001f600\r "


class SentencePieceBackend:
    """All that knows sentencepiece at run time: text to ids, and the bytes behind each id."""

    def __init__(self, model: bytes, name: str) -> None:
        self._processor = load_processor(model, name)
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(self._processor.is_byte(token) for token in self._byte_ids):
            raise DataError(f"{name}: this tokenizer has no byte fallback; train it with byte_fallback")
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(f"{name}: this tokenizer has no bos or no eos; train it with both")
        self.token_bytes = [self._bytes_of(token) for token in range(self._processor.vocab_size())]
        self._separator = self._find_separator()
        (ids,) = self.encode([LOSSLESS_PROBE], num_threads=1)
        if b"".join([self.token_bytes[token] for token in ids]) != LOSSLESS_PROBE.encode():
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


def load_processor(model: bytes, name: str) -> SentencePieceProcessor:
    try:
        processor = SentencePieceProcessor(model_proto=model + _KEEP_WHITESPACE)
    except RuntimeError as error:
        raise DataError(f"{name}: not a sentencepiece model, or damaged; replace the file") from error
    return processor


# Characters that have a meaning inside the trainer. They are left to the bytes, like newlines and tabs.
_UNTRAINED = re.compile("[\0-\x1f\x7f\u2581\u2585]+")
_TRAINING_CHARS = 4096
_TRAINING_THREADS = 4  # recorded in the model, so a machine's own count would change the fingerprint


def train_sentencepiece(texts: Iterable[str], vocab_size: int, max_bytes: int) -> bytes:
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
