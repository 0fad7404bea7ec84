"""One of the processes that test_distributed.py starts with torchrun: it does a list of jobs, each a few steps of a run.

    torchrun --nproc_per_node=2 tests/ranks.py jobs.json        [{"steps": 3, "options": ["--config", "small", ...]}, ...]

Each job leaves its checkpoint, and in its output folder values.json: what every step logged, what validation found and the
images in each of its batches, by process, and how many times gradients travelled between the processes (DDP only). RANK in
an option is the process's number. A job with "refused" must fail: each process writes the error there, under its number.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from train import parse, save, set_up, train_step, validate


def work(job):
    rank = os.environ["RANK"]
    try:
        run = set_up(*parse([option.replace("RANK", rank) for option in job["options"]]))
    except ValueError as error:
        if "refused" not in job:
            raise
        return Path(job["refused"] + rank).write_text(str(error))
    travelled = []
    if isinstance(run.parallel, DistributedDataParallel):
        run.parallel.register_comm_hook(None, lambda state, bucket: (travelled.append(bucket.is_last()), allreduce_hook(None, bucket))[1])
    steps = [train_step(run) for _ in range(job["steps"])]
    validation = validate(run)
    save(run)
    held_out = [None] * run.ranks
    dist.all_gather_object(held_out, [len(batch.images) for batch in run.validation])
    if run.rank == 0:
        found = {"ranks": run.ranks, "steps": steps, "validation": validation, "held_out": held_out, "travelled": sum(travelled)}
        (run.out / "values.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        work(job)
    if dist.is_initialized():
        dist.destroy_process_group()
