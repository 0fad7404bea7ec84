"""AdamW, the paper's optimiser, and Muon beside it (Jordan et al. 2024)."""

import torch


def make_optimizers(model, config, undecayed=()):
    """AdamW, with weight decay on matrices only; for optimizer="muon" also Muon, for the blocks' matrices.

    Muon makes an update orthogonal, which learns faster per step, and scales it to AdamW's size.
    """
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
        scaled = dict(weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(by_muon, lr=config.lr, **scaled))
    return optimizers
