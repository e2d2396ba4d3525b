"""One update with each prefix computed once, against the same code with it computed for every suffix; and against
transformers with plain torch.

    python -m benchmarks update                          # packing, then a DPO step beside transformers'
    python -m benchmarks update --prefix 1024 --suffixes 16 --parts packing

packing: forward and backward of NLL on all suffix tokens, `--suffixes` to a prefix; tokens and operations are
    counted as they run and predicted from the layout. Gradients of both packings are compared before anything is
    written.
step: a whole DPO step (policy forward and backward, reference forward, clipping, AdamW) on the same pairs, against
    transformers' Llama of the same weights, sequences right-padded into one batch. Losses are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
from benchmarks.sampler import MODEL, VOCAB
from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.kernels.shared_prefix_attention import attention_cost, rows_of
from sip_engine.objectives.base import open_objective
from sip_engine.objectives.update import update
from sip_engine.policy.packing import PackedRows
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import LossSums, Row
from sip_engine.types import Candidate, Choice, Kind, Sample

SUFFIX = 128
TARGETS = {2: 1.6, 16: 4.5}
"""At P = 1024 (the project's performance model)."""


def run_config(micro_batch_tokens: int) -> RunConfig:
    """A frozen learning rate and no warm-up, so that every step does the same work."""
    return RunConfig(
        model=MODEL,
        parallel={"micro_batch_tokens": micro_batch_tokens},  # pyright: ignore[reportArgumentType]
        optimizer={"lr": 1e-5, "warmup_steps": 0, "min_lr_ratio": 1.0},  # pyright: ignore[reportArgumentType]
    )


def random_row(seed: int, prefix: int, suffixes: int) -> Row:
    rng = np.random.default_rng([seed, prefix, suffixes])

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, VOCAB, length).astype(np.int32)

    return Row(ids(prefix), tuple(ids(SUFFIX) for _ in range(suffixes)))


def unshared(row: Row) -> list[Row]:
    """The same suffixes, each with a copy of the prefix."""
    return [Row(row.prefix, (suffix,)) for suffix in row.suffixes]


def gradients(policy: Policy, rows: Sequence[Row]) -> float:
    """Forward and backward of NLL on all suffix tokens; gradients are left in the buffers. Returns the loss."""
    policy.ddp.zero_grad_buffer()

    def loss(log_probs: Tensor, _: PackedRows, __: int) -> LossSums:
        return LossSums(-log_probs.sum(), len(log_probs))

    results = policy.forward_backward(policy.micro_batches(rows), loss)
    return sum(found.loss.item() for found in results) / sum(found.units for found in results)


