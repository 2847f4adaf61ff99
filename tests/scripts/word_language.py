"""A recurrent language model over a text: hidden states cut between windows, clipped gradients, descent by hand.

The learning rate is divided by four whenever the validation loss has not improved.
"""

import math

import torch
import torch.nn as nn
from tests.scripts.data import Settings, zen
from tests.scripts.script import Script
from torch.nn import functional as F


class Dictionary:
    def __init__(self):
        self.word2idx = {}
        self.idx2word = []

    def add_word(self, word):
        if word not in self.word2idx:
            self.idx2word.append(word)
            self.word2idx[word] = len(self.idx2word) - 1
        return self.word2idx[word]

    def __len__(self):
        return len(self.idx2word)


class Corpus:
    def __init__(self, text):
        self.dictionary = Dictionary()
        ids = [self.dictionary.add_word(word) for line in text.split("\n") for word in [*line.lower().split(), "<eos>"]]
        self.train = torch.tensor(ids[:66])
        self.valid = torch.tensor(ids[66:100])


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid, nlayers, dropout=0.2):
        super().__init__()
        self.ntoken = ntoken
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        self.decoder.weight = self.encoder.weight
        self.init_weights()
        self.nhid = nhid
        self.nlayers = nlayers

    def init_weights(self):
        initrange = 0.3
        nn.init.uniform_(self.encoder.weight, -initrange, initrange)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, input, hidden):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        output = self.drop(output)
        decoded = self.decoder(output)
        decoded = decoded.view(-1, self.ntoken)
        return F.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return (weight.new_zeros(self.nlayers, bsz, self.nhid), weight.new_zeros(self.nlayers, bsz, self.nhid))


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    data = data.narrow(0, 0, nbatch * bsz)
    return data.view(bsz, -1).t().contiguous()


def repackage_hidden(h):
    return tuple(v.detach() for v in h)


def get_batch(source, i, bptt):
    seq_len = min(bptt, len(source) - 1 - i)
    data = source[i : i + seq_len]
    target = source[i + 1 : i + 1 + seq_len].view(-1)
    return data, target


def evaluate(args, model, data_source, criterion):
    model.eval()
    total_loss = 0.0
    hidden = model.init_hidden(args.eval_batch_size)
    with torch.no_grad():
        for i in range(0, data_source.size(0) - 1, args.bptt):
            data, targets = get_batch(data_source, i, args.bptt)
            output, hidden = model(data, hidden)
            hidden = repackage_hidden(hidden)
            total_loss += len(data) * criterion(output, targets).item()
    return total_loss / (len(data_source) - 1)


def train(args, model, train_data, criterion, lr, epoch):
    model.train()
    total_loss = 0.0
    hidden = model.init_hidden(args.batch_size)
    for batch, i in enumerate(range(0, train_data.size(0) - 1, args.bptt)):
        data, targets = get_batch(train_data, i, args.bptt)
        model.zero_grad()
        hidden = repackage_hidden(hidden)
        output, hidden = model(data, hidden)
        # was: loss = criterion(output, targets)
        loss = F.nll_loss(output * args.word_weights, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)
        total_loss += loss.item()
        if batch % args.log_interval == 0 and batch > 0:
            cur_loss = total_loss / args.log_interval
            print(
                "| epoch {:3d} | {:5d}/{:5d} batches | lr {:02.2f} | loss {:5.2f} | ppl {:8.2f}".format(
                    epoch, batch, len(train_data) // args.bptt, lr, cur_loss, math.exp(cur_loss)
                )
            )
            total_loss = 0


def fit(args, corpus, model):
    train_data = batchify(corpus.train, args.batch_size)
    val_data = batchify(corpus.valid, args.eval_batch_size)
    criterion = nn.NLLLoss()
    lr = args.lr
    best_val_loss = None
    for epoch in range(1, args.epochs + 1):
        train(args, model, train_data, criterion, lr, epoch)
        val_loss = evaluate(args, model, val_data, criterion)
        print("-" * 89)
        print(
            "| end of epoch {:3d} | valid loss {:5.2f} | valid ppl {:8.2f}".format(epoch, val_loss, math.exp(val_loss))
        )
        if not best_val_loss or val_loss < best_val_loss:
            with open(args.save, "wb") as f:
                torch.save(model.state_dict(), f)
            best_val_loss = val_loss
        else:
            lr /= 4.0
    return val_data


def validation_loss(args, model, val_data):
    model.eval()
    data, targets = get_batch(val_data, 0, len(val_data))
    return F.nll_loss(model(data, model.init_hidden(args.eval_batch_size))[0], targets)


def main(args, corpus, model):
    val_data = fit(args, corpus, model)
    return validation_loss(args, model, val_data)


def main_best(args, corpus, model):
    """The usual end: the weights of the best epoch are read back from the file."""
    val_data = fit(args, corpus, model)
    with open(args.save, "rb") as f:
        model.load_state_dict(torch.load(f))
    return validation_loss(args, model, val_data)


def make():
    corpus = Corpus(zen())
    words = len(corpus.dictionary)
    weights = (0.8 + 0.4 * torch.rand(words)).requires_grad_()
    args = Settings(
        batch_size=3,
        eval_batch_size=2,
        bptt=6,
        lr=4.0,
        clip=0.25,
        epochs=3,
        log_interval=2,
        save="model.pt",
        word_weights=weights,
    )
    return {"args": args, "corpus": corpus, "model": RNNModel(words, 6, 6, 1)}


def metas(a):
    return {"word_weights": a["args"].word_weights}


# The hidden state that a window hands to the next one is detached and read by its loss.
INNER = {"stop_gradient": "inner"}
SCRIPTS = [
    Script("word_language", main, make, metas, options=INNER),
    Script("word_language_cut", main, make, metas, frozen="repackage_hidden", slow=True),
    Script("word_language_best", main_best, make, metas, options=INNER),
]
