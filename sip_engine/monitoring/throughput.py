"""What a step did and how fast: tokens, model operations and their share of the GPUs' peak, and what judging cost.

Operations are counted over the real lengths by `accounting`, the plan's own counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sip_engine.accounting.hardware import peak_bf16
from sip_engine.accounting.shape import Shape
from sip_engine.accounting.useful import generation_flops, training_flops
from sip_engine.config.judge import JudgeConfig
from sip_engine.config.schema import ParallelConfig, RunConfig
from sip_engine.policy.rows import Row
from sip_engine.types import Cost


class StepWork:
    """Tokens, operations and judge costs of one replica's share of a step."""

    def __init__(self, cfg: RunConfig, vocab_size: int) -> None:
        self._shape = Shape(cfg.model, ParallelConfig(), vocab_size)
        self._needs_reference = cfg.needs_reference
        self.tokens = 0
        """Written by the policy, and trained on."""
        self.flops = 0.0
        self.judged = Cost()

    def sampled(self, prefix: int, suffixes: Sequence[int]) -> None:
        """Texts of so many tokens, written after one prefix."""
        if suffixes:
            self.tokens += sum(suffixes)
            self.flops += generation_flops(self._shape, prefix, suffixes)

    def trained(self, rows: Iterable[Row]) -> None:
        """Rows that go into the update."""
        for row in rows:
            self.tokens += row.num_tokens
            self.flops += training_flops(
                self._shape,
                len(row.prefix),
                [len(suffix) for suffix in row.suffixes],
                sum(row.num_scored),
                reference=self._needs_reference,
            )

    def totals(self) -> list[float]:
        """As numbers that add up over replicas: what `speeds` reads."""
        return [self.tokens, self.flops, self.judged.calls, self.judged.tokens, self.judged.written]


def speeds(
    totals: Sequence[float], seconds: float, processes: int, device: str, judge: JudgeConfig
) -> dict[str, float]:
    """What to record of a step that took `seconds` on `processes` devices of that name; `totals` over all replicas.

    `machine/mfu` is missing where the device's peak is not in the table of rates, `judge/dollars` where no price is
    set, and all of the judge's where it was not asked.
    """
    tokens, flops, calls, asked, written = totals
    found = {
        "machine/step_seconds": seconds,
        "machine/tokens_per_second": tokens / seconds,
        "machine/model_tflop_s": flops / seconds / 1e12,
    }
    if peak := peak_bf16(device):
        found["machine/mfu"] = flops / seconds / (processes * peak)
    if calls:
        found |= {"judge/calls": calls, "judge/tokens": asked}
        if judge.price_read is not None or judge.price_written is not None:
            read = (asked - written) * (judge.price_read or 0.0)
            found["judge/dollars"] = (read + written * (judge.price_written or 0.0)) / 1e6
    return found
