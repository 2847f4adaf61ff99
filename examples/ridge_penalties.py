"""One penalty per feature, for ridge and for logistic regression: implicit gradients beside exact ones.

Both problems have one solution, so a hypergradient needs no history of the training: ``mlc.Implicit("cg")`` solves one
linear system with the Hessian at the solution. Both gradients are checked first. Ridge regression (diabetes data) has a
closed form, which autograd differentiates; logistic regression (breast cancer data) has none, so its training is
unrolled step by step. Then the penalties are learned; half of the features are noise, and theirs should become large.

    mlc run examples/ridge_penalties.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes

import mlc


def fit(log_penalty, loss, train, val, steps):
    """Validation loss of a linear model trained with the penalty exp(log_penalty[i]) on its weight i."""
    weight = torch.zeros_like(log_penalty, requires_grad=True)
    opt = torch.optim.SGD([weight], lr=0.06, momentum=0.85, nesterov=True)
    with mlc.level("fit"):
        for _ in range(steps):
            opt.zero_grad()
            penalty = 0.5 * (log_penalty.exp() * weight.square()).sum()
            (loss(train[0] @ weight, train[1]) + penalty).backward()
            opt.step()
    return loss(val[0] @ weight, val[1])


unrolled = mlc.compile(fit)
implicit = mlc.compile(fit, flows={"fit": mlc.Implicit("cg", steps=60, tol=1e-9)})


def closed_form(log_penalty, train, val):
    """The same for ridge regression, without a loop."""
    (x, y), n = train, len(train[1])
    weight = torch.linalg.solve(2 / n * x.T @ x + log_penalty.exp().diag(), 2 / n * x.T @ y)
    return F.mse_loss(val[0] @ weight, val[1])


PROBLEMS = {
    "ridge": (F.mse_loss, load_diabetes),
    "logistic": (F.binary_cross_entropy_with_logits, load_breast_cancer),
}


def load(source, train=80, val=150, seed=0):
    """Training, validation and test data: standardised features and as many of noise; a standardised target."""
    x, y = (torch.tensor(a, dtype=torch.float64) for a in source(return_X_y=True))
    torch.manual_seed(seed)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.randn_like(x)], 1)
    y = y if source is load_breast_cancer else (y - y.mean()) / y.std()
    parts = torch.randperm(len(y)).split([train, val, len(y) - train - val])
    return [(x[p], y[p]) for p in parts]


def gradient(fn, log_penalty, *args):
    return torch.autograd.grad(fn(log_penalty, *args), log_penalty)[0]


def learn(log_penalty, loss, train, val, outer_steps, steps):
    log_penalty = log_penalty.clone().requires_grad_()
    opt = torch.optim.Adam([log_penalty], lr=0.3)
    for _ in range(outer_steps):
        opt.zero_grad()
        implicit(log_penalty, loss, train, val, steps).backward()
        opt.step()
        with torch.no_grad():
            log_penalty.clamp_(-2, 2.5)  # where the fit converges
    return log_penalty.detach()


def example_args():
    train, val, _ = load(load_diabetes, train=40, val=40)
    log_penalty = torch.zeros(train[0].shape[1], dtype=torch.float64)
    return log_penalty.requires_grad_(), F.mse_loss, train, val, 20


def main(outer_steps=30, steps=150):
    result = {}
    for name, (loss, source) in PROBLEMS.items():
        train, val, test = load(source)
        d = train[0].shape[1]
        start = torch.full((d,), 0.0, dtype=torch.float64, requires_grad=True)
        mine = gradient(implicit, start, loss, train, val, steps)
        if name == "ridge":
            exact = gradient(closed_form, start, train, val)
        else:
            exact = gradient(unrolled, start, loss, train, val, steps)
        error = ((mine - exact).norm() / exact.norm()).item()
        grid = [torch.full((d,), float(p), dtype=torch.float64) for p in torch.linspace(-2, 2, 9)]
        single = min(grid, key=lambda p: fit(p, loss, train, val, steps).item())
        learned = learn(single, loss, train, val, outer_steps, steps)
        result[name] = {
            "error of the gradient": error,
            "test loss, one penalty": fit(single, loss, train, test, steps).item(),
            "test loss, one per feature": fit(learned, loss, train, test, steps).item(),
            "penalty of real features": learned[: d // 2].exp().median().item(),
            "penalty of noise": learned[d // 2 :].exp().median().item(),
        }
        print(name + "".join(f"\n  {what:28s}{value:.3g}" for what, value in result[name].items()))
    return result


if __name__ == "__main__":
    main()
