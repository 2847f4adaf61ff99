"""Differentiable architecture search: the architect steps by a finite difference at moved weights."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.scripts.data import Settings, digits
from tests.scripts.script import Script

OPERATIONS = {
    "none": lambda C: Zero(),
    "skip": lambda C: nn.Identity(),
    "conv": lambda C: nn.Sequential(nn.Tanh(), nn.Conv2d(C, C, 3, padding=1, bias=False)),
    "pool": lambda C: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
}


class Zero(nn.Module):
    def forward(self, x):
        return x.mul(0.0)


class MixedOp(nn.Module):
    def __init__(self, C):
        super().__init__()
        self._ops = nn.ModuleList([make(C) for make in OPERATIONS.values()])

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Network(nn.Module):
    def __init__(self, C, edges, criterion):
        super().__init__()
        self._C, self._edges, self._criterion = C, edges, criterion
        self.stem = nn.Conv2d(1, C, 3, padding=1, stride=2)
        self.cells = nn.ModuleList([MixedOp(C) for _ in range(edges)])
        self.classifier = nn.Linear(C, 10)
        self.alphas = (1e-3 * torch.randn(edges, len(OPERATIONS))).requires_grad_(True)
        self._arch_parameters = [self.alphas]

    def new(self):
        model_new = Network(self._C, self._edges, self._criterion)
        for x, y in zip(model_new.arch_parameters(), self.arch_parameters()):
            x.data.copy_(y.data)
        return model_new

    def forward(self, input):
        x = self.stem(input)
        for weights, cell in zip(F.softmax(self.alphas, dim=-1), self.cells):
            x = cell(x, weights)
        return self.classifier(x.mean((2, 3)))

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        return self._arch_parameters


def _concat(xs):
    return torch.cat([x.view(-1) for x in xs])


class Architect:
    def __init__(self, model, args):
        self.network_momentum = args.momentum
        self.network_weight_decay = args.weight_decay
        self.model = model
        self.optimizer = torch.optim.Adam(
            self.model.arch_parameters(),
            # was: lr=0.05,
            lr=args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
            eps=1e-4,
        )

    def _compute_unrolled_model(self, input, target, eta, network_optimizer):
        loss = self.model._loss(input, target)
        theta = _concat(self.model.parameters()).data
        try:
            moment = _concat(network_optimizer.state[v]["momentum_buffer"] for v in self.model.parameters())
            moment.mul_(self.network_momentum)
        except KeyError:
            moment = torch.zeros_like(theta)
        dtheta = _concat(torch.autograd.grad(loss, self.model.parameters())).data + self.network_weight_decay * theta
        return self._construct_model_from_theta(theta.sub(moment + dtheta, alpha=eta))

    def step(self, input_train, target_train, input_valid, target_valid, eta, network_optimizer):
        self.optimizer.zero_grad()
        self._backward_step_unrolled(input_train, target_train, input_valid, target_valid, eta, network_optimizer)
        self.optimizer.step()

    def _backward_step_unrolled(self, input_train, target_train, input_valid, target_valid, eta, network_optimizer):
        unrolled_model = self._compute_unrolled_model(input_train, target_train, eta, network_optimizer)
        unrolled_loss = unrolled_model._loss(input_valid, target_valid)
        unrolled_loss.backward()
        dalpha = [v.grad for v in unrolled_model.arch_parameters()]
        vector = [v.grad.data for v in unrolled_model.parameters()]
        implicit_grads = self._hessian_vector_product(vector, input_train, target_train)
        for g, ig in zip(dalpha, implicit_grads):
            g.data.sub_(ig.data, alpha=eta)
        for v, g in zip(self.model.arch_parameters(), dalpha):
            if v.grad is None:
                v.grad = g.data.clone()
            else:
                v.grad.data.copy_(g.data)

    def _construct_model_from_theta(self, theta):
        model_new = self.model.new()
        model_dict = self.model.state_dict()
        params, offset = {}, 0
        for k, v in self.model.named_parameters():
            v_length = v.numel()
            params[k] = theta[offset : offset + v_length].view(v.size())
            offset += v_length
        assert offset == len(theta)
        model_dict.update(params)
        model_new.load_state_dict(model_dict)
        return model_new

    def _hessian_vector_product(self, vector, input, target, r=1e-2):
        R = r / _concat(vector).norm()
        for p, v in zip(self.model.parameters(), vector):
            p.data.add_(R * v)
        loss = self.model._loss(input, target)
        grads_p = torch.autograd.grad(loss, self.model.arch_parameters())
        for p, v in zip(self.model.parameters(), vector):
            p.data.sub_(2 * R * v)
        loss = self.model._loss(input, target)
        grads_n = torch.autograd.grad(loss, self.model.arch_parameters())
        for p, v in zip(self.model.parameters(), vector):
            p.data.add_(R * v)
        return [(x - y).div_(2 * R) for x, y in zip(grads_p, grads_n)]


def main(args, images, labels):
    criterion = nn.CrossEntropyLoss()
    model = Network(2, 2, criterion)
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=1e-3)
    data = torch.utils.data.TensorDataset(images, labels)
    split = int(len(data) * args.train_portion)
    indices = list(range(len(data)))
    sampler = torch.utils.data.SubsetRandomSampler
    train_queue = torch.utils.data.DataLoader(data, batch_size=6, sampler=sampler(indices[:split]))
    valid_queue = torch.utils.data.DataLoader(data, batch_size=6, sampler=sampler(indices[split:]))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(args.epochs), eta_min=0.01)
    architect = Architect(model, args)

    for epoch in range(args.epochs):
        lr = scheduler.get_last_lr()[0]
        objs = 0.0
        for input, target in train_queue:
            model.train()
            input_search, target_search = next(iter(valid_queue))
            architect.step(input, target, input_search, target_search, lr, optimizer)
            optimizer.zero_grad()
            loss = model._loss(input, target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            objs += loss.item()
        scheduler.step()
        print("epoch %d lr %e train %.4f" % (epoch, lr, objs / len(train_queue)))
        print(F.softmax(model.alphas, dim=-1).detach().numpy().round(4))

    torch.save(model.state_dict(), "weights.pt")
    return criterion(model(images[split:]), labels[split:])


def make():
    images, labels = digits(24)
    lr = torch.tensor(0.05, requires_grad=True)
    args = Settings(
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-3,
        arch_learning_rate=lr,
        arch_weight_decay=1e-3,
        train_portion=0.5,
        epochs=2,
        grad_clip=5,
    )
    return {"args": args, "images": images, "labels": labels}


SCRIPT = Script("darts", main, make, lambda a: {"arch_learning_rate": a["args"].arch_learning_rate})
