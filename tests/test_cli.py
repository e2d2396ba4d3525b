"""The command line: what commands write, and one line with a non-zero exit for every kind of bad input."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Sip, fails, read_jsonl, write_jsonl, write_texts
from world_runs import run_config

from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.checkpoint import checkpoint_tokenizer, resolve_checkpoint
from sip_engine.train import train

TINY = """
steps = 2
batch_size = 4
[model]
num_layers = 1
hidden_size = 16
num_heads = 2
num_kv_heads = 1
ffn_size = 24
max_context = 64
[data]
suffix_tokens = 8
max_prefix_tokens = 24
min_prefix_tokens = 4
vocab_size = 300
[[candidates]]
rollouts = 2
[eval]
num_prefixes = 4
"""


@pytest.fixture(scope="module")
def checkpoint(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(run_config(folder, steps=2), mesh)
    return folder / "run"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_train_on_files_makes_a_report_and_says_what_it_found_again(sip: Sip, config: Path) -> None:
    texts = write_texts(config.parent / "texts")
    code, _, err = sip("train", config, "--data.path", texts, "--out", "run")
    assert code == 0, err
    assert "60 documents" in err and Path("run/report.html").stat().st_size > 10_000
    code, _, err = sip("train", config, "--data.path", texts, "--out", "run", "--steps", 3)
    assert code == 0 and "resuming at step 2 of 3" in err


def test_dry_run_prints_the_settings_and_writes_nothing(sip: Sip, config: Path) -> None:
    code, out, _ = sip("train", config, "--dry-run", "--data.path", "x", "--objective.beta=0.7")
    assert code == 0
    values = json.loads(out)
    assert values["objective"]["beta"] == 0.7 and values["optimizer"]["lr"] == 5e-6
    assert {p.name for p in config.parent.iterdir()} == {"tiny.toml"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data.path", "nowhere"], 3, ["nowhere"]),
        (["--data.path", "empty"], 3, ["empty"]),
        (["--data.path", "rows.jsonl", "--data.text_column", "body"], 3, ["rows.jsonl", "body"]),
        (["--data.path", "rows.jsonl.gz"], 3, ["rows.jsonl.gz"]),
        (["--data.path", "short.txt"], 3, ["short.txt"]),
        (["--data.path", "program.exe"], 3, ["program.exe"]),
        ([], 2, ["data.path"]),
        (["--data.path", "texts", "--data.vocab_size", "100000"], 3, ["vocab_size"]),
        (["--data.path", "texts", "--init", "nowhere"], 4, ["nowhere", "no checkpoint"]),
        (["--data.path", "texts", "--data.tokenizer", "rows.jsonl"], 3, ["rows.jsonl"]),
        (["--data.pth", "texts"], 2, ["data.pth", "did you mean 'path'"]),
        (["--data.path"], 2, ["--data.path needs a value"]),
        (["--data", "3", "--data.path", "x"], 2, ["'data' was given a value before"]),
        (["data.path"], 2, ["expected --section.setting VALUE"]),
        (["--data.path", "texts", "--batch_size", "none"], 2, ["batch_size", "valid integer"]),
        (["--data.path", "texts", "--parallel.tensor", "2", "--model.num_kv_heads", "2"], 2, ["torchrun"]),
    ],
)
def test_bad_input_of_train_is_one_line_and_leaves_nothing(
    sip: Sip, config: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    write_texts(config.parent / "texts")
    Path("empty").mkdir()
    write_jsonl(Path("rows.jsonl"), [{"text": "some words"}] * 3)
    Path("rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b c d"}\n' * 50)[:-20])
    Path("short.txt").write_text("three words only")
    Path("program.exe").write_bytes(bytes(range(256)))
    fails(sip("train", config, *arguments, "--out", "run"), code, *words)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.toml"], "no such config file"),
        (["trian"], "No such command 'trian'"),
        (["generate"], "Missing argument"),
        (["quickstart", "--scale", "0"], "--scale 0"),
        (["quickstart", "--scale", "much"], "valid number"),
    ],
)
def test_bad_command_lines_are_one_line(sip: Sip, arguments: list[str], words: str) -> None:
    fails(sip(*arguments), 2, words)


def test_damaged_documents_are_counted_and_skipped(sip: Sip, config: Path) -> None:
    texts = write_texts(config.parent / "texts")
    (texts / "empty.txt").write_text("")
    (texts / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 50)
    (texts / "nuls.txt").write_bytes(b"\0" * 5000)
    code, out, err = sip("data", "inspect", config, "--data.path", texts)
    assert code == 0
    assert "60" in out + err and "3" in out + err


def test_documents_are_inspected_with_the_tokenizer_of_the_checkpoint_that_a_run_starts_from(
    sip: Sip, config: Path, checkpoint: Path
) -> None:
    texts = write_texts(config.parent / "texts")
    table, rest = TINY.split("[model]")[0], TINY.split("[data]")[1]  # the model is the checkpoint's
    config.write_text(f"{table}[data]{rest}")
    code, out, err = sip("data", "inspect", config, "--data.path", texts, "--init", checkpoint)
    assert code == 0, err
    tokenizer = checkpoint_tokenizer(resolve_checkpoint(checkpoint))
    (vocabulary,) = re.findall(r"vocabulary\W+([\d,]+)", out + err)
    (tokens,) = re.findall(r"\btokens\W+([\d,]+)", out + err)
    files = [json.loads(line)["text"] for path in texts.rglob("*.jsonl") for line in path.open()]
    files += [path.read_text() for path in texts.rglob("*.txt")]
    counts = [len(tokenizer.encode(text)) + 2 for text in files]  # with what begins and ends a document
    assert int(vocabulary.replace(",", "")) == tokenizer.vocab_size != 300
    assert int(tokens.replace(",", "")) == sum(counts)
    assert not list(config.parent.rglob("tokenizer.model")), "none is trained"
    fails(sip("data", "inspect", config, "--data.path", texts, "--init", "nowhere"), 4, "nowhere")


def test_generated_log_probs_are_those_that_score_gives(sip: Sip, checkpoint: Path) -> None:
    write_jsonl(Path("p.jsonl"), [{"prompt": "The bridge"}, {"prompt_ids": [1, 50, 7]}])
    code, _, err = sip(
        "generate", checkpoint, "--prompts", "p.jsonl", "--n", 3, "--max-new-tokens", 9, "--out", "g.jsonl"
    )
    assert code == 0, err
    rows = read_jsonl(Path("g.jsonl"))
    assert rows[1]["prompt_ids"] == [1, 50, 7] and [len(r["completions"]) for r in rows] == [3, 3]
    done = [(r["prompt_ids"], c) for r in rows for c in r["completions"]]
    write_jsonl(Path("s.jsonl"), [{"prefix_ids": p, "suffix_ids": c["ids"]} for p, c in done])
    code, _, err = sip("score", checkpoint, "--pairs", "s.jsonl", "--out", "o.jsonl")
    assert code == 0, err
    for (prompt, completion), scored in zip(done, read_jsonl(Path("o.jsonl")), strict=True):
        assert scored["prefix_ids"] == prompt and scored["suffix_ids"] == completion["ids"]
        np.testing.assert_allclose(scored["logprobs"], completion["logprobs"], atol=1e-5)
        assert scored["logprob"] == pytest.approx(sum(completion["logprobs"]), abs=1e-4)


def test_generation_does_not_depend_on_the_other_prompts(sip: Sip, checkpoint: Path) -> None:
    write_jsonl(Path("p.jsonl"), [{"prompt_ids": [1, 40 + n]} for n in range(70)])
    sip("generate", checkpoint, "--prompts", "p.jsonl", "--max-new-tokens", 5, "--out", "a.jsonl")
    write_jsonl(Path("p.jsonl"), [{"prompt_ids": [1, 40 + n]} for n in range(3)])
    sip("generate", checkpoint, "--prompts", "p.jsonl", "--max-new-tokens", 5, "--out", "b.jsonl")
    few, many = read_jsonl(Path("b.jsonl")), read_jsonl(Path("a.jsonl"))
    assert [r["completions"][0]["ids"] for r in few] == [r["completions"][0]["ids"] for r in many[:3]]


@pytest.mark.parametrize(
    ("row", "options", "code", "words"),
    [
        ({"prompt": ""}, [], 0, ""),
        ({"prompt_ids": []}, [], 5, "p.jsonl:1"),
        ({"prompt_ids": [100000]}, [], 5, "token id 100000 is outside"),
        ({"prompt_ids": ["a"]}, [], 3, "must be a list of integers"),
        ({"prompt": 3}, [], 3, "write text in quotes"),
        ({"text": "x"}, [], 3, 'needs either "prompt" or "prompt_ids"'),
        ({"prompt": "x", "prompt_ids": [1]}, [], 3, 'needs either "prompt" or "prompt_ids"'),
        (["x"], [], 3, "p.jsonl:1: a list, must be a JSON object"),
        ({"prompt": "x " * 200}, [], 5, "context of 64"),
        ({"prompt": "x"}, ["--n", "0"], 5, "n=0"),
        ({"prompt": "x"}, ["--temperature", "-1"], 5, "temperature=-1"),
        ({"prompt": "x"}, ["--top-p", "0"], 5, "top_p=0"),
        ({"prompt": "x"}, ["--kv-memory-mb", "0"], 5, "kv"),
    ],
)
def test_bad_prompts_are_one_line_and_write_nothing(
    sip: Sip, checkpoint: Path, row: object, options: list[str], code: int, words: str
) -> None:
    write_jsonl(Path("p.jsonl"), [row])
    result = sip(
        "generate", checkpoint, "--prompts", "p.jsonl", "--max-new-tokens", 4, "--out", "g.jsonl", *options
    )
    if code:
        fails(result, code, words)
    assert Path("g.jsonl").exists() == (code == 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "p.jsonl:1: not JSON"),
        (b"\n \n", "no rows"),
        (b"\xff", "p.jsonl:1: not UTF-8 at byte 0"),
        (None, "p.jsonl"),
    ],
)
def test_unreadable_prompt_files_are_named(
    sip: Sip, checkpoint: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        Path("p.jsonl").write_bytes(content)
    fails(sip("generate", checkpoint, "--prompts", "p.jsonl", "--out", "g.jsonl"), 3, words)
    fails(sip("score", checkpoint, "--pairs", "p.jsonl", "--out", "g.jsonl"), 3, words)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest", "{}", "[]"])
def test_damaged_checkpoints_are_named(sip: Sip, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    shutil.copytree(checkpoint / "checkpoints", tmp_path / "copy")
    folder = sorted((tmp_path / "copy").iterdir())[-1]
    victim = sorted((folder / "sharded").glob("*.distcp"))[0]
    content = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(content[:-1])
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        victim.unlink()
    else:
        (folder / "manifest.json").write_text("{" if damage == "manifest" else damage)
    write_jsonl(Path("p.jsonl"), [{"prompt": "x"}])
    words = victim.name if damage in ("cut", "flip", "missing") else "manifest.json"
    fails(sip("generate", folder, "--prompts", "p.jsonl", "--out", "g.jsonl"), 4, words)


def test_report_of_a_folder_without_records_is_refused(sip: Sip, tmp_path: Path) -> None:
    fails(sip("report", tmp_path), 3, "holds no records")
    assert not Path("report.html").exists()


@pytest.mark.parametrize("out", ["folder", "file/below"])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    sip: Sip, checkpoint: Path, config: Path, out: str
) -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    write_jsonl(Path("p.jsonl"), [{"prompt": "x"}])
    fails(sip("generate", checkpoint, "--prompts", "p.jsonl", "--out", out), 3, out)
    fails(sip("score", checkpoint, "--pairs", "p.jsonl", "--out", out), 3, out)
    run = "file" if out == "folder" else out
    fails(sip("train", config, "--data.path", write_texts(Path("texts")), "--out", run), 3, run)


def test_completions_depend_on_the_prompt_alone(sip: Sip, checkpoint: Path) -> None:
    prompts = [{"prompt": text} for text in ("The bridge", "A", "The bridge", "River")]
    found = []
    for name, rows in (("a", prompts), ("b", [prompts[3], prompts[0], prompts[1]])):
        write_jsonl(Path(f"{name}.jsonl"), rows)
        code, _, err = sip(
            "generate",
            checkpoint,
            "--prompts",
            f"{name}.jsonl",
            "--max-new-tokens",
            9,
            "--out",
            f"{name}.out",
        )
        assert code == 0, err
        rows = [json.loads(line) for line in Path(f"{name}.out").read_text().splitlines()]
        found.append([row["completions"][0]["ids"] for row in rows])
    first, second = found
    assert [second[1], second[2], second[0]] == [first[0], first[1], first[3]]
    assert first[0] != first[2]  # the same prompt again draws anew


def test_outputs_that_are_no_plain_files_are_left_alone(sip: Sip, checkpoint: Path) -> None:
    write_jsonl(Path("p.jsonl"), [{"prompt": "A"}])
    os.mkfifo("pipe")
    Path("target").write_text("old")
    Path("link").symlink_to("target")
    run = ("generate", checkpoint, "--prompts", "p.jsonl", "--max-new-tokens", 2, "--out")
    fails(sip(*run, "pipe"), 3, "something else")
    fails(sip(*run, "x" * 300), 3, "cannot be written")
    assert sip(*run, "link")[0] == 0
    assert Path("pipe").is_fifo() and Path("link").is_symlink() and "prompt_ids" in Path("target").read_text()


@pytest.mark.parametrize("memory", [10**9, 10**12])
def test_more_memory_than_there_is(sip: Sip, checkpoint: Path, memory: int) -> None:
    write_jsonl(Path("p.jsonl"), [{"prompt": "A"}])
    fails(
        sip(
            "generate",
            checkpoint,
            "--prompts",
            "p.jsonl",
            "--kv-memory-mb",
            memory,
            "--max-new-tokens",
            2,
            "--out",
            "o",
        ),
        5,
        "lower kv_memory_mb",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["judge-pairs", "--pairs", "-1"], "--pairs"),
        (["judge-pairs", "--safety", "-4"], "--safety"),
        (["judge-pairs", "--max-prefix-chars", "0"], "--max-prefix-chars"),
        (["rewrites", "--num", "0"], "--num"),
    ],
)
def test_silly_amounts_of_data_are_refused(sip: Sip, config: Path, arguments: list[str], words: str) -> None:
    command, *rest = arguments
    fails(sip("data", command, config, "--out", "made", *rest), 2, words)
    assert not Path("made").exists()
