"""A Mixtral checkpoint as a GGUF file, for llama.cpp: PYTHON tools/clients/write_gguf.py MODEL FILE bf16|q8_0

Matrices in bfloat16 as they are, or in blocks of 32 as 8 bits; norms and routers in float32, as llama.cpp's own
converter has them. The vocabulary's pieces come along without merges: prompts have to be token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, quants

SPECIAL = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}


class Tensors:
    """Of safetensors files, as bfloat16 in uint16."""

    def __init__(self, model: Path) -> None:
        self._found = {}
        for path in sorted(model.glob("*.safetensors")):
            data = np.memmap(path, mode="r")
            header_bytes = int(data[:8].view(np.uint64)[0])
            for name, about in json.loads(bytes(data[8 : 8 + header_bytes])).items():
                if name != "__metadata__":
                    begin, end = (8 + header_bytes + offset for offset in about["data_offsets"])
                    assert about["dtype"] == "BF16", f"{name} is {about['dtype']}"
                    self._found[name] = data[begin:end].view(np.uint16).reshape(about["shape"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._found[name]


def widened(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32)


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head whose halves are rotated against each other, in pairs as llama.cpp rotates them."""
    rows, width = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def main() -> None:
    model, file, format = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")

    def add(name: str, weight: np.ndarray) -> None:
        if format == "q8_0":
            values = quants.quantize(widened(weight), GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            values = np.ascontiguousarray(weight).view(np.uint8)
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.BF16)

    is_8_bits = format == "q8_0"
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if is_8_bits else LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    add_vocabulary(writer, model, config)
    tensors = Tensors(model)
    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", widened(tensors["model.norm.weight"]))
    add("output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, norm in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            writer.add_tensor(f"{theirs}.{name}.weight", widened(tensors[f"{ours}.{norm}.weight"]))
        add(f"{theirs}.attn_q.weight", interleaved(tensors[f"{ours}.self_attn.q_proj.weight"], heads))
        add(f"{theirs}.attn_k.weight", interleaved(tensors[f"{ours}.self_attn.k_proj.weight"], kv_heads))
        add(f"{theirs}.attn_v.weight", tensors[f"{ours}.self_attn.v_proj.weight"])
        add(f"{theirs}.attn_output.weight", tensors[f"{ours}.self_attn.o_proj.weight"])
        moe = f"{ours}.block_sparse_moe"
        writer.add_tensor(f"{theirs}.ffn_gate_inp.weight", widened(tensors[f"{moe}.gate.weight"]))
        for name, part in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            experts = [tensors[f"{moe}.experts.{one}.{part}.weight"] for one in range(config["num_local_experts"])]
            add(f"{theirs}.ffn_{name}_exps.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: GGUFWriter, model: Path, config: dict) -> None:
    size = config["vocab_size"]
    pieces = [f"<{number}>" for number in range(size)]
    for piece, number in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].items():
        if number < size:
            pieces[number] = piece
    types = [
        SPECIAL.get(one, TokenType.BYTE if one.startswith("<0x") and len(one) == 6 else TokenType.NORMAL)
        for one in pieces
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


if __name__ == "__main__":
    main()
