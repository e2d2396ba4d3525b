"""A process that is slower than the others, said while it is so: which rank, in which phase, how many times.

Each phase's seconds are those in which a process works by itself (`data`, `generate`, `judge`, and `update` up to the
exchange of gradients), since in a collective all wait alike. Processes of one replica wait for each other in these as
well: of those the replica is found, not the rank. On CUDA the update counts what the host does.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

PHASES = ("data", "generate", "judge", "update")
_IN_A_ROW = 2
_LEAST_SECONDS = 0.5
"""A rank that loses less in a step is not worth a line."""


class SlowRanks:
    """Sees each step's seconds by rank and phase; speaks once when a rank is slow two steps in a row."""

    def __init__(self, factor: float) -> None:
        """factor: how many times slower than the median of the others counts; 0 never speaks."""
        self._factor = factor
        self._in_a_row: dict[tuple[int, str], int] = {}

    def see(self, step: int, seconds: Sequence[Sequence[float]]) -> list[str]:
        """`seconds`: [ranks][PHASES] of one step. Returns a line for each rank newly found slow in a phase."""
        if not self._factor or len(seconds) < 2:
            return []
        lines = []
        for column, phase in enumerate(PHASES):
            for rank, row in enumerate(seconds):
                usual = median(other[column] for n, other in enumerate(seconds) if n != rank)
                slow = row[column] > self._factor * usual and row[column] - usual > _LEAST_SECONDS
                count = self._in_a_row.get((rank, phase), 0) + 1 if slow else 0
                self._in_a_row[rank, phase] = count
                if count == _IN_A_ROW:
                    times = row[column] / max(usual, 1e-3)
                    lines.append(
                        f"step {step}: rank {rank} is slow in {phase}: {row[column]:.2f} s, {times:.1f} times what "
                        f"the others take ({usual:.2f} s)"
                    )
        return lines
