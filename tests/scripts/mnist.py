"""Digits by a small convolutional network: `train()` and `test()` per epoch, a step schedule, weights saved."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from tests.scripts.data import Digits, Settings
from tests.scripts.script import Script
from torch.optim.lr_scheduler import StepLR


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 1)
        self.conv2 = nn.Conv2d(4, 6, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(24, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = F.silu(self.conv1(x))
        x = F.silu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = F.silu(self.fc1(x))
        x = self.dropout2(x)
        return F.log_softmax(self.fc2(x), dim=1)


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        # was: loss = F.nll_loss(output, target)
        loss = (args.class_weights[target] * F.nll_loss(output, target, reduction="none")).mean()
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0:
            print(
                "Train Epoch: {} [{}/{} ({:.0f}%)]\tLoss: {:.6f}".format(
                    epoch,
                    batch_idx * len(data),
                    len(train_loader.dataset),
                    100.0 * batch_idx / len(train_loader),
                    loss.item(),
                )
            )
            if args.dry_run:
                break


def test(model, device, test_loader):
    model.eval()
    test_loss = 0
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction="sum").item()
            pred = output.argmax(dim=1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()

    test_loss /= len(test_loader.dataset)
    print(f"\nTest set: Average loss: {test_loss:.4f}, Accuracy: {correct}/{len(test_loader.dataset)}\n")


def validation_loss(model, device, loader):
    model.eval()
    loss = 0
    for data, target in loader:
        loss = loss + F.nll_loss(model(data.to(device)), target.to(device), reduction="sum")
    return loss / len(loader.dataset)


def main(args):
    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    train_kwargs = {"batch_size": args.batch_size, "shuffle": True}
    test_kwargs = {"batch_size": args.test_batch_size}
    train_loader = torch.utils.data.DataLoader(args.dataset1, **train_kwargs)
    test_loader = torch.utils.data.DataLoader(args.dataset2, **test_kwargs)

    model = Net().to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)

    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        train(args, model, device, train_loader, optimizer, epoch)
        test(model, device, test_loader)
        scheduler.step()

    if args.save_model:
        torch.save(model.state_dict(), "mnist_cnn.pt")
    return validation_loss(model, device, test_loader)


def make():
    return {
        "args": Settings(
            batch_size=12,
            test_batch_size=16,
            epochs=2,
            lr=1.0,
            gamma=0.7,
            seed=1,
            log_interval=2,
            dry_run=False,
            save_model=True,
            dataset1=Digits(36),
            dataset2=Digits(24),
            class_weights=torch.linspace(0.5, 1.5, 10).requires_grad_(),
        )
    }


SCRIPT = Script("mnist", main, make, lambda a: {"class_weights": a["args"].class_weights})
