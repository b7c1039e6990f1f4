"""Families of Hugging Face's `transformers`, as small as their configurations allow, and inputs for them.

Nothing is downloaded: weights are random. Masks leave out the end of the second row.
"""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {**_SIZES, "vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
_FEW_KEYS = {**_TEXT, "num_key_value_heads": 1, "pad_token_id": 0}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 8}
_BOTH_SIDES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

_WORDS = ("input_ids", "attention_mask")
_WITHOUT_CACHE = (*_WORDS, "use_cache")
_TRANSLATED = (*_WITHOUT_CACHE, "decoder_input_ids")


class Family(NamedTuple):
    """A model of a family: the names of its class and of its configuration, the configuration, and its inputs."""

    model: str
    config: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...]


FAMILIES = {
    "albert": Family("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 8}, _WORDS),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig", {**_BOTH_SIDES, "max_position_embeddings": 32}, _TRANSLATED
    ),
    "beit": Family(
        "BeitForImageClassification",
        "BeitConfig",
        {**_IMAGE, "use_relative_position_bias": True},
        ("pixel_values",),
    ),
    "bert": Family("BertForSequenceClassification", "BertConfig", _TEXT, _WORDS),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 8},
        (*_WORDS, "pixel_values"),
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2},
        ("pixel_values",),
    ),
    "deberta_v2": Family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        _WORDS,
    ),
    "deit": Family("DeiTForImageClassificationWithTeacher", "DeiTConfig", _IMAGE, ("pixel_values",)),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 50, "max_position_embeddings": 32},
        _WORDS,
    ),
    "electra": Family("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 8}, _WORDS),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": 50,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _WITHOUT_CACHE,
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _FEW_KEYS, _WITHOUT_CACHE),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", {**_FEW_KEYS, "head_dim": 8, "sliding_window": 4}, _WITHOUT_CACHE
    ),
    "mpnet": Family("MPNetForSequenceClassification", "MPNetConfig", _TEXT, _WORDS),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _FEW_KEYS, _WITHOUT_CACHE),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", _TEXT, _WORDS),
    "swin": Family(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        ("pixel_values",),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
        _TRANSLATED,
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", _IMAGE, ("pixel_values",)),
    "wav2vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **_SIZES,
            "conv_dim": [8, 8],
            "conv_stride": [4, 4],
            "conv_kernel": [8, 4],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "vocab_size": 50,
            "classifier_proj_size": 8,
        },
        ("input_values",),
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BOTH_SIDES, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12},
        ("input_features", "decoder_input_ids", "use_cache"),
    ),
}
"""Encoders, decoders and both, of texts, images and sounds."""


def model_of(name: str) -> nn.Module:
    """Returns a model of the family with random weights."""
    transformers, family = importlib.import_module("transformers"), FAMILIES[name]
    return getattr(transformers, family.model)(getattr(transformers, family.config)(**family.options))


def inputs_of(name: str) -> dict[str, Any]:
    """Returns the arguments of a call, by name, for a batch of two."""
    ids = torch.randint(3, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    made: dict[str, Tensor | bool] = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": ids[:, :5],
        "pixel_values": torch.randn(2, 3, 16, 16),
        "input_values": torch.randn(2, 200),
        "input_features": torch.randn(2, 8, 20),
        "use_cache": False,
    }
    return {key: made[key] for key in FAMILIES[name].inputs}
