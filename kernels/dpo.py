"""Direct preference optimisation (arXiv 2305.18290, eq. 7) from log-probs of tokens, in one pass over them.

N: tokens, P: pairs. Tokens of a pair's chosen suffix come before those of its rejected one, pair after pair.
With sums s_c, s_r over a pair's suffixes of n_c and n_r tokens, and the reference policy's r_c, r_r:

    z    = beta * ((s_c - r_c) - (s_r - r_r))            (sums over n of them where length-normalised)
    loss = -log sigmoid(z) - nll_weight * s_c / n_c
    d loss / d log_prob = -beta * sigmoid(-z) * w_c - nll_weight / n_c      of a chosen token
                        = +beta * sigmoid(-z) * w_r                          of a rejected token

with w = 1, or 1 / n where length-normalised. The second term of the loss is the chosen suffix's mean NLL a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sip_engine.kernels._impl import Impl, resolve_impl
from sip_engine.kernels._triton import jit, tl
from sip_engine.kernels.compile_report import CompileCase

BLOCK = 256
"""Tokens of a step of a program."""


class PairLosses(NamedTuple):
    """What `dpo` finds of P pairs, in the dtype of the log-probs. Only `losses` carries a gradient."""

    losses: Tensor
    """[P]."""
    policy: Tensor
    """[P, 2]: log-probs of the chosen and the rejected suffix as they enter z: sums, or means."""
    reference: Tensor
    """[P, 2]: the reference policy's."""


def segment_of_token(starts: Tensor, num_tokens: int) -> Tensor:
    """[N] int64: which segment starts[i] <= n < starts[i + 1] each token is in; len(starts) - 1 past the last."""
    tokens = torch.arange(num_tokens, device=starts.device)
    return torch.searchsorted(starts, tokens, right=True) - 1


def dpo_reference(
    log_probs: Tensor,
    starts: Tensor,
    reference_sums: Tensor,
    beta: float,
    length_normalised: bool,
    nll_weight: float,
) -> PairLosses:
    """The definition, in plain torch, differentiable. See `dpo`."""
    lens = starts.diff().view(-1, 2)
    sums = log_probs.new_zeros(len(starts))
    sums = sums.index_add(0, segment_of_token(starts, len(log_probs)), log_probs)[:-1].view(-1, 2)
    policy, reference = sums, reference_sums.to(sums.dtype).view(-1, 2)
    if length_normalised:
        policy, reference = policy / lens, reference / lens
    gain = policy - reference
    losses = -F.logsigmoid(beta * (gain[:, 0] - gain[:, 1]))
    if nll_weight:
        losses = losses - nll_weight * sums[:, 0] / lens[:, 0]
    return PairLosses(losses, policy.detach(), reference.detach())


@jit
def sum_segment(values_ptr, first, last, BLOCK: tl.constexpr):
    """Sum of values[first:last], float32."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + token, mask=token < last, other=0.0)
    return tl.sum(total, axis=0)


@jit
def fill_segment(out_ptr, first, last, value, BLOCK: tl.constexpr):
    """out[first:last] = value."""
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + token, tl.zeros([BLOCK], tl.float32) + value, mask=token < last)


@jit
def dpo_kernel(
    log_probs_ptr, starts_ptr, reference_ptr, losses_ptr, policy_ptr, scale_ptr, beta, nll_weight,
    LENGTH_NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a pair: its sums, its loss, and the loss' gradient of each of its tokens into scale [N]."""
    pair = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + 2 * pair)
    middle = tl.load(starts_ptr + 2 * pair + 1)
    last = tl.load(starts_ptr + 2 * pair + 2)
    chosen = sum_segment(log_probs_ptr, first, middle, BLOCK)
    rejected = sum_segment(log_probs_ptr, middle, last, BLOCK)
    num_chosen = (middle - first).to(tl.float32)
    chosen_nll = -chosen / num_chosen
    weight_chosen, weight_rejected = 1.0, 1.0
    if LENGTH_NORMALISED:
        weight_chosen, weight_rejected = 1.0 / num_chosen, 1.0 / (last - middle).to(tl.float32)
        chosen, rejected = -chosen_nll, rejected / (last - middle).to(tl.float32)
    tl.store(policy_ptr + 2 * pair, chosen)
    tl.store(policy_ptr + 2 * pair + 1, rejected)
    chosen -= tl.load(reference_ptr + 2 * pair)
    rejected -= tl.load(reference_ptr + 2 * pair + 1)

    z = beta * (chosen - rejected)
    small = tl.exp(-tl.abs(z))
    one_more = 1.0 + small
    # log(1 + x) to full precision for x near 0, where 1 + x loses bits: they are lost in the divisor as well.
    log1p = tl.where(one_more == 1.0, small, tl.log(one_more) * (small / (one_more - 1.0)))
    loss = tl.where(z < 0.0, -z, 0.0) + log1p
    push = beta / (1.0 + tl.exp(z))
    nll_slope = 0.0
    if nll_weight != 0.0:
        loss += nll_weight * chosen_nll
        nll_slope = nll_weight / num_chosen
    tl.store(losses_ptr + pair, loss)
    fill_segment(scale_ptr, first, middle, -push * weight_chosen - nll_slope, BLOCK)
    fill_segment(scale_ptr, middle, last, push * weight_rejected, BLOCK)


