"""The policy's matrices in FP8, quantised as the trainer quantises them: what decoding reads in their place."""

from __future__ import annotations

from typing import Literal

import torch

from sip_engine.kernels.fp8_linear import Fp8Weight
from sip_engine.policy.weights import PolicyWeights

Matrix = Literal["qkv", "attention_out", "gate_up", "down"]
MATRICES: tuple[Matrix, ...] = ("qkv", "attention_out", "gate_up", "down")


class Fp8Weights:
    """One byte a parameter of each layer that the trainer computes in FP8, at addresses that stay.

    Made anew from the policy's own parameters whenever `refresh` is called: they are what the optimizer steps, and
    what Transformer Engine quantises before its matrix products, too.
    """

    def __init__(self, weights: PolicyWeights) -> None:
        self._weights = weights
        self._layers = {
            number: {name: Fp8Weight.like(getattr(weights.layers[number], name), recipe) for name in MATRICES}
            for number, recipe in enumerate(weights.fp8)
            if recipe is not None
        }

    @property
    def num_bytes(self) -> int:
        matrices = (one for layer in self._layers.values() for one in layer.values())
        return sum(one.values.nbytes + one.scale.nbytes for one in matrices)

    def of(self, layer: int, name: Matrix) -> Fp8Weight | None:
        """A layer's matrix; None where the trainer computes in 16 bits."""
        matrices = self._layers.get(layer)
        return None if matrices is None else matrices[name]

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the parameters as they are now."""
        for number, layer in self._layers.items():
            for name, matrix in layer.items():
                matrix.take(getattr(self._weights.layers[number], name))
