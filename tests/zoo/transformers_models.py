"""Architectures of transformers, configured tiny: text, images, audio, several of them at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry, tokens
from zoo.ops import transformers

EOS, PAD, LENGTH = 2, 1, 10

COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim", "n_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("d_kv", "head_dim", "d_head"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
    "bos_token_id": 0,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
    "image_size": 32,
    "patch_size": 8,
}
"""Small values of the options that architectures share; each takes those that it has."""

CLASSIFY: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bart": {},
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "biogpt": {},
    "bloom": {},
    "camembert": {},
    "canine": {"num_hash_buckets": 64, "downsampling_rate": 2, "local_transformer_stride": 4},
    "convbert": {},
    "data2vec-text": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {},
    "electra": {},
    "ernie": {},
    "esm": {"position_embedding_type": "rotary"},
    "flaubert": {},
    "fnet": {},
    "funnel": {"block_sizes": [2, 2], "num_hidden_layers": None},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "hidden_size": 32},
    "ibert": {"quant_mode": False},
    "layoutlm": {},
    "lilt": {"max_2d_position_embeddings": 64, "channel_shrink_ratio": 2, "hidden_size": 48},
    "llama": {},
    "longformer": {"attention_window": 4},
    "megatron-bert": {},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "modernbert": {},
    "mpnet": {},
    "mpt": {},
    "mra": {},
    "nystromformer": {"num_landmarks": LENGTH, "segment_means_seq_len": LENGTH},
    "openai-gpt": {},
    "opt": {"word_embed_proj_dim": 16},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False, "num_hidden_layers": None,
                 "local_attn_chunk_length": 5, "attention_head_size": 16, "feed_forward_size": 64},
    "rembert": {},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roformer": {},
    "squeezebert": {"q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2, "output_groups": 2},
    "t5": {"decoder_start_token_id": EOS},
    "tapas": {},
    "xlm": {},
    "xlnet": {"max_position_embeddings": None},
    "yoso": {},
}  # fmt: skip

CAUSAL: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 4, "n_head": 4, "num_attention_heads": 4},
    "cohere": {},
    "ctrl": {"dff": 64},
    "deepseek_v2": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 16},
    "diffllama": {},
    "falcon": {"head_dim": None},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 4},
    "glm": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 16},
    "lfm2": {},
    "llama": {},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "minimax": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {},
    "nemotron": {},
    "olmo2": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
    "xlstm": {"num_blocks": 4, "chunk_size": 16, "hidden_size": 64, "qk_dim_factor": 1.0, "head_dim": None},
}  # fmt: skip

MASKED: dict[str, dict[str, Any]] = {"albert": {}, "bert": {}, "distilbert": {}, "electra": {}, "modernbert": {}}

TOKENS: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {}, "xlm-roberta": {}}

SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": {},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99},
    "led": {"attention_window": 4},
    "longt5": {"local_radius": 4},
    "m2m_100": {},
    "marian": {},
    "mbart": {},
    "mt5": {},
    "mvp": {},
    "pegasus": {},
    "pegasus_x": {},
    "plbart": {},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2},
    "switch_transformers": {},
    "t5": {},
    "umt5": {},
}  # fmt: skip

QUICK = frozenset(("classify/fnet", "classify/distilbert", "causal/opt"))


def config(kind: str, **options: Any) -> Any:
    """The smallest sensible one; an option of None keeps the architecture's own value."""
    made = transformers.CONFIG_MAPPING[kind]
    defaults = made()
    given = {name: value for name, value in COMMON.items() if hasattr(defaults, name)} | options
    return made(**{name: value for name, value in given.items() if value is not None}, num_labels=3)


def _make(auto: str, kind: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = getattr(transformers, auto).from_config(config(kind, **options))
    return model


def text(rows: int, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """Sentences that end with one mark; every second one is shorter, and padded."""
    ids, mask = tokens(LENGTH)(rows), torch.ones(rows, LENGTH, dtype=torch.int64)
    ids[:, -1] = EOS
    if padded:
        ids[1::2, -4], ids[1::2, -3:], mask[1::2, -3:] = EOS, PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def whole_text(rows: int) -> dict[str, torch.Tensor]:
    return {"input_ids": text(rows, padded=False)["input_ids"]}


def two_texts(rows: int) -> dict[str, torch.Tensor]:
    return {**text(rows), "decoder_input_ids": tokens(LENGTH - 2)(rows)}


def _text_entries(
    task: str, auto: str, table: dict[str, dict[str, Any]], inputs: Callable[[int], Any], tied: str = "together"
) -> list[Entry]:
    return [
        Entry(
            f"{task}/{kind}",
            "transformers",
            partial(_make, auto, kind, options),
            inputs,
            f"{task}/{kind}" in QUICK,
            tied,
        )
        for kind, options in table.items()
    ]


def entries() -> list[Entry]:
    return [
        *_text_entries("classify", "AutoModelForSequenceClassification", CLASSIFY, text),
        *_text_entries("causal", "AutoModelForCausalLM", CAUSAL, whole_text, "untie"),
        *_text_entries("masked", "AutoModelForMaskedLM", MASKED, text, "untie"),
        *_text_entries("tokens", "AutoModelForTokenClassification", TOKENS, text),
        *_text_entries("seq2seq", "AutoModelForSeq2SeqLM", SEQ2SEQ, two_texts, "untie"),
    ]
