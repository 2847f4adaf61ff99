"""Which examples is a small language model to be trained on? One weight for every one of them, from one long training.

The text to learn is Python's reference manual; the examples are pieces of docstrings, of which half had their letters
shuffled. A training of 200 steps runs from the same start each time; the loss on the manual is differentiated through
all of it, by every example's weight, in the memory of a budget: the states of most steps are made again when they are
needed (``memory=``). A few such gradients tell the two kinds apart.

    mlc run examples/data_selection.py
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

ALPHABET = "\n" + string.printable[:95]
MODULES = "argparse ast configparser difflib doctest inspect optparse pickle statistics tarfile textwrap typing"
CONTEXT, PIECE = 3, 24


class CharacterModel(nn.Module):
    """The next character from the last CONTEXT ones: their embeddings, two layers."""

    def __init__(self, width=8, hidden=24):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), width)
        self.hidden = nn.Linear(width * CONTEXT, hidden)
        self.head = nn.Linear(hidden, len(ALPHABET))

    def forward(self, text):
        return self.head(torch.tanh(self.hidden(self.embed(text).flatten(-2))))


def losses(model, pieces):
    """Mean cross entropy of each row of ``pieces``, (count, CONTEXT + PIECE), in nats per character."""
    windows = pieces.unfold(1, CONTEXT + 1, 1)
    scores = model(windows[..., :-1])
    return F.cross_entropy(scores.transpose(1, 2), windows[..., -1], reduction="none").mean(1)


def train(start, logits, batches, val):
    """Loss on ``val`` of a model trained from ``start`` on batches of (index, pieces), weighted one by one."""
    model = mlc.clone(start)
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-5)
    for index, pieces in batches:
        opt.zero_grad()
        (2 * torch.sigmoid(logits[index]) * losses(model, pieces)).mean().backward()
        opt.step()
    return losses(model, val).mean()


loss_after_training = mlc.compile(train, memory="4MiB", backend="interpreter")


def load(count=100, seed=0):
    """Pieces to train on, which of them are shuffled, and pieces of the manual to validate and test on."""
    library, docs = Path(sysconfig.get_path("stdlib")), []
    for name in MODULES.split():
        for node in ast.walk(ast.parse((library / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                docs.append(text)
    text = "\n\n".join(docs)
    letters = list(text)
    random.Random(seed).shuffle(letters)
    torch.manual_seed(seed)
    good, bad = cut(encode(text), count // 2), cut(encode("".join(letters)), count // 2)
    order = torch.randperm(count)
    manual = encode("\n\n".join(pydoc_data.topics.topics.values())).chunk(2)
    return torch.cat([good, bad])[order], order >= count // 2, cut(manual[0], 60), cut(manual[1], 200)


def encode(text):
    number = {character: index for index, character in enumerate(ALPHABET)}
    return torch.tensor([number[c] for c in text if c in number])


def cut(text, count):
    """``count`` random pieces of CONTEXT + PIECE characters."""
    return text[torch.randint(len(text) - CONTEXT - PIECE, (count, 1)) + torch.arange(CONTEXT + PIECE)]


def draw_batches(pieces, steps, size=10):
    """Batches of (index, pieces), epoch after epoch."""
    epochs = [torch.randperm(len(pieces)) for _ in range(-(-steps * size // len(pieces)))]
    return [(index, pieces[index]) for index in torch.cat(epochs)[: steps * size].split(size)]


def example_args():
    pieces, _, val, _ = load(40)
    torch.manual_seed(0)
    return CharacterModel(), torch.zeros(len(pieces), requires_grad=True), draw_batches(pieces, 6), val[:10]


def main(count=100, steps=200, rounds=4, seed=0):
    pieces, shuffled, val, test = load(count, seed)
    torch.manual_seed(seed)
    start, logits = CharacterModel(), torch.zeros(count, requires_grad=True)
    opt = torch.optim.Adam([logits], lr=1.0)
    for _ in range(rounds):
        opt.zero_grad()
        loss_after_training(start, logits, draw_batches(pieces, steps), val).backward()
        opt.step()
    plan, report = loss_after_training.plan, loss_after_training.report
    result = {
        "shuffled pieces below the median": (logits < logits.median())[shuffled].double().mean().item(),
        "predicted peak, kilobytes": plan.peak_bytes / 1024,
        "measured peak, kilobytes": report.peak_bytes / 1024,
    }
    batches = draw_batches(pieces, steps)
    for name, weights in (("equal weights", torch.zeros(count)), ("learned weights", logits.detach())):
        result[f"test loss, {name}"] = train(start, weights, batches, test).item()
    for name, value in result.items():
        print(f"{name:36s}{value:9.3f}")
    return result


if __name__ == "__main__":
    main()
