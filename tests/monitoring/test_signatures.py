"""Failure signatures: what a run's curves and pools must show for each to be seen, watched or clear."""

from __future__ import annotations

import numpy as np
import pytest
from run_records import a_pool, records_of

from sip_engine.monitoring.load import RunRecords
from sip_engine.monitoring.signatures import all_signatures, looks_complete


def verdicts(run: RunRecords) -> list[str | None]:
    """The verdict of each signature, in the order of the page; None where nothing was recorded."""
    return [s.findings[0].verdict if s.findings else None for s in all_signatures([run])]


def line(first: float, last: float, num: int = 50) -> np.ndarray:
    return np.linspace(first, last, num)


@pytest.mark.parametrize(
    ("safety", "coherence", "win_rate", "verdict"),
    [
        ([0.7, 0.95], [0.8, 0.85], [0.5, 0.8], "clear"),
        ([0.7, 0.95], [0.8, 0.75], [0.5, 0.8], "watch"),
        ([0.7, 0.95], [0.8, 0.85], [0.5, 0.2], "seen"),
        ([0.7, 0.95], [0.8, 0.30], [0.5, 0.6], "seen"),
        ([0.7, 0.30], [0.8, 0.30], [0.5, 0.2], "clear"),  # worse in all: failing, but not into safety
    ],
)
def test_collapse(safety, coherence, win_rate, verdict):
    run = records_of(eval__safety=safety, eval__coherence=coherence, eval__win_rate=win_rate)
    assert verdicts(run) == [verdict, None, None, None, None, None, None]


def test_collapse_without_evaluations_reads_the_rollouts():
    run = records_of(safety__rollout=line(0.5, 1.0), quality__rollout=line(0.5, 0.1))
    assert verdicts(run)[0] == "seen"


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "clear"), (0.65, "watch"), (0.8, "seen")])
def test_completeness(share, verdict):
    """The complete-looking rollout is first in half of the pools; originals and ties of form do not count."""
    pools = []
    for n in range(100):
        texts = (
            [" It ended.", " It ended.", " and then"] if n % 2 else [" It ended.", " and then", " It ended."]
        )
        complete_wins = float(n // 2 < 50 * share)
        win = complete_wins if n % 2 else 1.0 - complete_wins
        pools.append(a_pool(texts, pairs=[[0, 1, 1.0], [0, 2, 1.0], [1, 2, win], [2, 1, None]]))
    assert verdicts(records_of(pools=pools))[1] == verdict
    assert verdicts(records_of(pools=pools[:10]))[1] == "unknown"


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("He left.", True),
        ('"He left!" ', True),
        ("(why?)", True),
        ("He lef", False),
        ("one, two,", False),
        ("", False),
    ],
)
def test_looks_complete(text, complete):
    assert looks_complete(text) is complete


@pytest.mark.parametrize(
    ("distinct", "entropy", "reward", "verdict"),
    [
        (line(0.5, 0.5), line(2.0, 1.9), line(1, 2), "clear"),
        (line(0.5, 0.35), line(2.0, 2.0), line(1, 2), "watch"),
        (line(0.5, 0.5), line(2.0, 0.5), line(1, 2), "seen"),
        (line(0.5, 0.5), line(2.0, 0.5), line(2, 1), "watch"),
        (line(0.5, 0.1, 5), line(2.0, 0.5, 5), line(1, 2, 5), "unknown"),
    ],
)
def test_narrowing(distinct, entropy, reward, verdict):
    run = records_of(diversity__distinct_2=distinct, diversity__entropy=entropy, reward__rollout=reward)
    assert verdicts(run)[2] == verdict


@pytest.mark.parametrize(
    ("chosen", "rejected", "verdict"),
    [(3.0, -9.0, "clear"), (-1.0, -9.0, "watch"), (-8.0, -20.0, "seen"), (-8.0, 1.0, "clear")],
)
def test_unlearning(chosen, rejected, verdict):
    """The reference gives chosen -100 nats: losing 8 of them is more than the 5 % allowed, losing 1 is not."""
    gain = line(0.0, chosen)
    run = records_of(
        dpo__chosen_gain=gain, dpo__rejected_gain=line(0.0, rejected), dpo__chosen_logprob=gain - 100.0
    )
    assert verdicts(run)[3] == verdict


@pytest.mark.parametrize(
    ("drift", "verdict"),
    [
        (line(2e-6, 2e-6), "clear"),
        (np.append(np.full(40, 1e-6), np.full(10, 1e-4)), "clear"),
        (np.append(np.full(40, 1e-5), np.full(10, 5e-3)), "watch"),
        (np.append(np.full(49, 1e-5), 0.06), "seen"),
    ],
)
def test_drifting(drift, verdict):
    assert verdicts(records_of(drift__mean=drift, config={"max_drift": 0.1}))[4] == verdict


@pytest.mark.parametrize(
    ("faultless", "everything", "diversity", "verdict"),
    [
        ([0.5, 0.52], [0.8, 1.9], None, "clear"),  # the rise on all documents is that on faulty ones
        ([0.5, 0.57], None, None, "watch"),
        ([0.5, 0.9, 0.76], None, [0.9, 0.95], "seen"),
        (None, [0.8, 1.2], None, "seen"),
        ([0.5, 0.4], None, [1.0, 0.89], "watch"),
        ([0.5, 0.4], None, [1.0, 0.59], "seen"),
        ([0.5, 0.4], None, [0.4, 0.45], "clear"),  # narrow from the start, and widening
        ([0.5], None, None, None),
    ],
)
def test_forgetting(faultless, everything, diversity, verdict):
    curves = {
        "eval__heldout_loss_faultless": faultless,
        "eval__heldout_loss": everything,
        "eval__relative_diversity": diversity,
    }
    run = records_of(**{name: values for name, values in curves.items() if values is not None})
    assert verdicts(run)[5] == verdict


@pytest.mark.parametrize(
    ("rollouts", "documents", "verdict"),
    [(0.30, 0.05, "seen"), (0.30, 0.25, "watch"), (0.06, 0.05, "clear"), (0.9, None, None)],
)
def test_copying(rollouts, documents, verdict):
    curves = {"copied__rollout": [0.05] * 6 + [rollouts] * 6}
    if documents is not None:
        curves["copied__document"] = [documents] * 12
    assert verdicts(records_of(**curves))[6] == verdict
