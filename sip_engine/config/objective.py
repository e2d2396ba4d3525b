"""The [objective] section, the registry of the objectives it may name, and what settings ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, field_validator

from sip_engine.config.section import Section
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.registry import Registry

OBJECTIVES: Registry[Any] = Registry(
    "objective",
    "sip_engine.objectives",
    {
        "dpo": "sip_engine.objectives.dpo:DPO",
        "rf_nll": "sip_engine.objectives.reward_nll:RewardNLL",
        "next_token": "sip_engine.objectives.next_token:NextToken",
        "sft_rewrite": "sip_engine.objectives.sft:RewriteSFT",
        "sft_rollout": "sip_engine.objectives.sft:RolloutSFT",
        "dpo_rewrite_over_rollout": "sip_engine.objectives.dpo:RewriteOverRollout",
        "grpo": "sip_engine.objectives.grpo:GRPO",
    },
)
"""`objective.kind` -> the class, a `sip_engine.objectives.base.Objective`."""


class LearnsFrom(Enum):
    """What of a step an objective is shown."""

    SAMPLES = "samples"
    """The documents' (or prompts') own text: nothing is generated."""
    POOLS = "pools"
    """Candidates of each prefix, judged where the objective wants it; it chooses among them."""
    GENERATIONS = "generations"
    """A group of graded generations for each prompt of a task."""


@runtime_checkable
class ObjectiveFacts(Protocol):
    """What settings and reports ask of an objective; see `sip_engine.objectives.base.Objective`."""

    learns_from: LearnsFrom
    needs_judge: bool
    needs_reference: bool
    loss_unit: str

    def check(self, cfg: Any) -> None:
        """Raise ValueError where the settings of a run do not suit the objective."""
        ...


class ObjectiveConfig(Section):
    """What an update does with the judged candidates."""

    kind: str = "dpo"
    """dpo: chosen over rejected; rf_nll: likelihood of the best candidate; grpo: graded generations of a task's
    prompt; next_token, sft_rewrite, sft_rollout and dpo_rewrite_over_rollout are baselines without judge. Other
    packages may add theirs."""
    beta: float = Field(default=0.1, gt=0)
    """DPO: strength of the pull towards the reference policy."""
    ties: Literal["drop", "keep"] = "drop"
    """DPO: what to do with a prefix whose best and worst reward are equal."""
    min_margin: float = Field(default=0.0, ge=0)
    """DPO: drop a prefix whose reward gap is not above this."""
    length_normalised: bool = False
    """DPO: mean instead of summed log-probs."""
    nll_weight: float = Field(default=0.0, ge=0)
    """DPO: weight of the chosen suffix's mean NLL a token, added to the loss."""
    document_nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean NLL a token of the document's own suffix, added to the loss of any objective that chooses
    among candidates: it holds the policy to how the documents go on. 0 adds nothing."""
    loss_on: Literal["suffix", "all"] = "all"
    """next_token: train on the suffix only, or on every token of prefix and suffix."""
    generations: Annotated[int, Field(ge=2)] = 16
    """grpo: generations of a prompt, whose rewards are normalised together."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """grpo: a token's ratio to the policy that sampled it counts up to 1 +- this."""
    kl_weight: float = Field(default=0.0, ge=0)
    """grpo: weight of the estimated KL divergence from the reference policy; 0 needs no reference."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of an objective from another package, which says what they are; the built-in ones have none."""

    @field_validator("kind")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return OBJECTIVES.check(value)

    @property
    def facts(self) -> ObjectiveFacts:
        """The objective, as far as settings need to know it.

        Raises:
            ConfigError: its package cannot be loaded, or it refuses its settings.
        """
        found = OBJECTIVES.get(self.kind)(self)
        if not isinstance(found, ObjectiveFacts):
            raise ConfigError(f"objective {self.kind!r} is no sip_engine.objectives.base.Objective")
        return found


def recorded_facts(settings: Mapping[str, Any]) -> ObjectiveFacts | None:
    """The objective of a recorded [objective] table; None where there is none, or none that is known here."""
    if "kind" not in settings:
        return None
    try:
        return ObjectiveConfig.model_validate(settings).facts
    except ValueError:  # pydantic's and ConfigError
        return None
