"""Averaged weights (EMA), which are sampled from and kept: they are steadier than the last step's."""

from contextlib import contextmanager

import torch


class Average:
    """An exponential moving average of a model's weights; of this process's shards, where they are shared."""

    def __init__(self, model):
        self.model = model
        self.current = [p.to_local() if hasattr(p, "to_local") else p.data for p in model.parameters()]
        self.weights = [p.clone() for p in self.current]

    @torch.no_grad()
    def update(self, decay):
        """Move by a share 1 - decay towards the current weights."""
        torch._foreach_lerp_(self.weights, self.current, 1 - decay)

    @contextmanager
    def applied(self):
        """While it is entered, the model's weights are the averaged ones."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
            if hasattr(self.model, "reshard"):  # FSDP2 keeps what was gathered last, the averaged weights
                self.model.reshard()

    @torch.no_grad()
    def _swap(self):
        for p, average in zip(self.current, self.weights):
            before = p.clone()
            p.copy_(average)
            average.copy_(before)
