"""`python -m benchmarks NAME [options]`: run one measurement; without a name, list them."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "sampler": "the sampler against transformers' generate, same weights",
    "gpu": "the acceptance run on a GPU: checks, timings, predictions, peers; or its rehearsal",
    "loop": "one whole step, rollouts and DPO, against generate and plain torch",
    "update": "each prefix computed once against once a suffix; a DPO step against transformers'",
    "logprob": "the log-prob head against torch and other libraries",
    "checkpoint": "how long the training stands still for a checkpoint, written at once or beside it",
    "fp8_drift": "an FP8 trainer against the sampler with 16-bit and with FP8 weights, fake-quantised",
    "host_step": "host time of one decode step, of the compiled planner",
    "judge_schedules": "calls against choices: all pairs, pivot, tournament, with simulated judges",
    "heuristic_judge": "how often the heuristic judge prefers real text",
    "judge_accuracy": "how often a trained judge is right about prompts with known answers",
    "mutual_information": "what mutual information prefers: repetition, copying, nonsense, wrong facts",
    "real": "the figures of a `sip real` as CSV",
    "plan_table": "the table of predictions in configs/README.md",
    "injections": "how often an injected text moves a judge's verdict",
}


def main() -> int:
    """Dispatch to `benchmarks.NAME.main`."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [--help | options]\n")
        for name, what in BENCHMARKS.items():
            print(f"  {name:18}{what}")
        return 0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2
    module = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    sys.argv[0] = f"python -m benchmarks {sys.argv[1]}"
    return module.main(sys.argv[2:]) or 0


if __name__ == "__main__":
    sys.exit(main())
