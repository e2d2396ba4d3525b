"""`sip import`: a transformers folder in, a checkpoint that any layout can start from out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from sip_engine.config.schema import ParallelConfig
from sip_engine.data.tokenizer import Tokenizer
from sip_engine.distributed.megatron_cpu import megatron_device
from sip_engine.distributed.mesh import start_alone
from sip_engine.huggingface.families import SourceConfig, read_config
from sip_engine.huggingface.shards import Shards, has_own_head, open_shards
from sip_engine.huggingface.staging import check_free, new_folder
from sip_engine.huggingface.tensors import own_tensors, stored_shapes, tensor_shapes, tensor_views
from sip_engine.huggingface.tokenizer_files import conventions, read_tokenizer
from sip_engine.policy.checkpoint import CheckpointState, sharded_model
from sip_engine.policy.checkpoint_files import write_manifest
from sip_engine.policy.checkpoint_state import write_state
from sip_engine.policy.checkpoint_tensors import TensorSave
from sip_engine.policy.model import PolicyModel, build_model
from sip_engine.policy.weights import weight_views
from sip_engine.utils.errors import CheckpointError, ConfigError
from sip_engine.utils.progress import console

Precision = Literal["auto", "fp32", "bf16"]


def import_model(folder: Path, out: Path, precision: Precision = "auto") -> Path:
    """Make a checkpoint `out` of a folder of a supported family (`families`) with safetensors; one process.

    What was found is said, and a line for each convention that is not as in transformers.

    The checkpoint holds weights and tokenizer, no optimizer: start a run from it with `init`, or give it to
    `sip generate` and `sip score`. Weights keep bfloat16 where all have it; float16 becomes float32.

    precision: what whoever loads it computes in, unless told otherwise.

    Raises:
        CheckpointError: something in `folder` is missing, damaged or not supported, or `out` is taken; there
            is no `out` then. ConfigError: started on several processes.
    """
    source = read_config(folder)
    if source.model.tie_embeddings and has_own_head(folder):
        untied = source.model.model_copy(update={"tie_embeddings": False})
        note = "tie_word_embeddings is set, but the files hold another head: it is kept, untied"
        source = replace(source, model=untied, notes=(*source.notes, note))
    shards = open_shards(
        folder,
        stored_shapes(
            source.model, source.vocab_size, fused=source.family.fused, output_bias=source.output_bias
        ),
    )
    tokenizer = read_tokenizer(folder, source)
    check_free(out)
    mesh = start_alone()
    if mesh.size > 1:
        raise ConfigError(f"a model is imported by one process, not {mesh.size}: start it without torchrun")
    kept = "fp32" if source.scales else shards.precision
    stored = source.model.model_copy(update={"precision": kept})
    model = build_model(stored, ParallelConfig(), source.vocab_size, mesh, seed=0)
    _fill(model, source, shards)
    with new_folder(out) as temporary:
        _write_checkpoint(temporary, model, source, tokenizer, precision)
    for line in (_summary(source, kept), *source.notes, *conventions(tokenizer, folder)):
        console.print(line, soft_wrap=True, markup=False)
    return out


def _summary(source: SourceConfig, precision: str) -> str:
    """What was found, in one line."""
    model = source.model
    parts = [
        f"{model.num_layers} layers of {model.hidden_size:,}",
        f"{model.num_heads} heads and {model.num_kv_heads} key/value heads of {model.kv_channels}",
        f"vocabulary {source.vocab_size:,}",
        f"context {model.max_context:,}",
        "tied" if model.tie_embeddings else "own head",
        *(["biases of queries, keys and values"] if model.qkv_bias else []),
        *(["norms of queries and keys"] if model.qk_norm else []),
        *([f"{model.rope_scaling} rope x {model.rope_factor:g}"] if model.rope_factor > 1 else []),
        precision,
    ]
    return f"{source.family.model_type}: {', '.join(parts)}"


@torch.no_grad()
def _fill(model: PolicyModel, source: SourceConfig, shards: Shards) -> None:
    views = tensor_views(weight_views(model, source.vocab_size, 0), tied=source.model.tie_embeddings)
    shapes = tensor_shapes(source.model, source.vocab_size)
    for name, tensor in own_tensors(shards.tensors(), shapes, source.scales):
        if name in views:
            views[name].copy_(tensor.reshape(views[name].shape))
        elif tensor.any():
            raise CheckpointError(f"{name} is not 0: the policy's attention has no bias of its output")


def _write_checkpoint(
    folder: Path, model: PolicyModel, source: SourceConfig, tokenizer: Tokenizer, precision: Precision
) -> None:
    """The files of `sip_engine.policy.checkpoint`, of which only the policy's weights are sharded tensors."""
    (folder / "sharded").mkdir()
    with megatron_device():
        weights = sharded_model(model, "model.")
    save = TensorSave({"model": weights}, folder / "sharded", None)
    save.write()
    save.finish()
    tokenizer.save(folder / "tokenizer.model")
    described = source.model.model_copy(update={"precision": precision})
    write_state(folder, CheckpointState(0, described, source.vocab_size, {}))
    write_manifest(folder)
