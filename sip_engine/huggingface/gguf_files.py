"""A GGUF file as a folder that `sip import` reads; transformers and gguf do the reading."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from sip_engine.huggingface.families import FAMILIES
from sip_engine.huggingface.staging import check_free, new_folder
from sip_engine.utils.errors import CheckpointError, ConfigError
from sip_engine.utils.regular import open_regular

_MAGIC = b"GGUF"


def unpack_gguf(file: Path, out: Path) -> Path:
    """Write the model of a GGUF file, its matrices as float32, and its tokenizer as a transformers folder `out`.

    Raises:
        CheckpointError: the file is missing, damaged or of an architecture that is not imported, or `out` is taken.
        ConfigError: the packages that read it are missing.
    """
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"a GGUF file needs {package}: pip install 'sip-engine[gguf]'")
    try:
        with open_regular(file) as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    if magic != _MAGIC:
        raise CheckpointError(f"{file}: not a GGUF file; give a model's .gguf, or its folder without --gguf")
    check_free(out)
    with new_folder(out) as folder:
        _convert(file, folder)
    return out


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the readers raise many types for a damaged file or an unknown architecture
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {reason}); copy it anew"
        ) from None
    name = type(model).__name__
    if name not in FAMILIES:
        raise CheckpointError(
            f"{file}: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    config = model.config
    if hasattr(config, "quantization_config"):  # the weights are no longer quantized
        delattr(config, "quantization_config")
    # Stored as float32: 9.999999747378752e-06 is 1e-05.
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
