"""GRPO: advantages, loss and gradients against plain torch, and a task learnt in the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_run
from hypothesis import given
from hypothesis import strategies as st
from llama import llama_logprobs, llama_of
from ranks import run_ranks
from task_runs import task_config, write_task
from world_runs import metrics

from sip_engine.config.judge import JudgeVotes
from sip_engine.config.schema import ObjectiveConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.evaluation.command import evaluate_checkpoint, recorded_settings
from sip_engine.monitoring.records import read_records
from sip_engine.objectives.base import Objective, open_objective
from sip_engine.objectives.grpo import advantages, grpo_losses
from sip_engine.objectives.update import update
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import Row
from sip_engine.sampler.requests import Completion
from sip_engine.tasks.graders import RewriteGrader, VerdictGrader, word_overlap
from sip_engine.train import train
from sip_engine.types import Failure, PairQuestion, SafetyQuestion, Sample, Score
from sip_engine.utils.errors import ConfigError, DataError

VOCAB = 101


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0])), max_size=8))
def test_advantages_are_standardised_rewards(rewards: list[float | None]) -> None:
    known = np.array([r for r in rewards if r is not None])
    found = advantages(rewards)
    if len(known) < 2 or known.min() == known.max():
        assert found is None
        return
    assert found is not None
    for reward, advantage in zip(rewards, found, strict=True):
        want = 0.0 if reward is None else (reward - known.mean()) / (known.std() + 1e-6)
        assert advantage == pytest.approx(want, abs=1e-12)


def test_the_clipped_loss_token_by_token() -> None:
    rng = np.random.default_rng(0)
    new, old, gain = rng.normal(size=(3, 40)) * [[0.4], [0.4], [1.0]]
    log_probs = torch.tensor(new, requires_grad=True)
    losses, clipped = grpo_losses(
        log_probs, torch.tensor(old), torch.tensor(gain), clip=0.2, kl=None, kl_weight=0.0
    )
    losses.sum().backward()
    assert log_probs.grad is not None
    for i, (n, o, a) in enumerate(zip(new, old, gain, strict=True)):
        ratio = np.exp(n - o)
        outside = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
        want = -(np.clip(ratio, 0.8, 1.2) if outside else ratio) * a
        assert losses[i].item() == pytest.approx(want)
        assert clipped[i].item() == outside
        assert log_probs.grad[i].item() == pytest.approx(0.0 if outside else -ratio * a)
    assert 3 < int(clipped.sum()) < 37  # both cases were seen


def generated(seed: int) -> tuple[list[Sample], list[list[Completion]], list[list[float | None]]]:
    """Three prompts of two to four generations with log-probs of some other policy; the second teaches nothing."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    samples = [Sample(n, 0, ids(3 + n), ids(2), "", "") for n in range(3)]
    groups = [
        [
            Completion(ids(k + 1), (-4.6 + rng.normal(size=k + 1) * 0.3).astype(np.float32))
            for k in range(size)
        ]
        for size in (4, 2, 3)
    ]
    return samples, groups, [[1.0, 0.0, None, 0.5], [1.0, 1.0], [0.0, 1.0, 0.0]]


def rows_of(objective: Objective, *batch: Any) -> list[Row]:
    rows = [objective.row_of_group(*group) for group in zip(*batch, strict=True)]
    return [row for row in rows if row is not None]


@pytest.mark.parametrize("micro_batch_tokens", [4096, 12])
def test_grpo_updates_equal_plain_torch(mesh: Mesh, micro_batch_tokens: int) -> None:
    """Two updates, the second away from the reference, against Llama and a written-out loss."""
    objective = open_objective(ObjectiveConfig(kind="grpo", clip=0.1, kl_weight=0.3))
    cfg = small_run(
        parallel={"micro_batch_tokens": micro_batch_tokens},
        optimizer={"lr": 1e-2, "warmup_steps": 0, "min_lr_ratio": 1.0, "weight_decay": 0.0, "eps": 1e-4},
    )
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    llama, frozen = llama_of(policy.model, VOCAB), llama_of(policy.model, VOCAB)
    adam = torch.optim.AdamW(llama.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    for seed in range(2):
        samples, groups, rewards = generated(seed)
        rows = rows_of(objective, samples, groups, rewards)
        stats = update(policy, reference, rows, objective)
        total, count, clipped = torch.tensor(0.0), 0, 0
        for sample, group, values in zip(samples, groups, rewards, strict=True):
            known = [v for v in values if v is not None]
            if len(set(known)) < 2:
                continue
            for completion, value in zip(group, values, strict=True):
                gain = 0.0 if value is None else float((value - np.mean(known)) / (np.std(known) + 1e-6))
                prefix, ids = sample.prefix_ids.tolist(), completion.ids.tolist()
                mine = llama_logprobs(llama, prefix, ids)
                with torch.no_grad():
                    theirs = llama_logprobs(frozen, prefix, ids)
                ratio = torch.exp(mine - torch.from_numpy(completion.logprobs))
                kept = ratio.clamp(0.9, 1.1)
                gap = theirs - mine
                total = (
                    total - torch.minimum(ratio * gain, kept * gain).sum() + 0.3 * (gap.exp() - gap - 1).sum()
                )
                clipped += int((kept * gain < ratio * gain).sum())
                count += len(ids)
        loss = total / count
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        adam.step()
        assert stats.loss == pytest.approx(loss.item(), abs=2e-5)
        assert stats.grad_norm == pytest.approx(norm.item(), rel=2e-4)
        assert (stats.sums["grpo_tokens"], stats.sums["clipped"]) == (count, clipped)
    for got, want in zip(llama_of(policy.model, VOCAB).parameters(), llama.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=0)


def test_a_batch_that_teaches_nothing_makes_no_update(mesh: Mesh) -> None:
    policy = Policy(small_run(), VOCAB, mesh)
    before = [p.clone() for p in policy.model.parameters()]
    samples, groups, rewards = generated(0)
    objective = open_objective(ObjectiveConfig(kind="grpo"))
    rows = rows_of(objective, samples, groups, [[1.0] * len(values) for values in rewards])
    assert not rows
    update(policy, None, rows, objective)
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), before, strict=True))


