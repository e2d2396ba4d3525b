"""FIFOs, sockets, devices and folders in the place of files: every input refuses them at once, in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Sip
from world_runs import run_config

import sip_engine
from sip_engine.config.parse import parse_config
from sip_engine.distributed.mesh import Mesh
from sip_engine.train import train
from sip_engine.utils.errors import CheckpointError, ConfigError, DataError

CONFIG, DATA, CHECKPOINT = ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code


def make_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has 108 bytes at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(before)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}

RUN = """
steps = 1
[model]
num_layers = 1
hidden_size = 16
num_heads = 2
num_kv_heads = 1
ffn_size = 24
max_context = 64
[data]
path = "texts.jsonl"
suffix_tokens = 8
max_prefix_tokens = 24
min_prefix_tokens = 4
vocab_size = 300
"""

# What the file is called; the command; its exit code; "/" ends the name of a folder that the file lies in.
INPUTS: dict[str, tuple[str, str, int]] = {
    "a config": ("odd", "train odd", CONFIG),
    "what a config extends": ("odd", "train extends.toml", CONFIG),
    "documents": ("odd", "train run.toml --data.path odd", DATA),
    "documents of a known kind": ("odd.jsonl.gz", "train run.toml --data.path odd.jsonl.gz", DATA),
    "a table of documents": ("odd.parquet", "data inspect run.toml --data.path odd.parquet", DATA),
    "held-out documents": ("odd.txt", "train run.toml --data.eval_path odd.txt", DATA),
    "token files": ("odd.idx", "train run.toml --data.path odd.idx --data.tokenizer tokenizer.model", DATA),
    "ids of token files": (
        "odd.bin",
        "train run.toml --data.path odd --data.tokenizer tokenizer.model",
        DATA,
    ),
    "a tokenizer": ("odd", "train run.toml --data.tokenizer odd", DATA),
    "prompts with answers": (
        "odd",
        "train run.toml --task judge --data.path odd --data.eval_path odd --data.tokenizer tokenizer.model "
        "--objective.kind grpo",
        DATA,
    ),
    "a checkpoint to begin with": ("odd", "train run.toml --init odd", CHECKPOINT),
    "a cache of replies": (
        "odd",
        "train run.toml --judge.backend server --judge.server.url http://127.0.0.1:9/v1 --judge.server.model m "
        "--judge.server.cache odd",
        DATA,
    ),
    "the folder's lock": ("run/.lock", "train run.toml --out run", DATA),
    "prompts": ("odd", "generate run --prompts odd --out g.jsonl", DATA),
    "pairs": ("odd", "score run --pairs odd --out s.jsonl", DATA),
    "a file to write": ("odd", "generate run --prompts prompts.jsonl --out odd", DATA),
    "a checkpoint": ("odd", "export odd --out e", CHECKPOINT),
    "a manifest": ("run/checkpoints/step_00000001/manifest.json", "export run --out e", CHECKPOINT),
    "a state": ("run/checkpoints/step_00000001/state.json", "export run --out e", CHECKPOINT),
    "a checkpoint's tokenizer": (
        "run/checkpoints/step_00000001/tokenizer.model",
        "generate run --prompts prompts.jsonl --out g.jsonl",
        CHECKPOINT,
    ),
    "an index": ("run/checkpoints/step_00000001/sharded/.metadata", "export run --out e", CHECKPOINT),
    "tensors": ("run/checkpoints/step_00000001/sharded/__0_0.distcp", "export run --out e", CHECKPOINT),
    "records": ("run/metrics.jsonl", "report run", DATA),
    "recorded pools": ("run/pools.jsonl", "report run", DATA),
    "recorded settings": ("run/config.json", "report run", DATA),
    "a config to evaluate by": ("odd", "eval run --out e --config odd", CONFIG),
    "a baseline": ("odd", "eval run --out e --baseline odd", CHECKPOINT),
    "an evaluation set": ("odd", "eval run --out e --set xstest=odd", DATA),
    "an imported config": ("model/config.json", "import model --out i", CHECKPOINT),
    "imported weights": ("model/model.safetensors", "import model --out i", CHECKPOINT),
    "a GGUF file": ("odd", "import --gguf odd --out i", CHECKPOINT),
    "prompts to mix in": ("mix/train.jsonl", "data rollout-pairs init.toml --out d --mix mix", DATA),
    "a plan": ("odd", "reproduce odd --out r", CONFIG),
    "measured rates": ("odd", "plan configs/paper/quality.toml --gpu h100 --rates odd", DATA),
    "a config to simulate": ("odd", "simulate odd --out sim", CONFIG),
}


@pytest.fixture(scope="module")
def made(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, and small files of other kinds."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"the fox number {n} jumps over a lazy dog"}) + "\n" for n in range(60))
    )
    (folder / "run.toml").write_text(RUN)
    data = RUN[RUN.index("[data]") :]  # the model is the checkpoint's
    (folder / "init.toml").write_text(f'init = "run"\n{data}')
    (folder / "extends.toml").write_text('extends = "odd"\n')
    (folder / "prompts.jsonl").write_text('{"prompt": "the fox"}\n')
    plain = {"eval": {"generate": False, "num_prefixes": 2}, "batch_size": 2, "monitors": {"every": 0}}
    cfg = run_config(folder, steps=1, **plain)
    train(parse_config(cfg.model_dump() | {"out": folder / "run"}, "test"), mesh)
    shutil.copy(folder / "run/checkpoints/step_00000001/tokenizer.model", folder)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "hidden_act": "silu",
                "eos_token_id": 1,
            }
        )
    )
    shutil.copy(folder / "tokenizer.model", folder / "model")
    (folder / "mix").mkdir()
    (folder / "mix" / "eval.jsonl").write_text("")
    return folder


@pytest.mark.parametrize("name", INPUTS)
def test_what_is_no_file_is_refused_at_once(
    sip: Sip, made: Path, tmp_path: Path, no_waiting: None, name: str
) -> None:
    file, command, code = INPUTS[name]
    for kind, make in KINDS.items():
        if (name, kind) in LEGAL:
            continue
        folder = tmp_path / kind.replace(" ", "_")
        shutil.copytree(made, folder, symlinks=True)
        odd = folder / file
        odd.unlink(missing_ok=True)
        if file == "odd.bin":
            (folder / "odd.idx").write_bytes(b"MMIDIDX\x00\x00" + bytes(100))
        if file == "odd.idx":
            (folder / "odd.bin").write_bytes(bytes(100))
        make(odd)
        os.chdir(folder)
        begun = time.monotonic()
        got, out, err = sip(*command.split())
        said = [line for line in (out + err).splitlines() if line.strip()]
        assert got == code and "Traceback" not in err, (kind, got, out + err)
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == 1 and said[-1] == errors[0], (kind, said)
        assert time.monotonic() - begun < 30


LEGAL = {
    (name, "a folder") for name in ("documents", "a checkpoint to begin with", "a checkpoint", "a baseline")
}
"""Where a folder may stand: these are empty, which other tests refuse."""

OPENS = re.compile(r"\.open\(\s*(mode=)?[\"'][rwxab]|\.read_(text|bytes)\(|(?<![\w.])(?<!def )open\(")
ALLOWED = {"utils/regular.py"}
"""Opens the others' files. What lies in the package itself (`resources.files`, TABLE) is nobody else's."""


def test_files_are_opened_in_one_place() -> None:
    root = Path(sip_engine.__file__).parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).as_posix() not in ALLOWED
        for line in path.read_text().splitlines()
        if OPENS.search(line)
        and not re.search(r"resources\.files|TABLE\.read|baked|/proc|now\.read|zone", line)
    ]
    assert found == []
