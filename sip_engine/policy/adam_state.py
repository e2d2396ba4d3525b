"""Lets Megatron's optimizers save and load torch's AdamW, which they expect only Apex or TE in place of.

Megatron reads Adam's state before the first step has made it, on loading asks the checkpoint for the step count that
it has itself just put there, and hands all parameters one and the same step tensor, which torch then counts up once a
parameter. A step count of zero it does not write at all. Where Transformer Engine or Apex is installed it would take
their optimizer, whose state has another form: `use_torch_adam` keeps torch's, so that a checkpoint does not depend on
what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as optimizers
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor


def use_torch_adam() -> None:
    """Tell Megatron's optimizers, from now on, that torch's AdamW is what there is."""
    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = torch.optim.Adam, False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False


_STATE = ("params", "step")
"""What of a parameter group is state, or is no setting."""
_KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells one group of parameters from another, whatever the run's settings."""


def fill_adam_state(optimizer: Any) -> None:
    """Make the state that AdamW would make in its first step, and have it take that in one kernel on CUDA."""
    for part in _torch_adams(optimizer):
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        _fuse(part.optimizer)


def _fuse(adam: torch.optim.AdamW) -> None:
    """AdamW's fused form beside CUDA: the default one makes temporaries of four bytes a parameter. It wants its step
    counts on the device.
    """
    for group in adam.param_groups:
        if not group["params"] or not all(p.is_cuda and p.is_floating_point() for p in group["params"]):
            continue
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            state = adam.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device)


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)` for every kind of optimizer.

    No two parameters share a state's tensor. Settings (decay rates, peak learning rate) stay this optimizer's own.
    """
    # Before loading: Megatron-core 0.19 finds a saved group by its settings, too, and finds none that have changed.
    ours = {_kind_of(group): group for group in optimizer.param_groups}
    for saved in _state_of(state)["param_groups"]:
        saved.update((k, v) for k, v in ours.get(_kind_of(saved), {}).items() if k not in _STATE)
    with ExitStack() as stack:
        for part in _torch_adams(optimizer):
            if hasattr(part, "_set_main_param_and_optimizer_states"):
                stack.enter_context(_keeping_step(part))
            else:
                _state_of(state)["state"].setdefault("common_step", torch.tensor(0.0))
        optimizer.load_state_dict(state)
    for part in _torch_adams(optimizer):
        _own_tensors(part.optimizer)
        _fuse(part.optimizer)


def _kind_of(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in _KINDS)


def _torch_adams(optimizer: Any) -> Iterator[Any]:
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part


@contextmanager
def _keeping_step(part: Any) -> Iterator[None]:
    name = "_set_main_param_and_optimizer_states"
    load = getattr(part, name)

    def load_beside_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        load(model_param, {**tensors, "step": state["step"]})

    with mock.patch.object(part, name, load_beside_step):
        yield


def _state_of(state: dict[str, Any]) -> dict[str, Any]:
    """The inner optimizer's part of what Megatron writes: beside fp32 copies it is one level down."""
    return state.get("optimizer", state)


def _own_tensors(adam: torch.optim.AdamW) -> None:
    """Give every parameter tensors of its own."""
    seen: set[int] = set()
    for state in adam.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel():
                place = value.untyped_storage().data_ptr()
                if place in seen:
                    state[name] = value = value.clone()
                    place = value.untyped_storage().data_ptr()
                seen.add(place)
