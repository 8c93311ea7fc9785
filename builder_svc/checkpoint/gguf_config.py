"""Hugging Face's config.json from a GGUF file's metadata, as llama.cpp's converter has written it.

What llama.cpp takes for granted of an architecture, and therefore leaves out of the file, stands here.
"""

from collections.abc import Callable
from typing import Any

from builder_svc.checkpoint.gguf_file import GgufFile, Metadata
from builder_svc.checkpoint.gguf_rope import rope
from engine.errors import InvalidArgument, Unimplemented


def config(meta: Metadata) -> dict[str, Any]:
    """config.json's fields. Raises InvalidArgument for missing metadata, Unimplemented for an unknown architecture."""
    make = _ARCHITECTURES.get(meta.architecture)
    if make is None:
        raise Unimplemented(
            f"{meta.where}: GGUF architecture {meta.architecture!r} is not supported; supported are "
            f"{', '.join(sorted(_ARCHITECTURES))}. Take the model's safetensors",
            reason="ARCHITECTURE_UNSUPPORTED",
        )
    shape = meta.file.shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2:
        raise InvalidArgument(f"{meta.where} has no tensor 'token_embd.weight': is it a language model?")
    last = f"blk.{meta.size('block_count') - 1}."
    if not any(name.startswith(last) for name in meta.file.shapes):
        raise InvalidArgument(f"{meta.where} has no layer {last!r}, which its 'block_count' implies: download it again")
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding"}
    keys = {f"{ours}_token_id": f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in kinds.items()}
    tokens = {name: meta.values[key] for name, key in keys.items() if key in meta.values}
    common = {
        "vocab_size": shape[0],
        "tie_word_embeddings": "output.weight" not in meta.file.shapes,
        "dtype": _dtype(meta.file),
        **tokens,
    }
    return {**common, **make(meta)}


