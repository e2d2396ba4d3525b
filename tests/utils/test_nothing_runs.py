"""No file of another's runs code when it is read: what the loaders use, and a pickle in the place of every file."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sip_engine
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.huggingface.families import read_config
from sip_engine.huggingface.shards import open_shards
from sip_engine.llm.reply_cache import ReplyCache
from sip_engine.utils.errors import SipError
from sip_engine.utils.files import read_json
from sip_engine.utils.jsonl import read_jsonl


class Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a tokenizer": ("tokenizer.model", Tokenizer.load),
    "a cache of replies": ("replies.sqlite", ReplyCache),
    "a JSON file of ours": ("kept.json", read_json),
    "records": ("metrics.jsonl", lambda path: list(read_jsonl(path))),
    "an imported model's config": ("config.json", lambda path: read_config(path.parent)),
    "an imported model's weights": ("model.safetensors", lambda path: open_shards(path.parent, {"a": (1,)})),
    "weights of the old kind": ("pytorch_model.bin", lambda path: open_shards(path.parent, {"a": (1,)})),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_pickle_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, load = LOADERS[name]
    (tmp_path / file).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(SipError) as seen:
        load(tmp_path / file)
    assert "\n" not in str(seen.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / file).read_bytes())
    assert (tmp_path / "ran").exists(), "the file would have run"


RUNS_CODE = re.compile(
    r"pickle\.loads?\(|Unpickler\(|torch\.load\(|allow_pickle|yaml\.load\(|marshal\.|(?<![\w.])(eval|exec)\(|joblib|"
    r"trust_remote_code=True|dist_checkpointing\.load\w*\(|(?<!def )read_metadata\("
)
ALLOWED = {
    ("policy/checkpoint_tensors.py", "Unpickler("): "admits the classes of an index only",
    (
        "policy/checkpoint_tensors.py",
        "dist_checkpointing.load(",
    ): "reads the index by the reader with that unpickler",
    ("policy/checkpoint_tensors.py", "read_metadata("): "that reader's own",
}


def test_no_loader_uses_what_runs_code() -> None:
    """Whoever needs one of these says here why it is safe, and adds a malicious file to the tests."""
    root = Path(sip_engine.__file__).parent
    found = {
        (path.relative_to(root).as_posix(), match.group())
        for path in root.rglob("*.py")
        for match in RUNS_CODE.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)
