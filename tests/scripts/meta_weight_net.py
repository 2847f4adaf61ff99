"""Meta-Weight-Net: in every iteration a weighing network takes a step through one step of a copy of the model."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.func import functional_call


class VNet(nn.Module):
    def __init__(self, input, hidden, output):
        super().__init__()
        self.linear1 = nn.Linear(input, hidden)
        self.linear2 = nn.Linear(hidden, output)

    def forward(self, x):
        return torch.sigmoid(self.linear2(torch.tanh(self.linear1(x))))


def build_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def adjust_learning_rate(args, optimizer, epoch):
    lr = args.lr * (0.5 ** int(epoch >= 1))
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr


def test(model, test_loader):
    model.eval()
    correct, test_loss = 0, 0
    with torch.no_grad():
        for inputs, targets in test_loader:
            outputs = model(inputs)
            test_loss += F.cross_entropy(outputs, targets).item()
            _, predicted = outputs.max(1)
            correct += predicted.eq(targets).sum().item()
    test_loss /= len(test_loader.dataset)
    print(f"Test set: Average loss: {test_loss:.4f}, Accuracy: {correct}/{len(test_loader.dataset)}")
    return 100.0 * correct / len(test_loader.dataset)


def train(args, train_loader, train_meta_loader, model, vnet, optimizer_model, optimizer_vnet, epoch):
    train_loss, meta_loss = 0, 0
    train_meta_loader_iter = iter(train_meta_loader)
    for batch_idx, (inputs, targets) in enumerate(train_loader):
        model.train()
        meta_model = build_model()
        meta_model.load_state_dict(model.state_dict())
        params = dict(meta_model.named_parameters())
        outputs = functional_call(meta_model, params, (inputs,))
        cost = F.cross_entropy(outputs, targets, reduction="none")
        cost_v = torch.reshape(cost, (len(cost), 1))
        v_lambda = vnet(cost_v.data)
        l_f_meta = torch.sum(cost_v * v_lambda) / len(cost_v)
        grads = torch.autograd.grad(l_f_meta, list(params.values()), create_graph=True)
        meta_lr = args.lr * (0.5 ** int(epoch >= 1))
        params = {name: p - meta_lr * g for (name, p), g in zip(params.items(), grads)}
        del grads

        try:
            inputs_val, targets_val = next(train_meta_loader_iter)
        except StopIteration:
            train_meta_loader_iter = iter(train_meta_loader)
            inputs_val, targets_val = next(train_meta_loader_iter)
        y_g_hat = functional_call(meta_model, params, (inputs_val,))
        l_g_meta = F.cross_entropy(y_g_hat, targets_val)
        optimizer_vnet.zero_grad()
        l_g_meta.backward()
        optimizer_vnet.step()

        outputs = model(inputs)
        cost_w = F.cross_entropy(outputs, targets, reduction="none")
        cost_v = torch.reshape(cost_w, (len(cost_w), 1))
        with torch.no_grad():
            w_new = vnet(cost_v)
        loss = torch.sum(cost_v * w_new) / len(cost_v)
        optimizer_model.zero_grad()
        loss.backward()
        optimizer_model.step()
        train_loss += loss.item()
        meta_loss += l_g_meta.item()
        if (batch_idx + 1) % 2 == 0:
            done = (batch_idx + 1) * len(inputs)
            print(
                "Epoch: [%d] Iters: [%d/%d] Loss: %.4f MetaLoss: %.4f"
                % (epoch, done, len(train_loader.dataset), train_loss / (batch_idx + 1), meta_loss / (batch_idx + 1))
            )


def main(args, train_set, meta_set, test_set):
    train_loader = torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True)
    train_meta_loader = torch.utils.data.DataLoader(meta_set, batch_size=8, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test_set, batch_size=15)
    model = build_model()
    vnet = VNet(1, 6, 1)
    optimizer_model = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    # was: optimizer_vnet = torch.optim.Adam(vnet.parameters(), 1e-2, weight_decay=1e-4, eps=1e-4)
    optimizer_vnet = torch.optim.Adam(vnet.parameters(), args.vnet_lr, weight_decay=1e-4, eps=1e-4)
    best_acc = 0
    for epoch in range(args.epochs):
        adjust_learning_rate(args, optimizer_model, epoch)
        train(args, train_loader, train_meta_loader, model, vnet, optimizer_model, optimizer_vnet, epoch)
        test_acc = test(model, test_loader)
        if test_acc >= best_acc:
            best_acc = test_acc
            torch.save({"model": model.state_dict(), "vnet": vnet.state_dict(), "best": best_acc}, "best.pt")
    print("best accuracy:", best_acc)
    return sum(F.cross_entropy(model(x), y) for x, y in test_loader) / len(test_loader)


def make():
    images, labels = digits(84)
    noisy = torch.where(torch.rand(84) < 0.3, torch.randint(10, (84,)), labels)
    sets = [(images[:32], noisy[:32]), (images[32:44], labels[32:44]), (images[44:74], labels[44:74])]
    train_set, meta_set, test_set = (torch.utils.data.TensorDataset(*s) for s in sets)
    args = Settings(lr=0.2, vnet_lr=torch.tensor(0.05, requires_grad=True), epochs=2)
    return {"args": args, "train_set": train_set, "meta_set": meta_set, "test_set": test_set}


# The weights of the model's own step are made under no_grad.
SCRIPT = Script(
    "meta_weight_net", main, make, lambda a: {"vnet_lr": a["args"].vnet_lr}, options={"stop_gradient": "inner"}
)
