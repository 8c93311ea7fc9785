"""The decoder computed a layer at a time over sequences of one length, in float32: the residual stream is all that stays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builder_svc.models.config import DecoderConfig
from builder_svc.models.decoder import Decoder, KVScales, Layer
from builder_svc.models.operators import computed
from builder_svc.models.packed import Packed
from builder_svc.quantize.inputs import Inputs
from engine.ops import REFERENCE, to_fp8, to_int8
from engine.opset import OPERATORS

Read = Callable[[str], Tensor]
"""Reads a weight by its name."""
_TOKENS = {"cpu": 4096, "cuda": 16384}  # that are computed at a time
_LOGITS = 1024


def compute_device(chosen: str = "auto") -> torch.device:
    """Of "auto" the GPU, if there is one."""
    there = torch.cuda.is_available()
    return torch.device("cuda" if chosen == "cuda" or (chosen == "auto" and there) else "cpu")


class Stream:
    """Sequences on their way through a decoder.

    Attributes:
        hidden: the residual stream, float32 [sequences, length, hidden_size].
        keys, values: the largest absolute number of each channel of the last layer's keys and values, float32 [G * D].
    """

    def __init__(
        self,
        config: DecoderConfig,
        read: Read,
        sequences: Tensor,
        device: torch.device,
        packed: Mapping[str, Packed] = {},  # noqa: B006  (not changed)
        kv_scales: KVScales | None = None,
        kv_int8: bool = False,
    ) -> None:
        """Reads the embedding.

        Args:
            sequences: token ids, int64 [sequences, length].
            packed, kv_scales, kv_int8: as the decoder's.
        """
        self.decoder = Decoder.on_meta(config, "float32", packed, kv_scales, kv_int8=kv_int8)
        self.device, self._read = device, read
        self.ids = sequences.to(device)
        self.length = sequences.shape[1]
        self.keys = self.values = torch.zeros(1, device=device)
        constants = {name: value.to(device) for name, value in self.decoder.constants().items()}
        own = [name for name in self.decoder.declared() if "." not in name]
        self.decoder.load_state_dict(constants | {name: self._weight(name) for name in own}, strict=False, assign=True)
        count, wide = len(sequences), config.hidden_size
        self.hidden = torch.empty(count, self.length, wide, device=device)
        with torch.no_grad(), computed(self._compute):
            for span, positions in self._spans():
                made = self.decoder.embedded(self.ids[span].flatten(), positions)
                self.hidden[span] = made.view(-1, self.length, wide)
        if not config.tie_embeddings:
            self.decoder.embedding = nn.Parameter(torch.empty_like(self.decoder.embedding, device="meta"))

    def layer_tensors(self, number: int) -> dict[str, Tensor]:
        """Reads a layer's weights, by their names in it: float32, or what a packed form has."""
        layer = self.decoder.layers[str(number)]
        names = [*dict(layer.named_parameters()), *dict(layer.named_buffers())]
        return {name: self._weight(f"layers.{number}.{name}") for name in names}

    def pass_layer(
        self, number: int, tensors: dict[str, Tensor], watch: Sequence[str] = (), with_products: bool = False
    ) -> dict[str, Inputs]:
        """Takes the stream through a layer.

        Args:
            tensors: of `layer_tensors`; not changed.
            watch: linears whose inputs are to be looked at, by their names in the layer.
            with_products: as of `Inputs`.

        Returns:
            What was seen, by linear.
        """
        layer: Layer = self.decoder.layers[str(number)]
        layer.load_state_dict(tensors, assign=True)
        seen = {name: Inputs(self.ids.numel(), with_products) for name in watch}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _, args, into=into: into.add(args[0]))
            for name, into in seen.items()
        ]
        self.keys = self.values = torch.zeros(1, device=self.device)
        with torch.no_grad(), computed(self._compute):
            for span, positions in self._spans():
                x = self.hidden[span].flatten(0, 1)
                places = self.decoder.places(positions, torch.full_like(positions, self.length))
                made, residual = layer(x, None, *places(layer))
                self.hidden[span] = (made + residual).view_as(self.hidden[span])
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        return seen

    def head_tensors(self) -> dict[str, Tensor]:
        """Reads what is behind the layers."""
        return {
            name: self._weight(name) for name in self.decoder.declared() if name.startswith(("final_norm", "lm_head"))
        }

    def head_inputs(self, tensors: dict[str, Tensor], with_products: bool = False) -> Inputs:
        """What the head reads."""
        self.decoder.load_state_dict(tensors, strict=False, assign=True)
        seen = Inputs(self.ids.numel(), with_products)
        with torch.no_grad(), computed(self._compute):
            for span, _ in self._spans():
                seen.add(self.decoder.final_norm(self.hidden[span].flatten(0, 1))[0])
        return seen

    def loss(self, tensors: dict[str, Tensor], start: int) -> tuple[float, int]:
        """(the sum of -log p of each token after the first `start`, in nats; how many they are)."""
        self.decoder.load_state_dict(tensors, strict=False, assign=True)
        start = max(start, 1)
        total, targets = torch.zeros((), dtype=torch.float64, device=self.device), self.ids[:, start:]
        with torch.no_grad(), computed(self._compute):
            rows, wanted = self.hidden[:, start - 1 : -1], targets.flatten()
            rows = rows.reshape(-1, rows.shape[-1])
            for at in range(0, len(rows), _LOGITS):
                logits = self.decoder.logits(rows[at : at + _LOGITS], None).float()
                total += F.cross_entropy(logits, wanted[at : at + _LOGITS], reduction="sum").double()
        return float(total), targets.numel()

    def _spans(self) -> Iterator[tuple[slice, Tensor]]:
        """Some sequences at a time, and the positions of their tokens."""
        step = max(1, _TOKENS[self.device.type] // self.length)
        for at in range(0, len(self.ids), step):
            count = len(self.ids[at : at + step])
            yield slice(at, at + count), torch.arange(self.length, dtype=torch.int32, device=self.device).repeat(count)

    def _weight(self, name: str) -> Tensor:
        found = self._read(name)
        wide = (
            found.float() if found.dtype in (torch.bfloat16, torch.float16) and not name.endswith(".scales") else found
        )
        return wide.to(self.device)

    def _compute(self, name: str, tensors: Sequence[Tensor | None], attrs: dict[str, Any]) -> Any:
        if name == "attention":
            return self._attend(*tensors, **attrs)  # type: ignore[arg-type]
        given = {slot.rstrip("?"): tensor for slot, tensor in zip(OPERATORS[name].inputs, tensors, strict=False)}
        return REFERENCE[name](**given, **attrs)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi: Tensor | None = None,
        *,
        cache: int,
        head_dim: int,
        scale: float,
        window: int,
        soft_cap: float,
        k_scale: float,
        v_scale: float,
        kv_int8: bool,
    ) -> Tensor:
        """`engine.ops.attention` of whole sequences."""
        del cache
        self.keys = torch.maximum(self.keys, k.abs().amax(0))
        self.values = torch.maximum(self.values, v.abs().amax(0))
        rounded = to_int8 if kv_int8 else to_fp8
        k, v = (rounded(part, unit).float() * unit if unit else part for part, unit in ((k, k_scale), (v, v_scale)))
        heads, groups = q.shape[1] // head_dim, k.shape[1] // head_dim
        q, k, v = (
            part.view(-1, self.length, part.shape[1] // head_dim, head_dim).transpose(1, 2) for part in (q, k, v)
        )
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        if not (window or soft_cap or alibi is not None):
            made = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            return made.transpose(1, 2).reshape(-1, heads * head_dim)
        scores = q @ k.transpose(2, 3) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        at = torch.arange(self.length, device=q.device)
        behind = at[None, :] - at[:, None]
        if alibi is not None:
            scores = scores + alibi.view(-1, 1, 1) * behind
        visible = (behind <= 0) & ((behind > -window) if window else True)
        made = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
        return made.transpose(1, 2).reshape(-1, heads * head_dim)
