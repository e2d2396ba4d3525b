"""`sip import`: a transformers folder in, a checkpoint that any layout can start from out."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from sip_engine.config.schema import ParallelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import start_mesh
from sip_engine.huggingface.families import SourceConfig, read_config
from sip_engine.huggingface.shards import Shards, open_shards
from sip_engine.huggingface.staging import check_free, new_folder
from sip_engine.huggingface.tensors import tensor_shapes, tensor_views
from sip_engine.huggingface.tokenizer_files import read_tokenizer
from sip_engine.policy.checkpoint import FORMAT, _quiet_megatron, _write_manifest
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import weight_views
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import write_json


def import_model(folder: Path, out: Path) -> Path:
    """Make a checkpoint `out` of a Llama, Qwen2 or Qwen3 folder with safetensors; one process.

    The checkpoint holds weights and tokenizer, no optimizer: start a run from it with `init`, or give it to
    `sip generate` and `sip score`. Weights keep bfloat16 where all have it; float16 becomes float32.

    Raises:
        CheckpointError: something in `folder` is missing, damaged or not supported, or `out` is taken; there
            is no `out` then. ConfigError: started on several processes.
    """
    source = read_config(folder)
    shards = open_shards(folder, tensor_shapes(source.model, source.vocab_size))
    tokenizer = read_tokenizer(folder, source)
    check_free(out)
    mesh = start_mesh()
    if mesh.size > 1:
        raise ConfigError(f"a model is imported by one process, not {mesh.size}: start it without torchrun")
    stored = source.model.model_copy(update={"precision": shards.precision})
    model = build_model(stored, ParallelConfig(), source.vocab_size, mesh, seed=0)
    _fill(model, source, shards)
    with new_folder(out) as temporary:
        _write_checkpoint(temporary, model, source, tokenizer)
    return out


@torch.no_grad()
def _fill(model: PolicyModel, source: SourceConfig, shards: Shards) -> None:
    views = tensor_views(weight_views(model, source.vocab_size, 0), tied=source.model.tie_embeddings)
    for name, tensor in shards.tensors():
        views[name].copy_(tensor.view(views[name].shape))


def _write_checkpoint(folder: Path, model: PolicyModel, source: SourceConfig, tokenizer: Tokenizer) -> None:
    """The files of `sip_engine.policy.checkpoint`, of which only the policy's weights are sharded tensors."""
    (folder / "sharded").mkdir()
    with megatron_device(), _quiet_megatron():
        weights = model.sharded_state_dict(prefix="model.")
        dist_checkpointing.save({"model": weights}, str(folder / "sharded"))
    tokenizer.save(folder / "tokenizer.model")
    state = {
        "format": FORMAT,
        "step": 0,
        "model": source.model.model_dump(),
        "vocab_size": source.vocab_size,
        "has_reference": False,
        "distributed_optimizer": False,
        "run": {},
    }
    write_json(folder / "state.json", state)
    _write_manifest(folder)
