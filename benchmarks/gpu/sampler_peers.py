"""The whole sampler beside other libraries' with the same weights and prefixes, in a process of its own (item 13).

    python -m benchmarks.gpu.sampler_peers [--rehearse]

writes a line of JSON for each. A side is timed once the log-probs that it gives its tokens have been found to be
those of transformers' forward pass over the same weights. A rehearsal runs on the CPU, at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.figures import Context
from benchmarks.gpu.models import build, model_config, sampler_of, vocab
from benchmarks.gpu.peers import first_line, why_missing
from benchmarks.record import ROOT, timed
from benchmarks.sampler import ours, peer
from sip_engine.config.schema import ModelConfig, drift_limit
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.model import PolicyModel

SIZES: dict[str, Any] = {
    "num_layers": 24, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 16, "ffn_size": 5632,
    "max_context": 2048,
}  # fmt: skip
"""Of the reference model."""

Drawn = list[tuple[list[int], list[float]]]
"""Tokens and their log-probs in nats, a prompt's samples after one another."""


@dataclass
class Models:
    """One set of weights, in everybody's form."""

    config: ModelConfig
    policy: PolicyModel
    mesh: Mesh
    vocab: int

    @cached_property
    def llama(self) -> Any:
        sys.path.append(str(ROOT / "tests"))
        from llama import llama_of  # the tests' copy of a policy in transformers' layout

        found = llama_of(self.policy, self.vocab)
        found.config._attn_implementation = "sdpa"
        return found


@dataclass(frozen=True)
class Task:
    """Samples of prompts that are all equally long, at temperature 1 without cut-off."""

    prompts: list[list[int]]
    n: int
    """Samples a prompt."""
    new: int
    """Tokens a sample."""

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.n

    @property
    def arrays(self) -> list[np.ndarray]:
        return [np.array(prompt, np.int32) for prompt in self.prompts]


@dataclass(frozen=True)
class Side:
    """One library's way to do a task: what it sets up first is not timed."""

    name: str
    libraries: tuple[str, ...]
    start: Callable[[Models, Task], AbstractContextManager[Callable[[], Drawn]]]
    prompts: int = 16


@contextmanager
def with_generate(models: Models, task: Task) -> Iterator[Callable[[], Drawn]]:
    """transformers' `generate`: one batch, every sequence with a copy of its prefix's keys and values. Its log-probs
    are those that the others' are compared with."""

    def draw() -> Drawn:
        ids = peer(models.llama, task.arrays, task.n, task.new)
        return [(tokens, []) for tokens in ids[:, len(task.prompts[0]) :].tolist()]

    yield draw


@contextmanager
def with_continuous_batching(models: Models, task: Task) -> Iterator[Callable[[], Drawn]]:
    """transformers' continuous batching: paged keys and values, whose prefix blocks the samples of a prompt share."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=task.n,
        max_new_tokens=task.new, eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    on_cpu: dict[str, Any] = {} if torch.cuda.is_available() else {"num_blocks": 16, "max_batch_tokens": 64}
    batching = ContinuousBatchingConfig(return_logprobs=True, max_memory_percent=0.5, **on_cpu)
    with models.llama.continuous_batching_context_manager(
        how, continuous_batching_config=batching
    ) as manager:

        def draw() -> Drawn:
            asked = manager.add_requests(task.prompts, max_new_tokens=task.new)
            done: dict[str, Any] = {}
            while len(done) < task.sequences:
                found = manager.get_result(timeout=1)
                if found is not None and found.is_finished():
                    done[found.request_id] = found
                elif found is None and not manager.is_running():
                    raise RuntimeError("the thread that generates has ended")
            samples = [[one, *(f"{one}__child#{i}" for i in range(task.n - 1))] for one in asked]
            return [(done[s].generated_tokens, done[s].logprobs) for group in samples for s in group]

        yield draw


@contextmanager
def with_megatron(models: Models, task: Task) -> Iterator[Callable[[], Drawn]]:
    """Megatron-core's dynamic inference; a sample is a request, since it knows no samples of one prompt."""
    from benchmarks.gpu.megatron_peer import engine_of, sampling_of

    engine = engine_of(models.policy, models.config, models.vocab, task.sequences)

    def draw() -> Drawn:
        with torch.no_grad():
            records = engine.generate([p for p in task.prompts for _ in range(task.n)], sampling_of(task.new))  # pyright: ignore
        merged = [record.merge() for record in records]  # pyright: ignore
        return [(list(one.generated_tokens), list(one.generated_log_probs)) for one in merged]

    yield draw


