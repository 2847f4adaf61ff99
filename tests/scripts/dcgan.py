"""Two players with an optimizer each: real and fake halves, one label tensor refilled, samples saved per epoch."""

import torch
import torch.nn as nn
import torch.optim as optim
from tests.scripts.data import Digits, Settings
from tests.scripts.script import Script

nz, ngf, ndf = 5, 3, 3


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        torch.nn.init.normal_(m.weight, 0.0, 0.2)
    elif classname.find("BatchNorm") != -1:
        torch.nn.init.normal_(m.weight, 1.0, 0.02)
        torch.nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 2, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.SiLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.SiLU(True),
            nn.ConvTranspose2d(ngf, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, ndf, 4, 2, 1, bias=False),
            nn.SiLU(inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.SiLU(inplace=True),
            nn.Conv2d(ndf * 2, 1, 2, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


def main(opt):
    device = torch.device("cpu")
    dataloader = torch.utils.data.DataLoader(opt.dataset, batch_size=opt.batchSize, shuffle=True, num_workers=0)
    netG = Generator().to(device)
    netG.apply(weights_init)
    netD = Discriminator().to(device)
    netD.apply(weights_init)

    criterion = nn.BCELoss()
    fixed_noise = torch.randn(opt.batchSize, nz, 1, 1, device=device)
    real_label = 1
    fake_label = 0

    # was: optimizerD = optim.Adam(netD.parameters(), lr=0.01, betas=(0.5, 0.999), eps=1e-3)
    optimizerD = optim.Adam(netD.parameters(), lr=opt.lr_d, betas=(0.5, 0.999), eps=1e-3)
    optimizerG = optim.Adam(netG.parameters(), lr=0.01, betas=(0.5, 0.999), eps=1e-3)

    for epoch in range(opt.niter):
        for i, data in enumerate(dataloader, 0):
            # (1) the discriminator: log(D(x)) + log(1 - D(G(z)))
            netD.zero_grad()
            real_cpu = data[0].to(device)
            batch_size = real_cpu.size(0)
            label = torch.full((batch_size,), real_label, dtype=real_cpu.dtype, device=device)
            output = netD(real_cpu)
            errD_real = criterion(output, label)
            errD_real.backward()
            D_x = output.mean().item()

            noise = torch.randn(batch_size, nz, 1, 1, device=device)
            fake = netG(noise)
            label.fill_(fake_label)
            output = netD(fake.detach())
            errD_fake = criterion(output, label)
            errD_fake.backward()
            D_G_z1 = output.mean().item()
            errD = errD_real + errD_fake
            optimizerD.step()

            # (2) the generator: log(D(G(z)))
            netG.zero_grad()
            label.fill_(real_label)
            output = netD(fake)
            errG = criterion(output, label)
            errG.backward()
            D_G_z2 = output.mean().item()
            optimizerG.step()

            print(
                "[%d/%d][%d/%d] Loss_D: %.4f Loss_G: %.4f D(x): %.4f D(G(z)): %.4f / %.4f"
                % (epoch, opt.niter, i, len(dataloader), errD.item(), errG.item(), D_x, D_G_z1, D_G_z2)
            )
            if i % 100 == 0:
                fake = netG(fixed_noise)
                torch.save(fake.detach(), "fake_samples_epoch_%03d.pt" % epoch)

        torch.save(netG.state_dict(), "netG_epoch_%d.pth" % epoch)
        torch.save(netD.state_dict(), "netD_epoch_%d.pth" % epoch)

    fake = netG(fixed_noise)
    real = torch.stack([image for image, _ in opt.dataset])
    return (fake.mean(0) - real.mean(0)).square().mean() + (fake.std(0) - real.std(0)).square().mean()


def make():
    lr_d = torch.tensor(0.01, requires_grad=True)
    return {"opt": Settings(dataset=Digits(12), batchSize=6, niter=2, lr_d=lr_d)}


# The discriminator's loss reads `fake.detach()`.
SCRIPT = Script("dcgan", main, make, lambda a: {"lr_d": a["opt"].lr_d}, options={"stop_gradient": "inner"})
