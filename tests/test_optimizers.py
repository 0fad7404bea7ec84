"""Muon against torch.optim.Muon, which takes the matrices one by one."""

import pytest
import torch

from extras.optimizers import Muon, orthogonal

SHAPES = [(48, 16), (16, 48), (48, 16), (32, 32), (16, 48)]


def test_muon_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    a = Muon(ours, lr=0.02, weight_decay=0.1, momentum=0.95)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator) * 1e-4
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q, before in zip(ours, theirs, start):
        moved = (q - before).norm()
        assert moved > 0.1 and (p - q).norm() < 0.02 * moved  # bfloat16, in another order
    assert {name for state in a.state_dict()["state"].values() for name in state} == {"momentum_buffer"}


@pytest.mark.parametrize("shape", [(3, 8, 40), (3, 40, 8), (1, 16, 16)])
def test_singular_values_come_near_one(shape):
    found = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))).float())
    assert 0.5 < found.min() and found.max() < 1.3
