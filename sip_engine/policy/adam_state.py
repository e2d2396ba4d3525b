"""Lets Megatron's distributed optimizer save and load torch's AdamW, which it expects only Apex or TE in place of.

Megatron reads Adam's state before the first step has made it, and on loading asks the checkpoint for the
step count that it has itself just put there. Nothing is done for Transformer Engine's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


def fill_adam_state(optimizer: Any) -> None:
    """Make the state that AdamW would make in its first step."""
    for part in _torch_adams(optimizer):
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)` for every kind of optimizer."""
    with ExitStack() as stack:
        for part in _torch_adams(optimizer):
            if hasattr(part, "_set_main_param_and_optimizer_states"):
                stack.enter_context(_keeping_step(part))
        optimizer.load_state_dict(state)


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
