"""GGUF files of small random models, written as llama.cpp's converter writes them: what it does to names and tensors is done
here with the gguf package's own table of names.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

VOCAB_SIZE = 320
BASE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}

# What is written: GGUF architecture, transformers' class, and its config
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama with biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama with linear scaling": ("llama", "Llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with yarn": ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 24}),
    "qwen2moe": ("qwen2moe", "Qwen2Moe", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("qwen3moe", "Qwen3Moe", {**MOE, "num_experts": 4, "norm_topk_prob": True}),
    "phi2": ("phi2", "Phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 256}),
    "phi3": ("phi3", "Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "gemma": ("gemma", "Gemma", {"head_dim": 24}),
    "gemma2": ("gemma2", "Gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8}),
    "gemma3": (
        "gemma3",
        "Gemma3",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "falcon 7b": ("falcon", "Falcon", {"num_kv_heads": 1, "ffn_hidden_size": 256, "multi_query": True}),
    "falcon 40b": (
        "falcon",
        "Falcon",
        {"num_kv_heads": 2, "ffn_hidden_size": 256, "new_decoder_architecture": True, "bias": True},
    ),
    "gpt2": ("gpt2", "GPT2LMHead", GPT2),
    "gptneox": ("gptneox", "GPTNeoX", {"rotary_pct": 0.25, "use_parallel_residual": False}),
    "stablelm": ("stablelm", "StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "stablelm 12b": ("stablelm", "StableLm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "olmo3": ("olmo2", "Olmo3", {"sliding_window": 8, "num_hidden_layers": 5}),
    "granite": (
        "granite",
        "Granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
}


def make_model(directory: Path, class_name: str, changes: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """A random model, saved in Hugging Face layout, whose norms and biases are not what they begin with."""
    model_class = getattr(transformers, f"{class_name}Model" if "LMHead" in class_name else f"{class_name}ForCausalLM")
    settings = dict(changes) if class_name == "GPT2LMHead" else {**BASE, **changes}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.2, mean=0.5)
    model.save_pretrained(directory)
    return model


def write_gguf(
    path: Path,
    arch: str,
    source: Path,
    kinds: Callable[[str], str] = lambda _: "F32",
    **options: Any,
) -> None:
    """Converts a directory, and the byte-level tokenizer that it may hold.

    Args:
        kinds: each tensor's type by its GGUF name.
        options: GGUFWriter's.
    """
    path.parent.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    writer = gguf.GGUFWriter(path, arch, **options)
    _write_config(writer, arch, config)
    if (source / "tokenizer.json").exists():
        _write_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()))
    for name, tensor in _converted(arch, config, tensors).items():
        kind = gguf.GGMLQuantizationType[kinds(name)]
        array = tensor.float().contiguous().numpy()
        if kind.name in ("F32", "F16"):
            writer.add_tensor(name, array.astype(np.float32 if kind.name == "F32" else np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any]) -> None:
    """Its special tokens are <s> and </s>, whose ids the config has."""
    vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])


def _write_config(writer: gguf.GGUFWriter, arch: str, config: Mapping[str, Any]) -> None:
    def get(*names: str, default: Any = None) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    heads, width = get("num_attention_heads", "n_head"), get("hidden_size", "n_embd")
    writer.add_context_length(get("max_position_embeddings", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_block_count(get("num_hidden_layers", "n_layer"))
    writer.add_feed_forward_length(get("ffn_hidden_size", "intermediate_size", "n_inner"))
    writer.add_head_count(heads)
    if arch not in ("gpt2", "gptneox"):
        writer.add_head_count_kv(get("num_kv_heads", "num_key_value_heads", default=heads))
    if (eps := get("rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(eps)
    if (eps := get("layer_norm_eps", "layer_norm_epsilon")) is not None:
        writer.add_layer_norm_eps(eps)
    head_dim = get("head_dim", default=width // heads)
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    share = rope.get("partial_rotary_factor", get("partial_rotary_factor", "rotary_pct", default=1.0))
    if arch in ("llama", "granite", "smollm3", "phi2", "phi3", "gptneox", "stablelm"):
        writer.add_rope_dimension_count(int(head_dim * share))
    if "rope_theta" in rope and arch not in ("gemma", "gemma2", "phi2", "gptneox", "stablelm", "falcon"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key in ("num_experts", "num_local_experts"):
        if key in config:
            writer.add_expert_count(config[key])
            writer.add_expert_used_count(config["num_experts_per_tok"])
    if arch in ("gemma2", "gemma3", "phi3", "olmo2") and (arch == "phi3" or get("sliding_window")):
        writer.add_sliding_window(get("sliding_window", default=0))
    if arch == "olmo2" and "layer_types" in config:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == "gptneox":
        writer.add_parallel_residual(config["use_parallel_residual"])
    if arch == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(7)
    writer.add_pad_token_id(0)


def _converted(arch: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv_heads = config.get("num_kv_heads", config.get("num_key_value_heads", heads))
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, layers)
    stacks: dict[str, list[Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "experts" in parts or "norms" in parts:  # one stack of all experts, or of all heads' norms
            at = parts.index("experts" if "experts" in parts else "norms") + 1
            merged = ".".join([*parts[:at], *parts[at + 1 :]])
            merged = merged.replace("model.layers.", "layers.").replace("block_sparse_moe", "feed_forward")
            merged = merged if "feed_forward" in merged else f"model.{merged}"
            merged = merged.replace("_layernorm.norms", "_layernorm")
            stack = stacks.setdefault(merged, [])
            while len(stack) <= int(parts[at]):
                stack.append(tensor)
            stack[int(parts[at])] = tensor
            continue
        if arch in ("llama", "granite", "smollm3") and "self_attn.q_proj" in name:
            tensor = _permuted(tensor, heads)
        if arch in ("llama", "granite", "smollm3") and "self_attn.k_proj" in name:
            tensor = _permuted(tensor, kv_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.t()
        if "query_key_value" in name:
            groups = heads if arch == "gptneox" else kv_heads
            by_group = tensor.reshape(groups, heads // groups + 2, -1, *tensor.shape[1:])
            of_query, key, value = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
            tensor = torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in (of_query, key, value)])
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor.squeeze()
        result[_renamed(names, name)] = tensor
    for name, stack in stacks.items():
        result[_renamed(names, name)] = torch.stack(stack)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        result["rope_freqs.weight"] = _llama3_divisors(config, rope)
    if rope.get("rope_type") == "longrope":
        result["rope_factors_long.weight"] = torch.tensor(rope["long_factor"])
        result["rope_factors_short.weight"] = torch.tensor(rope["short_factor"])
    return result


def _renamed(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


def _permuted(tensor: Tensor, heads: int) -> Tensor:
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _llama3_divisors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Tensor:
    """transformers' plain frequencies divided by its scaled ones."""
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
        transformers.LlamaConfig(**config), "cpu"
    )
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    return plain / scaled
