"""Learn which sources of text help a small language model.

The target is the reference manual that ships with Python (the text behind ``help("topics")``). The
training text comes from four other places: docstrings of the standard library, its code, its character
tables, and docstrings with their letters shuffled. Each source has one weight, and the four logits are
meta-parameters: the loss on manual text is differentiated through each window of ordinary training
steps. The same model trained with equal weights is the opponent.

    mlc run examples/language_model.py
"""

import ast
import pydoc_data.topics
import random
import string
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mlc

SOURCES = "docstrings", "code", "tables", "shuffled"
ALPHABET = "\n" + string.printable[:95]
MODULES = """argparse ast bdb configparser contextlib dataclasses difflib doctest enum functools heapq
    inspect optparse pickle random shutil statistics string subprocess tarfile textwrap threading typing"""
CONTEXT = 48


def train(model, opt, logits, batches, val_text):
    """An ordinary loop over batches of (text, source); returns the loss on ``val_text``."""
    for text, source in batches:
        opt.zero_grad()
        weights = len(logits) * torch.softmax(logits, 0)
        (weights[source] * sequence_losses(model, text)).mean().backward()
        opt.step()
    return sequence_losses(model, val_text).mean()


validate_after_training = mlc.compile(train)


def sequence_losses(model, text):
    """Mean cross entropy of each row of ``text`` (batch, CONTEXT + 1), in nats per character."""
    scores = model(text[:, :-1])
    return F.cross_entropy(scores.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterModel(nn.Module):
    """A decoder-only transformer over characters."""

    def __init__(self, width=32, heads=4, layers=2):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, text):
        return self.head(self.norm(self.blocks(self.embed(text) + self.position)))


def make_optimizer(model):
    """AdamW; with the default eps its first step is a mere sign, which has no useful derivative."""
    return torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-5)


def load():
    """({source: characters}, validation characters, test characters), each a 1-d tensor."""
    library = Path(sysconfig.get_path("stdlib"))
    docs, code = [], []
    for name in MODULES.split():
        path = library / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            named = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if named and (text := ast.get_docstring(node)):
                docs.append(text)
                node.body[0] = ast.Pass()
        code.append(ast.unparse(tree))
    tables = [path.read_text(encoding="utf-8") for path in sorted(library.glob("encodings/cp*.py"))]
    shuffled = list("\n\n".join(docs))
    random.Random(0).shuffle(shuffled)
    texts = ["\n\n".join(docs), "\n\n".join(code), "".join(tables), "".join(shuffled)]
    manual = encode("\n\n".join(pydoc_data.topics.topics.values()))
    half = len(manual) // 2
    return dict(zip(SOURCES, map(encode, texts), strict=True)), manual[:half], manual[half:]


def encode(text):
    number = {character: index for index, character in enumerate(ALPHABET)}
    return torch.tensor([number[c] for c in text if c in number])


def cut(text, count):
    """``count`` random pieces of CONTEXT + 1 characters."""
    start = torch.randint(len(text) - CONTEXT, (count, 1))
    return text[start + torch.arange(CONTEXT + 1)]


def draw_batches(sources, steps, size=6):
    """Batches of (text, source) with ``size`` rows from each source."""
    source = torch.arange(len(sources)).repeat_interleave(size)
    return [(torch.cat([cut(t, size) for t in sources.values()]), source) for _ in range(steps)]


def example_args():
    torch.manual_seed(0)
    sources, val, _ = load()
    model, logits = CharacterModel(), torch.zeros(len(sources), requires_grad=True)
    opt = make_optimizer(model)
    return model, opt, logits, draw_batches(sources, 3, size=4), cut(val, 8)


def fit(sources, val, windows, learn_weights, seed=0):
    """Train a model for ``windows`` x 5 steps; returns it and the weights of the sources."""
    torch.manual_seed(seed)
    model, logits = CharacterModel(), torch.zeros(len(sources), requires_grad=True)
    opt = make_optimizer(model)
    meta_opt = torch.optim.Adam([logits], lr=0.2)
    for _ in range(windows):
        batches, val_text = draw_batches(sources, 5), cut(val, 32)
        if learn_weights:
            meta_opt.zero_grad()
            validate_after_training(model, opt, logits, batches, val_text).backward()
            meta_opt.step()
        else:
            train(model, opt, logits.detach(), batches, val_text)
    return model, torch.softmax(logits, 0).tolist()


def main(windows=60, seed=0):
    sources, val, test = load()
    torch.manual_seed(1)
    test_text = cut(test, 512)
    result = {}
    for name, learn_weights in (("equal weights", False), ("learned weights", True)):
        model, weights = fit(sources, val, windows, learn_weights, seed)
        with torch.no_grad():
            loss = sequence_losses(model, test_text).mean().item()
        print(f"{name:16s} manual {loss:.3f} nats per character, weights: ", end="")
        print("  ".join(f"{s} {w:.3f}" for s, w in zip(sources, weights, strict=True)))
        result[name] = {"loss": loss, "weights": dict(zip(sources, weights, strict=True))}
    return result


if __name__ == "__main__":
    main()