class _Dpo(torch.autograd.Function):
    """The kernel finds the gradient beside the loss; the backward pass scales it by each loss' own."""

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        starts: Tensor,
        reference: Tensor,
        beta: float,
        length_normalised: bool,
        nll_weight: float,
    ) -> tuple[Tensor, Tensor]:
        num_pairs = len(reference)
        losses, policy = torch.empty_like(reference[:, 0]), torch.empty_like(reference)
        scale = torch.zeros_like(log_probs)
        dpo_kernel[(num_pairs,)](
            log_probs,
            starts,
            reference,
            losses,
            policy,
            scale,
            beta,
            nll_weight,
            LENGTH_NORMALISED=length_normalised,
            BLOCK=BLOCK,
        )
        ctx.save_for_backward(scale, starts)
        ctx.mark_non_differentiable(policy)
        return losses, policy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        scale, starts = ctx.saved_tensors
        pair = segment_of_token(starts[::2].contiguous(), len(scale))
        return scale * F.pad(grad, (0, 1))[pair], None, None, None, None, None


def _check(log_probs: Tensor, starts: Tensor, reference_sums: Tensor) -> None:
    if log_probs.ndim != 1 or not log_probs.is_floating_point():
        raise ValueError(f"log_probs is {log_probs.dtype} {list(log_probs.shape)}: it must be float [N]")
    if starts.dtype != torch.int64 or starts.ndim != 1 or len(starts) % 2 == 0:
        raise ValueError(f"starts is {starts.dtype} {list(starts.shape)}: it must be int64 [2 * pairs + 1]")
    if reference_sums.shape != (len(starts) - 1,):
        raise ValueError(
            f"reference_sums {list(reference_sums.shape)} must be [{len(starts) - 1}], one a suffix of `starts`"
        )


def dpo(
    log_probs: Tensor,
    starts: Tensor,
    reference_sums: Tensor,
    *,
    beta: float,
    length_normalised: bool = False,
    nll_weight: float = 0.0,
    impl: Impl | None = None,
) -> PairLosses:
    """Losses of P pairs of suffixes, differentiable with respect to the log-probs of their tokens.

    log_probs: [N] float32 in nats, the policy's; "reference" also takes float64, and gives it.
    starts: int64 [2P + 1], where each suffix begins (chosen, rejected, chosen, ...), then where the last ends.
        Tokens past that belong to none and get no gradient.
    reference_sums: [2P], the reference policy's summed log-prob of each suffix.
    beta: strength of the pull towards the reference policy.
    length_normalised: mean instead of summed log-probs, of policy and reference alike.
    nll_weight: weight of the chosen suffix's mean NLL a token, added to the loss.

    A suffix without tokens has sum 0; what divides by its length is NaN or infinite. A NaN log-prob makes its
    pair's loss and gradients NaN and no other's. Raises ValueError on shapes, dtypes or an `impl` that do not fit.
    """
    _check(log_probs, starts, reference_sums)
    if resolve_impl(impl, log_probs) == "reference":
        return dpo_reference(log_probs, starts, reference_sums, beta, length_normalised, nll_weight)
    if log_probs.dtype != torch.float32:
        raise ValueError(
            f"impl='triton' takes float32 log-probs, not {log_probs.dtype}: pass impl='reference'"
        )
    reference = reference_sums.float().view(-1, 2)
    if length_normalised:
        reference = reference / starts.diff().view(-1, 2)
    losses, policy = _Dpo.apply(
        log_probs.contiguous(),
        starts.contiguous(),
        reference.contiguous(),
        beta,
        length_normalised,
        nll_weight,
    )  # pyright: ignore[reportGeneralTypeIssues]
    return PairLosses(losses, policy, reference)


def compile_cases() -> list[CompileCase]:
    """The configurations to check for sm_90."""
    floats = ("log_probs_ptr", "reference_ptr", "losses_ptr", "policy_ptr", "scale_ptr")
    signature = dict.fromkeys(floats, "*fp32:16") | {"starts_ptr": "*i64:16"}
    return [
        CompileCase(
            name=f"dpo{' length-normalised' if normalised else ''}",
            kernel=dpo_kernel,
            signature=signature | dict.fromkeys(("beta", "nll_weight"), "fp32"),
            constexprs={"LENGTH_NORMALISED": normalised, "BLOCK": BLOCK},
        )
        for normalised in (False, True)
    ]
