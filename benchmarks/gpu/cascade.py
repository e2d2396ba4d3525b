"""FlashInfer's multi-level cascade as decode attention of groups: level 0 reads prefixes, level 1 suffixes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import Beside, Tensors, why_missing
from sip_engine.kernels.kv_layout import page_shape

WORKSPACE_BYTES = 128 * 2**20
"""What its documentation recommends."""


def plan_arguments(inputs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """For `MultiLevelCascadeAttentionWrapper.plan`, from the keyword arguments of `decode_attention`."""
    q, starts = inputs["q"], inputs["group_starts"]
    shape = inputs["k_pages"].shape
    page, kv_heads = (shape[page_shape(-1, 0, 1, 2).index(i)] for i in (0, 1))
    own = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    levels = [_pages(inputs[f"{part}_tables"], inputs[f"{part}_lens"], page) for part in ("prefix", "suffix")]
    arrays = [[starts, own], *(list(level) for level in zip(*levels, strict=True))]
    sizes = [q.shape[1], kv_heads, q.shape[2], page]
    return [*arrays, *sizes], {
        "causal": False,  # one query a sequence sees all of it
        "q_data_type": q.dtype,
        "kv_data_type": inputs["k_pages"].dtype,
    }


def _pages(tables: Tensor, lens: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's pages begin [rows + 1], all pages in a row, and how full the last of each is [rows]: int32."""
    counts = (lens + page - 1) // page
    begins = torch.zeros(len(lens) + 1, dtype=torch.int32, device=lens.device)
    begins[1:] = counts.cumsum(0)
    used = torch.arange(tables.shape[1], device=lens.device)[None] < counts[:, None]
    return begins, tables[used], lens - (counts - 1) * page


def _prepare(inputs: dict[str, Any]) -> Callable[[], Tensors]:
    import flashinfer  # pyright: ignore[reportMissingImports]

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    layout = "NHD" if page_shape(0, 1, 2, 3)[1] == 1 else "HND"
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, layout)
    arrays, options = plan_arguments(inputs)
    wrapper.plan(*arrays, **options)  # once for all layers of a step, so that it is not timed
    return lambda: (wrapper.run(inputs["q"], (inputs["k_pages"], inputs["v_pages"])),)


CASCADE = Beside(_prepare, partial(why_missing, "FlashInfer"))
