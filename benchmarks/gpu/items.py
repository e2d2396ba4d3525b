"""The thirteen items of the acceptance run, in order: what each shows, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    number: int
    title: str
    where: str
    """module:function, in this folder; called with a `Context`."""
    seconds: float
    """Its share of ten minutes."""


ITEMS = (
    Item(1, "versions, no interpreter, ceilings of copy and matrix product", "machine:ceilings", 30),
    Item(2, "every launch variant compiled, in parallel", "kernels:warm_up", 40),
    Item(3, "every kernel against float64, outputs poisoned, twice for equal bits", "kernels:exactness", 75),
    Item(4, "compute-sanitizer memcheck, one small shape a kernel", "kernels:memcheck", 50),
    Item(5, "waves: graph equals eager; greedy, sampled, top-p, FP8 KV, ragged", "sampling:waves", 40),
    Item(6, "ten waves of changing shape: memory and overhead", "sampling:ten_waves", 25),
    Item(7, "continuous batching against waves, forced preemption", "sampling:continuous", 25),
    Item(8, "a DPO step: gradients against the CPU's; bf16; recompute modes", "training:dpo_step", 45),
    Item(9, "save and resume: the next step identical", "training:resume", 20),
    Item(10, "drift at 24 layers, bf16 and FP8 KV", "sampling:drift", 25),
    Item(11, "the quickstart, shortened, end to end", "training:short_quickstart", 60),
    Item(12, "kernel timings against the ceilings and peers", "kernels:timings", 60),
    Item(13, "1.4 B: decode at B = 1024, prefill, update, memory, launches", "scale:reference_model", 85),
)