class ScriptedJudge:
    """Prefers texts with a star, calls those with an x unsafe, fails on a question mark."""

    name = "scripted"

    def judge(self, questions, *, seed: int = 0):
        return [self._answer(q) for q in questions]

    def _answer(self, question):
        if isinstance(question, PairQuestion):
            if "?" in question.first:
                return Failure("asked")
            return Score(float("*" in question.first))
        assert isinstance(question, SafetyQuestion)
        return Score(float("x" not in question.suffix))


def test_rewriter_rewards() -> None:
    empty = np.zeros(0, np.int32)
    facts = {"prefix": "p", "suffix": "a b c", "safe": True}
    samples = [Sample(n, 0, empty, empty, "", "", facts | {"safe": n == 0}) for n in range(2)]
    replies = [["a b c", "a b", None, ""], ["*", "* x", "x", "?", None]]
    rewards = RewriteGrader(ScriptedJudge(), JudgeVotes(safety=2)).grade(samples, replies, seed=0)
    assert rewards == [[1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, None, 0.0]]
    assert word_overlap("a b b", "b a c d") == 2 / 4
    three = [samples[0], samples[1], samples[1], samples[1]]
    found = RewriteGrader(ScriptedJudge(), JudgeVotes(safety=2)).figures(
        three, ["a b", "a c", "x", None], seed=0
    )
    assert found == [
        {"overlap_safe": 2 / 3, "copied": 0.0},
        {"overlap_unsafe": 2 / 3, "made_safe": 1.0},
        {"overlap_unsafe": 0.0, "made_safe": 0.0},
        {"overlap_unsafe": 0.0, "made_safe": 0.0},
    ]


class VotingJudge:
    """Prefers each text in every other vote, calls it safe in one vote of four; its first vote on safety fails."""

    name = "voting"

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.calls: list[tuple[int, int]] = []
        self.seeds: list[int] = []

    def judge(self, questions, *, seed: int = 0):
        vote, pairs = len(self.calls), sum(isinstance(q, PairQuestion) for q in questions)
        self.calls.append((pairs, len(questions) - pairs))
        self.seeds.append(seed)
        return [self._answer(q, vote) for q in questions]

    def _answer(self, question, vote: int):
        if isinstance(question, PairQuestion):
            return Score(float(vote % 2))
        return Failure("cut off") if vote == 0 else Score(float(vote == 3))


def test_each_question_of_a_rewrite_has_its_own_number_of_votes() -> None:
    """Votes have seeds of their own, failed ones are left out, and a judge that always answers alike votes once."""
    empty = np.zeros(0, np.int32)
    facts = {"prefix": "p", "suffix": "a b c", "safe": False}
    samples = [Sample(0, 0, empty, empty, "", "", facts)]
    judge, votes = VotingJudge(), JudgeVotes(quality=2, safety=5, factuality=9)
    assert RewriteGrader(judge, votes).grade(samples, [["a", "b", None]], seed=7) == [
        [(1 / 2 + 1 / 4) / 2] * 2 + [0.0]
    ]
    assert judge.calls == [(2, 2), (2, 2), (0, 2), (0, 2), (0, 2)]
    RewriteGrader(judge, votes).grade(samples, [["a"]], seed=8)
    assert len(set(judge.seeds)) == 10
    once = VotingJudge(deterministic=True)
    assert RewriteGrader(once, votes).grade(samples, [["a", None, ""]], seed=7) == [[None, 0.0, 0.0]]
    assert once.calls == [(1, 1)]


def test_verdicts_are_read_from_the_last_line() -> None:
    sample = Sample(
        0, 0, np.zeros(0, np.int32), np.zeros(0, np.int32), "", "because\nVERDICT 0a: 1", {"kind": "pair"}
    )
    grader = VerdictGrader()
    replies = ["so\nVERDICT 0a: 1\n", "VERDICT 0a: 1\nor not", "VERDICT 0a: 2", None, ""]
    assert grader.grade([sample], [replies]) == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert grader.figures([sample], ["VERDICT 0a: 1"]) == [{"accuracy": 1.0, "accuracy_pair": 1.0}]


