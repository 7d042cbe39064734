"""A tiny model as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path


def write_gguf(path: Path, checkpoint: Path) -> Path:
    """The tiny Llama of `write_model` as a GGUF file, as llama.cpp's converter lays it out."""
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = model.config
    bpe = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_rope_dimension_count(config.hidden_size // heads["attn_q"])
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    writer.add_rope_freq_base(rope["rope_theta"])  # the first form is transformers 5's
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
    }
    for key, value in model.state_dict().items():
        part = key.removeprefix("model.").removesuffix(".weight")
        place = ""
        if part.startswith("layers."):
            _, layer, part = part.split(".", 2)
            place = f"blk.{layer}."
        name = names[part]
        if name in heads:
            value = value.view(heads[name], 2, -1, config.hidden_size).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{place}{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
