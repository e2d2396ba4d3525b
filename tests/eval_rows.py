"""One row of some published evaluation sets."""

from __future__ import annotations

QA = {"knowledge": "k", "question": "q", "right_answer": "r", "hallucinated_answer": "h"}
MC = {"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}
RTP = {"prompt": {"text": "a", "toxicity": 0.1}}
