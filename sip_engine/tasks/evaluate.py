"""Evaluation of a judge or a rewriter in training: its greedy replies to held-out prompts, graded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sip_engine.distributed.agreement import raised_together
from sip_engine.distributed.sharing import interleave
from sip_engine.evaluation.held_out import Evaluation, held_out_losses
from sip_engine.monitoring.metrics import Means
from sip_engine.policy.policy import Policy
from sip_engine.policy.rows import Row
from sip_engine.sampler.requests import Completion
from sip_engine.tasks.graders import Grader
from sip_engine.types import Labels, Sample

Reply = Callable[[Sequence[Sample]], tuple[list[list[Completion]], list[list[str | None]]]]
"""Greedy replies to prompts, one each: tokens and texts."""


def evaluate_task(
    policy: Policy, samples: Sequence[Sample], reply: Reply | None, grader: Grader, *, seed: int
) -> Evaluation:
    """Figures over all held-out prompts, the same on every process; without `reply` the answers' loss only.

    `finished` is the share of replies that end by themselves; the rest is the grader's. Labels of texts are no
    replies: `label_accuracy` is the share of them that the policy thinks likelier than all other labels.
    """
    mesh, means = policy.mesh, Means()
    mine = samples[mesh.dp.rank :: mesh.dp.size]
    replied = reply is not None and any(sample.labels is None for sample in samples)
    texts = [""] * len(mine) if replied else []
    with raised_together(mesh):
        if mine:
            for total, count in held_out_losses(policy, mine):
                means.add("heldout_loss", total, count)
        labelled = [sample for sample in mine if sample.labels is not None]
        if labelled:
            options = np.unique(np.concatenate([s.labels.ids for s in samples if s.labels is not None]))
            for label, right in _labels_hit(policy, labelled, options):
                means.add("label_accuracy", right)
                means.add(f"label_accuracy/{label}", right)
        places = [place for place, sample in enumerate(mine) if sample.labels is None]
        prompts = [mine[place] for place in places]
        if prompts and reply is not None:
            _, replies = reply(prompts)
            graded = grader.grade(prompts, replies, seed=seed)
            written = [text for (text,) in replies]
            figures = grader.figures(prompts, written, seed=seed)
            for place, text, (reward,), found in zip(places, written, graded, figures, strict=True):
                texts[place] = text or ""
                means.add("finished", float(text is not None))
                means.add("judge_failure_rate", float(reward is None))
                if reward is not None:
                    means.add("reward", reward)
                for name, value in found.items():
                    means.add(name, value)
    return Evaluation(means.over(mesh), interleave(mesh.gather_replicas(texts)))


def _labels_hit(policy: Policy, samples: Sequence[Sample], options: np.ndarray) -> list[tuple[str, float]]:
    """Each label and whether it is the likeliest of the options [n] in its place."""
    rows, wanted = [], []
    for s in samples:
        assert s.labels is not None
        rows.append(Row(s.prefix_ids, (s.suffix_ids,), (Labels.every(s.labels.positions, options),)))
        wanted += zip((label for _, label in s.facts["labels"]), s.labels.ids.tolist(), strict=True)
    scored = policy.score(policy.micro_batches(rows))  # nothing before the last pipeline stage
    likeliest = [options[n] for part in scored for n in part.view(-1, len(options)).argmax(dim=1).tolist()]
    likeliest = policy.mesh.from_last_stage(likeliest)
    return [(label, float(found == one)) for (label, one), found in zip(wanted, likeliest, strict=True)]