def generation_config(meta: Metadata) -> dict[str, Any]:
    """generation_config.json's fields: the ids that end a text or a turn."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(meta.values[key] for key in keys if key in meta.values))
    return {"eos_token_id": ids} if ids else {}


def _dtype(file: GgufFile) -> str:
    """What an engine on a GPU takes by default: quantized weights, whose scales have 11 bits, come as bfloat16."""
    matrices = [name for name, shape in file.shapes.items() if len(shape) > 1]
    kinds = {
        "bfloat16" if file.is_quantized(name) else str(file.dtype(name)).removeprefix("torch.") for name in matrices
    }
    return next((kind for kind in ("bfloat16", "float16") if kind in kinds), "float32")


def _decoder(meta: Metadata, architecture: str, **fields: Any) -> dict[str, Any]:
    """What LLaMA and its relatives share."""
    num_heads = meta.size("attention.head_count")
    return {
        "architectures": [architecture],
        "hidden_size": meta.size("embedding_length"),
        "num_hidden_layers": meta.size("block_count"),
        "intermediate_size": meta.size("feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.size("attention.head_count_kv", num_heads),
        "max_position_embeddings": meta.size("context_length"),
        **({"head_dim": meta.head_dim} if "attention.key_length" in meta.values else {}),
        **rope(meta),
        **fields,
    }


def _rms(meta: Metadata) -> dict[str, Any]:
    return {"rms_norm_eps": meta.require("attention.layer_norm_rms_epsilon", float), "hidden_act": "silu"}


def _llama(meta: Metadata) -> dict[str, Any]:
    biases = {"attention_bias": meta.has("attn_q.bias"), "mlp_bias": meta.has("ffn_gate.bias")}
    if not meta.get("expert_count", int, 0):
        return _decoder(meta, "LlamaForCausalLM", **_rms(meta), **biases)
    experts = {"num_local_experts": meta.size("expert_count"), "num_experts_per_tok": meta.size("expert_used_count")}
    return _decoder(meta, "MixtralForCausalLM", **_rms(meta), **experts)


def _qwen2(meta: Metadata) -> dict[str, Any]:
    return _decoder(meta, "Qwen2ForCausalLM", **_rms(meta))


def _qwen3(meta: Metadata) -> dict[str, Any]:
    return _decoder(meta, "Qwen3ForCausalLM", **_rms(meta), attention_bias=meta.has("attn_q.bias"))


def _experts(meta: Metadata) -> dict[str, Any]:
    return {
        "num_experts": meta.size("expert_count"),
        "num_experts_per_tok": meta.size("expert_used_count"),
        "moe_intermediate_size": meta.file.shapes["blk.0.ffn_gate_exps.weight"][1]
        if "blk.0.ffn_gate_exps.weight" in meta.file.shapes
        else meta.size("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(meta: Metadata) -> dict[str, Any]:
    shared = meta.file.shapes.get("blk.0.ffn_gate_shexp.weight")
    size = shared[0] if shared else meta.size("expert_shared_feed_forward_length")
    fields = {**_rms(meta), **_experts(meta), "shared_expert_intermediate_size": size, "norm_topk_prob": False}
    return _decoder(meta, "Qwen2MoeForCausalLM", **fields)


def _qwen3moe(meta: Metadata) -> dict[str, Any]:
    bias = meta.has("attn_q.bias")
    return _decoder(
        meta, "Qwen3MoeForCausalLM", **_rms(meta), **_experts(meta), attention_bias=bias, norm_topk_prob=True
    )


def _phi2(meta: Metadata) -> dict[str, Any]:
    eps = meta.require("attention.layer_norm_epsilon", float)
    return _decoder(meta, "PhiForCausalLM", layer_norm_eps=eps, hidden_act="gelu_new", qk_layernorm=False)


def _phi3(meta: Metadata) -> dict[str, Any]:
    window = meta.get("attention.sliding_window", int, 0) or None
    original = meta.size("rope.scaling.original_context_length", meta.size("context_length"))
    fields = {"sliding_window": window, "original_max_position_embeddings": original}
    return _decoder(meta, "Phi3ForCausalLM", **_rms(meta), **fields)


def _gemma(meta: Metadata) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh"
    fields = {"hidden_act": activation, "hidden_activation": activation, "head_dim": meta.head_dim}
    return _decoder(meta, "GemmaForCausalLM", **{**_rms(meta), **fields})


def _query_scalar(meta: Metadata, layers_of_27b: int) -> float:
    """Attention scores are divided by its root: the head's width, but for the 27B models the hidden size by heads."""
    if "attention.scale" in meta.values:
        return float(meta.require("attention.scale", float) ** -2)
    if meta.size("block_count") == layers_of_27b:
        return meta.size("embedding_length") // meta.size("attention.head_count")
    return meta.head_dim


