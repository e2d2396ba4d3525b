"""A GGUF file through `sip import --gguf`: the model that gguf wrote, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sip_engine.cli import app
from sip_engine.huggingface.gguf_files import unpack_gguf
from sip_engine.policy.checkpoint import checkpoint_tokenizer, read_state
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import score
from sip_engine.policy.rows import Row
from sip_engine.sampler.files import load_policy
from sip_engine.utils.errors import CheckpointError, ConfigError

gguf: Any = pytest.importorskip("gguf")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(hidden))]


def write_gguf(path: Path) -> LlamaForCausalLM:
    """A random Llama with a byte-level tokenizer, as converters of such models write it."""
    vocab = [*SPECIAL, *byte_characters(), "th", "the"]
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocab) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
            parameter += parameter.ndim == 1
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp turns neighbouring channels
            heads = values.reshape(4, 2, 4, 32)
            values = heads.swapaxes(1, 2).reshape(values.shape)
        if name.startswith("model.layers."):
            _, _, number, part = name.removesuffix(".weight").split(".", 3)
            writer.add_tensor(f"blk.{number}.{names[part]}.weight", np.ascontiguousarray(values))
        elif name != "lm_head.weight":
            short = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}[name]
            writer.add_tensor(f"{short}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_the_model_it_was_written_from(mesh: Any, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "checkpoint"
    app(["import", "--gguf", str(tmp_path / "tiny.gguf"), "--out", str(out)], standalone_mode=False)
    found = read_state(out).model
    assert found.norm_eps == 1e-5 and found.tie_embeddings and found.max_context == 96
    tokenizer = checkpoint_tokenizer(out)
    assert tokenizer.eos_id == 2 and tokenizer.decode(tokenizer.encode("the \u00e9 th")) == "the \u00e9 th"
    assert len(tokenizer.encode("the")) == 1
    policy, ids = load_policy(out), np.arange(3, 40, dtype=np.int32)
    with torch.no_grad():
        (got,) = score(policy.model, [pack_rows([Row(ids[:1], (ids[1:],))], policy.mesh.device)])
        table = torch.log_softmax(model(torch.from_numpy(ids).long()[None]).logits[0], -1)
    want = table[:-1].gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_what_is_no_gguf_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" + data[4:])
    for name, message in (
        ("cut.gguf", "cannot be read"),
        ("other.gguf", "not a GGUF file"),
        ("gone.gguf", "check the path"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            unpack_gguf(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ConfigError, match="needs gguf: pip install"):
        unpack_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match="either a folder or --gguf"):
        app(["import", "--out", str(tmp_path / "out")], standalone_mode=False)
