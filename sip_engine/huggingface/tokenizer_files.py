"""The tokenizer of a model folder as our Tokenizer, and the files that let transformers load ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Fast

from sip_engine.data.bundled_tokenizer import (
    FAST_FILE,
    SENTENCEPIECE_FILE,
    FastBackend,
    bundled_files,
    is_bundle,
    write_bundle,
)
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.huggingface.families import SourceConfig, read_json
from sip_engine.utils.errors import CheckpointError, DataError

_CONFIG_FILE = "tokenizer_config.json"
_GENERATION_FILE = "generation_config.json"
_CARRIED = (
    SENTENCEPIECE_FILE,
    FAST_FILE,
    _CONFIG_FILE,
    _GENERATION_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_tokenizer(folder: Path, source: SourceConfig) -> Tokenizer:
    """The folder's tokenizer, with as many ids as the model has rows.

    Raises:
        CheckpointError: there is none of a kind we read, or it is not this model's.
    """
    try:
        files = {name: (folder / name).read_bytes() for name in _CARRIED if (folder / name).is_file()}
        if SENTENCEPIECE_FILE in files:
            plain = Tokenizer(files[SENTENCEPIECE_FILE], str(folder / SENTENCEPIECE_FILE))
            ours = _files_if_bpe(plain)
            if plain.vocab_size == source.vocab_size and files.items() <= ours.items():
                return plain
            if FAST_FILE not in files and _CONFIG_FILE not in files:
                files = ours | files
            bos_id, eos_id = plain.bos_id, plain.eos_id
        elif FAST_FILE in files:
            fast = FastBackend(files[FAST_FILE], str(folder / FAST_FILE))
            eos_id = _special_id(folder, source, fast, "eos")
            if eos_id is None:
                raise CheckpointError(
                    f"{folder}: no eos token in {_CONFIG_FILE} or config.json; name one there"
                )
            bos_id = _special_id(folder, source, fast, "bos")
            # Qwen has no bos: a document then begins with what ends the one before it.
            bos_id = eos_id if bos_id is None else bos_id
        else:
            raise CheckpointError(
                f"{folder}: no {SENTENCEPIECE_FILE} and no {FAST_FILE}; load the tokenizer in transformers and "
                "save_pretrained it there"
            )
        files.setdefault(_GENERATION_FILE, _generation(bos_id, eos_id))
        bundle = write_bundle(files, vocab_size=source.vocab_size, bos_id=bos_id, eos_id=eos_id)
        return Tokenizer(bundle, str(folder))
    except (DataError, OSError) as error:
        raise CheckpointError(str(error)) from None


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Name and content of every file that transformers needs for the same ids.

    An imported tokenizer's own files; else made from its sentencepiece model, which goes along.

    Raises:
        CheckpointError: the sentencepiece model is not BPE.
    """
    if is_bundle(tokenizer.model):
        return bundled_files(tokenizer.model, "tokenizer")
    names, definition = _as_fast(tokenizer.model)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
        # Our models know no roles: what a chat server is sent, they continue.
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    return {
        SENTENCEPIECE_FILE: tokenizer.model,
        FAST_FILE: definition,
        _CONFIG_FILE: _json(settings),
        _GENERATION_FILE: _generation(tokenizer.bos_id, tokenizer.eos_id),
    }


def _files_if_bpe(tokenizer: Tokenizer) -> dict[str, bytes]:
    try:
        return tokenizer_files(tokenizer)
    except CheckpointError:
        return {SENTENCEPIECE_FILE: tokenizer.model}


def _as_fast(model: bytes) -> tuple[list[str], bytes]:
    """(piece by id, `tokenizer.json`) of a sentencepiece BPE model, with our Tokenizer's rules.

    A space is spelled " ", so that U+2581 in a text goes to the bytes; nothing is put in front of a text
    but bos. A pair merges when sentencepiece has a piece for it, the best-scored piece first.
    """
    proto_module: Any = sentencepiece_model_pb2
    proto = proto_module.ModelProto.FromString(model)
    if proto.trainer_spec.model_type != proto_module.TrainerSpec.BPE:
        raise CheckpointError(
            "the tokenizer is a sentencepiece model of another kind than BPE, which cannot be exported"
        )
    kinds = proto_module.ModelProto.SentencePiece
    names = [piece.piece.replace("\u2581", " ") for piece in proto.pieces]
    normal = [number for number, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL]
    known = {names[number] for number in normal}
    merges = []
    for number in sorted(normal, key=lambda number: -proto.pieces[number].score):
        splits = ((names[number][:at], names[number][at:]) for at in range(1, len(names[number])))
        merges.extend(pair for pair in splits if known.issuperset(pair))
    vocab = {name: number for number, name in enumerate(names)}
    fast = Fast(models.BPE(vocab, merges, byte_fallback=True))
    bos = proto.trainer_spec.bos_piece
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])]
    )
    fast.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Fuse()]
    )
    for number, piece in enumerate(proto.pieces):
        is_special = piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        if is_special or piece.type == kinds.USER_DEFINED:
            fast.add_tokens([AddedToken(names[number], special=is_special, normalized=False)])
    return names, fast.to_str(pretty=True).encode()


def _special_id(folder: Path, source: SourceConfig, fast: FastBackend, name: str) -> int | None:
    """The id of bos or eos: named in the tokenizer's settings, else numbered in the model's."""
    path = folder / _CONFIG_FILE
    token = read_json(path).get(f"{name}_token") if path.is_file() else None
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str):
        return fast.id_of(content)
    numbered = source.raw.get(f"{name}_token_id")
    first = numbered[0] if isinstance(numbered, list) and numbered else numbered
    return first if isinstance(first, int) else None


def _generation(bos_id: int, eos_id: int) -> bytes:
    return _json({"bos_token_id": bos_id, "eos_token_id": eos_id})


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
