"""What llama.cpp's converter does to names and tensors of each architecture, undone: Hugging Face's tensors come out.

The names on the left are those of gguf.TENSOR_NAMES; what is done to tensors stands in llama.cpp's conversion/*.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from builder_svc.checkpoint.gguf_file import Metadata
from builder_svc.checkpoint.gguf_rope import ROPE_TENSORS
from engine.errors import InvalidArgument

Change = Callable[[Tensor], Tensor]
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")  # of the time before experts were stacked


@dataclass(frozen=True)
class Layout:
    """An architecture's names, without ".weight" and ".bias".

    Attributes:
        outer: of tensors outside the layers.
        layers: prefix of a layer, with {} for its number.
        block: of tensors in a layer; "{}" in a Hugging Face name counts the entries of the first dimension.
        changes: what becomes of a tensor, by its GGUF name within the layer.
    """

    outer: Mapping[str, str]
    layers: str
    block: Mapping[str, str]
    changes: Mapping[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """A Hugging Face tensor's source: a tensor of the file, an index into its first dimension, and what is done to it."""

    tensor: str
    index: int | None = None
    change: Change | None = None


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = {**_ATTENTION, **_MLP, "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
}
_TWO_NORMS = {  # before and after attention and feed-forward
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GgufWeights:
    """A file's tensors under Hugging Face's names, in Hugging Face's form.

    Attributes:
        shapes: name -> shape. A tensor that the architecture's layout does not know keeps its name.
    """

    def __init__(self, meta: Metadata) -> None:
        self._file = meta.file
        self._origins = _origins(meta.file.shapes, _layout(meta))
        self.shapes = {name: self._shape(origin) for name, origin in self._origins.items()}

    def read(self, name: str) -> Tensor:
        """One tensor; what is quantized comes as float32. Raises KeyError for an unknown name."""
        origin = self._origins[name]
        tensor = self._file.read(origin.tensor, origin.index)
        return origin.change(tensor) if origin.change else tensor

    def _shape(self, origin: Origin) -> tuple[int, ...]:
        shape = self._file.shapes[origin.tensor]
        shape = shape if origin.index is None else shape[1:]
        try:
            return tuple(origin.change(torch.empty(shape, device="meta")).shape) if origin.change else shape
        except RuntimeError:
            raise InvalidArgument(
                f"{self._file.path}: tensor {origin.tensor!r} has shape {list(shape)}, for which the number of heads in its "
                "metadata is wrong: download it again",
                reason="TENSOR_SHAPE_MISMATCH",
            ) from None


def _layout(meta: Metadata) -> Layout:
    """The layout of an architecture that `gguf_config` knows."""
    architecture, layers = meta.architecture, "model.layers.{}."
    num_heads = meta.size("attention.head_count")
    num_kv_heads = meta.size("attention.head_count_kv", num_heads)
    if architecture in ("llama", "granite", "smollm3"):  # rotary pairs side by side, where Hugging Face has halves
        changes = {"attn_q": partial(_halves, heads=num_heads), "attn_k": partial(_halves, heads=num_kv_heads)}
        return Layout(_OUTER, layers, {**_LLAMA, **_MIXTRAL}, changes)
    if architecture in ("gemma", "gemma2", "gemma3"):
        norms = {
            "attn_norm",
            "ffn_norm",
            "post_attention_norm",
            "post_ffw_norm",
            "output_norm",
            "attn_q_norm",
            "attn_k_norm",
        }
        block = _LLAMA if architecture == "gemma" else {**_LLAMA, **_TWO_NORMS}
        return Layout(_OUTER, layers, block, dict.fromkeys(norms, _less_one))
    if architecture == "phi2":
        outer = {**_OUTER, "output_norm": "model.final_layernorm"}
        mlp = {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
        return Layout(outer, layers, {**_LLAMA, **mlp})
    if architecture == "phi3":
        fused = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
        return Layout(_OUTER, layers, {**_LLAMA, **fused})
    if architecture == "stablelm":
        norms_of_heads = {
            "attn_q_norm": "self_attn.q_layernorm.norms.{}",
            "attn_k_norm": "self_attn.k_layernorm.norms.{}",
        }
        return Layout(_OUTER, layers, {**_LLAMA, **norms_of_heads})
    if architecture == "olmo2":
        return Layout(_OUTER, layers, {**_ATTENTION, **_MLP, **_TWO_NORMS})
    if architecture == "gpt2":
        outer = {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        }
        linears = {
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }
        block = {**linears, "attn_norm": "ln_1", "ffn_norm": "ln_2"}
        return Layout(outer, "transformer.h.{}.", block, dict.fromkeys(linears, _transposed))
    fused = {
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    if architecture == "gptneox":
        outer = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
        attention = {"attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"}
        grouped = {"attn_qkv": partial(_grouped, heads=num_heads, kv_heads=num_heads)}
        return Layout(outer, "gpt_neox.layers.{}.", {**fused, **attention}, grouped)
    if architecture == "falcon":
        outer = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}
        attention = {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"}
        grouped = {"attn_qkv": partial(_grouped, heads=num_heads, kv_heads=num_kv_heads)}
        branches = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if meta.has("attn_norm_2.weight") else {}
        return Layout(outer, "transformer.h.{}.", {**fused, **attention, **branches}, grouped)
    return Layout(_OUTER, layers, {**_LLAMA, **_EXPERTS}, {"ffn_gate_inp_shexp": _one_row})


def _origins(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Origin]:
    """Hugging Face name -> where it comes from."""
    found: dict[str, Origin] = {}
    for name, shape in shapes.items():
        if name in ROPE_TENSORS:
            continue
        if expert := _EXPERT.fullmatch(name):
            stem = layout.block.get(f"ffn_{expert[2]}_exps", name)
            found[f"{layout.layers.format(expert[1])}{stem.format(expert[3])}.weight"] = Origin(name)
            continue
        stem, _, kind = name.rpartition(".")
        in_block = _BLOCK.fullmatch(stem)
        key, prefix = (in_block[2], layout.layers.format(in_block[1])) if in_block else (stem, "")
        theirs, change = (layout.block if in_block else layout.outer).get(key), layout.changes.get(key)
        if theirs is None:
            found[name] = Origin(name)
        elif "{}" in theirs:
            for index in range(shape[0]):
                found[f"{prefix}{theirs.format(index)}.{kind}"] = Origin(name, index, change)
        else:
            found[f"{prefix}{theirs}.{kind}"] = Origin(name, None, change)
    return found


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2)."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _grouped(tensor: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Rows [all queries, all keys, all values] to groups of the queries that share a key and value, and these."""
    dim = tensor.shape[0] // (heads + 2 * kv_heads)
    rest = tensor.shape[1:]
    query, key, value = tensor.split([heads * dim, kv_heads * dim, kv_heads * dim])
    query = query.reshape(kv_heads, heads // kv_heads, dim, *rest)
    key, value = (part.reshape(kv_heads, 1, dim, *rest) for part in (key, value))
    grouped: Tensor = query.new_empty(kv_heads, heads // kv_heads + 2, dim, *rest)
    grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:] = query, key, value
    return grouped.reshape(tensor.shape)


def _less_one(tensor: Tensor) -> Tensor:
    return tensor - 1


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t()


def _one_row(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1)
