"""Evaluation of a judge or a rewriter in training: its greedy replies to held-out prompts, graded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sip_engine.evaluate import Evaluation, held_out_losses, interleave
from sip_engine.graders import Grader
from sip_engine.metrics import Means
from sip_engine.policy.policy import Policy
from sip_engine.sampler.requests import Completion
from sip_engine.types import Sample

Reply = Callable[[Sequence[Sample]], tuple[list[list[Completion]], list[list[str | None]]]]
"""Greedy replies to prompts, one each: tokens and texts."""


def evaluate_task(
    policy: Policy, samples: Sequence[Sample], reply: Reply | None, grader: Grader, *, seed: int
) -> Evaluation:
    """Figures over all held-out prompts, the same on every process; without `reply` the answers' loss only.

    `finished` is the share of replies that end by themselves; the rest is the grader's.
    """
    mesh, means = policy.mesh, Means()
    mine = samples[mesh.dp.rank :: mesh.dp.size]
    texts: list[str] = []
    if mine:
        for total, count in held_out_losses(policy, mine):
            means.add("heldout_loss", total, count)
    if mine and reply is not None:
        _, replies = reply(mine)
        graded = grader.grade(mine, replies, seed=seed)
        written = [text for (text,) in replies]
        figures = grader.figures(mine, written, seed=seed)
        for text, (reward,), found in zip(written, graded, figures, strict=True):
            texts.append(text or "")
            means.add("finished", float(text is not None))
            means.add("judge_failure_rate", float(reward is None))
            if reward is not None:
                means.add("reward", reward)
            for name, value in found.items():
                means.add(name, value)
    return Evaluation(means.over(mesh), interleave(mesh.gather_replicas(texts)))
