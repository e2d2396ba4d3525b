"""The whole sampler beside other libraries' with the same weights and prefixes, in a process of its own (item 13).

    python -m benchmarks.gpu.sampler_peers [--rehearse]

writes a line of JSON for each. A side is timed once the log-probs that it gives its tokens have been found to be
those of transformers' forward pass over the same weights. A rehearsal runs on the CPU, at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
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


@dataclass
class Side:
    """One library's way to draw `n` samples of `new` tokens for each prompt, at temperature 1 without cut-off."""

    name: str
    libraries: tuple[str, ...]
    start: Callable[[Models, int], Callable[[list[list[int]], int, int], Drawn]]
    """(models, the most sequences at a time) -> the call."""
    prompts: int = 16


def with_generate(models: Models, _: int) -> Callable[[list[list[int]], int, int], Drawn]:
    """transformers' `generate`: one batch, every sequence with a copy of its prefix's keys and values."""

    def draw(prompts: list[list[int]], n: int, new: int) -> Drawn:
        arrays = [np.array(prompt) for prompt in prompts]
        ids = peer(models.llama, arrays, n, new)
        tokens = ids[:, len(prompts[0]) :].tolist()
        return [(one, []) for one in tokens]

    return draw


def with_continuous_batching(models: Models, _: int) -> Callable[[list[list[int]], int, int], Drawn]:
    """transformers' `generate_batch`: paged keys and values, whose prefix blocks the samples of a prompt share."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    on_cpu = {} if torch.cuda.is_available() else {"num_blocks": 16, "max_batch_tokens": 64}
    batching = ContinuousBatchingConfig(return_logprobs=True, **on_cpu)

    def draw(prompts: list[list[int]], n: int, new: int) -> Drawn:
        how = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n, max_new_tokens=new,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        found = models.llama.generate_batch(
            prompts, how, continuous_batching_config=batching, progress_bar=False, persistent_manager=True
        )
        return [(one.generated_tokens, one.logprobs) for one in found.values()]

    return draw


def with_megatron(models: Models, most: int) -> Callable[[list[list[int]], int, int], Drawn]:
    """Megatron-core's dynamic inference; a sample is a request, since it knows no samples of one prompt."""
    from benchmarks.gpu.megatron_peer import engine_of, sampling_of

    engine = engine_of(models.policy, models.config, models.vocab, most)

    def draw(prompts: list[list[int]], n: int, new: int) -> Drawn:
        asked = [prompt for prompt in prompts for _ in range(n)]
        with torch.no_grad():
            records = engine.generate(asked, sampling_of(new))
        merged = [record.merge() for record in records]
        return [(list(one.generated_tokens), list(one.generated_log_probs)) for one in merged]

    return draw


SIDES = (
    Side("transformers' continuous batching", ("transformers",), with_continuous_batching),
    Side("transformers' generate", ("transformers",), with_generate, prompts=4),
    Side("Megatron-core's dynamic inference", ("Megatron-core", "flash-attn"), with_megatron),
)


def difference(llama: Any, prompts: list[list[int]], n: int, drawn: Drawn) -> float:
    """Mean |log-prob given - that of transformers' forward pass| over each prompt's first sample, nats a token."""
    gaps = []
    for prompt, (tokens, given) in zip(prompts, drawn[::n], strict=True):
        ids = torch.tensor([prompt + tokens], device=llama.device)
        with torch.no_grad():
            logits = llama(ids).logits[0, len(prompt) - 1 : -1].float()
        wanted = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        gaps += [(torch.tensor(given) - wanted).abs()]
    return float(torch.cat(gaps).mean())


def compare(context: Context, models: Models, side: Side) -> None:
    """One line of JSON: seconds of both sides, or why there are none."""
    count, n, length, new = (2, 2, 9, 3) if context.rehearse else (side.prompts, 16, 1024, 64)
    missing = next(filter(None, map(why_missing, side.libraries)), "")
    if missing:
        report(side.name, why=missing)
        return
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, models.vocab, length).tolist() for _ in range(count)]
    arrays = [np.array(prompt, np.int32) for prompt in prompts]
    limit = 1e-4 if models.config.precision == "fp32" else drift_limit("auto", "bf16", "auto")
    try:
        sampler = sampler_of(
            context, models.policy, models.mesh, kv_memory_mb=1 if context.rehearse else 16_384
        )
        draw = side.start(models, count * n)
        drawn = draw(prompts, n, new)
        mine = [(c.ids.tolist(), c.logprobs.tolist()) for g in ours(sampler, arrays, n, new) for c in g]
        for name, found in (("ours", mine), (side.name, drawn)):
            if [len(tokens) for tokens, _ in found] != [new] * (count * n):
                raise ValueError(f"{name}: not {count * n} samples of {new} tokens")
            gap = difference(models.llama, prompts, n, found) if found[0][1] else 0.0
            if not gap <= limit:
                raise ValueError(f"{name}: log-probs are {gap:.2g} nats off, not timed")
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(2 if context.rehearse else 3):
            seconds["ours"].append(timed(lambda: ours(sampler, arrays, n, new)))
            seconds["theirs"].append(timed(lambda: draw(prompts, n, new)))
        report(
            side.name,
            shape=f"{count} x {n} x {new}, P = {length}",
            **{k: median(v) for k, v in seconds.items()},
        )
    except Exception as error:  # whatever another library raises, the next one is measured
        report(side.name, why=first_line(error))
    torch.cuda.empty_cache()


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
