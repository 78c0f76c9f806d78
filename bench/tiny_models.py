"""Families of language models that transformers and vLLM both know, each as a tiny model of random weights.

A family is its `model_type`; what stands beside it is what keeps it tiny, or turns on what it is here for: a window shorter than the
sequences, a soft cap that the logits reach, a scale that is not 1, a layer of each kind. The families stand by what is particular of them;
many of the later ones have what the earlier ones have, too.
"""

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEAD = {"head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
# With few heads many keys' scores are 0, and which of equal ones are taken is an accident.
_INDEXER = {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 8}
_WINDOW = {"sliding_window": 6}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
_HYBRID = ["linear_attention", "full_attention"]

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {
        "llama": _HEAD,
        "qwen2": {},
        "qwen3": _HEAD,
        "phi3": {},
        "olmo": {},
        "olmo2": {},
        "glm": {**_HEAD, "partial_rotary_factor": 0.5},
        "glm4": {**_HEAD, "partial_rotary_factor": 0.5},
        "nemotron": _HEAD,
        "stablelm": {},
        "apertus": {},
        "arcee": {},
        "seed_oss": _HEAD,
        "persimmon": {},
        "phi": {},
        "gpt_neox": {},
        "jais2": {},
        "hrm_text": _HEAD,
        "hunyuan_v1_dense": _HEAD,
        "minicpm3": {**_LATENT, "scale_emb": 2, "dim_model_base": 16, "tie_word_embeddings": False},
    },
    "tied": {
        "gemma": _HEAD,
        "smollm3": {"no_rope_layers": [1, 0]},
        "ernie4_5": _HEAD,
        "gpt2": {"n_inner": 128},
        "gpt_bigcode": {"n_inner": 128},
        "gptj": {"n_inner": 128, "rotary_dim": 16},
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.1},
        "bloom": {},
        "mpt": {"expansion_ratio": 2, "max_seq_len": 128},
        "falcon": {},
        "starcoder2": {},
    },
    "windows": {
        "mistral": {**_HEAD, **_WINDOW},
        "ministral3": {**_HEAD, **_WINDOW},
        "olmo3": _MIXED,
        "exaone4": {**_HEAD, **_MIXED},
        "gemma3_text": {**_HEAD, **_MIXED, "query_pre_attn_scalar": 32},
        "cwm": {**_HEAD, **_MIXED},
    },
    "soft caps, scales": {
        "gemma2": {
            **_HEAD,
            **_MIXED,
            "query_pre_attn_scalar": 32,
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 50.0,
        },
        "vaultgemma": {
            **_HEAD,
            **_MIXED,
            "query_pre_attn_scalar": 32,
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": None,
        },
        "cohere": {"logit_scale": 0.25},
        "cohere2": {**_HEAD, **_MIXED, "logit_scale": 0.25},
        "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
        "hyperclovax": {**_HEAD, "logits_scaling": 0.5},
        "granite_swa": {**_HEAD, **_WINDOW, "logits_scaling": 3.0},
        "gemma3n_text": {
            **_HEAD,
            **_WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "intermediate_size": [128] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "final_logit_softcapping": 4.0,
        },
        "gemma4_text": {
            **_HEAD,
            **_MIXED,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 16,
            "global_head_dim": 32,
            "final_logit_softcapping": 4.0,
        },
    },
    "experts": {
        "mixtral": {**_HEAD, **_LOCAL_EXPERTS},
        "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
        "qwen3_moe": {**_HEAD, **_EXPERTS},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v2": {**_ROUTED, **_LATENT},
        "deepseek_v3": {**_ROUTED, **_LATENT},
        "dots1": {**_HEAD, **_ROUTED},
        "glm4_moe": {**_HEAD, **_ROUTED},
        "glm4_moe_lite": {**_ROUTED, **_LATENT, "mlp_layer_types": ["dense", "sparse"]},
        "ernie4_5_moe": {
            **_HEAD,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
        "granitemoe": {**_LOCAL_EXPERTS, "logits_scaling": 3.0},
        "granitemoeshared": {**_LOCAL_EXPERTS, "logits_scaling": 3.0, "shared_intermediate_size": 32},
        "hunyuan_v1_moe": {**_HEAD, "num_experts": 4, "moe_topk": 2},
        "minimax_m2": {**_HEAD, **_LOCAL_EXPERTS, "rotary_dim": 32},
        "phimoe": {**_LOCAL_EXPERTS, "router_jitter_noise": 0.01},
        "gpt_oss": {**_HEAD, **_LOCAL_EXPERTS, **_WINDOW},
        "afmoe": {**_HEAD, **_EXPERTS, **_WINDOW, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
        "exaone_moe": {**_HEAD, **_EXPERTS, **_MIXED},
        "llama4_text": {
            **_HEAD,
            "num_local_experts": 4,
            "intermediate_size_mlp": 128,
            "attention_chunk_size": 6,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "mellum": {**_HEAD, **_EXPERTS, **_MIXED},
        "hy_v3": {**_HEAD, **_EXPERTS, "num_shared_experts": 1},
        "laguna": {**_HEAD, **_EXPERTS},
        "axk1": {**_ROUTED, **_LATENT},
        "cohere2_moe": {**_HEAD, **_MIXED, "num_experts": 4, "num_experts_per_tok": 2, "logit_scale": 0.25},
        "granitemoe_swa": {**_HEAD, **_LOCAL_EXPERTS, **_WINDOW, "logits_scaling": 3.0},
        "longcat_flash": {
            **_LATENT,
            **_HEAD,
            "num_layers": 2,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        "deepseek_v32": {**_ROUTED, **_LATENT, **_INDEXER},
        "glm_moe_dsa": {**_ROUTED, **_LATENT, **_INDEXER, "mlp_layer_types": ["dense", "sparse"]},
        "hy_v4": {**_ROUTED, **_LATENT, **_INDEXER, **_HEAD},
        "dbrx": {
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 128,
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        },
    },
    "state": {
        "mamba": {"state_size": 16},
        "inkling_text": {
            **_HEAD,
            "vocab_size": 72,
            "unpadded_vocab_size": 64,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 32,
            "sliding_window_size": 6,
            "d_rel": 4,
            "rel_extent": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "logits_mup_width_multiplier": 2.0,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "mamba2": {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
        "falcon_mamba": {"state_size": 16},
        "bamba": {**_MAMBA, "attn_layer_indices": [1]},
        "falcon_h1": {**_HEAD, **_MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
        "granitemoehybrid": {
            **_MAMBA,
            **_LOCAL_EXPERTS,
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 3.0,
            "shared_intermediate_size": 32,
        },
        "jamba": {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
        },
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
        "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "nemotron_h": {
            **_HEAD,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "chunk_size": 16,
        },
        "olmo_hybrid": {"layer_types": _HYBRID},
        "qwen3_next": {**_HEAD, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
        "qwen3_5_text": {**_HEAD, **_DELTA},
        "qwen3_5_moe_text": {**_HEAD, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
        "minimax": {**_HEAD, **_LOCAL_EXPERTS, "layer_types": _HYBRID, "block_size": 16},
        "zamba2": {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "use_mem_rope": True,
            "adapter_rank": 8,
        },
    },
}

FAMILIES = {family: sizes for families in KINDS.values() for family, sizes in families.items()}


def build(family: str, folder: Path) -> str:
    """Writes a family's tiny model, its weights random from the family's name alone; returns its folder.

    Every matrix is far enough from 0 that what a family does with its logits, windows and experts shows in a few tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif not parameter.any():
                # Biases are 0 at first: left out they would not be missed.
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return str(folder)


def sequences(vocab_size: int, seed: int = 0) -> list[tuple[Any, list[Any]]]:
    """Returns random prompts with completions of each, [tokens] int32, longer than the families' windows."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def ids(length: int) -> Any:
        return rng.integers(3, vocab_size, length).astype(np.int32)

    return [(ids(9), [ids(11), ids(1), ids(14)]), (ids(2), [ids(20)])]
