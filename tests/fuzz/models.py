"""Models: from a batch of examples to three numbers each, in every kind of layer.

Traits: `smooth` (no kink whatever the activation), `act` (has the activation of the spec), `bn` (running statistics),
`drop` (random in training), `own` (a class of its own), `ints` (the batch is indices), `frozen` (has
parameters that are not trained), `mixes` (the examples of a batch see each other), `first` (plain PyTorch has no
second derivative of it).
"""

from __future__ import annotations

from tests.fuzz.draft import Draft
from tests.fuzz.piece import Axis

MODELS = Axis("model")

SMOOTH = ("Tanh", "GELU", "SiLU", "Softplus", "Mish", "Sigmoid", "Softsign", "LogSigmoid", "Tanhshrink")
KINKED = ("ReLU", "ELU", "LeakyReLU", "SELU", "CELU", "PReLU", "Hardswish", "ReLU6", "Hardtanh", "Softshrink")
ACTS = (*SMOOTH, *KINKED)


def sequential(name: str, layers: str, shape: tuple[int, ...] = (4,), traits: str = "", weight: float = 1.0) -> None:
    def write(d: Draft) -> None:
        d.make.append(f"model = nn.Sequential({layers.format(act=f'nn.{d.spec.act}()')})")
        d.shape = shape

    MODELS.put(name, write, traits + (" act" if "{act}" in layers else ""), weight=weight)


def own(
    name: str,
    init: str,
    forward: str,
    shape: tuple[int, ...] = (4,),
    traits: str = "",
    weight: float = 1.0,
    more: str = "",
) -> None:
    """A class of its own: statements of `__init__` and `forward`, separated by semicolons."""

    def write(d: Draft) -> None:
        act = f"nn.{d.spec.act}()"
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {s.strip()}" for s in init.format(act=act).split(";")]
        lines += ["", "    def forward(self, x):", *(f"        {s.strip()}" for s in forward.split(";"))]
        d.define("\n".join(lines))
        d.make.append("model = Net()")
        d.make += [more] if more else []
        d.shape = shape

    MODELS.put(name, write, f"{traits} own" + (" act" if "{act}" in init else ""), weight=weight)


sequential("linear", "nn.Linear(4, 3)", traits="smooth")
sequential("mlp", "nn.Linear(4, 5), {act}, nn.Linear(5, 3)", weight=4)
sequential("deep", "nn.Linear(4, 4), {act}, nn.Linear(4, 4), {act}, nn.Linear(4, 3, bias=False)")
sequential("batchnorm", "nn.Linear(4, 5), nn.BatchNorm1d(5), {act}, nn.Linear(5, 3)", traits="bn mixes", weight=2)
sequential("batchnorm_plain", "nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)", traits="bn mixes smooth")
sequential(
    "batchnorm_mean", "nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None), {act}, nn.Linear(5, 3)", traits="bn mixes"
)
sequential("layernorm", "nn.Linear(4, 5), nn.LayerNorm(5), {act}, nn.Linear(5, 3)")
sequential("rmsnorm", "nn.Linear(4, 5), nn.RMSNorm(5), {act}, nn.Linear(5, 3)")
sequential("groupnorm", "nn.Linear(4, 6), nn.GroupNorm(2, 6), {act}, nn.Linear(6, 3)")
sequential("dropout", "nn.Linear(4, 6), {act}, nn.Dropout(0.3), nn.Linear(6, 3)", traits="drop", weight=2)
sequential("alpha_dropout", "nn.Linear(4, 6), {act}, nn.AlphaDropout(0.2), nn.Linear(6, 3)", traits="drop")
sequential("glu", "nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 3)", traits="smooth")
sequential("softmax", "nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3), nn.LogSoftmax(1)", traits="smooth")
sequential("maxout", "nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), nn.MaxPool1d(2), nn.Flatten()", traits="kinked")

conv = "nn.Conv2d(1, 2, 3, padding=1), {act}, "
sequential("conv2d", conv + "nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)", (1, 4, 4), weight=2)
sequential("conv2d_max", conv + "nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)", (1, 4, 4), "kinked")
sequential("conv2d_global", conv + "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)", (1, 4, 4))
sequential(
    "conv2d_bn", "nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), {act}, nn.Flatten(), nn.Linear(8, 3)", (1, 4, 4), "bn mixes"
)
sequential("conv2d_gn", "nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), {act}, nn.Flatten(), nn.Linear(16, 3)", (1, 4, 4))
sequential(
    "conv2d_in",
    "nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, affine=True), {act}, nn.Flatten(), nn.Linear(8, 3)",
    (1, 4, 4),
)
sequential("conv2d_stride", "nn.Conv2d(2, 4, 3, stride=2, groups=2), {act}, nn.Flatten(), nn.Linear(16, 3)", (2, 5, 5))
sequential("conv2d_up", "nn.ConvTranspose2d(1, 2, 2, stride=2), {act}, nn.Flatten(), nn.Linear(32, 3)", (1, 2, 2))
sequential("conv2d_drop", conv + "nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(32, 3)", (1, 4, 4), "drop")
sequential("conv1d", "nn.Conv1d(2, 3, 3), {act}, nn.AvgPool1d(2), nn.Flatten(), nn.Linear(6, 3)", (2, 6))
sequential("conv1d_max", "nn.Conv1d(2, 3, 3), {act}, nn.AdaptiveMaxPool1d(1), nn.Flatten()", (2, 6), "kinked")
sequential(
    "conv1d_bn", "nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), {act}, nn.Flatten(), nn.Linear(12, 3)", (2, 6), "bn mixes"
)
sequential("upsample", "nn.Upsample(scale_factor=2), nn.Conv1d(2, 1, 3), {act}, nn.Flatten(), nn.Linear(4, 3)", (2, 3))

