"""How well do judge schedules find the best and the worst candidate, and at how many calls? Simulated judges.

    python -m benchmarks judge_schedules

Candidates' qualities are standard normal. The judge prefers i to j with probability sigmoid(s (q_i - q_j)); its
accuracy is how often it names the better one of two random candidates, and sets s. All schedules hear the same
answer to the same question. Reported of each schedule, with all pairs on the same pools beside it: calls; the
quality gap between chosen and rejected candidate as a share of all pairs' gap; how often the true best and worst
are found; and how far chosen and rejected are from them, in standard deviations. `swiss` is a fixed scheme for
comparison: two Swiss rounds, then round robins of the first and the last four.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, add_plot_option, header, plain_pyplot, read_csv, save_svg, write_csv
from sip_engine.judges.schedules.all_pairs import AllPairs
from sip_engine.judges.schedules.base import Schedule
from sip_engine.judges.schedules.pivot import Pivot
from sip_engine.judges.schedules.tournament import Tournament, tournament_budget

ACCURACIES = (0.70, 0.80, 0.90, 0.95)
DRAWS = {2: 1000, 4: 1000, 8: 1000, 16: 1500, 32: 250}
"""Pools by their number of candidates, at --scale 1."""
OTHER_DRAWS = 400
STUDIED = 16
"""Candidates where more budgets and other judges are tried."""
SHARE = 0.25


@dataclass(frozen=True)
class Judge:
    """A logistic judge; `place` (logits) favours the text shown first, `whims` differ from pair to pair."""

    accuracy: float
    name: str = "logistic"
    place: float = 0.0
    whims: float = 0.0
    """Standard deviation, in logits, of a liking for one of the two that follows no ranking: intransitive."""
    lapses: float = 0.0
    """Share of answers that are a coin's."""

    def wins(self, qualities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[num, num] 1.0 where the row, shown first, wins against the column."""
        num = len(qualities)
        whims = np.triu(rng.normal(size=(num, num)) * self.whims, 1)
        logits = sharpness(self.accuracy) * (qualities[:, None] - qualities) + whims - whims.T
        odds = (1 - self.lapses) / (1 + np.exp(-logits - self.place)) + self.lapses / 2
        luck = np.triu(rng.random((num, num)), 1)
        luck = luck + np.tril(1 - luck.T, -1)  # the same luck in both orders
        return (luck < odds).astype(float)


def sharpness(accuracy: float) -> float:
    """The slope s at which sigmoid(s |q_i - q_j|) is `accuracy` on average, q standard normal; by bisection."""
    grid = (np.arange(4000) + 0.5) / 400  # |q_i - q_j| / sqrt(2), half-normal
    density = np.exp(-0.5 * grid**2)
    low, high = 1e-3, 1e3
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        mean = np.average(1 / (1 + np.exp(-middle * math.sqrt(2) * grid)), weights=density)
        low, high = (middle, high) if mean < accuracy else (low, middle)
    return low


class Swiss:
    """Two rounds between neighbours in the ranking so far, then all pairs of the first and of the last four."""

    def __init__(self, num: int, seed: Sequence[int]) -> None:
        self._order = np.random.default_rng(seed).permutation(num)
        self._won, self._tier = np.zeros(num), np.zeros(num)
        self._pending: list[tuple[int, int]] = []
        self._round = 0

    def propose(self, base: Sequence[float | None] | None) -> list[tuple[int, int]]:
        del base
        order = self._order = self._order[np.argsort(-self._won[self._order], kind="stable")]
        self._round += 1
        self._pending = []
        if self._round <= 2:
            self._pending = list(zip(order[::2].tolist(), order[1::2].tolist(), strict=False))
        elif self._round == 3:
            self._tier[order[:4]], self._tier[order[-4:]] = 10.0, -10.0
            for four in (order[:4].tolist(), order[-4:].tolist()):
                self._pending += [(four[a], four[b]) for a in range(4) for b in range(a + 1, 4)]
        return self._pending

    def record(self, answers: Sequence[float | None]) -> None:
        for (i, j), win in zip(self._pending, answers, strict=True):
            assert win is not None
            self._won[i] += win
            self._won[j] += 1 - win

    def quality(self) -> list[float | None]:
        return (self._won + self._tier).tolist()


Make = Callable[[int, Sequence[int]], Schedule]


@dataclass
class Tally:
    """Figures of one schedule, a value a pool."""

    calls: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    best_regret: list[float] = field(default_factory=list)
    worst_regret: list[float] = field(default_factory=list)
    chosen_rank: list[int] = field(default_factory=list)
    rejected_rank: list[int] = field(default_factory=list)

    def play(self, schedule: Schedule, qualities: np.ndarray, wins: np.ndarray, tie: np.ndarray) -> None:
        """Run a schedule to its end; equal candidates are told apart by `tie`."""
        calls = rounds = 0
        while pairs := schedule.propose([0.0] * len(qualities)):
            schedule.record([float(wins[i, j]) for i, j in pairs])
            calls, rounds = calls + len(pairs), rounds + 1
        found = np.array(schedule.quality(), float) + 1e-7 * tie
        chosen, rejected = found.argmax(), found.argmin()
        self.calls.append(calls)
        self.rounds.append(rounds)
        self.gap.append(qualities[chosen] - qualities[rejected])
        self.best_regret.append(qualities.max() - qualities[chosen])
        self.worst_regret.append(qualities[rejected] - qualities.min())
        self.chosen_rank.append(1 + int((qualities > qualities[chosen]).sum()))
        self.rejected_rank.append(1 + int((qualities < qualities[rejected]).sum()))

    def row(self, everyone: Tally) -> dict[str, object]:
        """Means over the pools; `everyone` is all pairs' tally on the same pools."""
        gap, reference = np.array(self.gap), np.array(everyone.gap)
        share = gap.sum() / reference.sum()
        error = np.std(gap - share * reference) / reference.mean() / math.sqrt(len(gap))
        return {
            "pools": len(gap),
            "calls": round(float(np.mean(self.calls)), 2),
            "calls_share": round(float(np.sum(self.calls) / np.sum(everyone.calls)), 4),
            "rounds": round(float(np.mean(self.rounds)), 2),
            "gap": round(float(gap.mean()), 4),
            "gap_share": round(float(share), 4),
            "gap_share_error": round(float(error), 4),
            "best_found": round(float(np.mean(np.array(self.chosen_rank) == 1)), 4),
            "worst_found": round(float(np.mean(np.array(self.rejected_rank) == 1)), 4),
            "chosen_rank": round(float(np.mean(self.chosen_rank)), 3),
            "rejected_rank": round(float(np.mean(self.rejected_rank)), 3),
            "chosen_regret": round(float(np.mean(self.best_regret)), 4),
            "rejected_regret": round(float(np.mean(self.worst_regret)), 4),
        }


def schedules(num: int, budgets: Sequence[float], both_orders: bool = False) -> dict[str, Make]:
    """The schedules to compare, all pairs first."""
    makers: dict[str, Make] = {
        "all_pairs": lambda n, seed: AllPairs(n, seed, both_orders=both_orders),
        "pivot": lambda n, seed: Pivot(n, seed, both_orders=both_orders),
    }
    if num >= 8 and not both_orders:
        makers["swiss"] = Swiss
    for share in budgets:
        budget = tournament_budget(num, share, both_orders)
        makers[f"tournament {budget}"] = lambda n, seed, budget=budget: Tournament(
            n, seed, budget, both_orders=both_orders
        )
    return makers


def study(
    judge: Judge, num: int, pools: int, makers: dict[str, Make], seed: int
) -> Iterator[dict[str, object]]:
    """One row a schedule: `pools` pools of `num` candidates, the same for all."""
    tallies = {name: Tally() for name in makers}
    right = []
    for pool in range(pools):
        rng = np.random.default_rng([seed, num, pool])
        qualities, tie = rng.normal(size=num), rng.random(num)
        wins = judge.wins(qualities, rng)
        better = qualities[:, None] > qualities
        right.append(np.mean(np.where(better, wins, 1 - wins)[~np.eye(num, dtype=bool)]))
        for name, make in makers.items():
            tallies[name].play(make(num, (seed, pool)), qualities, wins, tie)
    for name, tally in tallies.items():
        yield {
            "judge": judge.name,
            "accuracy": judge.accuracy,
            "measured_accuracy": round(float(np.mean(right)), 4),
            "candidates": num,
            "schedule": name.split()[0],
            "budget": name.split()[1] if " " in name else "",
            **tally.row(tallies["all_pairs"]),
        }


def others() -> Iterator[tuple[Judge, bool]]:
    """Judges that are not what the tournament takes them to be, and whether they are asked in both orders."""
    for accuracy in (0.80, 0.95):
        yield Judge(accuracy, "first place + 1.5 logits", place=1.5), False
        yield Judge(accuracy, "first place + 1.5 logits, both orders", place=1.5), True
        yield Judge(accuracy, "intransitive, 2 logits", whims=2.0), False
        yield Judge(accuracy, "one answer in five a coin's", lapses=0.2), False


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Left: gap over calls at one pool size. Right: gap over the pool size at a quarter of the calls."""
    pyplot = plain_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    logistic = [row for row in rows if row["judge"] == "logistic"]
    for number, accuracy in enumerate(ACCURACIES):
        colour = f"C{number}"
        here = [row for row in logistic if row["accuracy"] == accuracy]
        pool = [row for row in here if row["candidates"] == STUDIED]
        for name, style in (("tournament", "o-"), ("pivot", "x"), ("swiss", "s"), ("all_pairs", "D")):
            points = [(row["calls"], row["gap_share"]) for row in pool if row["schedule"] == name]
            left.plot(*np.array(sorted(points), float).T, style, color=colour, mfc="none")
        for name, style in (("tournament", "o-"), ("pivot", "x:")):
            points = [
                (row["candidates"], row["gap_share"])
                for row in here
                if row["schedule"] == name
                and str(row["budget"]) in ("", str(tournament_budget(int(str(row["candidates"])), SHARE)))
            ]
            label = f"{accuracy:.0%}" if name == "tournament" else None
            right.plot(*np.array(sorted(points), float).T, style, color=colour, mfc="none", label=label)
    left.set(
        xlabel=f"judge calls for {STUDIED} candidates",
        ylabel="gap chosen - rejected, share of all pairs'",
        xscale="log",
        title="o tournament, x pivot, □ Swiss, ◇ all pairs",
    )
    left.set_xticks([15, 22, 30, 60, 120], ["15", "22", "30", "60", "120"])
    left.minorticks_off()
    right.set(
        xlabel="candidates", xscale="log", title="o tournament (1/4 of the calls), x pivot", ylim=(0, 1.05)
    )
    right.set_xticks(list(DRAWS), [str(num) for num in DRAWS])
    right.minorticks_off()
    right.legend(title="judge accuracy")
    save_svg(figure, path)


def show(row: dict[str, object]) -> None:
    """One line of the printed table."""
    print(
        f"{row['judge']!s:38}{row['measured_accuracy']:8.1%}{row['candidates']:4d}  {row['schedule']!s:11}"
        f"{row['calls']:7.1f}{row['rounds']:7.1f}{row['gap_share']:8.1%} ±{row['gap_share_error']:.1%}"
        f"{row['best_found']:8.1%}{row['worst_found']:8.1%}{row['chosen_regret']:7.2f}{row['rejected_regret']:7.2f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print a table, write the CSV file; or draw an earlier one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of pools")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_schedules.csv", help="CSV file")
    add_plot_option(parser)
    args = parser.parse_args(argv)
    if args.plot is not None:
        plot(read_csv(args.plot), args.plot.with_suffix(".svg"))
        return

    def pools(number: int) -> int:
        return max(2, round(number * args.scale))

    print(
        f"{'judge':38}{'right':>8}{'K':>4}  {'schedule':11}{'calls':>7}{'rounds':>7}{'gap share':>14}"
        f"{'best':>8}{'worst':>8}{'regret of both':>14}"
    )
    start = time.perf_counter()
    plans = [
        (Judge(accuracy), num, pools(draws), schedules(num, (SHARE,)))
        for num, draws in DRAWS.items()
        for accuracy in ACCURACIES
    ]
    for accuracy in ACCURACIES:
        more = schedules(STUDIED, (0.0, 0.5))
        plans.append((Judge(accuracy), STUDIED, pools(OTHER_DRAWS), more))
    for judge, both in others():
        plans.append((judge, STUDIED, pools(OTHER_DRAWS), schedules(STUDIED, (SHARE,), both)))
    rows: list[dict[str, object]] = []
    about = header("judge_schedules", ("numpy",))
    for judge, num, draws, makers in plans:
        for row in study(judge, num, draws, makers, args.seed):
            show(row)
            rows.append({**about, **row})
    write_csv(args.out, rows)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
