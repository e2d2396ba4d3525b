"""Items 8, 9 and 11: gradients against the CPU's, a run that is resumed, and the quickstart."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.figures import Context
from benchmarks.gpu.models import model_config, rows, run_config, vocab
from benchmarks.record import ROOT
from sip_engine.config.schema import ObjectiveConfig, RunConfig
from sip_engine.distributed.mesh import start_alone, start_mesh
from sip_engine.experiments.quickstart import STAGES, stage_config
from sip_engine.monitoring.records import METRICS, read_records
from sip_engine.objectives.base import open_objective
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.train import train

FP32_ERROR, BF16_ERROR = 1e-4, 5e-2
"""Of the gradient's norm."""


def _config(context: Context, precision: str, recompute: str) -> RunConfig:
    model = model_config(context, num_layers=4, hidden_size=512, num_heads=8, num_kv_heads=4, ffn_size=1408)
    model = model.model_copy(update={"precision": precision})
    return run_config(context, model, parallel={"micro_batch_tokens": 4096, "recompute": recompute})


def dpo_gradients(
    context: Context, precision: str, recompute: str, weights: dict[str, np.ndarray] | None
) -> tuple[Policy, float]:
    """A policy with the gradients of a DPO loss on it, and the loss; the reference is the policy, a little larger."""
    cfg, mesh = _config(context, precision, recompute), start_mesh()
    policy, reference = Policy(cfg, vocab(context), mesh), Reference(cfg, vocab(context), mesh)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if weights is not None:
                parameter.copy_(torch.from_numpy(weights[name]).to(parameter.device, parameter.dtype))
        reference.copy_from(policy)
        for parameter in reference.model.parameters():
            parameter.mul_(1.03125)
    sizes = (2, 9, 4) if context.rehearse else (4, 512, 128)
    batches = policy.micro_batches(rows(context, *sizes))
    referred = reference.score(batches)
    objective = open_objective(ObjectiveConfig(kind="dpo", beta=0.1))
    policy.ddp.zero_grad_buffer()
    found = policy.forward_backward(
        batches, lambda seen, packed, n: objective.loss(seen, packed, referred[n])
    )
    return policy, sum(part.loss.item() for part in found) / sum(part.units for part in found)


def _gradients(policy: Policy) -> dict[str, np.ndarray]:
    return {
        name: parameter.main_grad.detach().float().cpu().numpy()  # type: ignore[attr-defined]
        for name, parameter in policy.model.named_parameters()
    }


def dpo_step(context: Context) -> None:
    """fp32 against the CPU's gradients from the same weights; bf16; each way of computing activations anew."""
    before = context.out / "cpu.npz"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.training",
        str(before),
        *["--rehearse"] * context.rehearse,
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    with np.load(before) as saved:
        weights = {name[2:]: saved[name] for name in saved.files if name.startswith("w/")}
        wanted = {name[2:]: saved[name] for name in saved.files if name.startswith("g/")}
        loss = float(saved["loss"])
    before.unlink()
    size = np.sqrt(sum(float(np.square(g).sum()) for g in wanted.values()))
    kinds = [("fp32", "none", FP32_ERROR), ("fp32", "mlp", FP32_ERROR), ("fp32", "full", FP32_ERROR)]
    kinds += [] if context.rehearse else [("bf16", "none", BF16_ERROR), ("bf16", "full", BF16_ERROR)]
    torch.backends.cuda.matmul.allow_tf32 = False
    for precision, recompute, limit in kinds:
        policy, found = dpo_gradients(context, precision, recompute, weights)
        ours = _gradients(policy)
        gap = np.sqrt(sum(float(np.square(ours[name] - g).sum()) for name, g in wanted.items())) / size
        context.say(
            f"DPO gradients, {precision}, recompute {recompute}", float(gap), "of the CPU's norm",
            target=f"<= {limit:g}", ok=bool(gap <= limit), note=f"loss {found:.6f}, the CPU's {loss:.6f}",
        )  # fmt: skip
        del policy


def _short(context: Context, stage: str, **changes: Any) -> RunConfig:
    """A stage of the quickstart with few steps; in a rehearsal with a tiny model, too."""
    values = stage_config(stage, context.out, 0.001 if context.rehearse else 0.05).model_dump()
    if context.rehearse:
        values["model"] |= {
            "num_layers": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "num_kv_heads": 1,
            "ffn_size": 48,
        }
        values["world"] |= {"train_documents": 60, "test_documents": 12}
        values["data"] |= {"vocab_size": 400}
        values["batch_size"] = 2
        values["eval"] |= {"num_prefixes": 2}
        for candidates in values["candidates"]:
            candidates["rollouts"] = min(2, candidates["rollouts"])
    for section, change in changes.items():
        values[section] = values[section] | change if isinstance(change, dict) else change
    return RunConfig.model_validate(values)


def resume(context: Context) -> None:
    """A run of four steps, and one that ends after two and is started again: the same figures."""
    _kernels_of_a_rehearsal(context)
    mesh = start_alone()
    steady = {"optimizer": {"warmup_steps": 1, "min_lr_ratio": 1.0}, "checkpoint": {"every": 1}}
    found = {}
    for name, ends in (("whole", (3,)), ("resumed", (2, 3))):
        for steps in ends:
            train(_short(context, "base", steps=steps, out=context.out / name, **steady), mesh)
        rows = [
            row for row in read_records(context.out / name / METRICS) if "loss" in row or "train/loss" in row
        ]
        found[name] = rows[-1]
    names = [name for name in found["whole"] if "loss" in name or "grad_norm" in name]
    same = bool(names) and all(found["whole"][name] == found["resumed"][name] for name in names)
    context.check("step after resuming = step of an unbroken run, bit for bit", same, note=", ".join(names))


def short_quickstart(context: Context) -> None:
    """Every stage in order, with evaluation, judge and checkpoints; losses are finite and the records whole."""
    _kernels_of_a_rehearsal(context)
    mesh = start_alone()
    for stage in STAGES:
        train(_short(context, stage), mesh)
        last = list(read_records(context.out / stage / METRICS))[-1]
        figures = [value for value in last.values() if isinstance(value, float)]
        context.say(f"stage {stage}", float(last["elapsed"]), "s", ok=bool(np.isfinite(figures).all()))


def _kernels_of_a_rehearsal(context: Context) -> None:
    """A whole run in Triton's interpreter takes minutes; the other items have rehearsed the kernels."""
    if context.rehearse:
        os.environ["SIP_KERNELS"] = "reference"


def main(argv: Sequence[str] | None = None) -> int:
    """Save the weights and gradients of the fp32 step on the CPU."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    policy, loss = dpo_gradients(Context(8, args.file.parent, args.rehearse), "fp32", "none", None)
    weights = {f"w/{name}": p.detach().numpy() for name, p in policy.model.named_parameters()}
    gradients = {f"g/{name}": g for name, g in _gradients(policy).items()}
    arrays: dict[str, Any] = {"loss": np.float64(loss), **weights, **gradients}
    np.savez(args.file, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
