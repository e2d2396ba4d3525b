"""A model's safetensors files: checked against the shapes they must have, read and written one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sip_engine.huggingface.families import read_json
from sip_engine.utils.errors import CheckpointError
from sip_engine.utils.files import write_json
from sip_engine.utils.names import is_file_name

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")
# Old writers store the rotary table; with tied embeddings some store the head a second time.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Shards:
    """Tensors by name, each known to be there in its shape."""

    files: dict[Path, tuple[str, ...]]
    """The tensors to be read from each file."""
    precision: str
    """"bf16" when every tensor is, else "fp32"."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), one file open at a time. Raises CheckpointError when one cannot be read."""
        for path, names in self.files.items():
            with _reading(path) as file:
                for name in names:
                    yield name, file.get_tensor(name)


def open_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Shards:
    """Check the headers of all weight files of a folder; no tensor is read yet.

    Raises:
        CheckpointError: no safetensors file, one that is truncated or something else, a tensor that is
            missing, unknown, of another shape or of a type other than float32, bfloat16, float16.
    """
    files: dict[Path, tuple[str, ...]] = {}
    kinds: set[str] = set()
    for path in _weight_files(folder):
        with _reading(path) as file:
            wanted = tuple(name for name in file.keys() if not _is_ignored(name, shapes))  # noqa: SIM118
            for name in wanted:
                found = file.get_slice(name)
                _check(path, name, tuple(found.get_shape()), found.get_dtype(), shapes)
                kinds.add(found.get_dtype())
            files[path] = wanted
    present = [name for names in files.values() for name in names]
    found_names = set(present)
    missing = [name for name in shapes if name not in found_names]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; copy all files of the model anew"
        )
    if len(present) != len(shapes):
        twice = next(name for name in present if present.count(name) > 1)
        raise CheckpointError(f"{folder}: {twice} is in several files; remove the files of another model")
    return Shards(files, "bf16" if kinds == {"BF16"} else "fp32")


def has_own_head(folder: Path) -> bool:
    """Whether a folder holds a head that differs from its embedding; transformers 5 then keeps the two apart."""
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with _reading(path) as file:
            for name in (_HEAD, _EMBEDDING):
                if name in file.keys():  # noqa: SIM118
                    found[name] = file.get_tensor(name)
    head, embedding = found.get(_HEAD), found.get(_EMBEDDING)
    return head is not None and embedding is not None and not torch.equal(head, embedding)


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> None:
    """Write one file, or numbered files of at most `max_bytes` (a larger tensor alone) and an index of them."""
    groups: list[dict[str, Tensor]] = []
    weight_map: dict[str, int] = {}
    total = room = 0

    def flush() -> None:
        if groups and groups[-1]:
            save_file(groups[-1], folder / f"part-{len(groups)}", metadata={"format": "pt"})
            groups[-1] = {}  # written, so its memory can go

    for name, tensor in tensors:
        if not groups or tensor.nbytes > room:
            flush()
            groups.append({})
            room = max_bytes
        groups[-1][name] = tensor
        weight_map[name] = len(groups)
        room -= tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(groups) == 1:
        (folder / "part-1").rename(folder / _FILE)
        return
    names = {n: f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)}
    for number, name in names.items():
        (folder / f"part-{number}").rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {k: names[n] for k, n in weight_map.items()}}
    write_json(folder / _INDEX, index)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / _INDEX}: has no weight_map; copy the file anew")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not is_file_name(name) or not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: named by {_INDEX} but not there; copy the model anew"
                )
        return [folder / name for name in names]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle, which can run code when it is loaded, is never read; write "
            "safetensors with transformers' save_pretrained(..., safe_serialization=True) where you trust it"
        )
    raise CheckpointError(f"{folder}: no {_FILE} and no {_INDEX}; give a folder written by save_pretrained")


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """`safe_open` whose errors, also while tensors are read, name the file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file ({error}); copy it anew, or write the model with "
            "save_pretrained"
        ) from None


def _is_ignored(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    return bool(_IGNORED.fullmatch(name)) or (name == _HEAD and _HEAD not in shapes)


def _check(
    path: Path, name: str, shape: tuple[int, ...], kind: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    if name not in shapes:
        raise CheckpointError(f"{path}: tensor {name} has no place in this architecture; check config.json")
    if shape != shapes[name]:
        raise CheckpointError(
            f"{path}: {name} has shape {list(shape)} but config.json makes it {list(shapes[name])}; "
            "use the config.json of these weights"
        )
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} is {kind}, not one of {', '.join(_DTYPES)}; convert the model to one of them"
        )
