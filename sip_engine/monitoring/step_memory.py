"""Where a process' memory goes in a step: bytes of each part as its tensors take them, and the peak beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import psutil
import torch
from torch import Tensor

from sip_engine.monitoring.meters import peak_since_last
from sip_engine.policy.policy import Policy
from sip_engine.policy.reference import Reference
from sip_engine.sampler.sampler import Sampler

PARTS: tuple[str, ...] = ("weights", "gradients", "optimizer", "reference", "kv")


def held_bytes(policy: Policy, reference: Reference | None, sampler: Sampler | None) -> dict[str, int]:
    """Bytes of `PARTS` on this process' device at this moment; what lies elsewhere (offloaded) does not count."""
    weights = _storages(policy.model.parameters())
    optimizer = {at: n for at, n in _storages(policy.optimizer_tensors()).items() if at not in weights}
    kept = (
        []
        if reference is None
        else [*list(reference.model.parameters()), *(reference.average or {}).values()]
    )
    device = policy.mesh.device.type
    gradients = _storages(buffer.grad_data for buffer in policy.ddp.buffers)  # type: ignore[union-attr]
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "reference": sum(_storages(tensor for tensor in kept if tensor.device.type == device).values()),
        "kv": 0 if sampler is None else sampler.kv_bytes_held,
    }


def peak_bytes() -> int:
    """Most that CUDA's allocator has held since the last call; without CUDA what is resident now."""
    return peak_since_last() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def memory_metrics(peak: float, parts: Mapping[str, float], *, kv_stays: bool) -> dict[str, float]:
    """GiB of one process. `other` (activations, workspaces) is what its peak holds beside the parts."""
    found = {f"machine/memory_{name}_gib": size / 2**30 for name, size in parts.items()}
    if not torch.cuda.is_available():
        return {**found, "machine/memory_resident_gib": peak / 2**30}
    at_once = sum(parts.values()) - (0 if kv_stays else parts["kv"])
    other = max(0.0, peak - at_once)
    return {**found, "machine/memory_peak_gib": peak / 2**30, "machine/memory_other_gib": other / 2**30}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the tensors' storages by address: views of one storage count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
