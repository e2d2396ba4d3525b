"""`sip export`: a checkpoint in, a folder that transformers loads out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sip_engine.config.schema import ParallelConfig
from sip_engine.distributed.mesh import start_alone
from sip_engine.huggingface.families import config_json
from sip_engine.huggingface.shards import write_shards
from sip_engine.huggingface.staging import check_free, new_folder
from sip_engine.huggingface.tensors import tensor_shapes, tensor_views
from sip_engine.huggingface.tokenizer_files import tokenizer_files
from sip_engine.policy.checkpoint import (
    checkpoint_tokenizer,
    load_weights,
    read_state,
    resolve_checkpoint,
    stored_dtype,
)
from sip_engine.policy.model import build_model
from sip_engine.policy.weights import weight_views
from sip_engine.utils.errors import ConfigError
from sip_engine.utils.files import write_json

_MAX_SHARD_BYTES = 5 * 10**9


def export_model(checkpoint: Path, out: Path, *, max_shard_bytes: int = _MAX_SHARD_BYTES) -> Path:
    """Write a checkpoint's policy, or that of a run's newest one, as a transformers folder; one process.

    Weights keep the type they are stored in, and rows that pad the vocabulary stay behind, so that importing
    the folder gives the same bits. `AutoModelForCausalLM` and `AutoTokenizer` load it without network.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, no family has its parts, or `out` is taken;
            there is no `out` then. ConfigError: started on several processes.
    """
    path = resolve_checkpoint(checkpoint)
    state, tokenizer = read_state(path), checkpoint_tokenizer(path)
    dtype = stored_dtype(path)
    files = tokenizer_files(tokenizer)
    config = config_json(
        state.model,
        state.vocab_size,
        bos_id=tokenizer.named_bos_id,
        eos_id=tokenizer.named_eos_id,
        dtype=str(dtype).removeprefix("torch."),
    )
    check_free(out)
    mesh = start_alone()
    if mesh.size > 1:
        raise ConfigError(f"a model is exported by one process, not {mesh.size}: start it without torchrun")
    precision = "bf16" if dtype is torch.bfloat16 else "fp32"
    stored = state.model.model_copy(update={"precision": precision})
    model = build_model(stored, ParallelConfig(), state.vocab_size, mesh, seed=0)
    load_weights(path, model, stored, state.vocab_size)
    views = tensor_views(weight_views(model, state.vocab_size, 0), tied=stored.tie_embeddings)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in tensor_shapes(stored, state.vocab_size).items():
            yield name, views[name].reshape(shape).clone(memory_format=torch.contiguous_format).cpu()

    with new_folder(out) as folder:
        write_shards(folder, tensors(), max_shard_bytes)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        write_json(folder / "config.json", config)
    return out