def _gemma2(meta: Metadata) -> dict[str, Any]:
    fields = {
        "attn_logit_softcapping": meta.get("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": meta.get("final_logit_softcapping", float, 30.0),
        "sliding_window": meta.size("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(meta, 46),
        "layer_types": _layer_types(meta, 2),
    }
    return {**_gemma(meta), "architectures": ["Gemma2ForCausalLM"], **fields}


def _gemma3(meta: Metadata) -> dict[str, Any]:
    made = _gemma(meta)
    full = {"rope_type": "default", "rope_theta": made.pop("rope_theta"), **made.pop("rope_scaling", {})}
    if "rope.freq_base" not in meta.values:
        full["rope_theta"] = 1e6
    local = {"rope_type": "default", "rope_theta": meta.get("rope.freq_base_swa", float, 10000.0)}
    return {
        **made,
        "architectures": ["Gemma3ForCausalLM"],
        "final_logit_softcapping": meta.values.get("final_logit_softcapping"),
        "attn_logit_softcapping": None,
        "sliding_window": meta.size("attention.sliding_window", 1024),
        "query_pre_attn_scalar": _query_scalar(meta, 62),
        "layer_types": _layer_types(meta, 6),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def _layer_types(meta: Metadata, period: int) -> list[str]:
    """Every period's last layer sees everything, the others a window."""
    kinds = ("full_attention", "sliding_attention")
    pattern = meta.values.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return [kinds[bool(windowed)] for windowed in pattern]
    period = pattern if isinstance(pattern, int) and pattern > 0 else period
    return [kinds[(layer + 1) % period != 0] for layer in range(meta.size("block_count"))]


def _stablelm(meta: Metadata) -> dict[str, Any]:
    eps = meta.require("attention.layer_norm_epsilon", float)
    return _decoder(
        meta,
        "StableLmForCausalLM",
        layer_norm_eps=eps,
        hidden_act="silu",
        use_qkv_bias=meta.has("attn_q.bias"),
        use_parallel_residual=not meta.has("ffn_norm.weight"),
        qk_layernorm=meta.has("attn_q_norm.weight"),
        partial_rotary_factor=meta.size("rope.dimension_count", meta.head_dim) / meta.head_dim,
    )


def _olmo2(meta: Metadata) -> dict[str, Any]:
    if "attention.sliding_window" not in meta.values:
        return _decoder(meta, "Olmo2ForCausalLM", **_rms(meta))
    windows = {"sliding_window": meta.size("attention.sliding_window"), "layer_types": _layer_types(meta, 4)}
    return _decoder(meta, "Olmo3ForCausalLM", **_rms(meta), **windows)


def _granite(meta: Metadata) -> dict[str, Any]:
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    scales = {name: meta.get(key, float, 1.0) for name, key in keys.items()}
    biases = {"attention_bias": meta.has("attn_q.bias"), "mlp_bias": meta.has("ffn_gate.bias")}
    return _decoder(meta, "GraniteForCausalLM", **_rms(meta), **scales, **biases)


def _smollm3(meta: Metadata) -> dict[str, Any]:
    layers = meta.size("block_count")
    return _decoder(
        meta,
        "SmolLM3ForCausalLM",
        **_rms(meta),
        no_rope_layers=[int((layer + 1) % 4 != 0) for layer in range(layers)],  # 0 has no positions
        no_rope_layer_interval=4,
        attention_bias=meta.has("attn_q.bias"),
        mlp_bias=meta.has("ffn_gate.bias"),
        use_sliding_window=False,
    )


def _gpt2(meta: Metadata) -> dict[str, Any]:
    length = meta.size("context_length")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": meta.size("embedding_length"),
        "n_layer": meta.size("block_count"),
        "n_head": meta.size("attention.head_count"),
        "n_inner": meta.size("feed_forward_length"),
        "n_positions": length,
        "n_ctx": length,
        "layer_norm_epsilon": meta.require("attention.layer_norm_epsilon", float),
        "activation_function": "gelu_new",
    }


def _gptneox(meta: Metadata) -> dict[str, Any]:
    made = _decoder(meta, "GPTNeoXForCausalLM", layer_norm_eps=meta.require("attention.layer_norm_epsilon", float))
    rotary = made.pop("partial_rotary_factor", 1.0)
    return {
        **made,
        "hidden_act": "gelu",
        "rotary_pct": rotary,
        "partial_rotary_factor": rotary,
        "use_parallel_residual": meta.get("use_parallel_residual", bool, True),
        "attention_bias": meta.has("attn_qkv.bias"),
    }


def _falcon(meta: Metadata) -> dict[str, Any]:
    made = _decoder(meta, "FalconForCausalLM", layer_norm_epsilon=meta.require("attention.layer_norm_epsilon", float))
    groups = made.pop("num_key_value_heads")
    made["ffn_hidden_size"] = made.pop("intermediate_size")
    return {
        **made,
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups > 1,
        "num_ln_in_parallel_attn": 2 if meta.has("attn_norm_2.weight") else 1,
        "parallel_attn": True,
        "bias": meta.has("attn_qkv.bias"),
        "alibi": False,
        "activation": "gelu",
    }


_ARCHITECTURES: dict[str, Callable[[Metadata], dict[str, Any]]] = {
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "granite": _granite,
    "llama": _llama,
    "olmo2": _olmo2,
    "phi2": _phi2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
}
