"""Digits read row by row by an LSTM with batch normalisation: `train()`, `test()` and a schedule per epoch."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.optim.lr_scheduler import StepLR


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(input_size=8, hidden_size=6, batch_first=True)
        self.batchnorm = nn.BatchNorm1d(6)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 10)

    def forward(self, input):
        input = input.reshape(-1, 8, 8)
        output, hidden = self.rnn(input)
        output = output[:, -1, :]
        output = self.batchnorm(output)
        output = self.dropout1(output)
        output = torch.tanh(self.fc1(output))
        return F.log_softmax(self.fc2(output), dim=1)


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        # was: data = data + 0.1 * torch.randn_like(data)
        data = data + args.noise * torch.randn_like(data)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0:
            done = 100.0 * batch_idx / len(train_loader)
            print("Train Epoch: {} ({:.0f}%)\tLoss: {:.6f}".format(epoch, done, loss.item()))


def test(args, model, device, test_loader):
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
    args.history.append((test_loss, correct))
    print("Test set: Average loss: {:.4f}, Accuracy: {}/{}".format(test_loss, correct, len(test_loader.dataset)))


def main(args, model, train_set, test_set):
    device = "cpu"
    train_loader = torch.utils.data.DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test_set, batch_size=16)
    model = model.to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        train(args, model, device, train_loader, optimizer, epoch)
        test(args, model, device, test_loader)
        scheduler.step()
    model.eval()
    return sum(F.nll_loss(model(data), target) for data, target in test_loader) / len(test_loader)


def make():
    noise = torch.tensor(0.2, requires_grad=True)
    return {
        "args": Settings(batch_size=12, epochs=2, lr=0.5, gamma=0.7, log_interval=2, noise=noise, history=[]),
        "model": Net(),
        "train_set": torch.utils.data.TensorDataset(*digits(36)),
        "test_set": torch.utils.data.TensorDataset(*digits(32)),
    }


SCRIPT = Script("mnist_rnn", main, make, lambda a: {"noise": a["args"].noise}, slow=True)
