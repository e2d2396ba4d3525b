"""The tokenizer of a model folder as our Tokenizer, and the files that let transformers load ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from sip_engine.utils.regular import read_bytes

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
        files = {name: read_bytes(folder / name) for name in _CARRIED if (folder / name).is_file()}
        if SENTENCEPIECE_FILE in files:
            plain = Tokenizer(files[SENTENCEPIECE_FILE], str(folder / SENTENCEPIECE_FILE))
            ours = _files_if_bpe(plain)
            if plain.vocab_size == source.vocab_size and files.items() <= ours.items():
                return plain
            if FAST_FILE not in files and _CONFIG_FILE not in files:
                files = ours | files
            ids = _special_ids(folder, source, files, partial(_piece_id, plain, files))
            bos_id = plain.bos_id if ids.bos is None else ids.bos
            eos_ids = ids.eos or (plain.eos_id,)
            adds_bos = _settings(files).get("add_bos_token") is not False
        elif FAST_FILE in files:
            fast = FastBackend(files[FAST_FILE], str(folder / FAST_FILE))
            ids = _special_ids(folder, source, files, fast.id_of)
            if not ids.eos:
                raise CheckpointError(
                    f"{folder}: no eos token in {_CONFIG_FILE} or config.json; name one there"
                )
            bos_id, eos_ids = ids.bos, ids.eos
            adds_bos = _settings(files).get("add_bos_token")
            adds_bos = fast.begins_with(bos_id) if not isinstance(adds_bos, bool) else adds_bos
        else:
            raise CheckpointError(
                f"{folder}: no {SENTENCEPIECE_FILE} and no {FAST_FILE}; load the tokenizer in transformers and "
                "save_pretrained it there"
            )
        if bos_id is None:  # a document then begins with what ends the one before it, a prompt with nothing
            bos_id, adds_bos = eos_ids[0], False
        files[_GENERATION_FILE] = _with_all_ends(files.get(_GENERATION_FILE), ids.bos, eos_ids)
        bundle = write_bundle(
            files,
            vocab_size=source.vocab_size,
            bos_id=bos_id,
            eos_ids=eos_ids,
            adds_bos=adds_bos,
            named_bos_id=ids.bos,
            named_eos_id=source.raw.get("eos_token_id"),
        )
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
        _GENERATION_FILE: _generation(tokenizer.bos_id, tokenizer.eos_ids),
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


class _Special(NamedTuple):
    """Ids that a model's settings give; `eos` holds all of them, the tokenizer's own first."""

    bos: int | None
    eos: tuple[int, ...]


def _special_ids(
    folder: Path, source: SourceConfig, files: Mapping[str, bytes], id_of: Callable[[str], int | None]
) -> _Special:
    """Bos and every eos: named in the tokenizer's settings, and numbered in the model's and for generation."""
    path = folder / _GENERATION_FILE
    numbered = [source.raw, read_json(path) if path.is_file() else {}]
    settings = _settings(files)

    def named(kind: str) -> list[int]:
        token = settings.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        found = id_of(content) if isinstance(content, str) else None
        return [] if found is None else [found]

    def ids(kind: str) -> list[int]:
        found = named(kind)
        for values in numbered:
            found += _numbered(values, kind)
        return list(dict.fromkeys(found))

    return _Special(next(iter(ids("bos")), None), tuple(ids("eos")))


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    return _object(files, _CONFIG_FILE)


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: holds a {type(value).__name__}, must be a JSON object")
    return value


def _piece_id(tokenizer: Tokenizer, files: Mapping[str, bytes], name: str) -> int | None:
    """The id of a token of a sentencepiece model, or of one added to it, by its name."""
    added = _object(files, "added_tokens.json")
    decoder = _settings(files).get("added_tokens_decoder")
    for token, one in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(one, dict) and one.get("content") == name and token.isdecimal():
            added[name] = int(token)
    if type(added.get(name)) is int:
        return added[name]
    proto_module: Any = sentencepiece_model_pb2
    pieces = proto_module.ModelProto.FromString(tokenizer.model).pieces
    return next((number for number, piece in enumerate(pieces) if piece.piece == name), None)


def conventions(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """A line for each way in which ids differ from transformers' of the same folder, and on what ends a text."""
    if not is_bundle(tokenizer.model):
        return []
    files = bundled_files(tokenizer.model, "tokenizer")
    ends = ", ".join(map(str, tokenizer.eos_ids))
    lines = [f"text: ends at token {ends}; " + (
        f"begins with token {tokenizer.bos_id}"
        if len(tokenizer.begin)
        else f"begins with nothing, as its tokenizer has it (documents in training with token {tokenizer.bos_id})"
    )]  # fmt: skip
    path = folder / _GENERATION_FILE
    theirs = _numbered(read_json(path), "eos") if path.is_file() else list(tokenizer.eos_ids)
    if unnamed := [str(token) for token in tokenizer.eos_ids if token not in theirs]:
        lines.append(
            f"text: {_GENERATION_FILE} ends no reply at {', '.join(unnamed)}; here and in exports it does"
        )
    if _puts_space_first(files):
        lines.append("text: no space is put in front, where its own tokenizer puts one")
    lines.append("text: the names of special tokens in it are plain text, never the tokens")
    return lines


def _puts_space_first(files: Mapping[str, bytes]) -> bool:
    if SENTENCEPIECE_FILE in files:
        proto_module: Any = sentencepiece_model_pb2
        return proto_module.ModelProto.FromString(files[SENTENCEPIECE_FILE]).normalizer_spec.add_dummy_prefix
    spec = json.loads(files[FAST_FILE])
    steps = [step for part in ("normalizer", "pre_tokenizer") if (step := spec.get(part))]
    while steps:
        step = steps.pop()
        always = step.get("prepend_scheme") in ("always", "first") or step.get("add_prefix_space") is True
        if step["type"] == "Prepend" or (step["type"] in ("Metaspace", "ByteLevel") and always):
            return True
        steps += step.get("normalizers", []) + step.get("pretokenizers", [])
    return False


def _numbered(settings: Mapping[str, Any], kind: str) -> list[int]:
    """The ids of "bos" or "eos" in a config.json or generation_config.json: one, several or none."""
    value = settings.get(f"{kind}_token_id")
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def _with_all_ends(generation: bytes | None, bos_id: int | None, eos_ids: Sequence[int]) -> bytes:
    """A generation_config.json as it is, but that every end token ends replies: what is trained here ends in any."""
    if generation is None:
        return _generation(bos_id, eos_ids)
    values = json.loads(generation)
    if set(_numbered(values, "eos")) == set(eos_ids):
        return generation
    return _json({**values, "eos_token_id": _one_or_all(eos_ids)})


def _generation(bos_id: int | None, eos_ids: Sequence[int]) -> bytes:
    return _json({"bos_token_id": bos_id, "eos_token_id": _one_or_all(eos_ids)})


def _one_or_all(ids: Sequence[int]) -> int | list[int]:
    return list(ids) if len(ids) > 1 else ids[0]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
