"""Several processes: who they are, sums over them, and shared weights (FSDP2, HSDP; Zhao et al. 2023).

With --fsdp the processes share the weights, gradients and the optimiser's state, and the weights of a
block are gathered as it runs. With --shard n, each n processes share one copy (HSDP), so that a node can
keep its traffic to itself.
"""

import os
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from extras.runs import Interrupt


def join(device):
    """Join the processes that torchrun started, if it did -> (rank, number of processes, own device)."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # A long patience: the others wait while the first process trains the VAE, draws samples and saves.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if not dist.is_initialized():
        return 0, 1, device
    here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    return dist.get_rank(), dist.get_world_size(), here


def total(values, device):
    """Sums over all processes: list of numbers -> list of floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def first(work):
    """Have the first process do some work for all -> what it returns, in the others None.

    What it raises, all raise. The others outlive the signals that it is still heeding.
    """
    if not dist.is_initialized():
        return work()
    found, failure = None, [None]
    try:
        found = work() if dist.get_rank() == 0 else None
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        failure = [error]
    with Interrupt():
        dist.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]
    return found


def seen_by_all(path, device):
    """Is there such a file? Raises ValueError if some processes see it and others do not."""
    seen, ranks = total([path.exists(), 1], device)
    if 0 < seen < ranks:
        shared = "--out must be a folder that all nodes share"
        raise ValueError(f"{path}: {seen:.0f} of the {ranks:.0f} processes can see it; {shared}")
    return seen > 0


def share_weights(model, device, shard=0, bf16=False):
    """Cut the weights of a model between the processes, in place. shard: so many share one copy; 0 = all.

    bf16: weights are gathered as bfloat16; their shards, and the sums of gradients, stay float32. Raises
    ValueError if `shard` does not divide the number of processes.
    """
    ranks = dist.get_world_size()
    shard = shard or ranks
    if ranks % shard:
        raise ValueError(f"shard is {shard}; it must divide the number of processes, {ranks}")
    mesh = init_device_mesh(device.type, (ranks // shard, shard), mesh_dim_names=("replicas", "shards"))
    dtype = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh["shards"] if ranks == shard else mesh, mp_policy=policy)


def wrap(run, bf16, compiled):
    """Compile the blocks, and make the model one of several -> what is to be called in training."""
    model, config = run.model, run.config
    if config.checkpoint_activations:  # every block keeps its input only, and runs again in the backward pass
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if compiled:
        for block in model.blocks:
            block.compile()
    if run.ranks > 1 and config.fsdp:  # the processes share one copy of the weights
        share_weights(model, run.device, config.shard, bf16)
    elif run.ranks > 1:  # each has a copy, and gradients are averaged; the buffers are constants
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    return model


def synchronise(model, ranks, last):
    """Let gradients travel between the processes in the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif ranks > 1:
        model.set_requires_gradient_sync(last)
