"""A model inside the engine: a checkpoint in the policy's process group, served by our sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from sip_engine.config.judge import LocalModelConfig
from sip_engine.config.schema import SamplerConfig
from sip_engine.distributed.mesh import Mesh
from sip_engine.policy.checkpoint import resolve_checkpoint
from sip_engine.sampler.frozen import FrozenPolicy, encode_prompt
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.utils.progress import console


class LocalModel:
    """What judge and rewriter share: a frozen model, its sampler, and greedy or drawn replies to prompts."""

    def __init__(self, policy: FrozenPolicy, cfg: LocalModelConfig) -> None:
        self.policy, self.cfg, self.tokenizer = policy, cfg, policy.tokenizer
        self.sampler = policy.sampler(
            SamplerConfig(max_sequences=cfg.max_sequences, kv_memory_mb=cfg.kv_memory_mb)
        )

    def encode(self, prompt: str, room: int = 0) -> np.ndarray | None:
        """A prompt's tokens, begun as its model does, int32; None if the context cannot hold them and `room` more."""
        return self.fitting(encode_prompt(self.tokenizer, prompt), room)

    def fitting(self, ids: np.ndarray, room: int = 0) -> np.ndarray | None:
        """`ids`, or None if the context cannot hold them and `room` tokens of a reply."""
        return ids if len(ids) + room <= self.policy.max_context else None

    def reply(self, prompts: Sequence[np.ndarray], seed: int) -> list[tuple[str | None, int]]:
        """Text of each reply (None where it did not end by itself) and its number of tokens.

        What is drawn depends on the prompt and the seed, not on the prompts beside it.
        """
        if not prompts:
            return []
        cfg, ends = self.cfg, self.tokenizer.eos_ids
        params = SamplingParams(
            cfg.max_new_tokens,
            temperature=cfg.temperature or 1.0,
            top_p=cfg.top_p,
            greedy=cfg.temperature == 0,
            seed=seed,
            stop_ids=ends,
        )
        done = self.sampler.generate([Request(ids, 1, _key(ids)) for ids in prompts], params)
        return [
            (self.tokenizer.decode(c.ids[:-1]) if c.ids[-1] in ends else None, len(c.ids)) for (c,) in done
        ]


def open_local_model(cfg: LocalModelConfig, mesh: Mesh, role: str) -> LocalModel:
    """A model that every pipeline stage of the policy holds whole."""
    assert cfg.checkpoint is not None, "the settings were checked"
    policy, state = FrozenPolicy.load(resolve_checkpoint(cfg.checkpoint), mesh.without_pipeline())
    trained_as = state.run.get("config", {}).get("task", role)  # of an imported model nobody knows
    # Any language model is fit for mutual information.
    is_asked = cfg.style == "compact" and cfg.method != "mutual_information"
    if trained_as != role and is_asked and mesh.is_main:
        console.print(
            f'{cfg.checkpoint} was trained with task = "{trained_as}", not as a {role}: what it says means little',
            soft_wrap=True,
        )
    return LocalModel(policy, cfg)


def _key(ids: np.ndarray) -> int:
    """A prompt as the number that its random stream is keyed by."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=7).digest(), "big")
