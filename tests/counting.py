"""Counts what a CPU run really does: operations, live bytes, collectives. What plans are held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import small_run
from peak_memory import PeakMemory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sip_engine.config.schema import RunConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.kernels import dense_decode_attention as dense
from sip_engine.policy.packing import Row
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.policy.rows import LossSums
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def count_flops(action: Callable[[], object]) -> int:
    """Operations of matrix products and of attention's visible pairs, by the shapes of the calls that were made."""

    def pairs(query: Any, key: Any, causal: bool) -> int:
        length = query[2] * (query[2] + 1) // 2 if causal else query[2] * key[2]
        return query[0] * query[1] * length * query[3]

    def forward(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
        return 4 * pairs(q, k, causal)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any
    ) -> int:
        return 10 * pairs(q, k, causal)

    def addmm(_: Any, a: Any, b: Any, **__: Any) -> int:  # in place, the counter knows nothing of it
        return 2 * a[0] * a[1] * b[1]

    mapping = {_FLASH: forward, _FLASH_BACKWARD: backward, torch.ops.aten.addmm_: addmm}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        action()
    return counter.get_total_flops()


class CollectiveBytes(TorchDispatchMode):
    """Within it: bytes that this process puts into collectives of more than one, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            # Output first, then input, where both are given: the whole is the larger of the two.
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            groups = [tree_leaves(arg) for arg in args]
            sizes = [sum(x.nbytes for x in group if isinstance(x, torch.Tensor)) for group in groups]
            kind = name.split("::")[1].split(".")[0].strip("_")
            if tensors:
                self.bytes[kind] = self.bytes.get(kind, 0) + max(sizes)
        return func(*args, **(kwargs or {}))


@dataclass
class Counted:
    """Of one process. Operations of a whole update, reference pass, prefill and decode; bytes as in a plan."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    kv_token: float
    update_flops: int
    reference_flops: int
    sampler_flops: int
    kv_read: int
    forward_backward_collectives: dict[str, int]
    gradient_collectives: dict[str, int]


def setting(model: dict, parallel: dict, *, data: dict, grad_reduce: str = "fp32") -> RunConfig:
    """A small run for counting; documents are never read."""
    return small_run(
        model={"max_context": 2048, "precision": "fp32", **model},
        parallel={**parallel, "grad_reduce": grad_reduce},
        data=data,
        objective={"kind": "dpo"},
        candidates=[{"original": False, "rollouts": 4}],
        sampler={"kv_memory_mb": 64, "page_size": 4},
    )


def count(cfg: RunConfig, mesh: Mesh) -> Counted:
    """One update of a DPO pair a prefix, a reference pass and a wave of rollouts, counted on this process."""
    vocab, data = cfg.data.vocab_size, cfg.data
    policy, reference = Policy(cfg, vocab, mesh), Reference(cfg, vocab, mesh)
    draw = np.random.default_rng(0)
    rows = [
        Row(
            draw.integers(0, vocab, data.max_prefix_tokens).astype(np.int32),
            tuple(draw.integers(0, vocab, data.suffix_tokens).astype(np.int32) for _ in range(2)),
        )
        for _ in range(cfg.batch_size // mesh.dp.size)
    ]
    batches = policy.micro_batches(rows)
    live, memory, collectives = [0], PeakMemory(), CollectiveBytes()

    def loss(log_probs: torch.Tensor, *_: Any) -> LossSums:
        live.append(memory.live)
        return LossSums(-log_probs.sum(), len(log_probs))

    policy.ddp.zero_grad_buffer()
    with memory:
        policy.forward_backward(batches, loss)
    with collectives:
        update_flops = count_flops(lambda: policy.forward_backward(batches, loss))
    after = CollectiveBytes()
    with after:
        policy.update(batches, loss, "none")
    finals = {k: v - collectives.bytes.get(k, 0) for k, v in after.bytes.items()}
    sampled, kv_token, kv_read = _count_sampler(cfg, policy, mesh, vocab, rows)
    return Counted(
        weights=sum(p.nbytes for p in policy.model.parameters()),
        gradients=sum(buffer.grad_data.nbytes for buffer in policy.ddp.buffers),  # type: ignore[union-attr]
        optimizer=_optimizer_bytes(policy),
        reference=sum(p.nbytes for p in reference.model.parameters()),
        activations=max(live),
        kv_token=kv_token,
        update_flops=update_flops,
        reference_flops=count_flops(lambda: reference.score(batches)),
        sampler_flops=sampled,
        kv_read=kv_read,
        forward_backward_collectives=collectives.bytes,
        gradient_collectives=finals,
    )


def _count_sampler(
    cfg: RunConfig, policy: Policy, mesh: Mesh, vocab: int, rows: list[Row]
) -> tuple[int, float, int]:
    sampler = Sampler(weight_views(policy.model, vocab, mesh.tp.rank), mesh, cfg.sampler)
    requests = [Request(row.prefix, 4, number) for number, row in enumerate(rows)]
    read = [0]
    attend = dense.dense_decode_attention

    def counting(q: Any, pk: Any, pv: Any, bias: Any, sk: Any, sv: Any, **kwargs: Any) -> Any:
        read[0] += sum(x.numel() * x.element_size() for x in (pk, pv, sk, sv))
        return attend(q, pk, pv, bias, sk, sv, **kwargs)

    from sip_engine.sampler import attention

    attention.dense_decode_attention = counting
    try:
        params = SamplingParams(cfg.data.suffix_tokens)
        flops = count_flops(lambda: sampler.generate(requests, params))
    finally:
        attention.dense_decode_attention = attend
    pages = sampler.pages
    held = sum(x.numel() * x.element_size() for x in (*pages.keys, *pages.values))
    return flops, held / (pages.keys[0].shape[0] * pages.page_size), read[0]


def _optimizer_bytes(policy: Policy) -> int:
    """Moments and master weights of the process; a parameter that is its own master is not counted again."""
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    total = 0
    for part in policy.optimizer.chained_optimizers:  # pyright: ignore[reportAttributeAccessIssue]
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                total += sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
                if parameter.untyped_storage().data_ptr() not in own:
                    total += parameter.nbytes
    return total


def count_on_ranks(folder: Path, settings: str) -> None:
    """On every rank: counts of the run that `settings` (JSON) describe, as JSON in `folder`."""
    cfg = RunConfig.model_validate_json(settings)
    mesh = start_mesh(cfg.parallel.tensor, cfg.parallel.pipeline)
    (folder / f"counted-{mesh.rank}.json").write_text(json.dumps(asdict(count(cfg, mesh))))
