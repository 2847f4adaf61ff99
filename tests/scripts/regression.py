"""A polynomial fitted by descent by hand, until the loss is small: the number of steps depends on values."""

from itertools import count

import torch
import torch.nn.functional as F
from tests.scripts.script import Script

POLY_DEGREE = 3


def make_features(x):
    """A matrix [x, x^2, x^3]."""
    x = x.unsqueeze(1)
    return torch.cat([x**i for i in range(1, POLY_DEGREE + 1)], 1)


def f(x, W_target, b_target):
    return x.mm(W_target) + b_target.item()


def poly_desc(W, b):
    result = "y = "
    for i, w in enumerate(W):
        result += "{:+.2f} x^{} ".format(w, i + 1)
    result += "{:+.2f}".format(b[0])
    return result


def get_batch(W_target, b_target, batch_size=32):
    random = torch.randn(batch_size)
    x = make_features(random)
    y = f(x, W_target, b_target)
    return x, y


def main(fc, W_target, b_target, step, close=0.2):
    for batch_idx in count(1):
        batch_x, batch_y = get_batch(W_target, b_target)
        fc.zero_grad()
        output = F.smooth_l1_loss(fc(batch_x), batch_y)
        loss = output.item()
        output.backward()
        for param in fc.parameters():
            # was: param.data.add_(-0.1 * param.grad)
            param.data.add_(-step * param.grad)
        if loss < close:
            break

    print("Loss: {:.6f} after {} batches".format(loss, batch_idx))
    print("==> Learned function:\t" + poly_desc(fc.weight.view(-1), fc.bias))
    print("==> Actual function:\t" + poly_desc(W_target.view(-1), b_target))
    batch_x, batch_y = get_batch(W_target, b_target)
    return F.smooth_l1_loss(fc(batch_x), batch_y)


def make():
    return {
        "fc": torch.nn.Linear(POLY_DEGREE, 1),
        "W_target": torch.randn(POLY_DEGREE, 1),
        "b_target": torch.randn(1),
        "step": torch.tensor(0.1, requires_grad=True),
    }


SCRIPT = Script("regression", main, make, lambda a: {"step": a["step"]})
