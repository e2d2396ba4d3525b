"""Waves through pipeline stages: as many in flight as there are stages, so that every stage works on another one."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from sip_engine.distributed.mesh import Mesh
from sip_engine.sampler.wave import Wave


def run_pipelined(waves: Sequence[Wave], num_steps: int, mesh: Mesh) -> None:
    """Decode `num_steps` tokens of every wave; afterwards every stage holds the ids and log-probs.

    All stages go through (step, wave) in the same order. Hidden states travel to the next stage, drawn
    tokens from the last stage to the first on a group of their own: on one channel with the hidden states
    of two stages, each side could wait for the other's send.
    """
    pp, ends = mesh.pp, mesh.ends
    sending: list[tuple[dist.Work | None, Tensor]] = []  # the tensors must live until they are sent
    for step in range(num_steps):
        for wave in waves:
            incoming = None
            if not pp.is_first:
                incoming = _receive(wave.incoming_like(), pp.global_rank(pp.rank - 1), pp.group)
            elif step:
                assert ends is not None
                incoming = _receive(wave.incoming_like(), ends.global_rank(1), ends.group)
            out = wave.advance(incoming)
            if not pp.is_last:
                sending.append((dist.isend(out.contiguous(), pp.global_rank(pp.rank + 1), pp.group), out))
            elif step + 1 < num_steps:
                assert ends is not None
                sending.append((dist.isend(out, ends.global_rank(0), ends.group), out))
            sending = [(work, tensor) for work, tensor in sending if work and not work.is_completed()]
    for work, _ in sending:
        if work is not None:
            work.wait()
    last = pp.global_rank(pp.size - 1)
    for wave in waves:
        dist.broadcast(wave.ids, last, group=pp.group)
        dist.broadcast(wave.logprobs, last, group=pp.group)


def _receive(buffer: Tensor, source: int, group: dist.ProcessGroup) -> Tensor:
    dist.recv(buffer, source, group)
    return buffer
