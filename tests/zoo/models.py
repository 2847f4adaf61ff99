"""Small copies of real architectures: the classes of `transformers`, tiny configurations, random weights.

Nothing is downloaded and nothing of the models is changed: attention, caches, rotary tables, float32
islands, in-place updates and custom autograd.Functions are those that a user gets. Only the sizes are
small, dropout is off (so that two runs agree) and all is float64. An `Entry` builds the model
and its batches; `losses` and `loss` turn its logits into numbers the same way for every entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor]

EXAMPLES, LENGTH, VOCAB, CLASSES, SIDE = 3, 6, 19, 5, 16

# For models that compute in float32 here and there, whatever the dtype of their parameters: two exact
# derivatives of them differ by 1e-9 (rotary embeddings) to 6e-7 (delta rule), so a factor of 15 is left.
FLOAT32 = 1e-5


@dataclass(frozen=True)
class Entry:
    """One architecture. `tolerance` bounds the relative error of a hypergradient; a loose one says `why`."""

    name: str
    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Batch]
    tolerance: float = 1e-9
    why: str = ""
    slow: bool = False

    def build(self) -> tuple[nn.Module, Batch]:
        """The model in float64 and in training mode, the same at every call, and its first batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model().double().train()
            with torch.no_grad():
                for parameter in model.parameters():  # zero biases and unit scales would hide mistakes
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model, self.batch(0)

    def batch(self, seed: int) -> Batch:
        """Inputs by the names of the model's arguments, and the class numbers under "targets"."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1 + seed)
            return self.inputs()


def losses(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Cross entropy per example, shape (EXAMPLES,): the mean over the positions of its targets."""
    inputs = {name: value for name, value in batch.items() if name != "targets"}
    logits, targets = model(**inputs).logits, batch["targets"]
    each = F.cross_entropy(logits.flatten(0, -2).double(), targets.flatten(), reduction="none")
    return each.view(targets.shape[0], -1).mean(1)


def loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The mean of `losses`."""
    return losses(model, batch).mean()


# Inputs


def tokens() -> Batch:
    """A class number to predict at every position."""
    return {"input_ids": _tokens(LENGTH), "targets": _tokens(LENGTH)}


def padded_tokens() -> Batch:
    """The same for examples of different lengths."""
    lengths = torch.tensor([[LENGTH], [LENGTH - 2], [LENGTH - 1]])
    return tokens() | {"attention_mask": (torch.arange(LENGTH) < lengths).long()}


def documents() -> Batch:
    """One class number for each example of different lengths."""
    return padded_tokens() | {"targets": _classes()}


def pairs() -> Batch:
    """A source and a shorter target."""
    return {"input_ids": _tokens(LENGTH), **_decoded()}


def spoken_words() -> Batch:
    """Log-mel frames, of which two make one position of the encoder, and a target."""
    return {"input_features": _noise(8, 2 * LENGTH), **_decoded()}


def sounds() -> Batch:
    return {"input_values": _noise(60), "targets": _classes()}


def images() -> Batch:
    return {"pixel_values": _noise(3, SIDE, SIDE), "targets": _classes()}


def _decoded() -> Batch:
    return {"decoder_input_ids": _tokens(LENGTH - 2), "targets": _tokens(LENGTH - 2)}


def _tokens(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (EXAMPLES, length))  # 0, 1 and 2 are padding, begin and end


def _classes() -> Tensor:
    return torch.randint(CLASSES, (EXAMPLES,))


def _noise(*shape: int) -> Tensor:
    return torch.randn(EXAMPLES, *shape, dtype=torch.float64)


# Models. Families name the same sizes differently.


def of(model: Callable[[Any], nn.Module], **config: Any) -> Callable[[], nn.Module]:
    """A builder of `model` from a configuration with these values."""
    return lambda: model(model.config_class(**config))


def experts(**config: Any) -> Callable[[], nn.Module]:
    """The same for a mixture of experts; of the ways that transformers computes one only "batched_mm" does.

    "eager" loops over the experts that were hit, which depends on data, and the default, "grouped_mm", has no
    float64 kernel.
    """

    def build() -> nn.Module:
        values = hf.AutoConfig.for_model(**config)
        return hf.AutoModelForCausalLM.from_config(values, experts_implementation="batched_mm")

    return build


WORDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
LLAMA = WORDS | SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
BERT = WORDS | SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = LLAMA | {"num_experts_per_tok": 2}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
}
IMAGES = {"num_labels": CLASSES, "image_size": SIDE, "patch_size": 8}
VIT = IMAGES | SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DINO = IMAGES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
WAVE = {
    **{"num_labels": CLASSES, "vocab_size": VOCAB, "classifier_proj_size": 8},
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0},
    **{"feat_proj_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False},
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": of(
        hf.GPT2LMHeadModel,
        **WORDS,
        **{"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": of(hf.LlamaForCausalLM, **LLAMA),
    "qwen3": of(hf.Qwen3ForCausalLM, **LLAMA, head_dim=8),
    "gemma2": of(hf.Gemma2ForCausalLM, **LLAMA, head_dim=8, sliding_window=4),
    "bloom": of(hf.BloomForCausalLM, **WORDS, hidden_size=16, n_layer=2, n_head=2),
    "opt": of(hf.OPTForCausalLM, **WORDS, **SIZES, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "gpt_neox": of(hf.GPTNeoXForCausalLM, **WORDS, **SIZES),
    "hrm_text": of(  # all but the last of its inner cycles run under no_grad
        hf.HrmTextForCausalLM,
        **LLAMA | {"num_hidden_layers": 1},
        **{"head_dim": 8, "H_cycles": 1, "L_cycles": 3},
    ),
    "bert": of(hf.BertForMaskedLM, **BERT),
    "roberta": of(hf.RobertaForSequenceClassification, **BERT, num_labels=CLASSES),
    "albert": of(hf.AlbertForMaskedLM, **BERT, embedding_size=8),
    "deberta_v2": of(
        hf.DebertaV2ForTokenClassification,
        **BERT,
        **{"relative_attention": True, "position_buckets": 4, "max_relative_positions": 8},
        **{"pos_att_type": ["p2c", "c2p"], "num_labels": VOCAB},
    ),
    "modernbert": of(
        hf.ModernBertForMaskedLM,
        **WORDS,
        **SIZES,
        **{"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "fnet": of(hf.FNetForMaskedLM, **WORDS, **SIZES, hidden_dropout_prob=0.0),
    "t5": of(
        hf.T5ForConditionalGeneration,
        **{"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
        **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
        **{"relative_attention_num_buckets": 4, "relative_attention_max_distance": 8},
    ),
    "bart": of(hf.BartForConditionalGeneration, **WORDS, **BART, max_position_embeddings=16),
    "vit": of(hf.ViTForImageClassification, **VIT),
    "swin": of(
        hf.SwinForImageClassification,
        **IMAGES | {"patch_size": 2},
        **{"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4, "drop_path_rate": 0.0},
    ),
    "dinov2": of(hf.Dinov2ForImageClassification, **DINO),
    "segformer": of(
        hf.SegformerForImageClassification,
        **{"num_labels": CLASSES, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1]},
        **{"hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]},
        **{"num_attention_heads": [1, 2], "decoder_hidden_size": 8, "drop_path_rate": 0.0},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0},
    ),
    "resnet": of(
        hf.ResNetForImageClassification,
        **{"num_labels": CLASSES, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
    ),
    "convnext": of(
        hf.ConvNextV2ForImageClassification,
        **{"num_labels": CLASSES, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        patch_size=2,
    ),
    "mamba": of(
        hf.MambaForCausalLM,
        **WORDS,
        **{"hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2},
    ),
    "mamba2": of(
        hf.Mamba2ForCausalLM,
        **WORDS,
        **{"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "head_dim": 4, "num_heads": 4},
        **{"n_groups": 1, "chunk_size": 4},
    ),
    "qwen3_next": experts(
        model_type="qwen3_next",
        **EXPERTS,
        **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
        **{"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "mixtral": experts(model_type="mixtral", **EXPERTS, num_local_experts=4),
    "qwen2_moe": experts(
        model_type="qwen2_moe",
        **EXPERTS,
        **{"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    "deepseek_v3": experts(
        model_type="deepseek_v3",
        **EXPERTS | {"num_key_value_heads": 4},
        **{"q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
        **{"moe_intermediate_size": 8, "first_k_dense_replace": 1},
    ),
    "wav2vec2": of(hf.Wav2Vec2ForSequenceClassification, **WAVE),
    "hubert": of(hf.HubertForSequenceClassification, **WAVE),
    "whisper": of(
        hf.WhisperForConditionalGeneration,
        **WORDS,
        **BART,
        **{"num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 16},
    ),
}


def fast(name: str, kind: str, inputs: Callable[[], Batch], tolerance: float = 1e-9, why: str = "") -> Entry:
    """An entry of the default suite."""
    return Entry(name, kind, MODELS[name], inputs, tolerance, why)


def slow(name: str, kind: str, inputs: Callable[[], Batch], tolerance: float = 1e-9, why: str = "") -> Entry:
    """An entry that only `make test-all` runs."""
    return Entry(name, kind, MODELS[name], inputs, tolerance, why, slow=True)


ZOO = (
    fast("gpt2", "decoder", tokens),
    fast("llama", "decoder", tokens, FLOAT32, "RMSNorm in float32"),
    fast("bloom", "decoder", tokens, FLOAT32, "softmax in float32"),
    slow("qwen3", "decoder", padded_tokens, FLOAT32, "RMSNorm in float32"),
    slow("gemma2", "decoder", tokens, FLOAT32, "RMSNorm and softmax in float32"),
    slow("opt", "decoder", tokens),
    slow("gpt_neox", "decoder", tokens),
    slow("hrm_text", "decoder", tokens, FLOAT32, "RMSNorm in float32"),
    fast("bert", "encoder", padded_tokens),
    fast("deberta_v2", "encoder", padded_tokens),
    slow("roberta", "encoder", documents),
    slow("albert", "encoder", padded_tokens),
    slow("modernbert", "encoder", padded_tokens, FLOAT32, "queries and keys rotate in float32"),
    slow("fnet", "encoder", tokens),
    fast("t5", "encoder-decoder", pairs, FLOAT32, "RMSNorm and softmax in float32"),
    slow("bart", "encoder-decoder", pairs),
    fast("vit", "vision transformer", images),
    fast("swin", "vision transformer", images),
    slow("dinov2", "vision transformer", images),
    slow("segformer", "vision transformer", images),
    fast("resnet", "conv net", images),
    slow("convnext", "conv net", images),
    fast("mamba", "state space", tokens, FLOAT32, "state matrices and logits in float32"),
    slow("mamba2", "state space", tokens, FLOAT32, "scan and logits in float32"),
    slow("qwen3_next", "state space", tokens, FLOAT32, "RMSNorm, delta rule and router in float32"),
    fast("mixtral", "mixture of experts", tokens, FLOAT32, "RMSNorm and router in float32"),
    slow("qwen2_moe", "mixture of experts", tokens, FLOAT32, "RMSNorm and router in float32"),
    slow("deepseek_v3", "mixture of experts", tokens, FLOAT32, "RMSNorm and router in float32"),
    fast("wav2vec2", "speech", sounds),
    fast("whisper", "speech", spoken_words),
    slow("hubert", "speech", sounds),
)
