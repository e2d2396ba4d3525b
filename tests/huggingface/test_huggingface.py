"""Import and export against transformers: the same distributions, the same bits, the same token ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_models import (
    LLAMA3,
    MODELS,
    PIECES,
    SAMPLE,
    TEXTS,
    assert_same_distribution,
    transformers_logprobs,
    write_byte_level,
    write_model,
)
from huggingface_ranks import one_update, random_rows
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world_runs import run_config

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import Mesh
from sip_engine.huggingface.exporting import export_model
from sip_engine.huggingface.importing import import_model
from sip_engine.huggingface.tensors import tensor_views
from sip_engine.policy.checkpoint import read_state, stored_dtype
from sip_engine.policy.model import build_model
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.files import load_policy
from sip_engine.train import train
from sip_engine.utils.errors import DataError


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(TEXTS, PIECES, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def source(tmp_path: Path, sentencepiece: Tokenizer) -> Callable[..., tuple[Path, Any]]:
    """Writes a folder with a model and a sentencepiece tokenizer -> (folder, model)."""

    def write(name: str, **options: Any) -> tuple[Path, Any]:
        folder = tmp_path / "source"
        made = write_model(folder, name, **options)
        sentencepiece.save(folder / "tokenizer.model")
        return folder, made

    return write


@pytest.mark.parametrize("name", MODELS)
def test_import_gives_the_distribution_of_transformers(mesh: Mesh, tmp_path: Path, source, name: str) -> None:
    folder, model = source(name)
    assert_same_distribution(import_model(folder, tmp_path / "checkpoint"), model)


@pytest.mark.parametrize("name", ["llama tied, stretched, wide", "qwen2", "qwen3"])
def test_export_gives_the_distribution_to_transformers(mesh: Mesh, tmp_path: Path, source, name: str) -> None:
    """There and back in one file and in several: bitwise the same tensors, tokenizer and settings."""
    folder, model = source(name)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    whole = export_model(checkpoint, tmp_path / "whole")
    parts = export_model(checkpoint, tmp_path / "parts", max_shard_bytes=40_000)
    assert len(list(parts.glob("*.safetensors"))) > 2 and (parts / "model.safetensors.index.json").is_file()
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, PIECES, (2, 50)))
    for out in (whole, parts):
        loading: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        loaded, info = loading
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is type(model) and loaded.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0, rtol=0)
    before, after = load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    again = import_model(parts, tmp_path / "again")
    first, second = load_policy(checkpoint), load_policy(again)
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert read_state(again) == read_state(checkpoint)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_model_is_computed_in_the_precision_it_was_imported_for(mesh: Mesh, tmp_path: Path, source) -> None:
    """What is stored stays whole: settings that ask for more later get it."""
    folder, model = source("llama tied, stretched, wide")
    checkpoint = import_model(folder, tmp_path / "checkpoint", "bf16")
    assert {one.dtype for one in load_policy(checkpoint).model.parameters()} == {torch.bfloat16}
    assert stored_dtype(checkpoint) == model.dtype == torch.float32


def test_a_sharded_folder_is_the_same_model(mesh: Mesh, tmp_path: Path, source) -> None:
    folder, _ = source("qwen2")
    one = load_policy(import_model(folder, tmp_path / "one")).model
    (folder / "model.safetensors").unlink()
    source("qwen2", save={"max_shard_size": "30KB"})
    assert not (folder / "model.safetensors").exists() and len(list(folder.glob("*.safetensors"))) > 2
    many = load_policy(import_model(folder, tmp_path / "many")).model
    assert all(map(torch.equal, one.parameters(), many.parameters()))


@pytest.mark.parametrize(("saved", "stored"), [("bfloat16", torch.bfloat16), ("float16", torch.float32)])
def test_half_precision_loses_nothing(mesh: Mesh, tmp_path: Path, source, saved: str, stored) -> None:
    folder, model = source("qwen3")
    model.to(getattr(torch, saved)).save_pretrained(folder)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    # On the CPU the policy computes in float32, whatever the weights are stored in.
    assert_same_distribution(checkpoint, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    before = load_file(folder / "model.safetensors")
    after = load_file(export_model(checkpoint, tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {stored}
    assert all(torch.equal(before[key].to(stored), after[key]) for key in before)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == stored


@pytest.mark.parametrize("name", ["llama tied, stretched, wide", "qwen2", "qwen3"])
def test_gradients_are_those_of_transformers(mesh: Mesh, tmp_path: Path, source, name: str) -> None:
    """Float64, every parameter: biases and head norms are trained like the rest."""
    folder, model = source(name)
    policy = load_policy(import_model(folder, tmp_path / "checkpoint"))
    ours, theirs = policy.model.double().requires_grad_(True), model.double()
    rows = random_rows(3, PIECES)[:3]
    packed = pack_rows(rows, policy.mesh.device)
    weights = torch.linspace(-1, 1, len(packed.targets), dtype=torch.float64)
    with megatron_device():
        (ours(packed) * weights).sum().backward()
    (transformers_logprobs(theirs, rows) * weights).sum().backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    tied = model.config.tie_word_embeddings
    got = tensor_views(weight_views(ours, PIECES, 0), tied=tied)
    for key, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            got[key].reshape(parameter.shape), parameter.grad, atol=1e-5 * scale, rtol=0
        )


def test_rotary_frequencies_stay_float32(mesh: Mesh) -> None:
    settings = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "rope_base": 500.0, "rope_factor": 4.0}
    shape = ModelConfig(**settings, rope_high_freq_factor=3, rope_original_context=24, precision="bf16")
    ours = build_model(shape, ParallelConfig(), PIECES, mesh, seed=0).get_buffer("inv_freq")
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=LLAMA3)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    torch.testing.assert_close(ours, rotary.get_buffer("inv_freq"), atol=0, rtol=1e-6)


# Tokenizers


def assert_ids_agree(tokenizer: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode(ids) == text


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    parts = [
        "the",
        " ",
        "  ",
        "\n",
        "\u2581",
        "quick",
        " naïve",
        "\U0001f600",
        "azy",
        "12",
        "\t",
        "é",
        "e",
        "漢",
    ]
    return ["".join(rng.choice(parts, rng.integers(0, 12))) for _ in range(count)]


def test_a_byte_level_tokenizer_comes_along(mesh: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    write_model(folder, "qwen2", vocab_size=320, bos_id=None)  # rows beyond the tokenizer's 293 tokens
    write_byte_level(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    tokenizer = load_policy(checkpoint).tokenizer
    end = theirs.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, end, end)
    assert_ids_agree(tokenizer, theirs, [*random_texts(200), "a <think> b"])
    assert end not in tokenizer.encode(SAMPLE) and tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    every = [tokenizer.decode([token]) for token in range(320)]
    assert (
        every[end] == "" and every[319] == "" and every[theirs.convert_tokens_to_ids("<think>")] == "<think>"
    )
    with pytest.raises(DataError, match="token id 320"):
        tokenizer.decode([320])

    out = export_model(checkpoint, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    was, now = (json.loads((at / "generation_config.json").read_text()) for at in (folder, out))
    assert (
        now == was | {"eos_token_id": [end, 2]} and was["eos_token_id"] == 2
    )  # it had left out the tokenizer's
    again = load_policy(import_model(out, tmp_path / "again"))
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


def test_our_tokenizer_gives_transformers_the_same_ids(mesh: Mesh, tmp_path: Path) -> None:
    """Trained on words of few letters, so that most texts can be merged in many orders."""
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(["a", "b", "c", "é"], rng.integers(1, 9))) for _ in range(3000)]
    folder = tmp_path / "source"
    ours = Tokenizer.train([" ".join(words)], 420, folder / "tokenizer.model")
    write_model(folder, "llama", vocab_size=420)
    (folder / "generation_config.json").unlink()
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    out = export_model(checkpoint, tmp_path / "out")
    for made in (
        checkpoint,
        import_model(out, tmp_path / "again"),
    ):  # the plain model, which all else follows from
        assert load_policy(made).tokenizer.fingerprint == ours.fingerprint
    theirs = AutoTokenizer.from_pretrained(out)
    assert_ids_agree(ours, theirs, [*random_texts(200), *words[:500], "".join(words)])
    assert theirs("abc").input_ids == [ours.bos_id, *ours.encode("abc").tolist()]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.decode(ours.encode(SAMPLE)) == SAMPLE


def test_byte_fallback_without_a_sentencepiece_model(
    mesh: Mesh, tmp_path: Path, source, sentencepiece: Tokenizer
) -> None:
    """Llama 2's own `tokenizer.json`, as transformers writes it: the ids of the sentencepiece model."""
    folder, _ = source("llama")
    out = export_model(import_model(folder, tmp_path / "checkpoint"), tmp_path / "out")
    spelled = json.loads((out / "tokenizer.json").read_text())["model"]
    vocab = {piece.replace(" ", "\u2581"): token for piece, token in spelled["vocab"].items()}
    merges = [tuple(part.replace(" ", "\u2581") for part in pair) for pair in spelled["merges"]]
    transformers.LlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    tokenizer = load_policy(import_model(folder, tmp_path / "json only")).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in [*random_texts(200), SAMPLE]:
        assert tokenizer.encode(text).tolist() == sentencepiece.encode(text).tolist()
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_with_more_rows_than_pieces(mesh: Mesh, tmp_path: Path, source) -> None:
    folder, model = source("llama", vocab_size=PIECES + 7)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    assert_same_distribution(checkpoint, model)
    assert load_policy(checkpoint).tokenizer.vocab_size == PIECES + 7
    out = export_model(checkpoint, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == PIECES + 7
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


# Use


def test_a_run_starts_from_an_imported_model(mesh: Mesh, tmp_path: Path) -> None:
    """Rollouts, judge and DPO from an imported Qwen3 with its own tokenizer; then out again, tokenizer intact."""
    folder = tmp_path / "source"
    write_model(folder, "qwen3 tied, wide", vocab_size=320, bos_id=None)
    write_byte_level(folder)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    section = read_state(checkpoint).model.model_dump(
        exclude_none=True, exclude={"precision", "fp8", "init_std"}
    )
    changes = {"init": checkpoint, "model": {**section, "max_context": 96}, "steps": 1}
    data = {"suffix_tokens": 12, "max_prefix_tokens": 40, "min_prefix_tokens": 8, "cache": tmp_path / "cache"}
    cfg = run_config(tmp_path, **changes, data=data)
    trained = train(cfg, mesh)
    before, after = load_policy(checkpoint).model, load_policy(trained).model
    moved = [not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    out = export_model(tmp_path / "run", tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert_same_distribution(trained, AutoModelForCausalLM.from_pretrained(out))


@pytest.mark.slow
def test_every_layout_loads_an_imported_model(mesh: Mesh, tmp_path: Path, source) -> None:
    """Biases and head norms with tensor, sequence and pipeline parallelism: the same scores, samples and update."""
    checkpoints, want = {}, {}
    for name in ("qwen2", "qwen3 tied, wide"):
        folder, model = source(name)
        checkpoints[name] = str(import_model(folder, tmp_path / f"checkpoint {name}"))
        with torch.no_grad():
            want[name] = transformers_logprobs(model, random_rows(0, PIECES)).numpy()
        shutil.rmtree(folder)
    one_update(tmp_path, json.dumps(checkpoints), json.dumps({"single": {}}))
    layouts = {"tp": {"tensor": 2}, "sp": {"tensor": 2, "sequence": True}, "pp": {"pipeline": 2}}
    arguments = json.dumps(checkpoints), json.dumps(layouts)
    run_ranks("huggingface_ranks:one_update", 2, tmp_path, *arguments)
    for name in checkpoints:
        single = np.load(tmp_path / f"single {name}.npz")
        for layout in ("single", *layouts):
            result = np.load(tmp_path / f"{layout} {name}.npz")
            np.testing.assert_allclose(result["before"], want[name], atol=1e-4, rtol=0)
            np.testing.assert_allclose(result["after"], single["after"], atol=2e-4, rtol=0)
            assert result["ids"].tolist() == single["ids"].tolist()
            np.testing.assert_allclose(result["logprobs"], single["logprobs"], atol=1e-4, rtol=0)
        assert np.abs(single["after"] - single["before"]).max() > 0.1  # the update was one


def test_settings_of_one_shape_are_equal() -> None:
    assert ModelConfig(hidden_size=64, num_heads=4, head_dim=16) == ModelConfig(hidden_size=64, num_heads=4)
    with pytest.raises(ValueError, match="head_dim must be even"):
        ModelConfig(head_dim=15)
    with pytest.raises(ValueError, match=r"rope_low_freq_factor=4.0 must be below"):
        ModelConfig(rope_low_freq_factor=4.0)
