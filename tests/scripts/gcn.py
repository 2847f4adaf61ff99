"""A graph convolutional network: full-batch training, losses and accuracies every few epochs."""

import torch
import torch.nn.functional as F
from tests.scripts.data import Settings
from tests.scripts.graphs import CLASSES, FEATURES, NODES, citations
from tests.scripts.script import Script
from torch import nn
from torch.optim import Adam


class GraphConv(nn.Module):
    def __init__(self, input_dim, output_dim, use_bias=False):
        super().__init__()
        self.kernel = nn.Parameter(torch.Tensor(input_dim, output_dim))
        nn.init.xavier_normal_(self.kernel)
        self.bias = None
        if use_bias:
            self.bias = nn.Parameter(torch.Tensor(output_dim))
            nn.init.zeros_(self.bias)

    def forward(self, input_tensor, adj_mat):
        support = torch.mm(input_tensor, self.kernel)
        output = torch.mm(adj_mat, support)
        if self.bias is not None:
            output = output + self.bias
        return output


class GCN(nn.Module):
    def __init__(self, input_dim, hidden_dim, output_dim, use_bias=True, dropout_p=0.1):
        super().__init__()
        self.gc1 = GraphConv(input_dim, hidden_dim, use_bias=use_bias)
        self.gc2 = GraphConv(hidden_dim, output_dim, use_bias=use_bias)
        self.dropout = nn.Dropout(dropout_p)

    def forward(self, input_tensor, adj_mat):
        x = self.gc1(input_tensor, adj_mat)
        x = F.softplus(x)
        x = self.dropout(x)
        x = self.gc2(x, adj_mat)
        return F.log_softmax(x, dim=1)


def load(edges):
    """The normalised adjacency with self-loops, from its entries, dense."""
    loops = torch.arange(NODES).expand(2, -1)
    indices = torch.cat([edges, loops], 1)
    adj = torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), (NODES, NODES)).to_dense()
    degree = adj.sum(1).pow(-0.5)
    degree[torch.isinf(degree)] = 0.0
    return degree[:, None] * adj * degree[None, :]


def train_iter(epoch, model, optimizer, criterion, input, target, mask_train, mask_val, print_every, args):
    model.train()
    optimizer.zero_grad()
    output = model(*input)
    # was: loss = criterion(output[mask_train], target[mask_train])
    loss = (args.node_weights * F.nll_loss(output[mask_train], target[mask_train], reduction="none")).mean()
    loss.backward()
    optimizer.step()
    loss_train, acc_train = test(model, criterion, input, target, mask_train)
    loss_val, acc_val = test(model, criterion, input, target, mask_val)
    if epoch % print_every == 0:
        print(
            f"Epoch: {epoch:04d} --- loss_train: {loss_train:.4f}, acc_train: {acc_train:.4f}, "
            f"loss_val: {loss_val:.4f}, acc_val: {acc_val:.4f}"
        )


def test(model, criterion, input, target, mask):
    model.eval()
    with torch.no_grad():
        output = model(*input)
        output, target = output[mask], target[mask]
        loss = criterion(output, target)
        acc = (output.argmax(dim=1) == target).float().sum() / len(target)
    return loss.item(), acc.item()


def main(args, edges, features, labels):
    adj_mat = load(edges)
    idx = torch.randperm(len(labels))
    idx_train, idx_val = idx[:12], idx[12:]
    gcn = GCN(features.shape[1], args.hidden_dim, CLASSES, args.include_bias, args.dropout_p)
    optimizer = Adam(gcn.parameters(), lr=args.lr, weight_decay=args.l2)
    criterion = nn.NLLLoss()
    for epoch in range(args.epochs):
        train_iter(
            epoch + 1, gcn, optimizer, criterion, (features, adj_mat), labels, idx_train, idx_val, args.val_every, args
        )
    gcn.eval()
    return criterion(gcn(features, adj_mat)[idx_val], labels[idx_val])


def make():
    assert FEATURES == 8
    weights = torch.linspace(0.5, 1.5, 12).requires_grad_()
    args = Settings(
        hidden_dim=6, include_bias=True, dropout_p=0.3, lr=0.02, l2=5e-4, epochs=4, val_every=2, node_weights=weights
    )
    edges, features, labels = citations()
    return {"args": args, "edges": edges, "features": features, "labels": labels}


SCRIPT = Script("gcn", main, make, lambda a: {"node_weights": a["args"].node_weights})
