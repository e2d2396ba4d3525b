"""What theory says of checkpoints and failures; the model is held against it.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006. Times in seconds; failures are
exponential with mean time `mtbf` between them.
"""

from __future__ import annotations

import math


def young_interval(save: float, mtbf: float) -> float:
    """Work between saves that wastes least, to first order: sqrt(2 save mtbf)."""
    return math.sqrt(2.0 * save * mtbf)


def daly_interval(save: float, mtbf: float) -> float:
    """Daly's higher-order estimate; `mtbf` itself where saves take longer than twice that."""
    if save >= 2.0 * mtbf:
        return mtbf
    ratio = save / (2.0 * mtbf)
    return math.sqrt(2.0 * save * mtbf) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - save


def expected_goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Share of the time that is kept work, exactly, for saves that stop the work (Daly, equation 13).

    A segment of `interval` and its save takes mtbf e^(restart / mtbf) (e^((interval + save) / mtbf) - 1) on average;
    failures may also strike while restarting.
    """
    wall = mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    return interval / wall
