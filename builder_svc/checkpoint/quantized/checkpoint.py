"""A checkpoint some of whose linear layers are quantized, with the face of one that is not."""

import copy
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from builder_svc.checkpoint.huggingface import declared_dtype
from builder_svc.checkpoint.quantized.layers import FLOATS, NUMBER, Expected, Floats, Layer, Read, Scheme
from builder_svc.checkpoint.quantized.method import Method
from builder_svc.checkpoint.reader import Checkpoint
from builder_svc.models.packed import Packed
from engine.errors import InvalidArgument

# Of activations and of KV caches, read where an engine quantizes these, too.
_OTHER_SCALES = (
    "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    "q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale",
)  # fmt: skip

log = logging.getLogger(__name__)


class QuantizedCheckpoint:
    """A quantized layer M has one tensor M.weight, dequantized as it is read; once it is packed, those of its packed form.

    Attributes:
        path, config, generation_config: the checkpoint's.
        method: what its config says of quantization.
        layers: the quantized modules by name.
        shapes: tensor name -> shape, of what can be read.

    Raises:
        InvalidArgument: a layer is quantized that should not be, or lacks its main tensor.
    """

    def __init__(self, checkpoint: Checkpoint, method: Method) -> None:
        self._checkpoint, self.method = checkpoint, method
        self.path, self.config, self.generation_config = (
            checkpoint.path,
            checkpoint.config,
            checkpoint.generation_config,
        )
        self.layers = {
            name.rpartition(".")[0]: scheme
            for name in checkpoint.shapes
            if name.rpartition(".")[2] in method.markers and (scheme := self._scheme(name))
        }
        self._sizes = {module: self._size(module, scheme) for module, scheme in self.layers.items()}
        hidden = {f"{module}.{tensor}" for module, scheme in self.layers.items() for tensor in scheme.tensors(1, 1)}
        ignored = {name for name in checkpoint.shapes if name.rpartition(".")[2] in _OTHER_SCALES}
        if ignored:
            log.info("%d scales of activations or KV caches: %s, ...", len(ignored), min(ignored))
        self._plain = {name: shape for name, shape in checkpoint.shapes.items() if name not in hidden | ignored}
        self._packed: dict[str, tuple[str, str]] = {}  # a tensor of a packed form -> its layer and what it is
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **self._plain,
            **{f"{module}.weight": size for module, size in self._sizes.items()},
        }

    def packed(self, forms: Mapping[str, Packed], used: Collection[str]) -> "QuantizedCheckpoint":
        """The same with the tensors of packed forms in the place of these layers' weights.

        Args:
            used: names of what the decoder takes. Biases of zeros, which some writers give every quantized layer, are left out.
        """
        other = copy.copy(self)
        biases = {f"{module}.bias" for module in self.layers} & self._plain.keys() - set(used)
        gone = {name for name in biases if not self.read(name).any()} | {f"{module}.weight" for module in forms}
        shapes = {name: shape for name, shape in self.shapes.items() if name not in gone}
        other._packed = {f"{module}.{name}": (module, name) for module, form in forms.items() for name in form.inputs}
        for module, form in forms.items():
            made = form.tensors(*self._sizes[module])
            shapes |= {f"{module}.{name}": shape for name, (_, shape) in made.items()}
        other.shapes = shapes
        return other

    def files(self) -> list[Path]:
        """What decides an engine that is made of this checkpoint, tokenizer apart."""
        return [*self._checkpoint.files(), *(self.path / name for name in self.method.files)]

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized to float32 where its layer is quantized and not packed. Raises KeyError for an unknown name."""
        if name in self._packed:
            module, part = self._packed[name]
            return self.layers[module].part(part, self._layer(module))
        module = name.removesuffix(".weight")
        if module in self.layers and name not in self._plain:
            return self.layers[module].dense(self._layer(module))
        return self._checkpoint.read(name)

    def dtype(self) -> str:
        """The dtype that the config declares, else that of the first scales or other tensor in floating point."""
        if declared := declared_dtype(self.config.values):
            return declared
        return next((found for found in map(self._dtype, self._plain) if found in FLOATS), "bfloat16")

    def scales_dtype(self, module: str) -> str:
        """Of a quantized layer."""
        scheme, name = self.layers[module], f"{module}.{self.layers[module].scale}"
        if name not in self._checkpoint.shapes:
            raise self._missing(name, scheme.tensors(*self._sizes[module])[scheme.scale])
        return self._dtype(name)

    def kv_scale(self, names: Sequence[str]) -> float | None:
        """The first of these tensors that is there, one number. Raises InvalidArgument for what is no scale."""
        name = next((name for name in names if name in self._checkpoint.shapes), None)
        if name is None:
            return None
        self._check_tensor(name, NUMBER)
        found = float(self._checkpoint.read(name))
        if not 0 < found < math.inf:
            raise InvalidArgument(
                f"tensor {name!r} holds {found}, which is no scale: take the weights again, or leave kv_cache_dtype at 'auto'",
                reason="QUANTIZATION_MISMATCH",
            )
        return found

    def size(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a quantized layer's weight, by its main tensor."""
        return self._sizes[module]

    def check(self, modules: Sequence[str], rows: int, columns: int) -> None:
        """Checks the tensors of layers that form one linear of this size together.

        Raises:
            InvalidArgument: a tensor is missing, has another shape or dtype than the config and the linear's size imply, or holds
                what it must not; the message names it.
        """
        together = sum(self._sizes[module][0] for module in modules)
        if len(modules) > 1 and together != rows:
            names = " + ".join(f"{module}.{self.layers[module].main}" for module in modules)
            sizes = " + ".join(str(self._sizes[module][0]) for module in modules)
            raise InvalidArgument(
                f"tensors {names} have {sizes} = {together} rows of the weight, config.json implies {rows}: take the config.json "
                "of these weights",
                reason="TENSOR_SHAPE_MISMATCH",
            )
        for module in modules:
            own = rows if len(modules) == 1 else self._sizes[module][0]
            for tensor, expected in self.layers[module].tensors(own, columns).items():
                self._check_tensor(f"{module}.{tensor}", expected)
            if f"{module}.input_scale" in self._packed:
                self._check_tensor(f"{module}.input_scale", NUMBER)
            if found := self.layers[module].problem(Layer(self._of(module), own, columns)):
                tensor, problem = found
                raise InvalidArgument(
                    f"tensor '{module}.{tensor}' {problem}: take the config.json of these weights",
                    reason="QUANTIZATION_MISMATCH",
                )

    def check_dense(self, name: str) -> None:
        """Raises InvalidArgument for a tensor without scales whose dtype says that it should have them."""
        if (found := self._dtype(name)) not in (*FLOATS, "float64") and name in self._plain:
            scale = f"{name.rpartition('.')[0]}.{self.method.markers[0]}"
            raise InvalidArgument(
                f"{self.path} has no tensor {scale!r}, but {name!r} is stored in {found}: download the weights again",
                reason="TENSOR_MISSING",
            )

    def _scheme(self, name: str) -> Scheme | None:
        """Of the layer that a marker tells; None where another tensor is the layer's."""
        module, _, marker = name.rpartition(".")
        scheme = self.method.scheme(module)
        if isinstance(scheme, Floats) and marker in self.method.markers:
            scheme = replace(scheme, scale=marker)
        if scheme and f"{module}.{scheme.marker}" in self._checkpoint.shapes:
            return scheme if scheme.marker == marker else None
        if scheme is None or scheme.marker != marker:
            wanted = "not quantized" if scheme is None else f"stored with {scheme.marker!r}"
            raise InvalidArgument(
                f"{self.path} holds tensor {name!r} of shape {list(self._checkpoint.shapes[name])}, but by its "
                f"quantization_config the layer is {wanted}: take the config.json of these weights",
                reason="QUANTIZATION_MISMATCH",
            )
        return scheme

    def _size(self, module: str, scheme: Scheme) -> tuple[int, int]:
        name = f"{module}.{scheme.main}"
        if name not in self._checkpoint.shapes:
            raise InvalidArgument(
                f"{self.path} has no tensor {name!r} to '{module}.{scheme.marker}': download the weights again",
                reason="TENSOR_MISSING",
            )
        shape = self._checkpoint.shapes[name]
        if len(shape) != 2 or 0 in shape:
            raise InvalidArgument(
                f"tensor {name!r} has shape {list(shape)}, expected two dimensions of at least 1: download the weights again",
                reason="TENSOR_SHAPE_MISMATCH",
            )
        return scheme.size(self._of(module))

    def _layer(self, module: str) -> Layer:
        return Layer(self._of(module), *self._sizes[module])

    def _of(self, module: str) -> Read:
        return lambda tensor: self._checkpoint.read(f"{module}.{tensor}")

    def _dtype(self, name: str) -> str:
        return str(self._checkpoint.read(name).dtype).removeprefix("torch.") if name in self._checkpoint.shapes else ""

    def _check_tensor(self, name: str, expected: Expected) -> None:
        if name not in self._checkpoint.shapes:
            raise self._missing(name, expected)
        shape, dtype = self._checkpoint.shapes[name], self._dtype(name)
        if shape not in expected.shapes:
            raise InvalidArgument(
                f"tensor {name!r} has shape {list(shape)}, config.json and its quantization imply "
                f"{list(expected.shapes[0])}: take the config.json of these weights",
                reason="TENSOR_SHAPE_MISMATCH",
            )
        if dtype not in expected.dtypes:
            raise InvalidArgument(
                f"tensor {name!r} is {dtype}, its quantization implies {' or '.join(expected.dtypes)}: take the config.json "
                "of these weights",
                reason="TENSOR_DTYPE_MISMATCH",
            )

    def _missing(self, name: str, expected: Expected) -> InvalidArgument:
        return InvalidArgument(
            f"{self.path} has no tensor {name!r} of shape {list(expected.shapes[0])}, which quantization method "
            f"{self.method.name!r} implies: download the weights that belong to its config.json",
            reason="TENSOR_MISSING",
        )