def count_flops(action: Callable[[], object]) -> int:
    """Operations of all matrix products and attentions that `action` runs, as executed: masked blocks count."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    def backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
        return 10 * query[0] * query[1] * query[2] * key[2] * query[3]

    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(display=False, custom_mapping={flash: forward, backward_op: backward}) as counter:
        action()
    return counter.get_total_flops()


def predicted_flops(row: Row, *, shared: bool) -> int:
    """What the definition asks for: 6 operations a weight and token, attention's visible pairs, the head (with its
    logits computed again in the backward pass) on suffix tokens."""
    layout = rows_of([len(row.prefix)], [[len(s) for s in row.suffixes]], torch.device("cpu"))
    cost = attention_cost(layout, num_heads=MODEL.num_heads, head_dim=MODEL.kv_channels, shared=shared)
    h, f, kv = MODEL.hidden_size, MODEL.ffn_size, MODEL.num_kv_heads * MODEL.kv_channels
    weights = h * (h + 2 * kv) + h * h + 3 * h * f
    body = 6 * weights * cost.tokens + cost.forward_flops + cost.backward_flops
    return MODEL.num_layers * body + 8 * h * VOCAB * sum(map(len, row.suffixes))


def measure_packing(policy: Policy, prefix: int, suffixes: int, repeats: int) -> dict[str, object]:
    """Both packings in turns; their gradients must agree."""
    row = random_row(0, prefix, suffixes)
    sides = {"shared": [row], "unshared": unshared(row)}
    found, flops = {}, {}
    for name, rows in sides.items():  # also the warm-up
        flops[name] = count_flops(lambda rows=rows: gradients(policy, rows))
        found[name] = torch.cat([buffer.grad_data.clone() for buffer in policy.ddp.buffers])  # pyright: ignore
    difference = (found["shared"] - found["unshared"]).norm() / found["unshared"].norm()
    if difference > 1e-4:
        raise RuntimeError(
            f"P = {prefix}, G = {suffixes}: gradients differ by {difference:.2e} of their norm"
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, rows in sides.items():
            seconds[name].append(timed(lambda rows=rows: gradients(policy, rows)))
    mine, theirs = median(seconds["shared"]), median(seconds["unshared"])
    tokens = {name: sum(r.num_tokens for r in rows) for name, rows in sides.items()}
    ideal = {name: predicted_flops(row, shared=name == "shared") for name in sides}
    return {
        "part": "packing",
        "prefix": prefix,
        "suffixes": suffixes,
        "ours_s": round(mine, 3),
        "ours_min_s": round(min(seconds["shared"]), 3),
        "peer_s": round(theirs, 3),
        "peer_min_s": round(min(seconds["unshared"]), 3),
        "ratio": round(theirs / mine, 2),
        "ratio_tokens": round(tokens["unshared"] / tokens["shared"], 2),
        "ratio_flops_predicted": round(ideal["unshared"] / ideal["shared"], 2),
        "ours_gflop": round(flops["shared"] / 1e9, 1),
        "peer_gflop": round(flops["unshared"] / 1e9, 1),
        "ours_gflop_predicted": round(ideal["shared"] / 1e9, 1),
        "peer_gflop_predicted": round(ideal["unshared"] / 1e9, 1),
        "agreement": f"{difference:.1e}",
    }


def pairs(prefix: int, count: int) -> list[Choice]:
    """Random prefixes with a chosen and a rejected suffix."""
    chosen = []
    for number in range(count):
        row = random_row(number, prefix, 2)
        pool = tuple(Candidate(Kind.ORIGINAL, 0, ids, "") for ids in row.suffixes)
        chosen.append(Choice(Sample(number, 0, row.prefix, row.suffixes[0], "", ""), pool, 0, 1, 1.0))
    return chosen


class PlainDpo:
    """A DPO step as one writes it with transformers: chosen and rejected sequences in one batch, logits and all."""

    def __init__(self, policy: Policy, beta: float) -> None:
        sys.path.append(str(ROOT / "tests"))
        from llama import llama_of  # the tests' copy of a policy in transformers' layout

        self.llama, self.frozen = llama_of(policy.model, VOCAB), llama_of(policy.model, VOCAB)
        for model in (self.llama, self.frozen):
            model.config._attn_implementation = "sdpa"
        self.adam = torch.optim.AdamW(self.llama.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
        self.beta = beta

    def step(self, choices: Sequence[Choice]) -> float:
        """One update; all choices have prefixes and suffixes of one length. Returns the mean loss."""
        ids = np.stack(
            [
                np.concatenate([c.sample.prefix_ids, k.ids])
                for place in (0, 1)
                for c in choices
                for k in [c.trained()[place]]
            ]
        )
        tokens = torch.from_numpy(ids).long().to(next(self.llama.parameters()).device)
        sums = self._sums(self.llama, tokens)
        with torch.no_grad():
            frozen = self._sums(self.frozen, tokens)
        chosen, rejected = (sums - frozen).chunk(2)
        loss = -F.logsigmoid(self.beta * (chosen - rejected)).mean()
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.llama.parameters(), 1.0)
        self.adam.step()
        return loss.item()

    def _sums(self, model: torch.nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False, logits_to_keep=SUFFIX + 1).logits[:, :-1]
        picked = logits.gather(-1, tokens[:, -SUFFIX:, None])[..., 0]
        return (picked - logits.logsumexp(-1)).sum(-1)


def measure_step(mesh: Mesh, prefix: int, count: int, repeats: int) -> dict[str, object]:
    """A DPO step on `count` pairs, ours and the peer's in turns from the same weights; losses must agree."""
    cfg = run_config(micro_batch_tokens=count * (prefix + 2 * SUFFIX))
    policy, reference = Policy(cfg, VOCAB, mesh), Reference(cfg, VOCAB, mesh)
    reference.copy_from(policy)
    objective = open_objective(ObjectiveConfig(kind="dpo", beta=0.1))
    peer = PlainDpo(policy, objective.cfg.beta)
    batch = pairs(prefix, count)
    training = [objective.row_of_choice(choice) for choice in batch]
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    worst = 0.0
    for turn in range(repeats + 1):
        losses = {}

        def ours() -> None:
            losses["ours"] = update(policy, reference, training, objective).loss  # noqa: B023

        def theirs() -> None:
            losses["peer"] = peer.step(batch)  # noqa: B023

        times = timed(ours), timed(theirs)
        worst = max(worst, abs(losses["ours"] - losses["peer"]))
        if turn:  # the first is the warm-up
            seconds["ours"].append(times[0])
            seconds["peer"].append(times[1])
    if worst > 1e-3:
        raise RuntimeError(f"P = {prefix}: losses differ by {worst:.2e}")
    mine, theirs_s = median(seconds["ours"]), median(seconds["peer"])
    return {
        "part": "step",
        "prefix": prefix,
        "suffixes": 2,
        "ours_s": round(mine, 3),
        "ours_min_s": round(min(seconds["ours"]), 3),
        "peer_s": round(theirs_s, 3),
        "peer_min_s": round(min(seconds["peer"]), 3),
        "ratio": round(theirs_s / mine, 2),
        "agreement": f"{worst:.1e}",
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Measured and predicted speed-up of shared packing over the prefix length."""
    pyplot = plain_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for color, suffixes in zip(("C0", "C1", "C2"), sorted({row["suffixes"] for row in rows}), strict=False):
        line = [row for row in rows if row["suffixes"] == suffixes and row["part"] == "packing"]
        prefixes = [row["prefix"] for row in line]
        axes.plot(prefixes, [row["ratio"] for row in line], "o-", color=color, label=f"G = {suffixes}")
        predicted = [row["ratio_flops_predicted"] for row in line]
        axes.plot(prefixes, predicted, ":", color=color, label=f"G = {suffixes}, operations")
    axes.set(xlabel="prefix tokens P", ylabel="times as fast as unshared", ylim=(0, None))
    axes.legend()
    save_svg(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the CSV file; or draw an earlier one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prefix", type=int, nargs="+", default=[256, 512, 1024, 2048], help="prefix lengths"
    )
    parser.add_argument(
        "--suffixes", type=int, nargs="+", default=[2, 16], help="suffixes a prefix (packing)"
    )
    parser.add_argument("--parts", nargs="+", choices=["packing", "step"], default=["packing", "step"])
    parser.add_argument("--pairs", type=int, default=4, help="prefixes of the DPO step")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "update_cpu.csv", help="CSV file")
    add_plot_option(parser)
    args = parser.parse_args(argv)
    if args.plot is not None:
        plot(read_csv(args.plot), args.plot.with_suffix(".svg"))
        return
    torch.set_num_threads(args.threads)
    mesh = start_mesh()
    policy = Policy(run_config(micro_batch_tokens=8192), VOCAB, mesh)
    found: list[dict[str, object]] = []
    if "packing" in args.parts:
        for suffixes in args.suffixes:
            for prefix in args.prefix:
                found.append(measure_packing(policy, prefix, suffixes, args.repeats))
                print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    if "step" in args.parts:
        for prefix in args.prefix:
            found.append(measure_step(mesh, prefix, args.pairs, args.repeats))
            print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    columns = list(dict.fromkeys(name for row in found for name in row))
    about = {**header("update", ("torch", "transformers")), "threads": args.threads}
    write_csv(args.out, [{**about, **{name: row.get(name, "") for name in columns}} for row in found])


if __name__ == "__main__":
    main()
