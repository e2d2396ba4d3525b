"""Host time of one decode step of the compiled page planner.

Paths: "fixed" - suffix pages were taken at admission, a step looks up slots; "variable" - a step also retires
finished sequences, closes ranks and takes pages; "admit" - new groups take the place of the finished ones.
Caches: "warm" - nothing runs between the steps; "cold" - 8 MB are rewritten before each of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, header, write_csv
from sip_engine.sampler.pages import PagePool, RollingPages, WavePages

TARGET_US = 60.0
NUM_ROLLOUTS, PREFIX_TOKENS, SUFFIX_TOKENS, MAX_SUFFIX_TOKENS, PAGE_SIZE = 16, 512, 128, 512, 16


class Stopwatch:
    """Microseconds of each call, by path."""

    def __init__(self, cold: bool) -> None:
        self.times: dict[str, list[float]] = {}
        self._junk = np.zeros(8 << 20 if cold else 0, np.int8)

    def __call__(self, path: str, action: Callable[[], object]) -> None:
        self._junk += 1
        start = time.perf_counter_ns()
        action()
        self.times.setdefault(path, []).append((time.perf_counter_ns() - start) / 1000)


def groups(num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Prefix lengths and rollouts of `num_groups` groups, int32 each."""
    return np.full(num_groups, PREFIX_TOKENS, np.int32), np.full(num_groups, NUM_ROLLOUTS, np.int32)


def run_fixed(num_sequences: int, num_steps: int, watch: Stopwatch) -> None:
    """Slots of all sequences of a wave, position after position."""
    pool = PagePool(num_sequences * (PREFIX_TOKENS + SUFFIX_TOKENS) // PAGE_SIZE, PAGE_SIZE)
    slots, lens = np.empty(num_sequences, np.int64), np.zeros(num_sequences, np.int32)
    with WavePages(pool) as wave:
        tables = wave.admit(*groups(num_sequences // NUM_ROLLOUTS), SUFFIX_TOKENS).suffix_tables

        def step() -> None:
            pool.planner.fill_slots(tables, lens, PAGE_SIZE, slots)
            np.add(lens, 1, out=lens)

        step()
        for number in range(num_steps):
            lens.fill(number % SUFFIX_TOKENS)
            slots.fill(-7)
            watch("fixed", step)


def run_variable(num_sequences: int, num_steps: int, watch: Stopwatch) -> None:
    """A full batch whose sequences end at random, SUFFIX_TOKENS long on average, and are replaced."""
    generator = np.random.default_rng(0)
    pool = PagePool(num_sequences * (PREFIX_TOKENS + MAX_SUFFIX_TOKENS) // PAGE_SIZE, PAGE_SIZE)
    with RollingPages(
        pool,
        max_sequences=num_sequences,
        max_prefix_tokens=PREFIX_TOKENS,
        max_suffix_tokens=MAX_SUFFIX_TOKENS,
    ) as batch:
        for number in range(-SUFFIX_TOKENS, num_steps):  # untimed until suffixes have all lengths
            timer = watch if number >= 0 else Stopwatch(cold=False)
            new = groups((num_sequences - batch.num_live) // NUM_ROLLOUTS)
            if len(new[0]):
                timer("admit", lambda new=new: batch.admit(*new))
            finished = generator.random(batch.num_live) < 1 / SUFFIX_TOKENS
            batch.finished[: batch.num_live] = finished | (
                batch.suffix_lens[: batch.num_live] == MAX_SUFFIX_TOKENS
            )
            batch.slots.fill(-7)
            timer("variable", batch.step)


def measure(num_sequences: int, num_steps: int) -> list[dict[str, object]]:
    """One row for each path and state of the caches."""
    rows = []
    for run in (run_fixed, run_variable):
        for caches in ("warm", "cold"):
            watch = Stopwatch(cold=caches == "cold")
            run(num_sequences, num_steps, watch)
            for path, times in watch.times.items():
                p20, p50, p80 = np.percentile(times, (20, 50, 80)).round(1).tolist()
                row = {"path": path, "caches": caches, "impl": "cpp", "num_timed": len(times)}
                rows.append({**row, "p20_us": p20, "p50_us": p50, "p80_us": p80})
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """One line a row; steps are held against the target."""
    print(f"{'path':10}{'caches':8}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}")
    for row in rows:
        line = f"{row['path']:10}{row['caches']:8}"
        line += "".join(f"{row[column]:10.1f}" for column in ("p20_us", "p50_us", "p80_us"))
        if row["path"] != "admit":
            met = float(str(row["p50_us"])) <= TARGET_US
            line += f"  target {TARGET_US:g} us {'met' if met else 'MISSED'}"
        print(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the CSV file."""
    parser = argparse.ArgumentParser(description="Host time of one decode step.")
    parser.add_argument("--sequences", type=int, default=4096, help="live sequences, a multiple of 16")
    parser.add_argument("--steps", type=int, default=128, help="timed steps of each path")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_step.csv")
    args = parser.parse_args(argv)
    if args.sequences < NUM_ROLLOUTS or args.sequences % NUM_ROLLOUTS or args.steps < 1:
        parser.error(f"--sequences must be a positive multiple of {NUM_ROLLOUTS} and --steps at least 1")
    run = {**header("host_step", ("numpy",)), "num_sequences": args.sequences}
    rows = measure(args.sequences, args.steps)
    print_table(rows)
    write_csv(args.out, [{**run, **row} for row in rows])


if __name__ == "__main__":
    main()
