"""AdamW, the paper's optimiser, and Muon beside it (Jordan et al. 2024)."""

import math

import torch

QUINTIC = 3.4445, -4.7750, 2.0315  # of a step of the Newton-Schulz iteration


def orthogonal(matrices, steps=5):
    """Matrices (n, rows, columns) -> the same with all their singular values near 1, in bfloat16."""
    x, tall = matrices.bfloat16(), matrices.shape[1] > matrices.shape[2]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        x = x @ factor if tall else factor @ x  # a x + b x x' x + c (x x')^2 x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, as large as an update of AdamW; decoupled weight decay.

    Its update is that of torch.optim.Muon with "match_rms_adamw", but it takes all matrices of one shape at
    once. The weights of a convolution are a matrix with a row for each output.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient. closure: never used."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for shape, params in shapes.items():
                gradients = [p.grad for p in params]
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
                updates = orthogonal(updates.flatten(2)).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = -0.2 * math.sqrt(max(updates.shape[1:])) * group["lr"]
                torch._foreach_add_(params, list(updates.view(-1, *shape)), alpha=scale)


class MuonForConvolutions(torch.optim.AdamW):
    """AdamW, but for the weights of convolutions Muon at three times its learning rate."""

    def __init__(self, params, lr, **options):
        params = list(params)
        super().__init__([p for p in params if p.ndim != 4], lr, **options)
        self.muon = Muon([p for p in params if p.ndim == 4], lr, weight_decay=0.0)

    def step(self, closure=None):
        """One step of both. closure: never used."""
        super().step()
        self.muon.param_groups[0]["lr"] = 3 * self.param_groups[0]["lr"]
        self.muon.step()

    def zero_grad(self, set_to_none=True):
        """Of both."""
        super().zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)

    def state_dict(self):
        """Of both."""
        return {"adamw": super().state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state):
        """Of both."""
        super().load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"])


def make_optimizers(model, config, undecayed=()):
    """AdamW, with weight decay on matrices only; for optimizer="muon" also Muon, for the blocks' matrices."""
    in_blocks = {id(p) for p in model.blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"}
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_muon = [p for p in parameters if id(p) in in_blocks]
    by_adam = [p for p in parameters if id(p) not in in_blocks]
    decayed = [p for p in by_adam if p.ndim >= 2 and not any(p is q for q in undecayed)]
    others = [p for p in by_adam if p.ndim < 2 or any(p is q for q in undecayed)]
    groups = [dict(params=decayed, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
    betas = config.beta1, config.beta2
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, fused=True)]
    if by_muon:
        optimizers.append(Muon(by_muon, lr=config.lr, weight_decay=config.weight_decay))
    return optimizers
