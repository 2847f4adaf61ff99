"""Local rules of layers: convolution, normalisation, attention, tables, pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlc.ir.core import Eqn, Var, aten
from mlc.ir.types import TensorType
from mlc.passes.microbatch.dependence import SAME, SUM, Local, Shard, Site, Size, shape_of

__all__ = ["LAYERS", "aligned"]

Rule = Callable[[Site], Local | None]


def aligned(s: Site, values: Sequence[Var]) -> Shard | None:
    """Dependence that all of these values of one rank can be read with."""
    c = s.shard(values)
    if c is None:
        return None
    sizes = {shape_of(v)[c.dim] if c.dim < len(shape_of(v)) else -1 for v in values}
    return c if len(sizes) == 1 and all(s.take(v, c) for v in values) else None


def _convolution(s: Site) -> Local | None:
    """Examples one by one; or, in the gradient of a weight, examples as channels that are summed over."""
    x, w, bias = s.get("input"), s.get("weight"), s.vars("bias")
    own = s.kind(x)
    if isinstance(own, Shard) and own.dim == 0:
        return s.all(own) if s.fix(w, *bias) else None
    c = s.shard([x, w])
    if c is None or c.dim != 1 or s.get("transposed") or s.get("groups") != 1 or bias:
        return None
    return s.all(SUM) if shape_of(x)[1] == shape_of(w)[1] and s.take(x, c) and s.take(w, c) else None


def _masked(s: Site, kinds: Sequence[Any]) -> Local | None:
    """Results that ``output_mask`` asks for."""
    outs = tuple(k for k, m in zip(kinds, s.get("output_mask"), strict=True) if m)
    return Local(outs) if len(outs) == len(s.e.outs) else None


def _convolution_backward(s: Site) -> Local | None:
    c = aligned(s, s.vars("grad_output", "input"))
    if c is None or c.dim != 0 or not s.fix(s.get("weight")):
        return None
    return _masked(s, (c, SUM, SUM))


def _layer_norm(*names: str) -> Rule:
    def rule(s: Site) -> Local | None:
        c = aligned(s, s.vars(*names))
        rest = len(s.get("normalized_shape"))
        if c is None or c.dim >= len(shape_of(s.get("input"))) - rest or not s.fix(*s.vars("weight", "bias")):
            return None
        if s.get("output_mask") is None:
            return s.all(c)
        return _masked(s, (c, SUM, SUM)[: len(s.get("output_mask"))])

    return rule


def _group_norm(*names: str) -> Rule:
    def rule(s: Site) -> Local | None:
        c = aligned(s, s.vars(*names))
        if c is None or c.dim != 0 or not s.fix(*s.vars("weight", "bias")):
            return None
        changed = {"N": Size(s.get("N"))}
        if s.get("output_mask") is None:
            return s.all(c, set=changed)
        found = _masked(s, (c, SUM, SUM))
        return None if found is None else Local(found.outs, set=changed)

    return rule


def _batch_norm(*names: str) -> Rule:
    """With running statistics it is a scale; in training mode every example sees the others."""

    def rule(s: Site) -> Local | None:
        if s.get("training", False) or s.get("train", False) or not s.vars("running_mean"):
            return None
        values = s.vars(*names)
        c = aligned(s, values)
        if c is None or c.dim == 1 or not s.fix(*[v for v in s.e.inputs if v not in values]):
            return None
        if s.get("output_mask") is not None:
            return _masked(s, (c, SUM, SUM))
        return _with_empty(s, c)

    return rule


def _with_empty(s: Site, c: Shard) -> Local | None:
    """Statistics that were not computed are empty, whatever the batch."""
    early = []
    for v in s.e.outs[1:]:
        t = v.type
        assert isinstance(t, TensorType)
        if t.numel:
            return None
        early.append(Eqn(aten("zeros"), (list(t.shape),), (v,), (("dtype", t.dtype), ("device", t.device)), s.e.loc))
    return Local((c, *[SAME] * len(early)), early=tuple(early))


def _attention(*names: str) -> Rule:
    """Fused attention without dropout: heads and positions of one example."""

    def rule(s: Site) -> Local | None:
        values = s.vars(*names)
        c = aligned(s, values)
        mask = s.vars("attn_mask")
        if c is None or c.dim != 0 or s.get("dropout_p"):
            return None
        for v in mask:
            alone = len(shape_of(v)) < 4 or shape_of(v)[0] == 1
            if not (s.fix(v) if alone else s.take(v, c)):
                return None
        return s.all(c)

    return rule


def _embedding(s: Site) -> Local | None:
    c = s.kind(s.get("indices"))
    return s.all(c) if isinstance(c, Shard) and s.fix(s.get("weight")) else None


def _embedding_backward(s: Site) -> Local | None:
    c = s.shard(s.vars("indices")) or s.shard(s.vars("grad_output"))
    if c is None or s.get("scale_grad_by_freq") or c.dim >= len(shape_of(s.get("indices"))):
        return None
    return s.all(SUM) if s.take(s.get("indices"), c) and s.take(s.get("grad_output"), c) else None


def _leading(*names: str, rest: int, sizes: str = "") -> Rule:
    """Values of one rank whose last ``rest`` dimensions are worked on together (pooling, up-sampling)."""

    def rule(s: Site) -> Local | None:
        values = s.vars(*names)
        c = aligned(s, values)
        if c is None or c.dim >= len(shape_of(values[0])) - rest:
            return None
        if not s.fix(*[v for v in s.e.inputs if v not in values]):
            return None
        return s.all(c, set={sizes: s.sizes(s.out(), c)} if sizes else {})

    return rule


LAYERS: dict[str, Rule] = {
    "convolution": _convolution, "convolution_backward": _convolution_backward,
    "native_layer_norm": _layer_norm("input"), "native_group_norm": _group_norm("input"),
    "native_layer_norm_backward": _layer_norm("grad_out", "input", "mean", "rstd"),
    "native_group_norm_backward": _group_norm("grad_out", "input", "mean", "rstd"),
    "_fused_rms_norm": _layer_norm("input"), "_fused_rms_norm_backward": _layer_norm("grad_out", "input", "rstd"),
    "native_batch_norm": _batch_norm("input"), "_native_batch_norm_legit": _batch_norm("input"),
    "native_batch_norm_backward": _batch_norm("grad_out", "input"),
    "_scaled_dot_product_flash_attention_for_cpu": _attention("query", "key", "value"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention(
        "grad_out", "query", "key", "value", "out", "logsumexp"),
    "embedding": _embedding, "embedding_dense_backward": _embedding_backward,
    "max_pool2d_with_indices": _leading("self", rest=2), "avg_pool2d": _leading("self", rest=2),
    "max_pool2d_with_indices_backward": _leading("grad_output", "self", "indices", rest=2),
    "avg_pool2d_backward": _leading("grad_output", "self", rest=2),
    "_adaptive_avg_pool2d": _leading("self", rest=2),
    "_adaptive_avg_pool2d_backward": _leading("grad_output", "self", rest=2),
    "upsample_nearest2d": _leading("self", rest=2), "upsample_bilinear2d": _leading("self", rest=2),
    "upsample_nearest2d_backward": _leading("grad_output", rest=2, sizes="input_size"),
    "upsample_bilinear2d_backward": _leading("grad_output", rest=2, sizes="input_size"),
    "pixel_shuffle": _leading("self", rest=3), "pixel_unshuffle": _leading("self", rest=3),
    "reflection_pad2d": _leading("self", rest=2), "replication_pad2d": _leading("self", rest=2),
}  # fmt: skip
