"""Qwen, the first, in plain torch: from the published formulas, over the names of its checkpoints."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import VOCAB_SIZE, save_tokenizer

CONFIG = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": VOCAB_SIZE, "hidden_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 3, "kv_channels": 16, "intermediate_size": 144, "no_bias": True,
    "layer_norm_epsilon": 1e-6, "rotary_pct": 1.0, "rotary_emb_base": 10000, "seq_length": 160, "use_dynamic_ntk": True,
    "max_position_embeddings": 256, "use_logn_attn": True, "tie_word_embeddings": False,
}  # fmt: skip


def save_qwen(directory: Path, **changes: Any) -> Path:
    """A random checkpoint."""
    directory.mkdir()
    config = CONFIG | changes
    hidden, inner, bias = config["hidden_size"], config["intermediate_size"] // 2, not config["no_bias"]
    width = config["kv_channels"] * config["num_attention_heads"]
    shapes = {"wte.weight": (VOCAB_SIZE, hidden), "ln_f.weight": (hidden,)}
    for layer in (f"h.{index}." for index in range(config["num_hidden_layers"])):
        linears = {
            "attn.c_attn": (3 * width, hidden), "attn.c_proj": (hidden, width), "mlp.w1": (inner, hidden),
            "mlp.w2": (inner, hidden), "mlp.c_proj": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("ln_1", "ln_2")}
        shapes |= {f"{layer}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{layer}{name}.bias": shape[:1] for name, shape in linears.items() if bias or name == "attn.c_attn"}
    shapes = {f"transformer.{name}": shape for name, shape in shapes.items()} | {"lm_head.weight": (VOCAB_SIZE, hidden)}
    torch.manual_seed(0)
    save_file(
        {name: torch.randn(shape) * 0.2 + (1.0 if ".ln_" in name else 0.0) for name, shape in shapes.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    return directory


class QwenReference:
    """The model over sequences of at most `seq_length` tokens, beyond which it would change frequencies and scores."""

    def __init__(self, checkpoint: Path) -> None:
        self.config = json.loads((checkpoint / "config.json").read_text())
        self.weights = load_file(checkpoint / "model.safetensors")

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        """[1, T] -> logits [1, T, vocab_size]."""
        x = self.weights["transformer.wte.weight"][input_ids[0]]
        for index in range(self.config["num_hidden_layers"]):
            layer = f"transformer.h.{index}."
            x = x + self._attention(self._norm(x, f"{layer}ln_1"), f"{layer}attn.")
            y = self._norm(x, f"{layer}ln_2")
            y = self._linear(y, f"{layer}mlp.w1") * F.silu(self._linear(y, f"{layer}mlp.w2"))
            x = x + self._linear(y, f"{layer}mlp.c_proj")
        return SimpleNamespace(logits=self._linear(self._norm(x, "transformer.ln_f"), "lm_head")[None])

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **settings: Any) -> Tensor:
        """Greedy."""
        for _ in range(max_new_tokens):
            input_ids = torch.cat((input_ids, self(input_ids).logits[:, -1:].argmax(-1)), 1)
        return input_ids

    def _attention(self, x: Tensor, name: str) -> Tensor:
        heads, size = self.config["num_attention_heads"], self.config["kv_channels"]
        q, k, v = (
            part.view(len(x), heads, size).transpose(0, 1) for part in self._linear(x, f"{name}c_attn").chunk(3, -1)
        )
        scores = self._rotated(q) @ self._rotated(k).transpose(1, 2) / math.sqrt(size)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self._linear(y.transpose(0, 1).flatten(1), f"{name}c_proj")

    def _rotated(self, x: Tensor) -> Tensor:
        """[heads, T, size]"""
        turned = int(x.shape[-1] * self.config["rotary_pct"])
        frequencies = self.config["rotary_emb_base"] ** -(torch.arange(0, turned, 2).float() / turned)
        angles = torch.arange(x.shape[1])[:, None] * torch.cat((frequencies, frequencies))
        first, second = x[..., :turned].chunk(2, -1)
        return torch.cat(
            (x[..., :turned] * angles.cos() + torch.cat((-second, first), -1) * angles.sin(), x[..., turned:]), -1
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["layer_norm_epsilon"])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
