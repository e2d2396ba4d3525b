"""Who computes attention where that is free to choose: the table's nearest line, else the formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flash_twins import TWINS
from interpreter import DEVICE  # noqa: F401  (chooses the interpreter for the files that follow)

from sip_engine.kernels import _flash_attn, attention_choice
from sip_engine.kernels.attention_choice import COLUMNS, Shape, choose_decode, choose_packed, measured
from sip_engine.kernels.shared_prefix_attention import RowLayout


def packed(operation, prefix: int, suffixes: int, *, dim: int = 128, dtype=torch.bfloat16) -> str:
    layout = RowLayout((prefix,) * 4, ((128,) * suffixes,) * 4)
    q = torch.empty(layout.num_tokens, 16, dim, dtype=dtype, device="meta")
    return choose_packed(operation, q, 8, layout)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "attention.csv"
    monkeypatch.setattr(attention_choice, "TABLE", path)

    def write(*lines: str) -> None:
        path.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
        measured.cache_clear()

    yield write
    measured.cache_clear()


def test_without_flash_attn_everything_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: "missing")
    assert packed("training", 4096, 2) == packed("prefill", 4096, 0) == "triton"


def test_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 4 is faster by rate, and not where a launch or a copy costs more than that; line 2 hardly is."""
    monkeypatch.setattr(attention_choice, "flash_line", lambda: (4, None))
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: (4, TWINS[4]))
    assert packed("training", 4096, 2) == packed("prefill", 4096, 0) == "flash"
    assert packed("training", 64, 2) == "triton"
    assert packed("training", 4096, 2, dtype=torch.float32) == "triton"
    assert packed("training", 4096, 2, dim=256) == "triton", "line 4 has heads of up to 128"
    monkeypatch.setattr(attention_choice, "flash_line", lambda: (2, None))
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: (2, TWINS[2]))
    assert packed("training", 1024, 16) == "triton"
    assert packed("training", 64, 2, dim=256) == "flash", "ours have none so wide"
    assert (
        choose_decode(Shape("decode", 128, 1, 1, 1024))
        == choose_decode(Shape("decode", 128, 8, 16, 9))
        == "triton"
    )


def test_a_measured_line_goes_before_the_formula(table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "flash_line", lambda: (4, None))
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: (4, TWINS[4]))
    table(
        "training,128,2,2,4096,triton,H200 2027-01-01",
        "training,128,2,2,1024,flash,H200 2027-01-01",
        "decode,128,8,8,4000,triton_ungrouped,H200 2027-01-01",
    )
    assert packed("training", 4096, 2) == "triton"
    assert packed("training", 8192, 2) == "triton"
    assert packed("training", 8200, 2) == "flash", "beyond a factor of two the formula holds"
    assert packed("training", 1500, 2) == "flash", "the nearer of two"
    assert packed("prefill", 4096, 0) == "flash", "another operation"
    assert choose_decode(Shape("decode", 128, 8, 4, 4000)) == "triton_ungrouped"
    assert (
        choose_decode(Shape("decode", 64, 8, 8, 4000))
        == choose_decode(Shape("decode", 128, 8, 8, 999))
        == "triton"
    )


@pytest.mark.parametrize(
    "line", ("training,128,2,2,many,triton,x", "training,128,2,2,9,cudnn,x", "training,128")
)
def test_a_bad_line_is_named(table, line: str) -> None:
    table("training,128,2,2,4096,triton,x", line)
    with pytest.raises(ValueError, match=r"attention\.csv:3: a line is operation,head_dim"):
        measured()


def test_the_table_in_the_tree_can_be_used() -> None:
    measured.cache_clear()
    assert isinstance(measured(), tuple)
