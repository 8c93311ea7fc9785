"""A model of a kind that one need not know: its configuration and its class are found by its config.json."""

from pathlib import Path

import torch

from builder_svc import saved
from builder_svc.causal_lm import CausalLM, class_of
from builder_svc.mapping import Mapping
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import QuantConfig
from builder_svc.read_config import read_config
from engine.artifact import is_engine_dir
from engine.errors import InvalidArgument


class AutoConfig:
    """Finds the configuration of a model whose kind one need not know.

    Example:
        >>> from enginehouse import AutoConfig
        >>> AutoConfig.from_hugging_face("examples/demo-model").architecture
        'LlamaForCausalLM'
    """

    @staticmethod
    def from_hugging_face(
        hf_model_or_dir: str | Path,
        dtype: str | torch.dtype = "auto",
        mapping: Mapping | None = None,
        quant_config: QuantConfig | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,  # noqa: ARG004
    ) -> PretrainedConfig:
        """The configuration of a model in Hugging Face layout; its weights are neither read nor downloaded.

        Args:
            hf_model_or_dir: a directory with config.json, or a repository of the hub (ORG/NAME).
            dtype: "auto" is the one that config.json declares, and float32 in engines for the CPU.
            mapping: the ranks; by default one.
            quant_config: how a build is to quantize the model.
            revision: branch, tag or commit of the repository.
            trust_remote_code: taken for scripts that give it; no code of a checkpoint is run in any case.

        Raises:
            NotFound: no such directory or repository, or no config.json in it.
            InvalidArgument: (a ValueError) a config that does not hold together.
            Unimplemented: (a NotImplementedError) an architecture that is not supported; the message lists those that are.
        """
        return read_config(hf_model_or_dir, dtype, mapping, quant_config, revision, weights=False)


class AutoModelForCausalLM:
    """Finds the class of a model whose kind one need not know.

    Example:
        >>> from enginehouse import AutoConfig, AutoModelForCausalLM, LLaMAForCausalLM
        >>> isinstance(AutoModelForCausalLM.from_hugging_face("examples/demo-model"), LLaMAForCausalLM)
        True
        >>> config = AutoConfig.from_hugging_face("examples/demo-model", dtype="float16")
        >>> AutoModelForCausalLM.get_trtllm_model_class("examples/demo-model")(config).dummy
        True
    """

    @staticmethod
    def from_hugging_face(
        hf_model_or_dir: str | Path,
        dtype: str | torch.dtype = "auto",
        mapping: Mapping | None = None,
        quant_config: QuantConfig | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,  # noqa: ARG004
    ) -> CausalLM:
        """The model of a checkpoint in Hugging Face layout: `from_hugging_face` of its class, with its arguments and errors."""
        config = read_config(hf_model_or_dir, dtype, mapping, quant_config, revision, weights=True)
        return class_of(config).read(config)

    @staticmethod
    def from_checkpoint(ckpt_dir: str | Path, rank: int = 0, config: PretrainedConfig | None = None) -> CausalLM:
        """What `save_checkpoint` has written: `from_checkpoint` of its class, with its arguments and errors."""
        path = Path(ckpt_dir).expanduser()
        found = config or PretrainedConfig.from_json_file(path / "config.json")
        return class_of(found).from_checkpoint(path, rank, config)

    @staticmethod
    def get_trtllm_model_class(hf_model_or_dir: str | Path, *, revision: str | None = None) -> type[CausalLM]:
        """The class of a model; called with a configuration it makes one with dummy weights. Raises what `AutoConfig` raises."""
        return class_of(AutoConfig.from_hugging_face(hf_model_or_dir, revision=revision))


def open_model(path: Path, dummy_weights: bool = False) -> CausalLM:
    """The model of a directory, whichever kind of checkpoint it holds; with dummy weights, its config alone is read.

    Raises:
        NotFound, InvalidArgument, Unimplemented, DataLoss: as `CausalLM.from_hugging_face` and `from_checkpoint`.
    """
    if is_engine_dir(path):
        raise InvalidArgument(
            f"{path} is an engine already: load it with LLM, or put it into a store with Engine.from_dir({str(path)!r})"
            ".push(STORE, NAME)",
            reason="CHECKPOINT_IS_ENGINE",
        )
    if saved.is_saved(path):
        if not dummy_weights:
            return AutoModelForCausalLM.from_checkpoint(path)
        config = PretrainedConfig.from_json_file(path / "config.json")
        return class_of(config)(config)
    config = PretrainedConfig.from_path(path)
    return class_of(config)(config) if dummy_weights else class_of(config).read(config)
