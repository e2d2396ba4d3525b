"""A tokenizer that came with a model: its own files, carried byte for byte, behind our Tokenizer.

A `Tokenizer` is made from the bytes of one file. For a model's own tokenizer this file is a bundle: a JSON
object of all files that transformers reads, and what they leave open (rows of the vocabulary, bos, eos).
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tokenizers
from pydantic import AfterValidator, Base64Bytes, BaseModel, Field, ValidationError

from sip_engine.data.sentencepiece import LOSSLESS_PROBE, SentencePieceBackend
from sip_engine.utils.errors import DataError, first_fault
from sip_engine.utils.names import is_file_name

_FORMAT = "sip-engine tokenizer bundle 1"
SENTENCEPIECE_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
_SPACE = "\u2581"


def _checked_name(value: str) -> str:
    if not is_file_name(value):
        raise ValueError(f"{value!r} is no name of a file")
    return value


_Id = Annotated[int, Field(ge=0, lt=2**31)]


class _Bundle(BaseModel, strict=True):
    """The file's content, checked."""

    format: Literal["sip-engine tokenizer bundle 1"]
    vocab_size: _Id
    bos_id: _Id
    eos_id: _Id
    eos_ids: list[_Id] = Field(default_factory=list)
    adds_bos: bool = True
    named_bos_id: _Id | None = None
    named_eos_id: _Id | list[_Id] | None = None
    files: dict[Annotated[str, AfterValidator(_checked_name)], Base64Bytes]


def write_bundle(
    files: Mapping[str, bytes],
    *,
    vocab_size: int,
    bos_id: int,
    eos_ids: Sequence[int],
    adds_bos: bool = True,
    named_bos_id: int | None = None,
    named_eos_id: int | list[int] | None = None,
) -> bytes:
    """One file of many. `vocab_size` counts the model's rows, which may be more than the tokenizer's pieces.

    `eos_ids` are all that end a text, the one that ends a document first; `named_bos_id` and
    `named_eos_id` are what the model's own settings say, if anything.
    """
    encoded = {name: base64.b64encode(data).decode() for name, data in sorted(files.items())}
    head = {"format": _FORMAT, "vocab_size": vocab_size, "bos_id": bos_id, "eos_id": eos_ids[0]}
    head |= {"eos_ids": list(eos_ids), "adds_bos": adds_bos}
    head |= {"named_bos_id": named_bos_id, "named_eos_id": named_eos_id}
    return json.dumps({**head, "files": encoded}).encode()


def is_bundle(model: bytes) -> bool:
    """Whether a tokenizer's bytes are a bundle and not a sentencepiece model."""
    return model.startswith(b"{")


def bundled_files(model: bytes, name: str) -> dict[str, bytes]:
    """The files of a bundle. Raises DataError when it is damaged."""
    return dict(_read(model, name).files)


class BundledTokenizer:
    """Backend of a `Tokenizer`: sentencepiece where the bundle has its model, else the `tokenizers` library.

    Ids are those of transformers with `add_special_tokens=False`, but for three rules of ours: the name of a
    special token in a text is plain text; a text gets no space put in front; sentencepiece replaces nothing.
    """

    def __init__(self, model: bytes, name: str) -> None:
        """model: a bundle; `name` is what errors call it. Raises DataError."""
        head, files = _read(model, name), bundled_files(model, name)
        backend: Any
        if SENTENCEPIECE_FILE in files:
            backend = SentencePieceBackend(files[SENTENCEPIECE_FILE], name)
        elif FAST_FILE in files:
            backend = FastBackend(files[FAST_FILE], name)
        else:
            raise DataError(f"{name}: this bundle has no tokenizer; import the model again")
        self.bos_id, self.eos_id = head.bos_id, head.eos_id
        self.eos_ids = tuple(head.eos_ids or [self.eos_id])
        self.adds_bos = head.adds_bos
        says_bos = "named_bos_id" in head.model_fields_set
        self.named_bos_id: int | None = head.named_bos_id if says_bos else self.bos_id
        ends = list(self.eos_ids) if len(self.eos_ids) > 1 else self.eos_id
        self.named_eos_id: int | list[int] = head.named_eos_id or ends
        rows, table = head.vocab_size, backend.token_bytes
        unrowed = next((token for token in range(rows, len(table)) if table[token]), None)
        if unrowed is not None:
            raise DataError(
                f"{name}: a text can hold token {unrowed} ({table[unrowed][:20]!r}), but the model has {rows} rows; "
                "use the tokenizer of this model"
            )
        if not all(0 <= token < rows for token in (self.bos_id, *self.eos_ids)):
            raise DataError(
                f"{name}: bos is token {self.bos_id} and eos {list(self.eos_ids)}, but the model has {rows} rows; "
                "use the tokenizer of this model"
            )
        # What is left beyond the rows are special tokens, such as a pad, that no text becomes.
        table = table[:rows]
        self.token_bytes = table + [b""] * (rows - len(table))
        self.encode = backend.encode
        self.special_tokens: dict[str, int]
        if isinstance(backend, FastBackend):
            self.special_tokens, self.encode_with_special = (
                backend.special_tokens,
                backend.encode_with_special,
            )
        else:
            self.special_tokens = _special_of_settings(files, name)
        self.special_tokens = {name: token for name, token in self.special_tokens.items() if token < rows}


