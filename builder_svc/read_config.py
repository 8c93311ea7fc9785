"""The config of what a person names: a directory, a GGUF file, or a repository of the hub."""

from pathlib import Path

import torch

from builder_svc import saved
from builder_svc.build_config import DTYPES
from builder_svc.checkpoint.sources import fetch_here
from builder_svc.mapping import Mapping as RankMapping
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import QuantConfig
from engine.errors import InvalidArgument


def read_config(
    hf_model_or_dir: str | Path,
    dtype: str | torch.dtype,
    mapping: RankMapping | None,
    quant_config: QuantConfig | None,
    revision: str | None,
    *,
    weights: bool,
) -> PretrainedConfig:
    """The config of a directory or repository; of the latter, all but the weights is downloaded, or all."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    directory, source = fetch_here(hf_model_or_dir, revision, weights=weights)
    if saved.is_saved(directory):
        PretrainedConfig.from_json_file(directory / "config.json")  # raises what is wrong with one of another program
        raise InvalidArgument(
            f"{directory} was written by save_checkpoint: read it with from_checkpoint", reason="CHECKPOINT_SAVED"
        )
    return PretrainedConfig.from_path(directory, dtype, mapping, source, quant_config)
