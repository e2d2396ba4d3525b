"""Labels within texts: their log-probs against Llama, a task learnt from them alone, and bad ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, small_run
from llama import llama_of
from ranks import run_ranks
from world_runs import metrics

from sip_engine.config.parse import parse_config
from sip_engine.config.schema import RunConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import Policy, score
from sip_engine.policy.rows import Row
from sip_engine.train import train
from sip_engine.types import Labels, Sample
from sip_engine.utils.errors import DataError

VOCAB = 101


def labelled_rows(seed: int) -> list[Row]:
    """Several suffixes a row, an empty prefix, positions more than once and in no order, a row without."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    rows = []
    for prefix, lengths in ((4, (6, 3)), (0, (9,)), (1, (1, 5, 2))):
        labels = tuple(Labels(rng.integers(0, length, 4).astype(np.int32), ids(4)) for length in lengths)
        rows.append(Row(ids(prefix), tuple(map(ids, lengths)), labels))
    return [*rows, Row(ids(3), (ids(2),))]


def llama_labels(llama: Any, row: Row) -> list[torch.Tensor]:
    """[labels] log-probs of each suffix, one sequence at a time."""
    found = []
    for suffix, labels in zip(row.suffixes, row.labels, strict=True):
        ids = torch.from_numpy(np.concatenate([row.prefix, suffix]).astype(np.int64))
        logprobs = llama(ids[None]).logits[0].double().log_softmax(-1)
        positions = len(row.prefix) + labels.positions.astype(np.int64)
        found.append(logprobs[positions, labels.ids.astype(np.int64)])
    return found


