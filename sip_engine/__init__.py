"""sip-engine: self-improving pretraining (arXiv 2601.21343) as one engine.

A policy is sampled, scored and trained from Python in one process, on texts:

    from sip_engine import SamplingParams, Trainer, load_policy

    policy = load_policy("runs/quickstart/base")  # a run's folder, or a checkpoint
    prompt = "Once upon a time"
    drafts = policy.generate([prompt], SamplingParams(max_new_tokens=24, seed=1), n=4)[0]
    best, *_, worst = sorted(drafts, key=lambda draft: -len(set(draft.text.split())))  # your judge
    trainer = Trainer(policy, lr=1e-4)
    stats = trainer.step([(prompt, best.text, worst.text)])  # one step of DPO
    after = policy.score([(prompt, best.text), (prompt, worst.text)])  # nats, by the new weights
    print(f"loss {stats.loss:.3f}, better {after[0]:.2f}, worse {after[1]:.2f}")

Whole runs: `train(RunConfig(...))`, or `sip train`. The names below are loaded when they are first used, so that
importing the package costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sip_engine.api import TextCompletion, TextPolicy, Trainer, load_policy
    from sip_engine.config.parse import parse_config
    from sip_engine.config.schema import RunConfig
    from sip_engine.objectives.base import Objective, register_objective
    from sip_engine.sampler.requests import Completion, Request, SamplingParams
    from sip_engine.sampler.sampler import Sampler
    from sip_engine.train import train
    from sip_engine.utils.errors import RequestError, SipError

_PLACES = {
    "Completion": "sampler.requests",
    "Objective": "objectives.base",
    "Request": "sampler.requests",
    "RequestError": "utils.errors",
    "RunConfig": "config.schema",
    "Sampler": "sampler.sampler",
    "SamplingParams": "sampler.requests",
    "SipError": "utils.errors",
    "TextCompletion": "api",
    "TextPolicy": "api",
    "Trainer": "api",
    "load_policy": "api",
    "parse_config": "config.parse",
    "register_objective": "objectives.base",
    "train": "train",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Completion",
    "Objective",
    "Request",
    "RequestError",
    "RunConfig",
    "Sampler",
    "SamplingParams",
    "SipError",
    "TextCompletion",
    "TextPolicy",
    "Trainer",
    "load_policy",
    "parse_config",
    "register_objective",
    "train",
]


class _Package(ModuleType):
    """This package, whose `train` is the function also once the file `train.py` has been imported.

    Python binds a submodule to its package under the submodule's name; here that is a public function's name as well.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, ModuleType):
            value = value.train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Load a public name from its module (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
