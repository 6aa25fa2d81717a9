"""Random logits of experts, and the comparison of a loss with its formula."""

import torch
from torch.autograd import grad

COUNTS = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]


def draw(B=7, E=3, C=10, seed=0):
    """Logits [B, E, C] with gradients, and targets [B]."""
    generator = torch.Generator().manual_seed(seed)
    expert_logits = 5 * torch.randn(B, E, C, generator=generator, dtype=torch.float64)
    return expert_logits.requires_grad_(), torch.randint(0, C, (B,), generator=generator)


def half_precision(dtype):
    """Logits in half precision, with gradients, and targets."""
    x, y = draw()
    return x.detach().to(dtype).requires_grad_(), y


def prior():
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    return counts / counts.sum()


def adjusted_cross_entropy(x, y, offsets):
    """Mean of -log(e^(z_y + a_y) / sum_c e^(z_c + a_c)) in explicit loops."""
    total = 0.0
    for b in range(len(x)):
        terms = [torch.exp(x[b, c] + offsets[c]) for c in range(x.shape[1])]
        total = total - torch.log(terms[int(y[b])] / sum(terms))
    return total / len(x)


def assert_same_with_gradients(value, expected, x, rtol=1e-5, atol=1e-8):
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    ours, theirs = (grad(loss, x, retain_graph=True)[0] for loss in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