class FastBackend:
    """A `tokenizer.json`: byte-level BPE (Qwen, Llama 3), or BPE with byte fallback (Llama 2)."""

    def __init__(self, definition: bytes, name: str) -> None:
        """Raises DataError: damaged, of another kind, or one that changes more than a text's Unicode form."""
        try:
            spec = json.loads(definition)
            is_byte_level = '"ByteLevel"' in json.dumps(spec["decoder"])
            if not is_byte_level:
                spec = _with_plain_spaces(spec)
            self._fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except _Unsupported as error:
            raise DataError(f"{name}: {error}; only byte-level and byte-fallback BPE are supported") from None
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name}: {FAST_FILE} is damaged ({error}); copy it anew") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        self.token_bytes = self._bytes_of_all(is_byte_level)
        probe = unicodedata.normalize("NFC", LOSSLESS_PROBE)
        (ids,) = self.encode([probe], num_threads=1)
        if b"".join([self.token_bytes[token] for token in ids]) != probe.encode():
            raise DataError(f"{name}: this tokenizer changes text; use one that keeps case, spaces and lines")

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name."""
        return self._fast.token_to_id(token)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of its special tokens."""
        added = self._fast.get_added_tokens_decoder()
        return {one.content: token for token, one in added.items() if one.special}

    def encode_with_special(self, text: str) -> np.ndarray:
        """Ids [num_tokens] int32 of a text in which the names of special tokens stand for them."""
        self._fast.encode_special_tokens = False
        try:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        finally:
            self._fast.encode_special_tokens = True
        return np.array(ids, np.int32)

    def begins_with(self, token: int | None) -> bool:
        """Whether its own rule puts this token in front of a text."""
        ids = self._fast.encode("a", add_special_tokens=True).ids
        return token is not None and ids[:1] == [token]

    def encode(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        """Ids [num_tokens] int32 of each text; the library chooses its own threads."""
        encoded = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def _bytes_of_all(self, is_byte_level: bool) -> list[bytes]:
        alphabet = _byte_alphabet()

        def bytes_of(piece: str) -> bytes:
            if is_byte_level:
                return bytes(alphabet[char] for char in piece)
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            return piece.encode()

        vocab, added = self._fast.get_vocab(with_added_tokens=True), self._fast.get_added_tokens_decoder()
        table = [b""] * (max(vocab.values()) + 1)
        for piece, token in vocab.items():
            if token in added:
                table[token] = b"" if added[token].special else added[token].content.encode()
            else:
                table[token] = bytes_of(piece)
        return table


class _Added(BaseModel):
    content: str
    special: bool = False


class _Settings(BaseModel):
    added_tokens_decoder: dict[int, _Added] = Field(default_factory=dict)


def _special_of_settings(files: Mapping[str, bytes], name: str) -> dict[str, int]:
    """Special tokens that the settings add to a sentencepiece model."""
    try:
        settings = _Settings.model_validate_json(files.get("tokenizer_config.json", b"{}"))
    except ValidationError as error:
        raise DataError(
            f"{name}: tokenizer_config.json: {first_fault(error)}; import the model again"
        ) from None
    return {one.content: token for token, one in settings.added_tokens_decoder.items() if one.special}


class _Unsupported(Exception):
    pass


def _with_plain_spaces(spec: dict[str, Any]) -> dict[str, Any]:
    """The same BPE with a space spelled " " and not U+2581, and nothing put in front of a text.

    Then U+2581 in a text goes to the bytes like any unknown character, and every text survives.
    """
    model = spec["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise _Unsupported(f"{FAST_FILE} is {model['type']} without byte fallback")
    steps = [spec[part] for part in ("normalizer", "pre_tokenizer") if spec.get(part)]
    while steps:
        step = steps.pop()
        if step["type"] not in ("Sequence", "Prepend", "Replace", "Metaspace"):
            raise _Unsupported(f"{FAST_FILE} has a step {step['type']}")
        steps += step.get("normalizers", []) + step.get("pretokenizers", [])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    plain = {
        "vocab": {piece.replace(_SPACE, " "): token for piece, token in model["vocab"].items()},
        "merges": [[part.replace(_SPACE, " ") for part in pair] for pair in pairs],
    }
    return {**spec, "model": {**model, **plain}, "normalizer": None, "pre_tokenizer": None, "decoder": None}


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for: printable Latin-1 itself, then 256, 257..."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def _read(model: bytes, name: str) -> _Bundle:
    try:
        return _Bundle.model_validate_json(model)
    except ValidationError as error:
        raise DataError(f"{name}: {first_fault(error)}; copy it anew, or import its model again") from None
