"""Which implementation runs where, and that references do without Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from emulated_cuda import emulated_cuda
from interpreter import DEVICE

from sip_engine.kernels import _impl
from sip_engine.kernels._impl import resolve_impl

CPU = torch.zeros(1, device="cpu")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from sip_engine.kernels.filtered_sample import filtered_sample
from sip_engine.kernels.rms_norm import rms_norm
from sip_engine.kernels.rotary import rotary
from sip_engine.kernels.sample import sample
from sip_engine.kernels.swiglu import swiglu

x, ids = torch.ones(2, 4), torch.arange(2)
table = torch.ones(2, 2)
assert (rms_norm(x, torch.ones(4), 0.0) == 1).all()
assert rotary(x[:, None], table, table, ids)[0, 0].tolist() == [0, 0, 2, 2]
assert swiglu(x).shape == (2, 2)
assert sample(x, torch.eye(4), ids, ids).token.shape == (2,)
assert (filtered_sample(x, ids, ids, top_k=1).token == 0).all()
try:
    swiglu(x, impl="triton")
except ValueError as error:
    print(error)
"""


def test_the_default_follows_the_device():
    assert resolve_impl(None, CPU) == "reference"
    assert resolve_impl(None, CPU.to("meta")) == "reference"
    if DEVICE == "cuda":
        assert resolve_impl(None, CPU.cuda()) == "triton"
        assert resolve_impl(None, CPU.cuda(), allowed=("reference",)) == "reference"


def test_kernels_are_interpreted_only_where_there_is_no_gpu():
    assert _impl.INTERPRETED is not torch.cuda.is_available()


def test_the_explicit_choice_is_kept():
    assert resolve_impl("reference", CPU) == "reference"
    assert resolve_impl("triton", CPU.to(DEVICE)) == "triton"
    assert resolve_impl("other", CPU, allowed=("reference", "other")) == "other"


def test_an_impossible_choice_is_named(monkeypatch):
    with pytest.raises(ValueError, match="impl='cutlass' is unknown here: use one of 'reference', 'triton'"):
        resolve_impl("cutlass", CPU)
    monkeypatch.setattr(_impl, "INTERPRETED", False)
    with pytest.raises(ValueError, match="tensor on cpu: move it to CUDA"):
        resolve_impl("triton", CPU)


def test_references_need_no_triton():
    command = [sys.executable, "-P", "-c", WITHOUT_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the triton package" in done.stdout


def test_a_setting_turns_every_kernel_off(monkeypatch):
    with emulated_cuda():
        x = torch.zeros(1, device="cuda")
        assert resolve_impl(None, x) == "triton"
        monkeypatch.setenv("SIP_KERNELS", "reference")
        assert resolve_impl(None, x) == "reference"
        assert resolve_impl("triton", x) == "triton"
