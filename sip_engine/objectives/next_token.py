"""Next-token prediction: plain pretraining on documents, or training on a task's known answers."""

from __future__ import annotations

import numpy as np

from sip_engine.config.objective import LearnsFrom
from sip_engine.config.schema import RunConfig
from sip_engine.objectives.base import Objective
from sip_engine.policy.rows import Row, row_of
from sip_engine.types import Sample


class NextToken(Objective):
    """The likelihood of each sample's suffix, or of all of its tokens but the first (`objective.loss_on`)."""

    learns_from = LearnsFrom.SAMPLES

    def check(self, cfg: RunConfig) -> None:
        if cfg.task != "policy" and self.cfg.loss_on == "all":
            raise ValueError(f'task="{cfg.task}" learns answers, not prompts: set objective.loss_on="suffix"')

    def row_of_sample(self, sample: Sample) -> Row:
        if self.cfg.loss_on == "suffix":
            return row_of(sample)
        whole = np.concatenate([sample.prefix_ids, sample.suffix_ids])
        return Row(np.zeros(0, np.int32), (whole,), document=sample.document)
