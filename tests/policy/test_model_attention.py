"""`model.attention` reaches the trainer and the sampler, and is refused in one line where it cannot run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated_cuda import emulated_cuda
from flash_twins import TWINS

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig, SamplerConfig
from sip_engine.distributed.mesh import Mesh, start_mesh
from sip_engine.kernels import _flash_attn, _shared_prefix_flash
from sip_engine.policy import precision
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.packing import pack_rows
from sip_engine.policy.policy import score
from sip_engine.policy.precision import check_precision
from sip_engine.policy.rows import Row
from sip_engine.policy.weights import weight_views
from sip_engine.sampler.requests import Request, SamplingParams
from sip_engine.sampler.sampler import Sampler
from sip_engine.utils.errors import ConfigError

VOCAB = 90
SIZES = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "max_context": 96,
}
PREFIX, SUFFIX = np.arange(9, dtype=np.int32), np.arange(5, dtype=np.int32)


def built(mesh: Mesh, **settings) -> PolicyModel:
    model = ModelConfig.model_validate(SIZES | {"precision": "fp32", "init_std": 0.2} | settings)
    return build_model(model, ParallelConfig(), VOCAB, mesh, seed=1)


def log_probs(mesh: Mesh, **settings) -> torch.Tensor:
    rows = [Row(PREFIX, (SUFFIX, SUFFIX[::-1].copy())), Row(SUFFIX, (PREFIX,))]
    (found,) = score(built(mesh, **settings), [pack_rows(rows, mesh.device)])
    return found.cpu()


def drawn(mesh: Mesh, prefill_tokens: int = 16384, **settings) -> list[list[int]]:
    views = weight_views(built(mesh, **settings), VOCAB, 0)
    sampler = Sampler(views, mesh, SamplerConfig(kv_memory_mb=1, page_size=4, prefill_tokens=prefill_tokens))
    done = sampler.generate([Request(PREFIX, 2), Request(SUFFIX, 2)], SamplingParams(3, seed=5))
    return [c.ids.tolist() for group in done for c in group]


@pytest.mark.parametrize("line", (2, 4))
def test_flash_attn_trains_and_reads_prefixes(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, line: int) -> None:
    want, tokens = log_probs(mesh), drawn(mesh)
    calls = []
    name = "_flash_attn_fwd" if line == 4 else "_flash_attn_varlen_forward"
    twin = getattr(TWINS[line], name)
    monkeypatch.setattr(TWINS[line], name, lambda *a, **k: calls.append(len(a[0])) or twin(*a, **k))
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: (line, TWINS[line]))
    for module in (
        _shared_prefix_flash,
        precision,
    ):  # the twins take float32, whose values the interpreter has right
        monkeypatch.setattr(module, "why_not", lambda *_: "")
    with emulated_cuda():
        device = start_mesh()
        torch.testing.assert_close(log_probs(device, attention="flash"), want, atol=2e-5, rtol=0)
        assert calls == [33, 19], "all tokens on their own segments, suffixes on their prefixes"
        calls.clear()
        assert drawn(device, attention="flash") == tokens
        assert calls == [14], "one pass over both prefixes"
        calls.clear()
        assert drawn(device, prefill_tokens=5, attention="flash") == tokens
        assert calls == [5, 5], "a later part of a prefix reads what is stored of it"
        calls.clear()
        assert drawn(device) == tokens
        assert not calls, "by itself it is not chosen for float32"


def test_plain_torch_on_the_device(mesh: Mesh) -> None:
    want = drawn(mesh, attention="reference")
    with emulated_cuda() as cuda:
        assert drawn(start_mesh(), attention="reference") == want
        assert cuda.counts["replay"] == 0


def test_what_cannot_run_is_one_line(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**settings) -> str:
        with pytest.raises(ConfigError) as error:
            check_precision(ModelConfig.model_validate(SIZES | settings), ParallelConfig())
        assert "\n" not in str(error.value)
        return str(error.value)

    assert (
        refused(attention="flash")
        == 'model.attention="flash" needs a CUDA device: set model.attention="auto"'
    )
    assert "needs a CUDA device" in refused(attention="triton")
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: "flash-attn cannot be imported: install it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cannot be imported: install it" in refused(attention="flash")
    assert "at most 128 on CUDA" in refused(head_dim=256)
    check_precision(
        ModelConfig.model_validate(SIZES | {"head_dim": 256, "attention": "reference"}), ParallelConfig()
    )
    monkeypatch.setattr(_flash_attn, "find_flash", lambda: (2, TWINS[2]))
    check_precision(
        ModelConfig.model_validate(SIZES | {"head_dim": 256, "precision": "bf16"}), ParallelConfig()
    )
    assert "head dim 6" in refused(head_dim=6, attention="flash")
    monkeypatch.setenv("SIP_KERNELS", "reference")
    assert "exclude each other" in refused(attention="triton")
