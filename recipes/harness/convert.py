"""Writes the weights of a GGUF file, dequantized to f32, and its tokenizer as a directory that transformers opens.

    python convert.py MODEL.gguf DIR

Models of the architectures `llama` and `qwen2` whose tokenizer is a byte-level BPE (`smollm`, `qwen2`). The weights are those
that the file has; nothing is rounded again.
"""

import argparse
import json
import pathlib

import gguf
import numpy
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4


class Metadata:
    """The key-value pairs of a GGUF file."""

    def __init__(self, reader):
        self.fields = reader.fields
        self.architecture = self["general.architecture"]

    def __getitem__(self, key):
        return self.fields[key].contents()

    def get(self, key, default=None):
        return self[key] if key in self.fields else default

    def of_model(self, key, default=None):
        return self.get(f"{self.architecture}.{key}", default)


def configuration(metadata, tied):
    heads = metadata.of_model("attention.head_count")
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[metadata.architecture]],
        "model_type": metadata.architecture,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata.of_model("embedding_length"),
        "intermediate_size": metadata.of_model("feed_forward_length"),
        "num_hidden_layers": metadata.of_model("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.of_model("attention.head_count_kv", heads),
        "max_position_embeddings": metadata.of_model("context_length"),
        "rms_norm_eps": metadata.of_model("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.of_model("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }


def unpermuted(weight, heads):
    """Rows of a query or key projection in the order of transformers: GGUF pairs neighbouring rows for the rotation."""
    shape = weight.shape
    return weight.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def hub_name(name):
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def weights(reader, metadata, config):
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            raise SystemExit("this script does not read scaled rotations (rope_freqs.weight)")
        values = dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        part = tensor.name.split(".")[-2]
        if metadata.architecture == "llama" and part in heads:
            values = unpermuted(values, heads[part])
        found[hub_name(tensor.name)] = torch.from_numpy(numpy.ascontiguousarray(values))
    return found


def tokenizer(metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    kind = metadata["tokenizer.ggml.pre"]
    if kind == "smollm":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind == "qwen2":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        raise SystemExit(f"this script does not know the pre-tokenizer {kind!r}")
    made.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == CONTROL]
    )
    made.add_tokens([AddedToken(token) for token, kind in zip(tokens, kinds) if kind == USER_DEFINED])
    return made


def convert(gguf_file, directory):
    directory = pathlib.Path(directory)
    if (directory / "model.safetensors").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(gguf_file)
    metadata = Metadata(reader)
    config = configuration(metadata, all(tensor.name != "output.weight" for tensor in reader.tensors))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer(metadata).save(str(directory / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos"):
        at = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if at is not None:
            special[f"{name}_token"] = tokens[at]
    (directory / "tokenizer_config.json").write_text(json.dumps(special, indent=2))
    partial = directory / "partial.safetensors"
    save_file(weights(reader, metadata, config), partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf_file")
    parser.add_argument("directory")
    arguments = parser.parse_args()
    convert(arguments.gguf_file, arguments.directory)
