"""What a judge's answers about pairs say of every candidate: strengths, and the mean wins to expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Answer = tuple[int, int, float | None]
"""(first, second, win of the first in [0, 1]); None where the judge had no answer."""
Known = tuple[int, int, float]
"""An answer that is there."""

_SPREADS = np.array([1.4, 5.0])
"""How far apart, in logits, a pool's candidates may look to the judge (standard deviation of their strengths).

Of two random candidates it then names the better one in 78 and 93 % of cases; the answers weigh the two.
"""
_PLACE_SPREAD = 0.5
"""Standard deviation of the judge's liking for the first place, in logits."""
_DIGITS = 9
"""Mean wins are rounded to this, so that equal candidates stay equal and ties can be seen."""


@dataclass(frozen=True)
class Strengths:
    """A normal distribution over the strengths of `num` candidates, in logits; float64."""

    mean: np.ndarray
    """[num]"""
    cov: np.ndarray
    """[num, num]"""
    beats: np.ndarray
    """[num, num] probability that the judge prefers the row to the column."""
    modes: np.ndarray
    """[spreads, num + 1] where the search for each spread's mode ended; a later search may start there."""


def fit_strengths(num: int, known: Sequence[Known], start: np.ndarray | None = None) -> Strengths:
    """Bradley-Terry strengths with normal priors, by Laplace's approximation.

    P(first preferred) = sigmoid(strength of first - strength of second + liking for the first place). How sharp
    the judge is shows in the spread of the strengths: each of `_SPREADS` is weighed by how well it explains the
    answers. `start` saves iterations and does not change the result.
    """
    rows = np.arange(len(known))
    design = np.zeros((len(known), num + 1))
    design[rows, [i for i, _, _ in known]] = 1.0
    design[rows, [j for _, j, _ in known]] = -1.0
    design[:, num] = 1.0
    won = np.array([win for _, _, win in known], float)
    precision = np.repeat(_SPREADS[:, None] ** -2.0, num + 1, axis=1)
    precision[:, num] = _PLACE_SPREAD**-2.0
    modes = np.zeros_like(precision) if start is None else start.copy()
    diagonal = np.arange(num + 1)
    for _ in range(50):
        odds = _sigmoid(modes @ design.T)
        hessian = (design.T * (odds * (1.0 - odds))[:, None, :]) @ design
        hessian[:, diagonal, diagonal] += precision
        gradient = (won - odds) @ design - precision * modes
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        modes += np.clip(step, -3.0, 3.0)
        if np.abs(step).max() < 1e-6:  # Newton: the next step would be below 1e-11
            break
    margins = modes @ design.T
    evidence = (won * margins - np.logaddexp(0.0, margins)).sum(1) - 0.5 * np.linalg.slogdet(hessian)[1]
    evidence -= 0.5 * (precision * modes**2 - np.log(precision)).sum(1)
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    covs = np.linalg.inv(hessian)[:, :num, :num]
    beats = np.array([win_odds(m, c)[0] for m, c in zip(modes[:, :num], covs, strict=True)])
    mean, cov, beats = (np.tensordot(weights, x, 1) for x in (modes[:, :num], covs, beats))
    return Strengths(mean, cov, beats, modes)


def win_odds(mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of sigmoid(row - column) [num, num], and its slope in the difference of the means.

    The normal-logistic integral by the usual probit approximation: sigmoid(mean * `shrinkage`(variance)).
    """
    variances = np.diag(cov)
    scale = shrinkage(variances[:, None] + variances - 2.0 * cov)
    odds = _sigmoid((mean[:, None] - mean) * scale)
    return odds, odds * (1.0 - odds) * scale


def shrinkage(variance: np.ndarray) -> np.ndarray:
    """1 / sqrt(1 + pi / 8 variance); a variance below 0 by rounding counts as 0."""
    return 1.0 / np.sqrt(1.0 + math.pi / 8.0 * np.maximum(variance, 0.0))


def expected_mean_wins(num: int, answers: Sequence[Answer]) -> list[float | None]:
    """What all pairs would have given, as far as the answers tell: expected mean win of each of `num` candidates.

    A pair that was answered counts as answered, any other one by its probability under `fit_strengths`; if every
    pair was answered the result is the plain mean win. A candidate without an answer has None; it is no
    opponent to others if its comparisons failed, and one of unknown strength if nobody asked.
    """
    known = [(i, j, win) for i, j, win in answers if win is not None]
    if not known:
        return [None] * num
    wins, counts = tally(num, known)
    heard = np.asarray(counts.any(axis=1))
    failed = np.zeros(num, bool)
    failed[[n for i, j, win in answers if win is None for n in (i, j)]] = True
    beats = np.where(counts > 0, wins / np.maximum(counts, 1), fit_strengths(num, known).beats)
    counted = ~np.eye(num, dtype=bool) & (heard | ~failed)
    means = (beats * counted).sum(1) / np.maximum(counted.sum(1), 1)
    means = np.round(means, _DIGITS)
    _honour_clean_records(means, wins, counts)
    return [float(means[n]) if heard[n] else None for n in range(num)]


def _honour_clean_records(means: np.ndarray, wins: np.ndarray, counts: np.ndarray) -> None:
    """If one candidate won all its comparisons in full and every other one was beaten, it gets the highest mean.

    Likewise the lowest. Few answers leave the prior a say, and it trusts a long record more than a clean one; but
    if the judge does not err, these two are the best and the worst.
    """
    heard = np.flatnonzero(counts.any(axis=1))
    for won, sign in ((wins, 1.0), (wins.T, -1.0)):
        unbeaten = [n for n in heard if (won[n] >= 0.5 * counts[n]).all()]
        if len(unbeaten) == 1 and (won[unbeaten[0]] == counts[unbeaten[0]]).all():
            means[heard] = sign * _with_first(sign * means[heard], int(np.searchsorted(heard, unbeaten[0])))


def _with_first(values: np.ndarray, n: int) -> np.ndarray:
    """`values` [num] with the n-th moved to the top: each one above it takes the next lower value.

    Nobody else changes place, and the sum stays. Equal values stay equal: they share the mean of what they take.
    """
    above = np.flatnonzero(values > values[n])
    above = above[np.argsort(-values[above])]
    ladder = np.append(values[above], values[n])
    level = np.unique(values[above], return_inverse=True)[1]
    moved = values.copy()
    moved[n] = ladder[0]
    moved[above] = (np.bincount(level, ladder[1:]) / np.bincount(level))[level]
    return moved


def tally(num: int, known: Sequence[Known]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of wins of row over column, and number of answers, [num, num] each."""
    wins, counts = np.zeros((num, num)), np.zeros((num, num))
    for i, j, win in known:
        wins[i, j] += win
        wins[j, i] += 1.0 - win
        counts[i, j] += 1
        counts[j, i] += 1
    return wins, counts


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
