"""Small copies of real architectures: the classes of `transformers`, tiny configurations, random weights.

Nothing is downloaded and nothing of the models is changed: the attention implementation, caches, rotary
tables, float32 islands and custom autograd.Functions are those that a user gets. Only sizes are small,
dropout is off (so that two runs agree) and all is float64. An `Entry` says how to build the
model and a batch for it; `loss` and `losses` turn its logits into numbers the same way for every entry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor]

EXAMPLES, LENGTH, VOCAB, CLASSES = 3, 6, 19, 5

# Parts of the model compute in float32 whatever the dtype of the model; rounding there is 6e-8 a number.
FLOAT32 = 1e-5


@dataclass(frozen=True)
class Entry:
    """One architecture. `tolerance` bounds the relative error of a hypergradient; when it is not 1e-9, `why` says why."""

    name: str
    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Batch]
    tolerance: float = 1e-9
    why: str = ""
    slow: bool = False
    train: bool = True

    def build(self) -> tuple[nn.Module, Batch]:
        """The float64 model, the same at every call, and its first batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.model().double().train(self.train)
            with torch.no_grad():
                for parameter in model.parameters():  # zero biases and unit scales would hide mistakes
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model, self.batch(0)

    def batch(self, seed: int) -> Batch:
        """Inputs by the names of the model's arguments, and the class numbers under "targets"."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1 + seed)
            return self.inputs()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy per example, shape (EXAMPLES,): the mean over the positions of its targets."""
    inputs = {name: value for name, value in batch.items() if name != "targets"}
    logits, targets = model(**inputs).logits.double(), batch["targets"]  # Mamba rounds its logits to float32
    each = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return each.view(targets.shape[0], -1).mean(1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of `losses`."""
    return losses(model, batch).mean()


# Inputs


def tokens() -> Batch:
    """Next-token prediction without padding."""
    return {"input_ids": _ids(LENGTH), "targets": _ids(LENGTH)}


def padded_tokens() -> Batch:
    """One class number per position; the examples have different lengths."""
    lengths = torch.tensor([[LENGTH], [LENGTH - 2], [LENGTH - 1]])
    return tokens() | {"attention_mask": (torch.arange(LENGTH) < lengths).long()}


def documents() -> Batch:
    """One class number per example of varying length."""
    return padded_tokens() | {"targets": _classes()}


def sequence_pair() -> Batch:
    """A source and a shorter target sequence."""
    return {"input_ids": _ids(LENGTH), "decoder_input_ids": _ids(LENGTH - 2), "targets": _ids(LENGTH - 2)}


def speech_to_text() -> Batch:
    """Log-mel frames (two of them make one position of the encoder) and a target sequence."""
    frames = torch.randn(EXAMPLES, 8, 2 * LENGTH, dtype=torch.float64)
    return {"input_features": frames, "decoder_input_ids": _ids(LENGTH - 2), "targets": _ids(LENGTH - 2)}


def images(side: int = 16) -> Callable[[], Batch]:
    def make() -> Batch:
        return {"pixel_values": torch.randn(EXAMPLES, 3, side, side, dtype=torch.float64), "targets": _classes()}

    return make


def waves() -> Batch:
    return {"input_values": torch.randn(EXAMPLES, 60, dtype=torch.float64), "targets": _classes()}


def _ids(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (EXAMPLES, length))  # 0, 1, 2 are padding, begin, end


def _classes() -> Tensor:
    return torch.randint(CLASSES, (EXAMPLES,))


# Configurations. Names differ between families, so each spells its own.

_QUIET = {"attention_dropout": 0.0}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _TOKENS | _QUIET | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
_BERT = _TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_VISION = {"num_labels": CLASSES, "image_size": 16, "patch_size": 8, "num_channels": 3}


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        **_TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=8))


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=4))


def bloom() -> nn.Module:
    config = hf.BloomConfig(**_TOKENS, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0)
    return hf.BloomForCausalLM(config)


def opt() -> nn.Module:
    config = hf.OPTConfig(
        **_TOKENS | _QUIET, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, dropout=0.0,
        max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    return hf.OPTForCausalLM(config)


def gpt_neox() -> nn.Module:
    config = _LLAMA | {"num_attention_heads": 2, "hidden_dropout": 0.0}
    del config["num_key_value_heads"]
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**config))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**_BERT))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_BERT, num_labels=CLASSES))


def albert() -> nn.Module:
    """Its layers share one set of weights."""
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**_BERT, embedding_size=8))


def deberta_v2() -> nn.Module:
    config = hf.DebertaV2Config(
        **_BERT, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], max_relative_positions=8,
        num_labels=VOCAB,
    )  # fmt: skip
    return hf.DebertaV2ForTokenClassification(config)


def modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        **_TOKENS | _QUIET, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, embedding_dropout=0.0, mlp_dropout=0.0, local_attention=4,
        global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return hf.ModernBertForMaskedLM(config)


def fnet() -> nn.Module:
    config = {k: v for k, v in _BERT.items() if k not in ("num_attention_heads", "attention_probs_dropout_prob")}
    return hf.FNetForMaskedLM(hf.FNetConfig(**config))


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, d_model=16, d_kv=8, d_ff=24,
        num_layers=2, num_heads=2, relative_attention_num_buckets=4, relative_attention_max_distance=8,
        dropout_rate=0.0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**_TOKENS, **_ENCODER_DECODER))


_ENCODER_DECODER = _QUIET | {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_start_token_id": 1,
}


def vit() -> nn.Module:
    config = hf.ViTConfig(
        **_VISION, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def swin() -> nn.Module:
    config = hf.SwinConfig(
        **_VISION | {"patch_size": 2}, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0
    )
    return hf.SwinForImageClassification(config)


def dinov2() -> nn.Module:
    config = hf.Dinov2Config(**_VISION, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
    return hf.Dinov2ForImageClassification(config)


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        num_labels=CLASSES, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return hf.SegformerForImageClassification(config)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        num_labels=CLASSES, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck"
    )
    return hf.ResNetForImageClassification(config)


def convnext() -> nn.Module:
    config = hf.ConvNextV2Config(
        num_labels=CLASSES, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, drop_path_rate=0.0
    )
    return hf.ConvNextV2ForImageClassification(config)


def mamba() -> nn.Module:
    config = hf.MambaConfig(**_TOKENS, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=2)
    return hf.MambaForCausalLM(config)


def mamba2() -> nn.Module:
    config = hf.Mamba2Config(
        **_TOKENS, hidden_size=8, state_size=4, num_hidden_layers=1, head_dim=4, num_heads=4, n_groups=1, chunk_size=4
    )
    return hf.Mamba2ForCausalLM(config)


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "batched_mm"
    return hf.MixtralForCausalLM(config)


def qwen2_moe() -> nn.Module:
    config = hf.Qwen2MoeConfig(
        **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    config._experts_implementation = "batched_mm"
    return hf.Qwen2MoeForCausalLM(config)


_WAVE = {
    "num_labels": CLASSES,
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def wav2vec2() -> nn.Module:
    return hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**_WAVE))


def hubert() -> nn.Module:
    return hf.HubertForSequenceClassification(hf.HubertConfig(**_WAVE))


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        **_TOKENS, **_ENCODER_DECODER, num_mel_bins=8, max_source_positions=LENGTH, max_target_positions=16
    )
    return hf.WhisperForConditionalGeneration(config)


# About half are in the default suite, at least one of every kind; `make test-all` runs them all.
ZOO = (
    Entry("gpt2", "decoder", gpt2, tokens),
    Entry("llama", "decoder", llama, tokens, FLOAT32, "RMSNorm in float32"),
    Entry("bloom", "decoder", bloom, tokens, FLOAT32, "softmax and ALiBi in float32"),
    Entry("qwen3", "decoder", qwen3, padded_tokens, FLOAT32, "RMSNorm in float32", slow=True),
    Entry("gemma2", "decoder", gemma2, tokens, FLOAT32, "RMSNorm and softmax in float32", slow=True),
    Entry("opt", "decoder", opt, tokens, slow=True),
    Entry("gpt_neox", "decoder", gpt_neox, tokens, slow=True),
    Entry("bert", "encoder", bert, padded_tokens),
    Entry("deberta_v2", "encoder", deberta_v2, padded_tokens),
    Entry("roberta", "encoder", roberta, documents, slow=True),
    Entry("albert", "encoder", albert, padded_tokens, slow=True),
    Entry("modernbert", "encoder", modernbert, padded_tokens, FLOAT32, "queries and keys rotate in float32", slow=True),
    Entry("fnet", "encoder", fnet, tokens, slow=True),
    Entry("t5", "encoder-decoder", t5, sequence_pair, FLOAT32, "norms and softmax in float32"),
    Entry("bart", "encoder-decoder", bart, sequence_pair, slow=True),
    Entry("vit", "vision transformer", vit, images()),
    Entry("swin", "vision transformer", swin, images()),
    Entry("dinov2", "vision transformer", dinov2, images(), slow=True),
    Entry("segformer", "vision transformer", segformer, images(), slow=True),
    Entry("resnet", "conv net", resnet, images()),
    Entry("convnext", "conv net", convnext, images(), slow=True),
    Entry("mamba", "state space", mamba, tokens, FLOAT32, "the state's matrices and the logits are float32"),
    Entry("mamba2", "state space", mamba2, tokens, FLOAT32, "the scan and the logits are float32", slow=True),
    Entry("mixtral", "mixture of experts", mixtral, tokens, FLOAT32, "RMSNorm and router in float32"),
    Entry("qwen2_moe", "mixture of experts", qwen2_moe, tokens, FLOAT32, "RMSNorm and router in float32", slow=True),
    Entry("wav2vec2", "speech", wav2vec2, waves),
    Entry("whisper", "speech", whisper, speech_to_text),
    Entry("hubert", "speech", hubert, waves, slow=True),
)