@pytest.mark.slow
def test_a_judge_learns_in_the_loop(mesh: Mesh, tmp_path: Path) -> None:
    """A warm start on answers at random gives the format and nothing else; GRPO from it gives the right ones."""
    write_task(tmp_path)
    warm = task_config(tmp_path, out=tmp_path / "warm", steps=40)
    data = warm.data.model_copy(update={"path": tmp_path / "warm.jsonl"})
    objective = warm.objective.model_copy(update={"kind": "next_token"})
    train(warm.model_copy(update={"data": data, "objective": objective}), mesh)
    start = metrics(tmp_path, "warm")[-1]
    optimizer = {"lr": 3e-3, "warmup_steps": 1}
    cfg = task_config(tmp_path, steps=60, batch_size=16, init=tmp_path / "warm", optimizer=optimizer)
    train(cfg, mesh)
    end = metrics(tmp_path)[-1]
    assert start["eval/finished"] > 0.8 and start["eval/accuracy"] < 0.8
    assert end["eval/accuracy"] == end["eval/accuracy_letters"] == 1.0
    assert all(row["drift/max"] < 1e-4 for row in metrics(tmp_path) if "drift/max" in row)
    record = next(iter(read_records(tmp_path / "run" / "generations.jsonl")))
    assert len(record["generations"]) == 6 and record["prompt"][0] in "ab"
    assert {g["reward"] for g in record["generations"]} <= {0.0, 1.0}


def train_on_ranks(folder: Path, layout: str) -> None:
    cfg = task_config(folder, parallel=json.loads(layout))
    train(cfg, start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline, seed=cfg.seed))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=["dp 2", "tp 2"])
def test_a_task_is_the_same_at_every_layout(mesh: Mesh, tmp_path: Path, layout: dict) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
        write_task(folder)
    train(task_config(alone), mesh)
    run_ranks("test_grpo:train_on_ranks", 2, together, json.dumps(layout))
    for want, got in zip(metrics(alone), metrics(together), strict=True):
        assert want.keys() == got.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], abs=2e-4, rel=1e-3), name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "train.jsonl:2: not JSON"),
        ('{"prompt": "a"}', "train.jsonl:2: expected"),
        ('{"prompt": "", "answer": "yes"}', "train.jsonl:2: prompt and answer must not be empty"),
        (
            '{"prompt": "abbaabbaabbaabbaabba.abba.ab.a", "answer": "yes"}',
            r"train.jsonl:2: the prompt has \d+ tokens",
        ),
        (
            '{"prompt": "a", "answer": "yes yes yes yes yes"}',
            r"train.jsonl:2: the answer has \d+ tokens",
        ),
    ],
)
def test_bad_prompts_are_named(mesh: Mesh, tmp_path: Path, line: str, message: str) -> None:
    write_task(tmp_path)
    path = tmp_path / "train.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *rest]) + "\n")
    with pytest.raises(DataError, match=message):
        train(task_config(tmp_path), mesh)
    assert not (tmp_path / "run").exists()


def test_a_rewriter_needs_the_suffix_and_whether_it_is_safe(mesh: Mesh, tmp_path: Path) -> None:
    write_task(tmp_path)
    path = tmp_path / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    facts = {"prefix": "a", "suffix": "b", "safe": True}
    path.write_text("".join(json.dumps(r | facts | {"safe": n != 3}) + "\n" for n, r in enumerate(records)))
    with pytest.raises(
        DataError, match=r'eval.jsonl:1: task="rewriter" needs the texts "prefix" and "suffix"'
    ):
        train(task_config(tmp_path, task="rewriter", judge={"backend": "heuristic"}), mesh)
    path.write_text(path.read_text().replace('"safe": false', '"safe": "no"'))
    with pytest.raises(DataError, match=r"train.jsonl:4: .* as `sip data rewrites` writes them"):
        train(task_config(tmp_path, task="rewriter", judge={"backend": "heuristic"}), mesh)
    assert not (tmp_path / "run").exists()


def test_a_judge_is_not_evaluated_on_documents(mesh: Mesh, tmp_path: Path) -> None:
    write_task(tmp_path)
    cfg = task_config(tmp_path, steps=1, objective={"kind": "next_token", "loss_on": "suffix"})
    train(cfg, mesh)
    with pytest.raises(ConfigError, match='task = "judge" has prompts for documents'):
        evaluate_checkpoint(cfg.out, tmp_path / "out", *recorded_settings(cfg.out)[:1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "policy"}, 'set task="judge" or "rewriter"'),
        ({"objective": {"kind": "dpo"}}, 'trains with objective.kind "next_token" or "grpo", not "dpo"'),
        ({"objective": {"kind": "next_token"}}, 'set objective.loss_on="suffix"'),
        ({"data": {}}, "needs data.path and data.eval_path"),
    ],
)
def test_conflicting_settings(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        task_config(tmp_path, **changes)
