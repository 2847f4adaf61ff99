"""Forward-forward: every layer has its own optimizer and goodness, and hands detached activations to the next."""

import torch
import torch.nn as nn
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.optim import Adam


def get_y_neg(y):
    y_neg = y.clone()
    for idx, y_samp in enumerate(y):
        allowed_indices = list(range(10))
        allowed_indices.remove(y_samp.item())
        y_neg[idx] = torch.tensor(allowed_indices)[torch.randint(len(allowed_indices), size=(1,))].item()
    return y_neg


def overlay_y_on_x(x, y, classes=10):
    x_ = x.clone()
    x_[:, :classes] *= 0.0
    x_[range(x.shape[0]), y] = x.max()
    return x_


class Net(torch.nn.Module):
    def __init__(self, dims, args):
        super().__init__()
        self.layers = nn.ModuleList([Layer(dims[d], dims[d + 1], args) for d in range(len(dims) - 1)])

    def goodness_of_labels(self, x):
        goodness_per_label = []
        for label in range(10):
            h = overlay_y_on_x(x, label)
            goodness = []
            for layer in self.layers:
                h = layer(h)
                goodness = [*goodness, h.pow(2).mean(1)]
            goodness_per_label += [sum(goodness).unsqueeze(1)]
        return torch.cat(goodness_per_label, 1)

    def predict(self, x):
        return self.goodness_of_labels(x).argmax(1)

    def fit(self, x_pos, x_neg, args):
        h_pos, h_neg = x_pos, x_neg
        for i, layer in enumerate(self.layers):
            print("training layer: ", i)
            h_pos, h_neg = layer.fit(h_pos, h_neg, args)


class Layer(nn.Linear):
    def __init__(self, in_features, out_features, args):
        super().__init__(in_features, out_features)
        self.act = torch.nn.Softplus()
        self.opt = Adam(self.parameters(), lr=args.lr)
        self.threshold = args.threshold
        self.num_epochs = args.epochs

    def forward(self, x):
        x_direction = x / (x.norm(2, 1, keepdim=True) + 1e-4)
        return self.act(torch.mm(x_direction, self.weight.T) + self.bias.unsqueeze(0))

    def fit(self, x_pos, x_neg, args):
        for i in range(self.num_epochs):
            g_pos = self.forward(x_pos).pow(2).mean(1)
            g_neg = self.forward(x_neg).pow(2).mean(1)
            # was: loss = torch.log(1 + torch.exp(torch.cat([-g_pos + self.threshold, g_neg - self.threshold]))).mean()
            loss = torch.log(1 + torch.exp(torch.cat([-g_pos + args.margin, g_neg - args.margin]))).mean()
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            if i % args.log_interval == 0:
                print("Loss: ", round(loss.item(), 6))
        return self.forward(x_pos).detach(), self.forward(x_neg).detach()


def main(args, x, y, x_te, y_te):
    net = Net([64, 10, 8], args)
    x_pos = overlay_y_on_x(x, y)
    x_neg = overlay_y_on_x(x, get_y_neg(y))
    net.fit(x_pos, x_neg, args)
    print("train error: {:.4f}".format(1.0 - net.predict(x).eq(y).float().mean().item()))
    with torch.no_grad():
        print("test error: {:.4f}".format(1.0 - net.predict(x_te).eq(y_te).float().mean().item()))
    return nn.functional.cross_entropy(net.goodness_of_labels(x_te), y_te)


def make():
    (x, y), (x_te, y_te) = digits(20), digits(12)
    margin = torch.tensor(0.7, requires_grad=True)
    args = Settings(lr=0.03, threshold=0.7, epochs=3, log_interval=1, margin=margin)
    return {"args": args, "x": x.flatten(1), "y": y, "x_te": x_te.flatten(1), "y_te": y_te}


# The second layer's loss reads what the first handed over detached.
SCRIPT = Script(
    "forward_forward", main, make, lambda a: {"margin": a["args"].margin}, options={"stop_gradient": "inner"}
)
