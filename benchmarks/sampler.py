"""The sampler against transformers' `generate`, same weights and prefixes, alternating in one run.

    python -m benchmarks sampler                 # the sweep over prefix length and rollouts
    python -m benchmarks sampler --prefix 512 --rollouts 16

Both sides draw `--new` tokens a sequence at temperature 1 without cut-off. Ours also returns log-probs, which
are checked against the peer's logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.record import (
    RESULTS,
    ROOT,
    add_plot_option,
    header,
    plain_pyplot,
    read_csv,
    save_svg,
    timed,
    write_csv,
)
from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import num_parameters, weight_views
from sip_engine.sampler.requests import Completion, Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

VOCAB = 8192
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=4,
    ffn_size=704,
    max_context=2304,
    precision="fp32",
)
"""About the 9.9 M parameters (8 layers of 256) that published CPU figures of `generate` are for."""


def prefixes(count: int, length: int) -> list[np.ndarray]:
    """Random token ids, int32 [length] each."""
    rng = np.random.default_rng(length)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for _ in range(count)]


def ours(sampler: Sampler, prompts: Sequence[np.ndarray], rollouts: int, new: int) -> list[list[Completion]]:
    """All completions of all prompts in one call."""
    requests = [Request(ids, rollouts, document=n) for n, ids in enumerate(prompts)]
    return sampler.generate(requests, SamplingParams(new))


def peer(llama: torch.nn.Module, prompts: Sequence[np.ndarray], rollouts: int, new: int) -> torch.Tensor:
    """The same with `generate`, all prompts in one batch and `num_return_sequences` rollouts."""
    ids = torch.from_numpy(np.stack(prompts)).long().to(device_of(llama))
    return llama.generate(  # pyright: ignore[reportCallIssue]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=rollouts,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def largest_difference(
    llama: torch.nn.Module, prompts: Sequence[np.ndarray], done: list[list[Completion]]
) -> float:
    """Largest |our log-prob - the peer's| over the first completion of each prompt, nats."""
    worst = 0.0
    for prompt, (first, *_) in zip(prompts, done, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, first.ids])).long()[None].to(device_of(llama))
        with torch.no_grad():
            logits = llama(ids).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, float((torch.from_numpy(first.logprobs) - want.cpu()).abs().max()))
    return worst


def measure(
    model: PolicyModel,
    mesh: Mesh,
    llama: torch.nn.Module,
    prompts: int,
    prefix: int,
    rollouts: int,
    args: argparse.Namespace,
) -> dict[str, object]:
    """One row: seconds of both sides (medians of alternating runs) and their ratio."""
    cfg = SamplerConfig(max_sequences=prompts * rollouts, kv_memory_mb=4096)
    sampler = Sampler(weight_views(model, VOCAB, 0), mesh, cfg)
    batch = prefixes(prompts, prefix)
    error = largest_difference(llama, batch, ours(sampler, batch, rollouts, args.new))  # also the warm-up
    if error > 1e-4:
        raise RuntimeError(f"P = {prefix}: log-probs differ by {error:.2e} from the peer's")
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(args.repeats):
        times["ours"].append(timed(lambda: ours(sampler, batch, rollouts, args.new)))
        times["peer"].append(timed(lambda: peer(llama, batch, rollouts, args.new)))
    tokens = prompts * rollouts * args.new
    mine, theirs = median(times["ours"]), median(times["peer"])
    return {
        "prompts": prompts,
        "prefix": prefix,
        "rollouts": rollouts,
        "new": args.new,
        "ours_s": round(mine, 3),
        "ours_min_s": round(min(times["ours"]), 3),
        "generate_s": round(theirs, 3),
        "generate_min_s": round(min(times["peer"]), 3),
        "ours_tokens_per_s": round(tokens / mine),
        "generate_tokens_per_s": round(tokens / theirs),
        "ratio": round(theirs / mine, 2),
        "max_logprob_difference": f"{error:.1e}",
    }


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Speed-up over the prefix length, one line for each number of rollouts."""
    pyplot = plain_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for rollouts in sorted({int(str(row["rollouts"])) for row in rows}):
        line = [row for row in rows if row["rollouts"] == rollouts]
        points = np.array([[float(str(row[name])) for name in ("prefix", "ratio")] for row in line])
        axes.plot(points[:, 0], points[:, 1], "o-", label=f"G = {rollouts}")
    axes.axhline(4, color="grey", linestyle=":", label="target at G = 16, P = 512")
    axes.set(xlabel="prefix tokens P", ylabel="times as fast as generate", ylim=(0, None))
    axes.legend()
    save_svg(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the CSV file; or draw an earlier one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 512, 1024], help="prefix lengths")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1, 4, 16], help="rollouts a prefix")
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a batch, at least one prefix")
    parser.add_argument("--new", type=int, default=128, help="tokens drawn a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "sampler_cpu.csv", help="CSV file")
    add_plot_option(parser)
    args = parser.parse_args(argv)
    if args.plot is not None:
        plot(read_csv(args.plot), args.plot.with_suffix(".svg"))
        return
    torch.set_num_threads(args.threads)
    mesh = start_mesh()
    model = build_model(MODEL, ParallelConfig(), VOCAB, mesh, seed=0)
    sys.path.append(str(ROOT / "tests"))
    from llama import llama_of  # the tests' copy of a policy in transformers' layout

    llama = llama_of(model, VOCAB)
    llama.config._attn_implementation = "sdpa"
    print(f"{num_parameters(model) / 1e6:.1f} M parameters, {args.threads} threads")
    rows = []
    for rollouts in args.rollouts:
        for prefix in args.prefix:
            prompts = max(1, args.sequences // rollouts)
            row = measure(model, mesh, llama, prompts, prefix, rollouts, args)
            rows.append({**header("sampler", ("torch", "transformers")), "threads": args.threads, **row})
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
