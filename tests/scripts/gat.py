"""Graph attention over a dense adjacency: masked scores, several heads, dropout on the attention."""

import torch
import torch.nn.functional as F
from tests.scripts.data import Settings
from tests.scripts.graphs import CLASSES, NODES, citations
from tests.scripts.script import Script
from torch import nn
from torch.optim import Adam


class GraphAttentionLayer(nn.Module):
    def __init__(self, in_features, out_features, n_heads, concat=False, dropout=0.4, leaky_relu_slope=0.2):
        super().__init__()
        self.n_heads = n_heads
        self.concat = concat
        self.dropout = dropout
        self.n_hidden = out_features // n_heads if concat else out_features
        self.W = nn.Parameter(torch.empty(size=(in_features, self.n_hidden * n_heads)))
        self.a = nn.Parameter(torch.empty(size=(n_heads, 2 * self.n_hidden, 1)))
        self.leakyrelu = nn.LeakyReLU(leaky_relu_slope)
        self.softmax = nn.Softmax(dim=1)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.xavier_normal_(self.W)
        nn.init.xavier_normal_(self.a)

    def _get_attention_scores(self, h_transformed):
        source_scores = torch.matmul(h_transformed, self.a[:, : self.n_hidden, :])
        target_scores = torch.matmul(h_transformed, self.a[:, self.n_hidden :, :])
        e = source_scores + target_scores.mT
        return self.leakyrelu(e)

    def forward(self, h, adj_mat):
        n_nodes = h.shape[0]
        h_transformed = torch.mm(h, self.W)
        h_transformed = F.dropout(h_transformed, self.dropout, training=self.training)
        h_transformed = h_transformed.view(n_nodes, self.n_heads, self.n_hidden).permute(1, 0, 2)
        e = self._get_attention_scores(h_transformed)
        connectivity_mask = -9e16 * torch.ones_like(e)
        e = torch.where(adj_mat > 0, e, connectivity_mask)
        attention = F.softmax(e, dim=-1)
        attention = F.dropout(attention, self.dropout, training=self.training)
        h_prime = torch.matmul(attention, h_transformed)
        if self.concat:
            return h_prime.permute(1, 0, 2).contiguous().view(n_nodes, -1)
        return h_prime.mean(dim=0)


class GAT(nn.Module):
    def __init__(self, in_features, n_hidden, n_heads, num_classes, dropout=0.4):
        super().__init__()
        self.gat1 = GraphAttentionLayer(in_features, n_hidden, n_heads, concat=True, dropout=dropout)
        self.elu = nn.ELU()
        self.gat2 = GraphAttentionLayer(n_hidden, num_classes, n_heads=1, concat=False, dropout=dropout)

    def forward(self, input_tensor, adj_mat):
        x = self.gat1(input_tensor, adj_mat)
        x = self.elu(x)
        x = self.gat2(x, adj_mat)
        return F.log_softmax(x, dim=1)


def train_iter(epoch, model, optimizer, criterion, input, target, mask_train, mask_val, print_every=2):
    model.train()
    optimizer.zero_grad()
    output = model(*input)
    loss = criterion(output[mask_train], target[mask_train])
    loss.backward()
    optimizer.step()
    loss_train, acc_train = test(model, criterion, input, target, mask_train)
    loss_val, acc_val = test(model, criterion, input, target, mask_val)
    if epoch % print_every == 0:
        print(
            f"Epoch: {epoch:04d} loss_train: {loss_train:.4f}, acc_train: {acc_train:.4f}, "
            f"loss_val: {loss_val:.4f}, acc_val: {acc_val:.4f}"
        )
    return loss_val


def test(model, criterion, input, target, mask):
    model.eval()
    with torch.no_grad():
        output = model(*input)
        output, target = output[mask], target[mask]
        loss = criterion(output, target)
        acc = (output.argmax(dim=1) == target).float().sum() / len(target)
    return loss.item(), acc.item()


def main(args, model, edges, features, labels):
    adj_mat = torch.eye(NODES)
    adj_mat[edges[0], edges[1]] = 1.0
    idx_train, idx_val = torch.arange(12), torch.arange(12, NODES)
    # was: optimizer = Adam(model.parameters(), lr=0.02, weight_decay=args.l2)
    optimizer = Adam(model.parameters(), lr=args.lr, weight_decay=args.l2)
    criterion = nn.NLLLoss()
    best, bad_epochs = float("inf"), 0
    for epoch in range(args.epochs):
        loss_val = train_iter(epoch + 1, model, optimizer, criterion, (features, adj_mat), labels, idx_train, idx_val)
        if loss_val < best:
            best, bad_epochs = loss_val, 0
        else:
            bad_epochs += 1
        if bad_epochs == args.patience:
            print("Early stopping")
            break
    print(f"Best validation loss: {best:.4f}")
    model.eval()
    return nn.NLLLoss()(model(features, adj_mat)[idx_val], labels[idx_val])


def make():
    edges, features, labels = citations()
    model = GAT(features.shape[1], n_hidden=8, n_heads=2, num_classes=CLASSES, dropout=0.3)
    args = Settings(lr=torch.tensor(0.02, requires_grad=True), l2=5e-4, epochs=4, patience=3)
    return {"args": args, "model": model, "edges": edges, "features": features, "labels": labels}


SCRIPT = Script("gat", main, make, lambda a: {"lr": a["args"].lr})
