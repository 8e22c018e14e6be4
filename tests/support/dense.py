"""Tiny dense models as Hugging Face directories, written without `transformers`."""

import json

import torch
from safetensors.torch import load_file, save_file

from nsa_lightning.checkpoint.dense import read_dense_config
from nsa_lightning.checkpoint.weights import hugging_face_name, write_weights
from nsa_lightning.data.tokenizer import train_tokenizer
from nsa_lightning.model.transformer import Transformer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SOURCES = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 12},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama_no_gqa": {"model_type": "llama", "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "mistral_sliding": {"model_type": "mistral", "sliding_window": 10},
    "mistral_default": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "qwen2_yarn": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_scaling": YARN},
    "qwen2_mixed": {"model_type": "qwen2", "sliding_window": 10, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-3, "attention_bias": False},
}
"""Settings of every supported family and variant, beside the sizes."""

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_source(path, name="llama", *, dtype=torch.float32, shard_bytes=10**9, tokenizer=False, **changes):
    """Write a model whose every weight is random, norms and biases too; returns its directory."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SIZES | SOURCES[name] | changes))
    model = Transformer(read_dense_config(path, "source").config)
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in parameter_name else 0.0
        value = centre + (0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5) * noise
        tensors.append((hugging_face_name(parameter_name), value.to(dtype)))
    write_weights(path, tensors, shard_bytes)
    if tokenizer:
        train_tokenizer(["some text of a few words\n" * 20], 270).save(path / "tokenizer.json")
    return path


def rewrite(path, change):
    """Change the tensors of a source of one file."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
