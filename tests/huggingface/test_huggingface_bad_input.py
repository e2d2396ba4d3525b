"""Folders that cannot be imported and checkpoints that cannot be exported: one clear error, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import PIECES, TEXTS, write_byte_level, write_model
from safetensors.torch import load_file, save_file

from sip_engine.config.model import ModelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.huggingface.exporting import export_model
from sip_engine.huggingface.families import config_json, read_config
from sip_engine.huggingface.importing import import_model
from sip_engine.utils.errors import CheckpointError


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def pickle_only(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lowercasing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    write_byte_level(folder, normalize=False)


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def adapter_beside_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def bias_of_output(folder: Path) -> None:
    edit_config(attention_bias=True)(folder)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "self_attn" in name]:
            tensors[name.replace("weight", "bias")] = torch.ones(len(tensors[name]))

    edit_tensors(add)(folder)


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        "'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM",
    ),
    "experts": (
        edit_config(architectures=["MixtralForCausalLM"]),
        "a mixture of experts, and the policy is dense",
    ),
    "qwen experts": (edit_config(architectures=["Qwen3MoeForCausalLM"]), "import a dense model"),
    "other norms": (edit_config(architectures=["Olmo2ForCausalLM"]), "norms stand behind attention"),
    "layers without positions": (
        edit_config(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1, 0]),
        "leaves rotary positions out of some layers",
    ),
    "adapter": (adapter, r"holds an adapter \(adapter_config.json\), which is no model: merge it"),
    "adapter beside a model": (adapter_beside_a_model, "holds an adapter"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json: not readable as JSON",
    ),
    "no width": (edit_config(hidden_size=None), "config.json: hidden_size"),
    "heads": (edit_config(num_key_value_heads=3), "must be a multiple of num_kv_heads=3"),
    "longrope": (
        edit_config(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "rope scaling 'longrope'",
    ),
    "yarn without a factor": (edit_config(rope_parameters={"rope_type": "yarn"}), "factor is missing"),
    "biases that are not there": (
        edit_config(attention_bias=True),
        "8 tensors are missing, first .*o_proj.bias",
    ),
    "a bias of the output": (bias_of_output, "o_proj.bias is not 0"),
    "window": (edit_config(layer_types=["chunked_attention"] * 2), "layer_types other than full and sliding"),
    "own eos beyond the rows": (edit_config(eos_token_id=PIECES), "the model has 310 rows"),
    "quantized": (edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "truncated": (truncate, "model.safetensors: truncated or not a safetensors file"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 50),
        "truncated or not a safetensors file",
    ),
    "pickle": (pickle_only, "pytorch_model.bin: a pickle.*safe_serialization=True"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "missing shard": (lose_a_shard, "model-00001-of-00001.safetensors: named by"),
    "missing tensor": (edit_tensors(lambda t: t.pop(Q)), f"1 tensors are missing, first {Q}"),
    "extra tensor": (
        edit_tensors(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(32)})),
        "q_proj.bias has no place",
    ),
    "shape": (edit_config(intermediate_size=50), r"has shape \[32, 48\] but config.json makes it \[32, 50\]"),
    "type": (edit_tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), "is F8_E4M3, not one of"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model and no tokenizer.json"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"abc"), "not a sentencepiece model"),
    "cut added tokens": (
        lambda f: (f / "added_tokens.json").write_text('{"a": 1'),
        "added_tokens.json: not readable as JSON",
    ),
    "list of added tokens": (
        lambda f: (f / "added_tokens.json").write_text("[1]"),
        "added_tokens.json: holds a list",
    ),
    "nested settings": (
        lambda f: (f / "tokenizer_config.json").write_text("[" * 50_000),
        "tokenizer_config.json: not readable as JSON",
    ),
    "changing tokenizer": (lowercasing_tokenizer, "this tokenizer changes text"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "source"
    write_model(folder, "llama")
    Tokenizer.train(TEXTS, PIECES, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_error_and_leave_nothing(
    mesh: Mesh, tmp_path: Path, good: Path, case: str
) -> None:
    damage, message = BAD[case]
    shutil.copytree(good, tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(CheckpointError, match=message) as error:
        import_model(tmp_path / "source", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_of_another_model(mesh: Mesh, tmp_path: Path, good: Path) -> None:
    folder = tmp_path / "source"
    write_model(folder, "llama", vocab_size=PIECES - 1)
    shutil.copy(good / "tokenizer.model", folder)
    with pytest.raises(
        CheckpointError, match=f"a text can hold token {PIECES - 1} .* the model has {PIECES - 1} rows"
    ):
        import_model(folder, tmp_path / "out")


def test_nothing_is_overwritten_or_half_written(
    mesh: Mesh, tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="taken: already there"):
        import_model(good, tmp_path / "taken")
    checkpoint = import_model(good, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="checkpoint: already there"):
        export_model(checkpoint, checkpoint)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sip_engine.policy.checkpoint_state.write_json", full)
    monkeypatch.setattr("sip_engine.huggingface.exporting.write_json", full)
    for convert, given in ((import_model, good), (export_model, checkpoint)):
        with pytest.raises(CheckpointError, match=r"out: cannot be written .No space left"):
            convert(given, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "taken"]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf: a file; .* --gguf"):
        import_model(file, tmp_path / "out")


def test_what_no_family_has_is_not_exported() -> None:
    with pytest.raises(CheckpointError, match="both qkv_bias and qk_norm"):
        config_json(ModelConfig(qkv_bias=True, qk_norm=True), 100, bos_id=1, eos_id=2, dtype="float32")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize("value", ["x", "4", [], [1], True, -1.0, 0, float("nan"), float("inf"), 10**400])
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(tmp_path: Path, value: Any) -> None:
    whole = config_json(ModelConfig(), 300, bos_id=1, eos_id=2, dtype="float32")
    names = ["max_position_embeddings", "logits_scaling"]
    names += [f"{name}_multiplier" for name in ("attention", "embedding", "residual")]
    cases = [(name, {name: value}) for name in names]
    for name in ("factor", "attention_factor", "mscale"):
        rope = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, name: value}
        if value or name != "mscale":  # 0 switches it off
            cases.append((name, {"rope_scaling": rope}))
    for name, changes in cases:
        (tmp_path / "config.json").write_text(json.dumps(whole | {"tie_word_embeddings": True} | changes))
        with pytest.raises(CheckpointError, match=f"{name}=.* must be a number above 0"):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": "default"}, "rope scaling 'default' is not supported"),
        ({"rope_scaling": [YARN]}, "rope scaling"),
        ({"layer_types": 5}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": 5}, "no_rope_layers"),
    ],
)
def test_a_list_or_table_that_is_none_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    whole = config_json(ModelConfig(), 300, bos_id=1, eos_id=2, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(whole | changes))
    with pytest.raises(CheckpointError, match=said):
        read_config(tmp_path)
