"""The models of the Python API: a configuration, and where its weights come from. Weights are read when they are needed.

There is a class for each `CLASS_NAME` of the families' pages (`model_classes`); `auto.py` finds the right one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from builder_svc import saved
from builder_svc.build_config import Progress
from builder_svc.checkpoint import reader
from builder_svc.checkpoint.digests import file_digests
from builder_svc.checkpoint.quantized import find_method, open_quantized
from builder_svc.checkpoint.quantized.checkpoint import QuantizedCheckpoint
from builder_svc.checkpoint.quantized.resolve import Resolved, kv_scales, on_device, planned, resolve
from builder_svc.mapping import Mapping as RankMapping
from builder_svc.models.decoder import Decoder
from builder_svc.models.families import families
from builder_svc.models.sources import Source
from builder_svc.pretrained import PretrainedConfig
from builder_svc.quant_config import QuantConfig
from builder_svc.quantizable import Quantizable
from builder_svc.read_config import read_config
from builder_svc.saved import GivenWeights, SavedCheckpoint
from builder_svc.shard import cuts
from builder_svc.tokenizer import NormalizedTokenizer, has_tokenizer, normalize
from builder_svc.weights import check_weights
from builder_svc.weights_view import WeightsView
from engine.errors import FailedPrecondition, Internal, InvalidArgument, NotFound
from engine.program import TensorType

Published = reader.Checkpoint | QuantizedCheckpoint
Checkpoint = Published | SavedCheckpoint | GivenWeights

DUMMY_SEED = 0
"""Of the random weights that executors make."""


class CausalLM(Quantizable):
    """A language model: a configuration and its weights. Called with a configuration alone, it has dummy weights.

    Dummy weights are in no file: each executor makes random ones when it loads an engine. They are for tests of a workflow
    and for measurements, and are there without the time that it takes to read real ones.

    Attributes:
        config: what the model is.
        checkpoint: where its weights are read from; None for dummy weights.

    Example:
        >>> from enginehouse import LLaMAForCausalLM
        >>> model = LLaMAForCausalLM.from_hugging_face("examples/demo-model", dtype="bfloat16")
        >>> model.save_checkpoint("demo.ckpt")
        >>> LLaMAForCausalLM.from_checkpoint("demo.ckpt").config.dtype
        'bfloat16'
    """

    CLASS_NAME: ClassVar[str] = "CausalLM"

    def __init__(self, config: PretrainedConfig) -> None:
        """Raises InvalidArgument (a ValueError) for the configuration of another class, which it names."""
        if config.family.CLASS_NAME != self.CLASS_NAME:
            raise InvalidArgument(
                f"{config.source}: {config.architecture} is a model of {config.family.CLASS_NAME}, not of {self.CLASS_NAME}: "
                f"use enginehouse.{config.family.CLASS_NAME}",
                reason="MODEL_CLASS_MISMATCH",
            )
        self.config = config
        self.checkpoint: Checkpoint | None = None

    @classmethod
    def from_hugging_face(
        cls,
        hf_model_or_dir: str | Path,
        dtype: str | torch.dtype = "auto",
        mapping: RankMapping | None = None,
        quant_config: QuantConfig | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,  # noqa: ARG003
    ) -> Self:
        """The model of a checkpoint in Hugging Face layout. Of its weights only names and shapes are read now.

        Args:
            hf_model_or_dir: a directory, or a repository of the hub (ORG/NAME), which is downloaded.
            dtype: of the engine's weights and activations; "auto" is the checkpoint's own, and float32 in engines for the CPU.
            mapping: the ranks; by default one.
            quant_config: how a build, or `save_checkpoint`, is to quantize it, with the bundled text.
            revision: branch, tag or commit of the repository.
            trust_remote_code: taken for scripts that give it; no code of a checkpoint is run in any case.

        Raises:
            NotFound: no such directory or repository, or no weights in it.
            InvalidArgument: (a ValueError) a model of another class, or a config that does not hold together.
            Unimplemented: (a NotImplementedError) an architecture that is not supported.
            DataLoss: damaged weights.
        """
        return cls.read(read_config(hf_model_or_dir, dtype, mapping, quant_config, revision, weights=True))

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str | Path, rank: int = 0, config: PretrainedConfig | None = None) -> Self:
        """What `save_checkpoint` has written, for one rank or all of them.

        Args:
            rank: which one of the mapping's this is. `weights` are those of the whole model all the same, so that an engine for
                all ranks can be built of it.
            config: to use instead of the saved one, whose weights must have the same names and shapes. With another mapping the
                model is divided anew.

        Raises:
            NotFound, InvalidArgument, Unimplemented, DataLoss: as `from_hugging_face`.
        """
        path = Path(ckpt_dir).expanduser()
        if not path.is_dir():
            raise NotFound(
                f"{path} is no directory; give one that save_checkpoint wrote", reason="CHECKPOINT_NOT_FOUND"
            )
        checkpoint = SavedCheckpoint(path)
        chosen = config or checkpoint.pretrained
        model = cls(replace(chosen, mapping=replace(chosen.mapping, rank=rank)))
        model.checkpoint = checkpoint
        return model

    @classmethod
    def read(cls, config: PretrainedConfig) -> Self:
        """With the weights of the config's directory, which is in Hugging Face layout."""
        model = cls(config)
        if config.path is None:
            raise Internal(f"{config.source}: a config without a directory has no weights")
        model.checkpoint = open_quantized(reader.open_checkpoint(config.path, config.gguf))
        if config.auto_dtype:  # where the config declares none, its tensors tell
            model.config = replace(config, dtype=model.checkpoint.dtype())
        return model

    def save_checkpoint(self, output_dir: str | Path, save_config: bool = True) -> None:
        """Writes the model: config.json, rank0.safetensors (by our names, in the config's dtype), the tokenizer.

        With a mapping of several ranks it writes its own rank's part, rank1.safetensors for example, so that a loop over the
        ranks, from 0, writes them all; rank 0 removes those that were there. A build takes the directory like one in Hugging
        Face layout. One that was not written to its end is not taken.

        Args:
            output_dir: made if it is not there.
            save_config: without, the weights alone, and rank 0's tokenizer.

        Raises:
            FailedPrecondition: dummy weights, a directory that holds another checkpoint or cannot be written.
            ResourceExhausted: the disk is full.
            InvalidArgument: weights that are missing or of another shape than the config implies, a mapping that does not divide
                the model, or the directory that other ranks are still to be read from.
        """
        if self.config.quant_config and save_config:
            self.write_quantized(self.plan(self.config.quant_config), output_dir)
            return
        directory, config, weights = Path(output_dir).expanduser(), self.config, self.weights()
        mapping, read_from = config.mapping, weights.path
        if mapping.world_size > 1 and isinstance(read_from, Path) and directory.resolve() == read_from.resolve():
            raise InvalidArgument(
                f"{directory} is where the weights of all ranks are read from: save to another directory",
                reason="OUTPUT_OCCUPIED",
            )
        packed = config.quantized.packed if config.quantized else {}
        declared = Decoder.on_meta(config.decoder, config.checked_dtype, packed, mapping=mapping).declared()
        own = cuts(config.decoder, mapping, packed)

        def parts(name: str) -> Iterable[torch.Tensor]:
            whole = weights.parts(name)
            return own[name].taken(whole, tuple(map(int, declared[name].shape))) if name in own else whole

        saved.save(directory, config, declared, parts, self.tokenizer(), save_config)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes these weights instead of those that it has; they are kept, not copied.

        Args:
            weights: a tensor for each name of `declared`, of its shape; the dtype is the build's.

        Raises:
            InvalidArgument: (a ValueError) names that are missing or unknown, or another shape; the message names them.
        """
        given = GivenWeights(weights)
        check_weights(given, self._own_names(), self.declared())
        self.checkpoint = given

    def weights(self) -> WeightsView:
        """Our weight name -> tensor, of the whole model whatever the mapping; each is read when it is asked for.

        Raises:
            FailedPrecondition: dummy weights.
            InvalidArgument: the checkpoint has not the weights that its config implies.
        """
        if self.checkpoint is None:
            raise FailedPrecondition(
                f"{self.config.source}: dummy weights are made by executors, there are none here: from_hugging_face and "
                "from_checkpoint read real ones",
                reason="DUMMY_WEIGHTS",
            )
        return WeightsView(self.checkpoint, self.sources(), self.declared())

    def declared(self) -> dict[str, TensorType]:
        """Our weight name -> dtype and shape, in the config's dtype, of all that a checkpoint holds."""
        return self._decoder(self.config.checked_dtype).declared()

    def _decoder(self, dtype: str) -> Decoder:
        quantized = self.config.quantized
        return Decoder.on_meta(self.config.decoder, dtype, quantized.packed if quantized else {})

    @property
    def dummy(self) -> bool:
        """Whether its weights are in no file."""
        return self.checkpoint is None

    def _own_names(self) -> dict[str, Source]:
        return {name: Source((name,)) for name in self._decoder("float32").declared()}

    def sources(self) -> dict[str, Source]:
        """Our weight name -> the checkpoint's tensors that form it. Not for dummy weights."""
        if isinstance(self.checkpoint, Published):
            return self.config.family.NAMES.sources(self.config.decoder, self.checkpoint.shapes)
        return self._own_names()

    def resolve(self, device: str) -> Resolved:
        """What a build for a kind of device takes of the checkpoint: its weights as they are packed or dequantized."""
        if quantized := self.config.quantized:
            packed = {name: on_device(device, form) for name, form in quantized.packed.items()}
            taken = Decoder.on_meta(self.config.decoder, "float32", packed).declared() if self.checkpoint else ()
            sources = {name: Source((name,)) for name in taken}
            return Resolved(self.checkpoint, sources, packed, facts=dict(quantized.facts))
        if self.checkpoint:
            return resolve(self.checkpoint, self.sources(), device)
        config, names = self.config, self.config.family.NAMES
        method = find_method(config.fields, config.path) if config.path else None
        if method is None:
            return Resolved(None, {})
        columns = Decoder.on_meta(config.decoder, "float32").linears()
        return planned(method, names.sources(config.decoder, (names.prefix,)), columns, config.dtype, device)

    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """Of keys and of values, for each layer, in a KV cache of 8 bits."""
        if self.config.quantized and self.config.quantized.kv_scales:
            return self.config.quantized.kv_scales
        sources = self.sources() if self.checkpoint else {}
        return kv_scales(self.checkpoint, sources, len(self.config.decoder.layers))

    def tokenizer(self) -> NormalizedTokenizer | None:
        """The tokenizer; None where dummy or given weights come without one.

        Raises:
            FailedPrecondition: a checkpoint without one that can be read.
            InvalidArgument: one that is damaged or another model's.
        """
        path, gguf = self.config.path, self.config.gguf
        if path is None:
            return None
        directory = path if path.is_dir() else path.parent
        needed = isinstance(self.checkpoint, Published | SavedCheckpoint) or gguf is not None
        if not (needed or has_tokenizer(directory)):
            return None
        return normalize(directory, self.config.vocab_size, gguf)

    def digests(self, progress: Progress = lambda *_: None) -> dict[str, str]:
        """What decides an engine beside its options: SHA-256, hexadecimal, by file or weight name."""
        checkpoint, config = self.checkpoint, self.config
        found: dict[str, str] = {}
        if isinstance(checkpoint, Published | SavedCheckpoint):
            found = file_digests(checkpoint.files(), lambda done, total: progress("checkpoint", done, total, "bytes"))
            if (checkpoint.config.values, checkpoint.generation_config) == (
                config.hugging_face,
                config.generation_config,
            ):
                return found
        elif checkpoint is not None:
            found = checkpoint.digests()
        values = {"config.json": config.hugging_face, "generation_config.json": config.generation_config}
        return found | {name: _digest(value) for name, value in values.items()}


@cache
def _model_class(name: str) -> type[CausalLM]:
    doc = f"{CausalLM.__doc__}\n\n    Reads the architectures of enginehouse's {name}."
    return type(name, (CausalLM,), {"CLASS_NAME": name, "__module__": "enginehouse", "__doc__": doc})


def model_classes() -> dict[str, type[CausalLM]]:
    """Name -> class, for all pages that there are; such as "LLaMAForCausalLM"."""
    return {name: _model_class(name) for name in sorted({page.CLASS_NAME for page in families().values()})}


def class_of(config: PretrainedConfig) -> type[CausalLM]:
    """The class that reads a configuration."""
    return _model_class(config.family.CLASS_NAME)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
