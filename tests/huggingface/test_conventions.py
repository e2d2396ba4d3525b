"""What a model calls begin and end, and what it holds beside its settings: kept on import, on use and on export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_models import TEXTS, assert_same_distribution, write_byte_level, write_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Fast
from transformers import AutoModelForCausalLM, AutoTokenizer

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh
from sip_engine.huggingface.exporting import export_model
from sip_engine.huggingface.importing import import_model
from sip_engine.policy.checkpoint import checkpoint_tokenizer, read_state
from sip_engine.sampler.files import generate_file, load_policy, score_file
from sip_engine.sampler.frozen import encode_prompt
from sip_engine.sampler.requests import SamplingParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama with a byte-level tokenizer that has no beginning token, as SmolLM's and Qwen's have none."""
    path = tmp_path / "source"
    write_model(path, "llama", bos_id=None)
    write_byte_level(path)
    return path


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | changes))


def special(folder: Path) -> tuple[int, int]:
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    end, turn = fast.token_to_id("<|endoftext|>"), fast.token_to_id("<|im_end|>")
    assert end is not None and turn is not None
    return end, turn


def add_beginning(folder: Path) -> int:
    """Let the tokenizer put <|im_end|> in front of every text."""
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    _, turn = special(folder)
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=["<|im_end|>", "$A"], special_tokens=[("<|im_end|>", turn)]
    )
    fast.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", bos_token="<|im_end|>")
    return turn


