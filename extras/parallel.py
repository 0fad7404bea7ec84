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


PATIENCE = timedelta(days=7)  # of those that wait while the first process trains the VAE, draws or saves
patient = None  # a group of all processes that has it; any other wait may take half an hour


def join(device):
    """Join the processes that torchrun started, if it did -> (rank, number of processes, own device)."""
    if "RANK" in os.environ and not dist.is_initialized():
        global patient
        where, wait = dict(backend="gloo"), timedelta(minutes=30)
        if device.type == "cuda":
            where = dict(backend="nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
            torch.cuda.set_device(where["device_id"])
        dist.init_process_group(**where, timeout=wait)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    if not dist.is_initialized():
        return 0, 1, device
    here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    return dist.get_rank(), dist.get_world_size(), here


def sent(tensor, device):
    """A CPU tensor on the device. From pinned memory, where that is CUDA: then the host need not wait."""
    cuda = device.type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


def summed(values, device):
    """Sums over all processes: n numbers, on the device or not -> float64 (n,), for which no host waits."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
    given = [torch.is_tensor(value) for value in values]
    rest = [0 if on_device else value for value, on_device in zip(values, given)]
    rest = sent(torch.tensor(rest, dtype=dtype), device)
    parts = [value.to(dtype) if on_device else n for value, on_device, n in zip(values, given, rest)]
    values = torch.stack(parts) if any(given) else rest
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def total(values, device):
    """The same as a list of floats: the host waits for them, once."""
    return summed(values, device).tolist()


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
        dist.broadcast_object_list(failure, group=patient)
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
