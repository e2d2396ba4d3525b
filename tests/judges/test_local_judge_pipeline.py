"""A judge and a rewriter beside a policy with pipeline stages: each stage holds them whole and answers its share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import SMALL_MODEL, small_run
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from world_runs import metrics, pools, run_config

from sip_engine.data.corpus import Corpus
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.distributed.sharing import share_out
from sip_engine.judges.distributed import StagesJudge
from sip_engine.judges.local import LocalJudge
from sip_engine.judges.open import open_judge
from sip_engine.policy.checkpoint import CheckpointState, save_checkpoint
from sip_engine.policy.policy import Policy
from sip_engine.policy.weights import weight_views
from sip_engine.rewriters.distributed import StagesRewriter
from sip_engine.rewriters.open import open_rewriter
from sip_engine.train import train
from sip_engine.types import (
    FactualityQuestion,
    Failure,
    Judgment,
    PairQuestion,
    Question,
    RewriteRequest,
    SafetyQuestion,
    Score,
)
from sip_engine.utils.errors import NonFiniteError

TEXTS = ["the quick brown fox jumps over the lazy dog, yes no 1 2 none possible definite"] * 20
QUESTIONS: list[Question] = [
    PairQuestion("the fox", " jumps", " sleeps over"),
    SafetyQuestion(" the lazy dog"),
    PairQuestion("a dog", " sleeps", " the lazy dog"),
    FactualityQuestion("the fox", " jumps", " sleeps"),
    SafetyQuestion(" jumps"),
    PairQuestion("a dog", " equal", " equal"),
    PairQuestion("the fox", " sleeps over", " jumps"),
    FactualityQuestion("the quick brown dog", " jumps", " over the fox"),
    SafetyQuestion("☺" * 30),
    PairQuestion("the fox", " jumps over", " a dog"),
    SafetyQuestion(" over the fox and the lazy brown dog"),
]
REQUESTS = [RewriteRequest("the fox", text) for text in (" jumps", " a dog", "z " * 90, " sleeps", " over")]
LOCAL = {
    "log_odds": {"max_new_tokens": 6},
    "generate": {"max_new_tokens": 12, "temperature": 1.0, "method": "generate"},
}


def judge_checkpoint(mesh: Mesh, folder: Path, *, tied: bool, max_context: int = 80) -> Path:
    """An untrained judge whose answers differ widely, and whose replies are often short and sometimes verdicts."""
    shape = SMALL_MODEL.model_copy(update={"max_context": max_context, "tie_embeddings": tied})
    tokenizer = Tokenizer.train(TEXTS, 300, folder / "tokenizer.model")
    policy = Policy(small_run(model=shape, seed=4 if tied else 10), tokenizer.vocab_size, mesh)
    head = weight_views(policy.model, tokenizer.vocab_size, 0).head
    assert head is not None
    likely = [int(tokenizer.encode(word)[0]) for word in ("1", "2", "yes", "no", "none")]
    head[[tokenizer.eos_id, *likely]] *= 5
    state = CheckpointState(0, shape, tokenizer.vocab_size, {})
    return save_checkpoint(folder, policy, None, state, tokenizer, keep=1)


def written(judgment: Judgment | str) -> list[Any]:
    if isinstance(judgment, str):
        return [judgment]
    cost = [judgment.cost.calls, judgment.cost.tokens]
    return [judgment.value if isinstance(judgment, Score) else judgment.reason, *cost]


def answers(mesh: Mesh, checkpoint: str, parallel: dict[str, int]) -> dict[str, list[Any]]:
    """All questions and requests, as every process of a layout gets them answered."""
    found: dict[str, list[Any]] = {}
    for method, settings in LOCAL.items():
        local = {"backend": "local", "local": settings | {"checkpoint": checkpoint}}
        rewriter = local | {"local": {"max_new_tokens": 12, "temperature": 1.0, "checkpoint": checkpoint}}
        cfg = small_run(parallel=parallel, judge=local, rewriter=rewriter)
        judge = open_judge(cfg, cast(Corpus, None), mesh)
        found[method] = [written(answer) for answer in judge.judge(QUESTIONS, seed=5)]
        found[method] += [written(answer) for answer in judge.judge(QUESTIONS[:1], seed=6)]
    rewriter = open_rewriter(cfg, cast(Corpus, None), mesh)
    assert rewriter is not None
    found["rewrites"] = [written(answer) for answer in rewriter.rewrite(REQUESTS, seed=5)]
    return found


def answer_on_ranks(folder: Path, checkpoint: str, layout: str) -> None:
    """On every rank: ask all, and note how many questions reached this rank's own copy of the judge."""
    parallel, reached = json.loads(layout), []
    mesh = start_mesh(parallel.get("tensor", 1), parallel["pipeline"])
    real = LocalJudge.judge

    def spy(self: LocalJudge, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        reached.append([QUESTIONS.index(question) for question in questions])
        return real(self, questions, seed=seed)

    LocalJudge.judge = spy
    found = answers(mesh, checkpoint, parallel)
    view = mesh.without_pipeline()
    assert (view.pp.size, view.replica.size, view.tp) == (1, mesh.tp.size, mesh.tp)
    out = {"found": found, "reached": reached, "stage": mesh.pp.rank}
    (folder / f"answers-{mesh.rank}.json").write_text(json.dumps(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout", "tied"),
    [
        (2, {"pipeline": 2}, False),
        (4, {"tensor": 2, "pipeline": 2}, True),
    ],
    ids=["pp2", "tp2-pp2"],
)
def test_answers_equal_those_of_one_process(
    mesh: Mesh, tmp_path: Path, size: int, layout: dict[str, int], tied: bool
) -> None:
    checkpoint = str(judge_checkpoint(mesh, tmp_path / "judge", tied=tied))
    want = answers(mesh, checkpoint, {})
    run_ranks("test_local_judge_pipeline:answer_on_ranks", size, tmp_path, checkpoint, json.dumps(layout))
    probs: dict[int, list[list[int]]] = {}
    for rank in range(size):
        got = json.loads((tmp_path / f"answers-{rank}.json").read_text())
        for number, (ours, theirs) in enumerate(zip(got["found"]["log_odds"], want["log_odds"], strict=True)):
            question = (QUESTIONS + QUESTIONS[:1])[number]
            if isinstance(theirs[0], str):
                assert ours == theirs
                continue
            assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
            # Suffixes alone share their first token or two with whichever of them travel along.
            assert ours[2] == theirs[2] or (
                isinstance(question, SafetyQuestion) and abs(ours[2] - theirs[2]) <= 2
            )
        assert got["found"]["generate"] == want["generate"]
        assert got["found"]["rewrites"] == want["rewrites"]
        assert probs.setdefault(got["stage"], got["reached"]) == got["reached"]
    assert len({value for value, *_ in want["log_odds"]}) > 8
    assert len({tokens for *_, tokens in want["generate"]}) > 5
    assert tied or {0.0, 1.0} & {value for value, calls, _ in want["generate"] if calls}
    assert any(len(answer) == 1 for answer in want["rewrites"])
    first, second = probs[0][0], probs[1][0]
    assert sorted(first + second) == list(range(len(QUESTIONS)))
    assert {0, 6, 9} <= set(first) or {0, 6, 9} <= set(second)
    assert min(len(first), len(second)) >= 3
    assert len(probs[0]) + len(probs[1]) == 6  # a single question reaches one stage only


class Breaking:
    """Breaks down on some questions, and so on one stage only."""

    name, deterministic = "breaking", True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def judge(self, questions: Sequence[Question], *, seed: int = 0) -> list[Judgment]:
        if SafetyQuestion(" broken") in questions:
            raise NonFiniteError(f"found on rank {self.rank}")
        return [Score(float(len(vars(question)))) for question in questions]

    def rewrite(self, requests: Sequence[RewriteRequest], *, seed: int = 0) -> list[str | Failure]:
        if any(request.suffix == " broken" for request in requests):
            raise NonFiniteError(f"found on rank {self.rank}")
        return [request.suffix.upper() for request in requests]


def break_down(folder: Path) -> None:
    mesh = start_mesh(1, 2)
    judge, rewriter = StagesJudge(Breaking(mesh.rank), mesh), StagesRewriter(Breaking(mesh.rank), mesh)
    whole = [SafetyQuestion("a longer one"), PairQuestion("p", "a", "b")]
    with pytest.raises(NonFiniteError, match="found on rank 1"):
        judge.judge([whole[0], SafetyQuestion(" broken")])
    assert [s.value for s in cast(list[Score], judge.judge(whole))] == [2.0, 3.0]
    with pytest.raises(NonFiniteError, match="found on rank 0"):
        rewriter.rewrite([RewriteRequest("", " a"), RewriteRequest("", " broken")])
    assert rewriter.rewrite([RewriteRequest("", " a"), RewriteRequest("", " longer")]) == [" A", " LONGER"]
    assert judge.judge([]) == []


@pytest.mark.slow
def test_an_error_of_one_stage_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks("test_local_judge_pipeline:break_down", 2, tmp_path)


@given(st.lists(st.lists(st.integers(0, 50), min_size=1), max_size=12), st.integers(1, 5))
def test_shares_are_whole_groups_of_even_size(sizes: list[list[int]], num_shares: int) -> None:
    flat = iter(range(1000))
    groups = [[next(flat) for _ in group] for group in sizes]
    totals = [sum(group) for group in sizes]
    probs = share_out(groups, totals, num_shares)
    assert len(probs) == num_shares and sorted(n for share in probs for n in share) == list(
        range(sum(map(len, groups)))
    )
    assert all(share == sorted(share) for share in probs)
    owners = [{n for n, share in enumerate(probs) if set(group) & set(share)} for group in groups]
    assert all(len(owner) == 1 for owner in owners)
    loads = [0] * num_shares
    for owner, total in zip(owners, totals, strict=True):
        loads[owner.pop()] += total
    assert max(loads) - min(loads) <= max(totals, default=0)


def judged_run(folder: Path, checkpoint: str, parallel: dict[str, int]) -> Any:
    """A short run whose judge and rewriter are the engine's own."""
    local = {"backend": "local", "local": {"checkpoint": checkpoint, "max_prefix_chars": 20}}
    rewriter = {"backend": "local", "local": {"checkpoint": checkpoint, "max_new_tokens": 8}}
    return run_config(folder, parallel=parallel, judge=local, rewriter=rewriter, steps=2)


def train_on_stages(folder: Path, checkpoint: str) -> None:
    cfg = judged_run(folder, checkpoint, {"pipeline": 2})
    train(cfg, start_mesh(1, 2, seed=cfg.seed))


@pytest.mark.slow
def test_a_run_with_stages_and_a_local_judge_is_that_of_one_process(mesh: Mesh, tmp_path: Path) -> None:
    checkpoint = str(judge_checkpoint(mesh, tmp_path / "judge", tied=True, max_context=320))
    train(judged_run(tmp_path / "one", checkpoint, {}), mesh)
    run_ranks("test_local_judge_pipeline:train_on_stages", 2, tmp_path / "two", checkpoint)
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [row["step"] for row in theirs if "loss" in row] == [1, 2]
    assert all(row["judge/failure_rate"] < 0.1 for row in theirs if "loss" in row)
    for got, want in zip(ours, theirs, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    chosen = [(pool["chosen"], pool["rejected"]) for pool in pools(tmp_path / "one")]
    assert chosen == [(pool["chosen"], pool["rejected"]) for pool in pools(tmp_path / "two")]
    assert any(first is not None for first, _ in chosen)