def test_every_end_token_ends_and_survives(
    mesh: Mesh, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer names one, config.json both, as instruct models do."""
    end, turn = special(folder)
    edit(folder, "config.json", eos_token_id=[end, turn])
    edit(folder, "generation_config.json", eos_token_id=[end, turn])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][turn] = 100 * tensors["model.norm.weight"].sign()  # what it likes to say
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    assert f"ends at token {end}, {turn}" in " ".join(capsys.readouterr().err.split())
    assert checkpoint_tokenizer(checkpoint).eos_ids == (end, turn)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "g.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"fox {n}"}) + "\n" for n in range(12)))
    generate_file(checkpoint, prompts, out, n=1, params=SamplingParams(8, greedy=True), kv_memory_mb=64)
    written = [json.loads(line)["completions"][0]["ids"] for line in out.read_text().splitlines()]
    ended = [ids for ids in written if turn in ids]
    assert ended and all(ids.index(turn) == len(ids) - 1 for ids in ended)
    exported = export_model(checkpoint, tmp_path / "exported")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text())["eos_token_id"] == [end, turn]


@pytest.mark.parametrize("begins", [False, True])
def test_a_prompt_begins_as_its_tokenizer_has_it(
    mesh: Mesh, tmp_path: Path, folder: Path, begins: bool
) -> None:
    begin = [add_beginning(folder)] if begins else []
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    tokenizer, theirs = checkpoint_tokenizer(checkpoint), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:2]:
        assert encode_prompt(tokenizer, text).tolist() == theirs(text)["input_ids"]
        assert encode_prompt(tokenizer, text)[: len(begin)].tolist() == begin == tokenizer.begin.tolist()
    assert len(encode_prompt(tokenizer, "")) == 1, "something must be there to go on from"
    pairs, out = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    pairs.write_text(json.dumps({"prefix": "the quick", "suffix": " fox"}) + "\n")
    score_file(checkpoint, pairs, out)
    row = json.loads(out.read_text())
    assert row["prefix_ids"] == theirs("the quick")["input_ids"]
    ids = torch.tensor([row["prefix_ids"] + row["suffix_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        table = torch.log_softmax(model(ids).logits[0], -1)
    want = sum(float(table[at - 1, ids[0, at]]) for at in range(len(row["prefix_ids"]), ids.shape[1]))
    assert row["logprob"] == pytest.approx(want, abs=1e-4)
    exported = export_model(checkpoint, tmp_path / "exported")
    named = json.loads((exported / "config.json").read_text())["bos_token_id"]
    assert named == (begin[0] if begins else None)


def test_end_tokens_beside_a_sentencepiece_model(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chat models add theirs behind the pieces, and name them in the settings, but not always for generation."""
    folder = tmp_path / "source"
    tokenizer = Tokenizer.train(TEXTS, 300, tmp_path / "tokenizer.model")
    write_model(folder, "llama", vocab_size=303)
    shutil.copy(tmp_path / "tokenizer.model", folder)
    added = {"[PAD]": 300, "<|im_start|>": 301, "<|im_end|>": 302}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    edit(folder, "tokenizer_config.json", **settings)
    edit(folder, "config.json", eos_token_id=302)
    edit(folder, "generation_config.json", eos_token_id=2, bos_token_id=1, max_length=77)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    ours = checkpoint_tokenizer(checkpoint)
    assert ours.eos_id == 302 and ours.begin.tolist() == [tokenizer.bos_id]
    assert ours.eos_ids == (302, 2)
    assert (
        "generation_config.json ends no reply at 302; here and in exports it does" in capsys.readouterr().err
    )
    assert ours.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    exported = export_model(checkpoint, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 302
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"], generation["max_length"]) == (
        [302, 2],
        1,
        77,
    )
    again = import_model(exported, tmp_path / "again")
    assert checkpoint_tokenizer(again).eos_ids == (302, 2)
    assert "ends no reply" not in capsys.readouterr().err


def test_a_head_of_its_own_is_kept(mesh: Mesh, tmp_path: Path, folder: Path) -> None:
    """Tied by its settings, apart in its files: transformers keeps them apart."""
    tensors = load_file(folder / "model.safetensors")
    edit(folder, "config.json", tie_word_embeddings=True)
    checkpoint = import_model(folder, tmp_path / "apart")
    assert not read_state(checkpoint).model.tie_embeddings
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    assert_same_distribution(checkpoint, model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_state(import_model(folder, tmp_path / "tied")).model.tie_embeddings


def test_a_special_token_beyond_the_rows_does_no_harm(mesh: Mesh, tmp_path: Path, folder: Path) -> None:
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    for number in range(fast.get_vocab_size(), rows):
        fast.add_tokens([AddedToken(f"<unused{number}>", special=True)])
    fast.add_special_tokens([AddedToken("[PAD]", special=True)])
    assert fast.token_to_id("[PAD]") == rows
    fast.save(str(folder / "tokenizer.json"))
    tokenizer = load_policy(import_model(folder, tmp_path / "checkpoint")).tokenizer
    assert tokenizer.vocab_size == rows and tokenizer.encode("a [PAD] b").max() < rows


@pytest.mark.parametrize("window", [24, None])
def test_attention_that_slides_ends_the_context(mesh: Mesh, tmp_path: Path, window: int | None) -> None:
    folder = tmp_path / "source"
    write_model(folder, "mistral, wide")
    Tokenizer.train(TEXTS, 310, folder / "tokenizer.model")
    edit(folder, "config.json", sliding_window=window)
    checkpoint = import_model(folder, tmp_path / "checkpoint")
    assert read_state(checkpoint).model.max_context == (window or 96)


def test_export_of_what_was_multiplied_in_is_bitwise(mesh: Mesh, tmp_path: Path) -> None:
    """Fused, multiplied and stretched models leave as Llama or Qwen: the same bits, there and back."""
    for number, name in enumerate(("phi3, fused", "granite multiplied, tied", "qwen3 yarn", "llama linear")):
        folder, part = tmp_path / f"source{number}", tmp_path / str(number)
        model = write_model(folder, name)
        Tokenizer.train(TEXTS, 310, folder / "tokenizer.model")
        exported = export_model(import_model(folder, part / "first"), part / "exported")
        again = export_model(import_model(exported, part / "second"), part / "exported again")
        one, other = (load_file(path / "model.safetensors") for path in (exported, again))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert read_state(part / "first").model == read_state(part / "second").model
        loaded: Callable[..., Any] = AutoModelForCausalLM.from_pretrained(exported)
        ids = torch.from_numpy(np.arange(3, 23))[None]
        with torch.no_grad():
            ours, theirs = (torch.log_softmax(each(ids).logits, -1) for each in (loaded, model))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