def test_log_probs_equal_llama(mesh: Mesh) -> None:
    policy = Policy(small_run(), VOCAB, mesh)
    llama, rows = llama_of(policy.model, VOCAB), labelled_rows(0)
    packed = pack_rows(rows, mesh.device, multiple=8)
    assert packed.target_lens == (4, 4, 4, 4, 4, 4, 2)
    found = score(policy.model, [packed])[0].split(list(packed.target_lens))
    with torch.no_grad():
        want = [one for row in rows[:3] for one in llama_labels(llama, row)]
    for mine, theirs in zip(found[:-1], want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("micro_batch_tokens", [4096, 12])
def test_updates_equal_plain_torch(mesh: Mesh, micro_batch_tokens: int) -> None:
    """The mean over all labels, whatever the micro-batches; samples with and without labels in one batch."""
    cfg = small_run(
        parallel={"micro_batch_tokens": micro_batch_tokens},
        optimizer={"lr": 1e-2, "warmup_steps": 0, "min_lr_ratio": 1.0, "weight_decay": 0.0, "eps": 1e-4},
        objective={"kind": "next_token", "loss_on": "suffix"},
    )
    policy = Policy(cfg, VOCAB, mesh)
    llama = llama_of(policy.model, VOCAB)
    adam = torch.optim.AdamW(llama.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    rows = [row for row in labelled_rows(1)[:3] if len(row.suffixes) == 1 or len(row.prefix) == 4]
    samples = [
        Sample(n, 0, row.prefix, row.suffixes[0], "", "", labels=row.labels[0]) for n, row in enumerate(rows)
    ]
    plain = Sample(9, 0, np.array([3, 4], np.int32), np.array([7, 8, 9], np.int32), "", "")
    objective = open_objective(cfg.objective)
    stats = update(policy, None, [objective.row_of_sample(s) for s in (*samples, plain)], objective)
    parts = [llama_labels(llama, Row(r.prefix, r.suffixes[:1], r.labels[:1]))[0] for r in rows]
    own = Row(np.array([3], np.int32), (np.array([4, 7, 8], np.int32),))
    own = Row(own.prefix, own.suffixes, (Labels(np.arange(3), np.array([7, 8, 9])),))
    loss = -torch.cat([*parts, *llama_labels(llama, own)]).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(llama.parameters(), cfg.optimizer.clip_grad)
    adam.step()
    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    ours = llama_of(policy.model, VOCAB)
    for (name, got), (_, want) in zip(ours.named_parameters(), llama.named_parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4, msg=name)


ALPHABET = "ab"


def write_task(folder: Path) -> None:
    """Labels: is the letter the same as the one before? And a prompt with an answer, among them."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(ALPHABET), 6)) for _ in range(400)]
    Tokenizer.train([*texts, "Y N 1 2 ?"] * 3, 266, folder / "tokenizer.model")
    for name, some in (("train", texts[:340]), ("eval", texts[340:])):
        with (folder / f"{name}.jsonl").open("w") as file:
            for text in some:
                labels = [[end, "Y" if text[end - 1] == text[end - 2] else "N"] for end in range(2, 7)]
                file.write(json.dumps({"text": text, "labels": labels, "kind": "again"}) + "\n")
            for _ in range(60 if name == "train" else 3):
                file.write(json.dumps({"prompt": "ab?", "answer": "1", "kind": "reply"}) + "\n")


def task_config(folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "out": str(folder / "run"),
        "task": "judge",
        "steps": 60,
        "batch_size": 32,
        "model": SMALL_MODEL.model_dump(),
        "data": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "eval.jsonl"),
            "tokenizer": str(folder / "tokenizer.model"),
            "max_prefix_tokens": 12,
            "min_prefix_tokens": 1,
            "suffix_tokens": 4,
        },
        "objective": {"kind": "next_token", "loss_on": "suffix"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 5},
        "eval": {"num_prefixes": 80, "every": 0},
        "checkpoint": {"every": 0},
    }
    return parse_config(settings | changes, "test")


@pytest.mark.slow
def test_labels_are_learnt(mesh: Mesh, tmp_path: Path) -> None:
    write_task(tmp_path)
    train(task_config(tmp_path), mesh)
    start, end = (row for row in metrics(tmp_path) if "eval/label_accuracy" in row)
    assert start["eval/label_accuracy"] < 0.8 and end["eval/label_accuracy"] > 0.97
    assert end["eval/label_accuracy/Y"] > 0.95 and end["eval/label_accuracy/N"] > 0.95
    assert end["eval/accuracy"] == 1.0  # of what is replied to


def train_on_ranks(folder: Path, layout: str) -> None:
    cfg = task_config(folder, parallel=json.loads(layout), steps=4)
    train(cfg, start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline, seed=cfg.seed))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["dp 2", "pp 2"])
def test_labels_are_the_same_at_every_layout(mesh: Mesh, tmp_path: Path, layout: dict) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
        write_task(folder)
    train(task_config(alone, steps=4), mesh)
    run_ranks("test_labels:train_on_ranks", 2, together, json.dumps(layout))
    for want, got in zip(metrics(alone), metrics(together), strict=True):
        assert want.keys() == got.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], abs=2e-4, rel=1e-3), name


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"labels": [[1, "Y"]]}, "expected"),
        ({"text": "", "labels": [[1, "Y"]]}, "expected"),
        ({"text": "ab", "labels": []}, "expected"),
        ({"text": "ab", "labels": [[3, "Y"]]}, "expected"),
        ({"text": "ab", "labels": [[0, "Y"]]}, "expected"),
        ({"text": "ab", "labels": [[True, "Y"]]}, "expected"),
        ({"text": "ab", "labels": [[1, ""]]}, "expected"),
        ({"text": "ab", "labels": [[1, "Yes"]]}, "the label 'Yes' is 3 tokens, not one"),
        ({"text": "ab", "labels": [[1, "é"]]}, "the label 'é' is 2 tokens, not one"),
        ({"text": "ab", "labels": [[1]]}, "expected"),
        ({"text": "ab", "labels": "Y"}, "expected"),
        (
            {"text": "abba" * 9, "labels": [[1, "Y"]]},
            r"the text has \d+ tokens, above data.max_prefix_tokens=12",
        ),
    ],
)
def test_bad_labels_are_named(mesh: Mesh, tmp_path: Path, record: dict, message: str) -> None:
    write_task(tmp_path)
    path = tmp_path / "train.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(record), *rest]) + "\n")
    with pytest.raises(DataError, match=rf"train.jsonl:2: {message}"):
        train(task_config(tmp_path), mesh)
    assert not (tmp_path / "run").exists()


def test_labels_are_nothing_to_reply_to(mesh: Mesh, tmp_path: Path) -> None:
    write_task(tmp_path)
    with pytest.raises(DataError, match=r"train.jsonl:1: labels are not written in reply"):
        train(task_config(tmp_path, objective={"kind": "grpo"}), mesh)
