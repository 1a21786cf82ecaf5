"""What makes each model type of transformers tiny, and what keeps a few from being tried (see `sweep`)."""

from __future__ import annotations

from typing import Any

VOCABULARY = 97
# Given to each type that has a setting of that name.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "top_k_experts": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "is_decoder": True,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "sliding_window": 16,
    "init_std": 0.2,
    # Where there are no kernels, a chunk takes its length squared times states and heads: gigabytes by default.
    "mamba_chunk_size": 8,
    "mamba_d_state": 16,
}
# What is not text: encoders of images and sound.
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "encoder_ffn_dim": 32,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 32,
    "patch_size": 16,
    "out_hidden_size": 64,
    "projection_dim": 64,
}
# Names of the parts of a configuration that are language models themselves, or settings of one.
TEXTS = ("text", "attn_config", "ffn_config", "thinker", "language", "decoder", "llm", "global", "encoder", "patcher")

LEFT = object()  # as the type has it
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
LATENT = {"num_key_value_heads": 4}
ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SECTIONED = {"rope_parameters": ROTARY}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Settings that a type needs beyond those.
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "afmoe",
            "cohere2",
            "cohere2_moe",
            "exaone4",
            "exaone_moe",
            "gemma3_text",
            "gemma4_text",
            "kolibri1",
            "ministral",
            "olmo3",
        ),
        MIXED,
    ),
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
            "hy_v4",
            "mistral4",
            "mistral_large4_text",
            "dots3_note_text",
            "glm5_next_text",
        ),
        LATENT,
    ),
    **dict.fromkeys(("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), HYBRID),
    **dict.fromkeys(
        (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "glm4v_text",
            "glm46v_text",
            "glm_ocr_text",
            "glmga_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "hunyuan_vl_text",
            "cosmos3_edge_text",
        ),
        SECTIONED,
    ),
    "glm4v_moe_text": {"rope_parameters": ROTARY | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "bailing_hybrid": HYBRID | LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID | LATENT,
    "lfm2": CONVOLUTION,
    "lfm3": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "qwen4_exp_text": HYBRID | INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "chunk_size": 8, "state_size": 16},
    "nemotron_h": {"chunk_size": 8, "ssm_state_size": 16},
    "mistral": {"sliding_window": None},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "chunk_size": 8},
    "xlnet": {"max_position_embeddings": LEFT, "d_model": 64, "n_head": 4},
    "prophetnet": {"num_hidden_layers": LEFT, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "plbart": {"num_attention_heads": LEFT},
    "whisper": {"num_attention_heads": LEFT, "num_key_value_heads": LEFT},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "gemma4_text": MIXED
    | {
        "head_dim": LEFT,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4_unified_text": MIXED | {"head_dim": LEFT},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 16,
    },
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16},
    "longcat_flash": LATENT | {"zero_expert_num": 2},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "step3p5": {"sliding_window": 16},
    "inkling2_vision": {"text_hidden_size": 64},
    "glm5_next_text": LATENT | {"qk_rope_head_dim": 0},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": ROTARY | {"mrope_section": [3, 3, 2]},
    },
}
NO_IMAGE = "reads no text without an image"
NO_CHUNK = "reads no text in parts without positions of its own"
NO_TIMM = "needs the package timm"
LARGE = "its image encoder has one size, which is large"
UNFIT = "its parts must fit each other in ways of their own"
# Types of which no tiny model is made here, or none that reads text alone.
UNTRIED = {
    "blip-2": NO_IMAGE,
    "chameleon": NO_IMAGE,
    "deepseek_ocr2": LARGE,
    "diffusion_gemma": "generates by diffusion",
    "evolla": "reads proteins",
    "fast_vlm": NO_TIMM,
    "gemma3n": NO_TIMM,
    "gemma4_assistant": "drafts for another model",
    "granite4_vision": UNFIT,
    "idefics": NO_IMAGE,
    "instructblip": NO_IMAGE,
    "instructblipvideo": NO_IMAGE,
    "kosmos-2": NO_IMAGE,
    "muse_spark": UNFIT,
    "nemotron_h_omni": UNFIT,
    "perception_lm": NO_TIMM,
    "pi0": "moves a robot",
    "qwen2_5_omni_thinker": NO_CHUNK,
    "qwen3_omni_moe_thinker": NO_CHUNK,
    "unlimited_ocr": LARGE,
}
