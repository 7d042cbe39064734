"""llama.cpp by way of llama-cpp-python, with what successive prompts begin with in common kept.

The GGUF file is written here, as llama.cpp's own converter lays it out; that one comes with
llama.cpp's sources only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from benchmarks.peers.engine import LONGEST, Generator, Order, Prompts, convert, serve

_FILE = "model.gguf"
_FORMS = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
_NAMES = {
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
"""A tensor in a checkpoint of Llama or Qwen2 -> in GGUF."""


class LlamaCpp(Generator):
    """llama.cpp with the weights and the cache in float32, or with weights in 8 or 4 bits."""

    packages = ("llama_cpp_python",)

    def __init__(self, order: Order) -> None:
        def write(folder: Path) -> None:
            whole = folder / "whole.gguf"
            write_gguf(Path(order.source), whole)
            if order.form == "fp32":
                whole.rename(folder / _FILE)
                return
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = _FORMS[order.form]
            settings.nthread = order.threads
            names = (str(path).encode() for path in (whole, folder / _FILE))
            if llama_cpp.llama_model_quantize(*names, settings):
                raise RuntimeError(f"llama.cpp cannot quantize to {order.form}")
            whole.unlink()

        cache_types = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        self._llama = llama_cpp.Llama(
            str(Path(convert(order, write), _FILE)),
            n_ctx=LONGEST,
            n_batch=LONGEST,
            n_threads=order.threads,
            n_threads_batch=order.threads,
            verbose=False,
            **(cache_types if order.form == "fp32" else {}),
        )

    def greedy(self, prompts: Prompts) -> list[int]:
        """See `Generator.greedy`."""
        return [
            next(self._llama.generate(prompt, temp=0.0))
            for dialogue in prompts
            for prompt in dialogue
        ]


def write_gguf(checkpoint: Path, path: Path) -> None:
    """A checkpoint of Llama or Qwen2 as a GGUF file in float32, whose tokens have no names."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = GGUFWriter(str(path), kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads["attn_q"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>" for token in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    for key, value in _tensors(checkpoint):
        name, _, kind_of = key.removeprefix("model.").rpartition(".")
        prefix = ""
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            prefix = f"blk.{layer}."
        name = _NAMES[name]
        if kind == "llama" and name in heads:  # rotated in pairs of neighbours, not of halves
            tail_shape = value.shape[1:]
            value = (
                value.reshape(heads[name], 2, -1, *tail_shape)
                .swapaxes(1, 2)
                .reshape(-1, *tail_shape)
            )
        writer.add_tensor(f"{prefix}{name}.{kind_of}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """The tensors of a checkpoint in bfloat16, a type that NumPy doesn't have."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        content = np.fromfile(path, np.uint8)
        size = int(content[:8].view(np.int64)[0])
        header: Mapping[str, Any] = json.loads(content[8 : 8 + size].tobytes())
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {key} is not in bfloat16")
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            halves = content[start:end].view(np.uint16).astype(np.uint32)
            yield key, (halves << 16).view(np.float32).reshape(entry["shape"])


if __name__ == "__main__":
    serve(LlamaCpp)