SIDES = (
    Side("transformers' continuous batching", ("transformers",), with_continuous_batching),
    Side("transformers' generate", ("transformers",), with_generate, prompts=4),
    Side("Megatron-core's dynamic inference", ("Megatron-core", "flash-attn"), with_megatron),
)


def difference(llama: Any, task: Task, drawn: Drawn) -> float:
    """Mean |log-prob given - that of transformers' forward pass| over each prompt's first sample, nats a token."""
    gaps = []
    for prompt, (tokens, given) in zip(task.prompts, drawn[:: task.n], strict=True):
        ids = torch.tensor([prompt + tokens], device=llama.device)
        with torch.no_grad():
            logits = llama(ids).logits[0, len(prompt) - 1 : -1].float()
        wanted = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        gaps += [(torch.tensor(given) - wanted).abs()]
    return float(torch.cat(gaps).mean())


def check(models: Models, task: Task, name: str, drawn: Drawn) -> None:
    """ValueError unless all samples are there, with the log-probs that transformers' forward pass has for them."""
    if [len(tokens) for tokens, _ in drawn] != [task.new] * task.sequences:
        raise ValueError(f"{name}: not {task.sequences} samples of {task.new} tokens")
    limit = 1e-4 if models.config.precision == "fp32" else drift_limit("auto", "bf16", "auto")
    gap = difference(models.llama, task, drawn) if drawn[0][1] else 0.0
    if not gap <= limit:
        raise ValueError(f"{name}: log-probs are {gap:.2g} nats off, not timed")


def compare(context: Context, models: Models, side: Side) -> None:
    """One line of JSON: seconds of both sides, or why there are none."""
    missing = {name: why_missing(name) for name in side.libraries if why_missing(name)}
    if missing:
        report(side.name, why="; ".join(f"{name} {why}" for name, why in missing.items()))
        return
    count, n, length, new = (2, 2, 9, 3) if context.rehearse else (side.prompts, 16, 1024, 64)
    rng = np.random.default_rng(0)
    task = Task([rng.integers(0, models.vocab, length).tolist() for _ in range(count)], n, new)
    sampler = sampler_of(context, models.policy, models.mesh, kv_memory_mb=1 if context.rehearse else 16_384)

    def draw() -> Drawn:
        done = ours(sampler, task.arrays, n, new)
        return [(c.ids.tolist(), c.logprobs.tolist()) for group in done for c in group]

    try:
        with side.start(models, task) as theirs:
            check(models, task, "ours", draw())
            check(models, task, side.name, theirs())
            turns = [(timed(draw), timed(theirs)) for _ in range(2 if context.rehearse else 3)]
    except Exception as error:  # whatever another library raises, the next one is measured
        report(side.name, why=first_line(error))
        return
    seconds = {
        who: median(times) for who, times in zip(("ours", "theirs"), zip(*turns, strict=True), strict=True)
    }
    report(side.name, shape=f"{count} x {n} x {new}, P = {length}", **seconds)


def report(name: str, **found: Any) -> None:
    print(json.dumps({"name": name, **found}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare with each side in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true")
    context = Context(13, Path("."), parser.parse_args(argv).rehearse)
    config = model_config(context, **SIZES)
    policy, mesh = build(context, config)
    models = Models(config, policy, mesh, vocab(context))
    for side in SIDES:
        compare(context, models, side)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
