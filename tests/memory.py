"""Large checkpoints of random weights, the peak of anonymous memory of a process and its children, and their time."""

import json
import os
import threading
import time
from pathlib import Path

from tests.conftest import save_tokenizer

_LAYERS, _HIDDEN, _INTERMEDIATE, _VOCAB = 12, 2048, 5632, 32000  # 748 million parameters, 2.99 GB in float32
_CHUNK = 16 << 20


def write_checkpoint(directory: Path, layers: int = _LAYERS) -> int:
    """A LLaMA of random bytes that are valid float32, as one safetensors file; the bytes of its largest tensor.

    Has 0.23 GB a layer and 0.52 GB of embeddings.
    """
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": _VOCAB, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 1,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    shapes = {"model.embed_tokens.weight": [_VOCAB, _HIDDEN], "lm_head.weight": [_VOCAB, _HIDDEN]}
    shapes["model.norm.weight"] = [_HIDDEN]
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": [_HIDDEN], "post_attention_layernorm": [_HIDDEN], "self_attn.q_proj": [_HIDDEN, _HIDDEN],
            "self_attn.k_proj": [_HIDDEN, _HIDDEN], "self_attn.v_proj": [_HIDDEN, _HIDDEN],
            "self_attn.o_proj": [_HIDDEN, _HIDDEN], "mlp.gate_proj": [_INTERMEDIATE, _HIDDEN],
            "mlp.up_proj": [_INTERMEDIATE, _HIDDEN], "mlp.down_proj": [_HIDDEN, _INTERMEDIATE],
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, offset, largest = {}, 0, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset, largest = offset + size, max(largest, size)
    text = json.dumps(header).encode()
    noise = bytearray(os.urandom(_CHUNK))
    noise[3::4] = bytes(len(noise[3::4]))  # a small exponent: finite numbers
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, _CHUNK):
            noise[:8] = start.to_bytes(8, "little")  # no two chunks are alike
            noise[3::4] = bytes(len(noise[3::4]))
            file.write(noise[: min(_CHUNK, offset - start)])
    return largest


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        try:
            found += [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        except FileNotFoundError:
            continue
    return found


def rss_anon(pid: int) -> int:
    """Bytes of anonymous memory that a process has resident; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def processor_seconds(pid: int) -> float:
    """That a process and all that descend from it have computed for, those included that have ended and were waited for."""
    fields = (Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in tree(pid))
    return sum(int(ticks) for each in fields for ticks in each[11:15]) / os.sysconf("SC_CLK_TCK")


class PeakAnon:
    """Samples a process tree's anonymous memory every 5 ms while the block runs.

    Attributes:
        peak: the largest sum, bytes.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakAnon":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, sum(map(rss_anon, tree(self._pid))))
            time.sleep(0.005)
