"""The policy being trained: model, DDP, optimizer and learning-rate schedule, all Megatron-core's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sip_engine.config.schema import OptimizerConfig, RunConfig
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.adam_state import fill_adam_state, use_torch_adam
from sip_engine.policy.gradient_norm import use_one_norm
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.packing import PackedRows, pack_rows, split_by_tokens
from sip_engine.policy.precision import FP8_MULTIPLE, parameter_dtype
from sip_engine.policy.rows import LossSums, Row
from sip_engine.utils import heartbeat
from sip_engine.utils.errors import NonFiniteError

MicroBatchLoss = Callable[[Tensor, PackedRows, int], LossSums]
"""(log-probs [num_targets] float32 in nats, rows, micro-batch number) -> the loss and what is logged of it."""


@dataclass(frozen=True)
class UpdateStats:
    """What one update did, over all micro-batches and processes."""

    loss: float
    grad_norm: float
    lr: float
    sums: dict[str, float]
    maxima: dict[str, float] = field(default_factory=dict)
    units: int = 0
    """What the loss is a mean over; 0: there was nothing to learn from, and no update was made."""


@dataclass
class _Totals:
    """What the losses of several micro-batches, or processes, come to."""

    loss: float = 0.0
    units: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    """Whether the loss and all gradients are, on every process."""

    def add(self, loss: float, units: int, sums: Mapping[str, float], maxima: Mapping[str, float]) -> None:
        self.loss, self.units = self.loss + loss, self.units + units
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, value in maxima.items():
            self.maxima[name] = max(self.maxima.get(name, value), value)


class Policy:
    """This process' part of the policy and everything that updates it."""

    def __init__(self, cfg: RunConfig, vocab_size: int, mesh: Mesh) -> None:
        self.mesh = mesh
        self.model = build_model(cfg.model, cfg.parallel, vocab_size, mesh, seed=cfg.seed)
        self.micro_batch_tokens = cfg.parallel.micro_batch_tokens
        self.has_distributed_optimizer = cfg.parallel.distributed_optimizer
        use_torch_adam()
        use_one_norm()
        with megatron_device():
            self.ddp = _wrap(self.model, cfg)
            self.optimizer = get_megatron_optimizer(_optimizer_config(cfg), [self.ddp])
            fill_adam_state(self.optimizer)
            self.scheduler = _scheduler(self.optimizer, cfg.optimizer, cfg.steps)
        self.alone_until = 0.0
        """When (`time.perf_counter`) the part of the last update ended that this process makes by itself."""
        self.model.config.finalize_model_grads_func = self._finalize
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        if cfg.parallel.overlap:
            self.model.config.no_sync_func = self.ddp.no_sync

    def micro_batches(self, rows: Sequence[Row]) -> list[PackedRows]:
        """Rows packed into micro-batches of at most the configured tokens, on this process' device."""
        config = self.model.config
        multiple = (FP8_MULTIPLE if config.fp8 else 1) * (
            self.mesh.tp.size if config.sequence_parallel else 1
        )
        groups = split_by_tokens([row.num_tokens for row in rows], self.micro_batch_tokens)
        return [pack_rows([rows[i] for i in group], self.mesh.device, multiple=multiple) for group in groups]

    def update(
        self,
        batches: Sequence[PackedRows],
        loss: MicroBatchLoss,
        documents: str,
        check: Callable[[Mapping[str, float]], None] = lambda sums: None,
    ) -> UpdateStats:
        """One optimizer step on this process' micro-batches (at least one on every process).

        Args:
            check: Called on every process with the sums over all, before anything is updated; what it raises is
                raised.

        Raises:
            NonFiniteError: loss or gradient is not finite on some process; raised on every process before
                anything is updated, naming `documents`.
        """
        for group in self.optimizer.param_groups or ():
            group.setdefault("lr", 0.0)
        totals = self._passes(batches, loss)
        if not totals.finite:
            raise NonFiniteError(
                f"loss {totals.loss} or a gradient is not finite on documents {documents}: the update was not made; "
                "lower optimizer.lr or inspect these documents"
            )
        check(totals.sums)
        grad_norm = 0.0
        with megatron_device():
            self.scheduler.step(1)
            if totals.units:  # an optimizer step without data would still decay weights and move by momentum
                _, grad_norm, _ = self.optimizer.step()  # pyright: ignore[reportGeneralTypeIssues]
        return UpdateStats(
            loss=totals.loss / max(totals.units, 1),
            grad_norm=float(grad_norm or 0.0),
            lr=float(self.optimizer.param_groups[0]["lr"]),
            sums=totals.sums,
            maxima=totals.maxima,
            units=totals.units,
        )

    def stands(self, rows: Sequence[Row]) -> bool:
        """Whether training can go on from these parameters: they, the next-token loss of `rows` (at least one on
        every process) and its gradients are finite on every process. Changes nothing but gradients.
        """

        def loss(log_probs: Tensor, rows: PackedRows, number: int) -> LossSums:
            return LossSums(-log_probs.sum(), len(log_probs))

        totals = self._passes(self.micro_batches(rows), loss)
        largest = [torch.linalg.vector_norm(p.detach(), math.inf) for p in self.model.parameters()]
        finite = math.isfinite(torch.stack(largest).sum(dtype=torch.float64).item())
        return totals.finite and not self.mesh.any(not finite)

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """What the optimizer keeps on this process: moments, and what it steps (masters, or the model's own)."""
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            adam = part.optimizer
            yield from (p for group in adam.param_groups for p in group["params"])
            states = (value for state in adam.state.values() for value in state.values())
            yield from (value for value in states if isinstance(value, Tensor))

    def score(self, batches: Sequence[PackedRows]) -> list[Tensor]:
        """Log-probs [num_targets] of each micro-batch under this policy, no gradient.

        Only the last pipeline stage gets them; the others get an empty list.
        """
        return score(self.model, batches)

    def forward_backward(self, batches: Sequence[PackedRows], loss: MicroBatchLoss) -> list[LossSums]:
        """Add this process' gradients of all micro-batches to the buffers; what `loss` found of each.

        The results carry no gradient; the list is empty before the last pipeline stage.
        """
        numbered = iter(enumerate(batches))

        def forward_step(data: Iterator[tuple[int, PackedRows]], model: Any) -> tuple[Tensor, Any]:
            number, rows = next(data)
            heartbeat.tick()

            def loss_func(log_probs: Tensor) -> tuple[Tensor, Tensor, LossSums]:
                found = loss(log_probs, rows, number)
                # Filled there: a copy from the host would wait.
                num_units = torch.full((), found.units, dtype=torch.int, device=found.loss.device)
                return found.loss, num_units, found._replace(loss=found.loss.detach().clone())

            return model(rows), loss_func

        with megatron_device():
            return _run_schedule(forward_step, numbered, self.ddp, batches, forward_only=False)

    def _passes(self, batches: Sequence[PackedRows], loss: MicroBatchLoss) -> _Totals:
        """Gradients of all micro-batches, from zero; and their totals over all processes."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        mine, gradients_finite = self._read(self.forward_backward(batches, loss))
        totals = self._over_replicas(mine)
        totals.finite = not self.mesh.any(not (gradients_finite and math.isfinite(totals.loss)))
        return totals

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        self.alone_until = time.perf_counter()
        finalize_model_grads(*args, **kwargs)

    def _read(self, found: Sequence[LossSums]) -> tuple[_Totals, bool]:
        """This process' totals over micro-batches, and whether its gradients are finite: one read of the device."""
        # Of gradients the largest absolute value, which is NaN where one is: nothing of their size is made.
        largest = [torch.linalg.vector_norm(buffer.grad_data, math.inf) for buffer in self.ddp.buffers]  # type: ignore[union-attr]
        logged = [
            value for part in found for value in (part.loss, *part.sums.values(), *part.maxima.values())
        ]
        on_device = [value for value in (*logged, *largest) if isinstance(value, Tensor)]
        numbers = torch.stack([value.double() for value in on_device]).tolist() if on_device else []
        values = iter(numbers)

        def number(value: float | Tensor) -> float:
            return next(values) if isinstance(value, Tensor) else float(value)

        mine = _Totals()
        for part in found:
            loss = number(part.loss)
            sums = {name: number(value) for name, value in part.sums.items()}
            maxima = {name: number(value) for name, value in part.maxima.items()}
            mine.add(loss, part.units, sums, maxima)
        return mine, all(math.isfinite(value) for value in values)

    def _over_replicas(self, mine: _Totals) -> _Totals:
        """Totals over the data axis; the other pipeline stages learn them from the last one."""
        total = _Totals()
        shared = (mine.loss, mine.units, mine.sums, mine.maxima)
        for part in self.mesh.gather_replicas(self.mesh.from_last_stage(shared)):
            total.add(*part)
        return total


