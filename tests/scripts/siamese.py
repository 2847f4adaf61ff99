"""A siamese network: pairs of digits drawn with Python's `random`, the same tower on both, binary cross-entropy."""

import random

import torch
import torch.nn as nn
import torch.optim as optim
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Dataset


class SiameseNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 6))
        self.fc = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
        self.sigmoid = nn.Sigmoid()
        self.fc.apply(self.init_weights)

    def init_weights(self, m):
        if isinstance(m, nn.Linear):
            torch.nn.init.xavier_uniform_(m.weight)
            m.bias.data.fill_(0.01)

    def forward_once(self, x):
        output = self.tower(x)
        return output.view(output.size()[0], -1)

    def forward(self, input1, input2):
        output = torch.cat((self.forward_once(input1), self.forward_once(input2)), 1)
        return self.sigmoid(self.fc(output))


class Matcher(Dataset):
    """Every second pair is of one class."""

    def __init__(self, count):
        self.images, self.targets = digits(count)
        self.members = {}
        for i, label in enumerate(self.targets.tolist()):
            self.members.setdefault(label, []).append(i)
        self.members = {label: where for label, where in self.members.items() if len(where) > 1}

    def __len__(self):
        return 24

    def __getitem__(self, index):
        label = random.choice(sorted(self.members))
        one = random.choice(self.members[label])
        if index % 2 == 0:
            two = random.choice(self.members[label])
            while two == one:
                two = random.choice(self.members[label])
            target = torch.tensor(1, dtype=self.images.dtype)
        else:
            other = random.choice(sorted(self.members))
            while other == label:
                other = random.choice(sorted(self.members))
            two = random.choice(self.members[other])
            target = torch.tensor(0, dtype=self.images.dtype)
        return self.images[one], self.images[two], target


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    criterion = nn.BCELoss()
    for batch_idx, (images_1, images_2, targets) in enumerate(train_loader):
        images_1, images_2, targets = images_1.to(device), images_2.to(device), targets.to(device)
        optimizer.zero_grad()
        outputs = model(images_1, images_2).squeeze()
        # was: loss = criterion(outputs, targets)
        loss = criterion(outputs, targets) + args.decay * sum(p.square().sum() for p in model.fc.parameters())
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0:
            print("Train Epoch: {} [{}]\tLoss: {:.6f}".format(epoch, batch_idx * len(images_1), loss.item()))


def test(model, device, test_loader):
    model.eval()
    test_loss = 0
    correct = 0
    criterion = nn.BCELoss()
    with torch.no_grad():
        for images_1, images_2, targets in test_loader:
            outputs = model(images_1.to(device), images_2.to(device)).squeeze()
            test_loss += criterion(outputs, targets).sum().item()
            pred = torch.where(outputs > 0.5, 1, 0)
            correct += pred.eq(targets.view_as(pred)).sum().item()
    test_loss /= len(test_loader.dataset)
    print("Test set: Average loss: {:.4f}, Accuracy: {}/{}".format(test_loss, correct, len(test_loader.dataset)))


def main(args, train_set, test_set):
    device = torch.device("cpu")
    train_loader = torch.utils.data.DataLoader(train_set, batch_size=8)
    test_loader = torch.utils.data.DataLoader(test_set, batch_size=12)
    model = SiameseNetwork().to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        train(args, model, device, train_loader, optimizer, epoch)
        test(model, device, test_loader)
        scheduler.step()
    torch.save(model.state_dict(), "siamese_network.pt")
    images_1, images_2, targets = next(iter(test_loader))
    return nn.BCELoss()(model(images_1, images_2).squeeze(), targets)


def make():
    decay = torch.tensor(0.05, requires_grad=True)
    args = Settings(lr=1.0, gamma=0.7, epochs=2, log_interval=2, decay=decay)
    return {"args": args, "train_set": Matcher(40), "test_set": Matcher(40)}


SCRIPT = Script("siamese", main, make, lambda a: {"decay": a["args"].decay})
