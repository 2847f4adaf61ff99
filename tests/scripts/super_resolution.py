"""Digits enlarged by a sub-pixel network: `train`, `test` and `checkpoint` per epoch, log10 of a loss."""

from math import log10

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.init as init
import torch.optim as optim
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, upscale_factor):
        super().__init__()
        self.act = nn.Tanh()
        self.conv1 = nn.Conv2d(1, 6, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(6, 4, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(4, upscale_factor**2, (3, 3), (1, 1), (1, 1))
        self.pixel_shuffle = nn.PixelShuffle(upscale_factor)
        self._initialize_weights()

    def forward(self, x):
        x = self.act(self.conv1(x))
        x = self.act(self.conv2(x))
        return self.pixel_shuffle(self.conv3(x))

    def _initialize_weights(self):
        init.orthogonal_(self.conv1.weight, init.calculate_gain("tanh"))
        init.orthogonal_(self.conv2.weight, init.calculate_gain("tanh"))
        init.orthogonal_(self.conv3.weight)


def enlarging(count):
    target, _ = digits(count)
    return TensorDataset(F.avg_pool2d(target, 2), target)


def main(opt):
    torch.manual_seed(opt.seed)
    device = torch.device("cpu")
    training_data_loader = DataLoader(dataset=opt.train_set, num_workers=0, batch_size=8, shuffle=True)
    testing_data_loader = DataLoader(dataset=opt.test_set, num_workers=0, batch_size=6, shuffle=False)
    model = Net(upscale_factor=2).to(device)
    criterion = nn.MSELoss()
    optimizer = optim.Adam(model.parameters(), lr=opt.lr)

    def train(epoch):
        epoch_loss = 0
        for iteration, batch in enumerate(training_data_loader, 1):
            input, target = batch[0].to(device), batch[1].to(device)
            optimizer.zero_grad()
            # was: loss = criterion(model(input), target)
            loss = criterion(model(input), opt.contrast * target)
            epoch_loss += loss.item()
            loss.backward()
            optimizer.step()
            print(
                "===> Epoch[{}]({}/{}): Loss: {:.4f}".format(epoch, iteration, len(training_data_loader), loss.item())
            )
        print("===> Epoch {} Complete: Avg. Loss: {:.4f}".format(epoch, epoch_loss / len(training_data_loader)))

    def test():
        avg_psnr = 0
        with torch.no_grad():
            for batch in testing_data_loader:
                input, target = batch[0].to(device), batch[1].to(device)
                prediction = model(input)
                mse = criterion(prediction, target)
                psnr = 10 * log10(1 / mse.item())
                avg_psnr += psnr
        print("===> Avg. PSNR: {:.4f} dB".format(avg_psnr / len(testing_data_loader)))

    def checkpoint(epoch):
        model_out_path = "model_epoch_{}.pth".format(epoch)
        torch.save(model.state_dict(), model_out_path)
        print("Checkpoint saved to {}".format(model_out_path))

    for epoch in range(1, opt.nEpochs + 1):
        train(epoch)
        test()
        checkpoint(epoch)

    return criterion(model(opt.test_set.tensors[0]), opt.test_set.tensors[1])


def make():
    contrast = torch.tensor(0.9, requires_grad=True)
    sets = {"train_set": enlarging(24), "test_set": enlarging(12)}
    return {"opt": Settings(seed=123, lr=0.01, nEpochs=2, contrast=contrast, **sets)}


SCRIPT = Script("super_resolution", main, make, lambda a: {"contrast": a["opt"].contrast})
