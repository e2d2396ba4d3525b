"""The judge trained as the paper trains its own (method §judge training), from the real model, and its exam.

The frozen model judges the experiments by mutual information; what is trained here judges nothing else. It shows how
far corrupted copies and GRPO take a small post-trained model that cannot answer when it is asked, and how much of
that holds for corruptions, texts and lengths it has not seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.evaluation.intervals import Estimate, differences, estimates
from sip_engine.experiments.real.exam import (
    HELD_OUT,
    INFORMATION,
    LOG_ODDS,
    REPLIES,
    SETS,
    Answers,
    examine,
    make_exam,
    make_lessons,
    read_answers,
    save_answers,
)
from sip_engine.experiments.real.job import Job, train_once
from sip_engine.experiments.real.plan import Plan

BEFORE, WARM, GRPO = "before", "warm", "grpo"
STAGES = (BEFORE, WARM, GRPO)
_SHARES = {BEFORE: 0.2, WARM: 0.4, GRPO: 0.4}
"""Of the judge's minutes, for the ETA only."""
_PAIRS = 32
"""Of each set of the exam; each is asked in both orders."""
_SPARE = 1.1
"""Pairs cut for each that is needed: some cannot be corrupted, some are too long."""


@dataclass(frozen=True)
class JudgeFigures:
    """One judge before and after: accuracy with intervals."""

    sets: dict[str, dict[str, Estimate]]
    """Set -> who -> accuracy; who is a stage, or `mutual_information`: the untrained model, not asked in words."""
    gains: dict[str, Estimate]
    """Set -> the last stage's less the model's as it comes, pair by pair."""
    replies: dict[str, Estimate]
    """Stage -> share of greedy replies that are the right verdict, on documents like those of the lessons."""
    prompts: dict[str, int]
    """Stage -> prompts that it learnt from."""

    def to_json(self) -> dict[str, Any]:
        """The judge's part of summary.json."""
        return {
            "accuracy": {
                name: {who: one.to_json() for who, one in found.items()} for name, found in self.sets.items()
            },
            "trained_less_before": {name: one.to_json() for name, one in self.gains.items()},
            "right_replies": {stage: one.to_json() for stage, one in self.replies.items()},
            "prompts": self.prompts,
        }


class JudgeTraining:
    """Lessons, a warm start, GRPO, and an exam before and after each; every result is a file of its own."""

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        self._plan, self._mesh = plan, mesh

    def jobs(self, minute: float) -> Iterator[Job]:
        """In their order; none if the plan has no time for them. `minute` is the share of a minute.

        Raises:
            ConfigError: their settings do not fit the model.
        """
        stages = STAGES if self._plan.form.judge_minutes else ()
        for stage in stages[1:]:
            self._config(stage)
        for stage in stages:
            title = {BEFORE: "as it comes", WARM: "warm start", GRPO: "GRPO"}[stage]
            share = _SHARES[stage] * self._plan.form.judge_minutes * minute
            yield Job(f"judge: {title}", share, self._result(stage), partial(self._do, stage))

    def figures(self) -> JudgeFigures | None:
        """What is known by now; None before a trained judge sat the exam."""
        answers = {stage: read_answers(path) for stage in STAGES if (path := self._result(stage)).is_file()}
        if BEFORE not in answers or len(answers) == 1:
            return None
        last = [stage for stage in STAGES if stage in answers][-1]
        before, after = answers[BEFORE][LOG_ODDS], answers[last][LOG_ODDS]
        known = [
            name for name in SETS if all(name in one and one[name][:, 1].any() for one in (before, after))
        ]
        trained = {stage: self._config(stage) for stage in answers if stage != BEFORE}
        return JudgeFigures(
            {name: _row(answers, name) for name in known},
            {name: differences({name: after[name]}, {name: before[name]})[name] for name in known},
            {stage: estimates(found[REPLIES])[HELD_OUT] for stage, found in answers.items()},
            {stage: cfg.steps * cfg.batch_size for stage, cfg in trained.items()},
        )

    def _do(self, stage: str) -> None:
        plan = self._plan
        documents, wanted = plan.judge_documents(), {s: self._config(s) for s in (WARM, GRPO)}
        pairs = {s: round(_SPARE * cfg.steps * cfg.batch_size / 2) for s, cfg in wanted.items()}
        longest = min(cfg.data.max_prefix_tokens for cfg in wanted.values())
        make_lessons(documents, plan.judge / "lessons", pairs, longest, self._mesh)
        exam = make_exam(documents, plan.judge, _PAIRS, self._mesh)
        if stage != BEFORE:
            train_once(wanted[stage], self._mesh)
        checkpoint = plan.model if stage == BEFORE else wanted[stage].out
        save_answers(
            self._result(stage), examine(checkpoint, exam, self._mesh, by_information=stage == BEFORE)
        )
        if stage == GRPO:
            shutil.rmtree(wanted[WARM].out / "checkpoints", ignore_errors=True)  # gigabytes

    def _config(self, stage: str) -> RunConfig:
        plan = self._plan
        init = plan.model if stage == WARM else plan.judge / WARM
        return plan.judge_config(stage, init, plan.judge / "lessons" / f"{stage}.jsonl")

    def _result(self, stage: str) -> Path:
        return self._plan.judge / f"{stage}.json"


def _row(answers: Mapping[str, Answers], name: str) -> dict[str, Estimate]:
    """Who -> accuracy on one set."""
    found = {INFORMATION: answers[BEFORE][INFORMATION][name]}
    found |= {stage: one[LOG_ODDS][name] for stage, one in answers.items()}
    return estimates(found)