own(
    "residual",
    "self.a = nn.Linear(4, 4); self.act = {act}; self.b = nn.Linear(4, 3)",
    "x = x + self.act(self.a(x)); return self.b(x)",
    weight=2,
)
own(
    "tied",
    "self.a = nn.Linear(4, 4, bias=False); self.act = {act}; self.b = nn.Linear(4, 4); self.b.weight = self.a.weight",
    "x = self.act(self.a(x)); return self.b(x)[:, :3]",
)
own(
    "transposed",
    "self.w = nn.Parameter(torch.randn(4, 4) / 2); self.act = {act}",
    "return (self.act(x @ self.w) @ self.w.t())[:, :3]",
)
own(
    "half_frozen",
    "self.a = nn.Linear(4, 5); self.act = {act}; self.b = nn.Linear(5, 3); self.a.weight.requires_grad_(False)",
    "return self.b(self.act(self.a(x)))",
    traits="frozen",
)
own(
    "weight_norm",
    "self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)); self.act = {act}; self.b = nn.Linear(5, 3)",
    "return self.b(self.act(self.a(x)))",
    traits="hooked first",  # PyTorch's second derivative of the fused operator is wrong
)
own(
    "bilinear",
    "self.a = nn.Bilinear(4, 4, 5); self.act = {act}; self.b = nn.Linear(5, 3)",
    "return self.b(self.act(self.a(x, x)))",
)
own("einsum", "self.w = nn.Parameter(torch.randn(3, 4, 4) / 4)", "return torch.einsum('bi,oij,bj->bo', x, self.w, x)")
own(
    "embedding",
    "self.a = nn.Embedding(7, 4); self.act = {act}; self.b = nn.Linear(4, 3)",
    "return self.b(self.act(self.a(x)).mean(1))",
    (5,),
    "ints",
)
own(
    "bag",
    "self.a = nn.EmbeddingBag(7, 4); self.b = nn.Linear(4, 3)",
    "return self.b(self.a(x))",
    (5,),
    "ints smooth first",
)
own(
    "padded",
    "self.a = nn.Embedding(7, 4, padding_idx=0); self.b = nn.Linear(4, 3)",
    "mask = (x != 0).unsqueeze(-1); return self.b((self.a(x).tanh() * mask).sum(1))",
    (5,),
    "ints smooth",
)
own(
    "gru",
    "self.a = nn.GRU(2, 3, batch_first=True); self.b = nn.Linear(3, 3)",
    "h, _ = self.a(x); return self.b(h[:, -1])",
    (3, 2),
    "smooth",
)
own(
    "lstm",
    "self.a = nn.LSTM(2, 3, batch_first=True); self.b = nn.Linear(3, 3)",
    "_, (h, c) = self.a(x); return self.b(h[-1] + c[-1])",
    (3, 2),
    "smooth",
)
own(
    "rnn_words",
    "self.e = nn.Embedding(7, 3); self.a = nn.RNN(3, 3, batch_first=True); self.b = nn.Linear(3, 3)",
    "h, _ = self.a(self.e(x)); return self.b(h.mean(1))",
    (4,),
    "ints smooth",
)
own(
    "cell",
    "self.a = nn.GRUCell(2, 3); self.b = nn.Linear(3, 3)",
    "h = x.new_zeros(x.shape[0], 3); h = self.a(x[:, 0], h); h = self.a(x[:, 1], h); return self.b(h)",
    (2, 2),
    "smooth",
)
own(
    "attention",
    "self.a = nn.MultiheadAttention(4, 2, batch_first=True); self.b = nn.Linear(4, 3)",
    "h, _ = self.a(x, x, x); return self.b((x + h).mean(1))",
    (3, 4),
    "smooth",
)
own(
    "attention_fused",
    "self.q = nn.Linear(4, 12); self.b = nn.Linear(4, 3)",
    "q, k, v = self.q(x).chunk(3, -1); h = F.scaled_dot_product_attention(q, k, v, is_causal=True); "
    "return self.b(h.mean(1))",
    (3, 4),
    "smooth first",
)
own(
    "transformer",
    "self.a = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True); self.b = nn.Linear(4, 3)",
    "return self.b(self.a(x).mean(1))",
    (3, 4),
    "kinked first",
)
own(
    "transformer_drop",
    "layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, activation='gelu', batch_first=True); "
    "self.a = nn.TransformerEncoder(layer, 1); self.b = nn.Linear(4, 3)",
    "return self.b(self.a(x)[:, 0])",
    (3, 4),
    "smooth drop first",
)
own(
    "buffered",
    "self.a = nn.Linear(4, 3); self.register_buffer('mean', torch.zeros(4)); self.scale = 0.5",
    "self.mean.lerp_(x.detach().mean(0), 0.1) if self.training else None; return self.a(x) * self.scale",
    traits="smooth",
)
own(
    "listed",
    "self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]); self.act = {act}; self.b = nn.Linear(4, 3)",
    "x = sum(self.act(part(x)) for part in self.parts); return self.b(x)",
)
