"""What models of the Python API can do about quantizing."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from builder_svc.build_config import Progress
from builder_svc.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from builder_svc.mapping import Mapping as RankMapping
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import BUNDLED, CalibConfig, QuantConfig, checked
from builder_svc.quantize.plan import Plan, make_plan
from builder_svc.quantize.run import LinearError, quantize
from builder_svc.read_config import read_config
from builder_svc.tokenizer import NormalizedTokenizer
from builder_svc.weights_view import WeightsView
from engine.errors import FailedPrecondition, InvalidArgument


class Quantizable:
    """The part of `CausalLM` that quantizes; the rest of it is what this calls."""

    if TYPE_CHECKING:
        config: PretrainedConfig
        checkpoint: object | None
        dummy: bool

        @classmethod
        def read(cls, config: PretrainedConfig) -> Self: ...
        def weights(self) -> WeightsView: ...
        def tokenizer(self) -> NormalizedTokenizer | None: ...

    @classmethod
    def quantize(
        cls,
        hf_model_dir: str | Path,
        output_dir: str | Path,
        dtype: str | torch.dtype = "auto",
        mapping: RankMapping | None = None,
        quant_config: QuantConfig | None = None,
        *,
        device: str = "auto",
        calib_dataset: str | Path = BUNDLED,
        calib_batches: int = CalibConfig.calib_batches,
        calib_batch_size: int = 1,
        calib_max_seq_length: int = CalibConfig.calib_max_seq_length,
        random_seed: int = CalibConfig.random_seed,
        tokenizer_max_seq_length: int | None = None,  # noqa: ARG003
        progress: Progress = lambda *_: None,
    ) -> None:
        """Quantizes a model and saves it: `from_checkpoint`, and a build, read what it writes.

        Args:
            hf_model_dir: a directory in Hugging Face layout, a GGUF file, or a repository of the hub (ORG/NAME).
            output_dir: made if it is not there.
            dtype: of what is not quantized; "auto" is the checkpoint's own.
            mapping: taken, without effect: the checkpoint is whole, and a build divides it (its tp_size and pp_size).
            quant_config: what to do.
            device, calib_dataset, calib_batches, calib_batch_size, calib_max_seq_length, random_seed: as in CalibConfig.
            tokenizer_max_seq_length: taken, without effect: text is never cut off.
            progress: told of phase "quantize", in layers.

        Raises:
            InvalidArgument: (a ValueError) a config that cannot be, does not fit the model, or asks for nothing; text that is too
                short.
            Unimplemented: (a NotImplementedError) an algorithm that is not made here.
            NotFound, DataLoss: as `from_hugging_face`.
            FailedPrecondition: weights that are quantized already, a directory that cannot be written.

        Example:
            >>> from enginehouse import LLaMAForCausalLM, QuantAlgo, QuantConfig, build
            >>> awq = QuantConfig(quant_algo=QuantAlgo.W4A16_AWQ)
            >>> LLaMAForCausalLM.quantize("examples/demo-model", "demo.awq", quant_config=awq, calib_batches=8)
            >>> build(LLaMAForCausalLM.from_checkpoint("demo.awq")).manifest.quantization["quant_algo"]
            'W4A16_AWQ'
        """
        if checked(quant_config) is None:
            raise InvalidArgument("quant_config asks for nothing: set its quant_algo or kv_cache_quant_algo")
        calib = CalibConfig(
            device, str(calib_dataset), calib_batches, calib_batch_size, calib_max_seq_length, random_seed
        )
        model = cls.read(read_config(hf_model_dir, dtype, mapping, quant_config, None, weights=True))
        model.write_quantized(model.plan(quant_config, calib), output_dir, progress)

    def plan(
        self,
        quant_config: QuantConfig,
        calib_config: CalibConfig | None = None,
        *,
        target: str = "",
        compute_capability: str | None = None,
        measures: bool = False,
    ) -> Plan:
        """What quantizing would do, checked as far as it can be before weights are read. Raises what `make_plan` does.

        And FailedPrecondition for weights that are quantized already.
        """
        if self.config.quantized or isinstance(self.checkpoint, QuantizedCheckpoint):
            raise FailedPrecondition(
                f"{self.config.source} is quantized already: build it as it is, or quantize the model that it was made of",
                reason="QUANTIZED_ALREADY",
            )
        return make_plan(
            self.config,
            quant_config,
            calib_config or CalibConfig(),
            None if self.dummy else self.tokenizer(),
            target=target,
            compute_capability=compute_capability,
            measures=measures,
            dummy=self.dummy,
        )

    def write_quantized(
        self, plan: Plan, output_dir: str | Path, progress: Progress = lambda *_: None
    ) -> list[LinearError]:
        """Saves the model quantized; what each linear has lost. Raises what `quantize` raises."""
        weights = self.weights()
        directory = Path(output_dir).expanduser()
        return quantize(self.config, weights.__getitem__, plan, self.tokenizer(), directory, progress)