def score(model: PolicyModel, batches: Sequence[PackedRows]) -> list[Tensor]:
    """Log-probs [num_targets] float32 of each micro-batch, no gradient; empty before the last stage."""

    def forward_step(data: Iterator[PackedRows], model: Any) -> tuple[Tensor, Any]:
        def keep(log_probs: Tensor, non_loss_data: bool = True) -> Tensor:
            return log_probs

        return model(next(data)), keep

    with torch.no_grad(), megatron_device():
        return _run_schedule(forward_step, iter(batches), model, batches, forward_only=True)


def _run_schedule(
    step: Any, data: Iterator, model: Any, batches: Sequence[PackedRows], forward_only: bool
) -> list:
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=data,
        model=[model],
        num_microbatches=len(batches),
        seq_length=max(batch.layout.num_tokens for batch in batches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _wrap(model: PolicyModel, cfg: RunConfig) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=cfg.parallel.grad_reduce == "fp32",
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap,
        # Parameters are gathered at once: the sampler needs all of them right after the update, and reads them
        # without the forward hooks that would gather them later.
        overlap_param_gather=False,
    )
    wrapped = DistributedDataParallel(model.config, ddp, model)
    wrapped.broadcast_params()
    return wrapped


def _optimizer_config(cfg: RunConfig) -> MegatronOptimizerConfig:
    dtype = parameter_dtype(cfg.model.precision)
    opt = cfg.optimizer
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=opt.lr,
        min_lr=opt.lr * opt.min_lr_ratio,
        weight_decay=opt.weight_decay,
        adam_beta1=opt.beta1,
        adam_beta2=opt.beta2,
        adam_eps=opt.eps,
        clip_grad=opt.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
    )


def _scheduler(optimizer: Any, cfg: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=cfg.lr,
        min_lr=cfg.lr * cfg.min_lr_ratio,
        lr_warmup_steps=cfg.warmup_steps,
        lr_decay_steps=max(steps, cfg.warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # On resume the settings hold, as everywhere, not those of the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
