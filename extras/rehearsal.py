"""A rehearsal: before the first long stage, everything that will be run later is run once, at its smallest.

It finds what no list of checks finds: a sampler with more steps than there are timesteps, images that no row
is long enough for, a discriminator too deep for the image, too little memory of a GPU, a folder or a disk
that cannot be written to. It leaves nothing behind: no file, no line on the terminal, no random number used.
"""

import gc
import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from extras.cli import NO_MEMORY, pick_device
from extras.runs import reason
from extras.sources import say


def takes_minutes(config):
    """Does one step of everything take minutes on a CPU? `small` takes a fiftieth of what is allowed."""
    c, vae = config.model, config.autoencoder
    side = config.data.image_size // vae.unshuffle
    return (side * vae.channels) ** 2 + config.data.seq_len * c.n_layers * c.dim**2 / 10 > 1e8


def smallest(config, ranks, cpu):
    """The configuration of a run that takes one step of everything, in a folder of its own."""
    vae, rows, micro_rows = config.autoencoder, config.micro_rows * ranks or config.rows, config.micro_rows
    if cpu:  # where time is short, rather than memory
        vae, rows, micro_rows = replace(vae, batch=min(2, vae.batch)), ranks, 0
    plays = vae.disc_start < vae.steps and vae.disc_weight > 0
    parts = dict(autoencoder=replace(vae, steps=1, disc_start=0 if plays else 1))
    parts |= dict(data=replace(config.data, workers=0), model=replace(config.model))
    parts |= dict(rows=rows, micro_rows=micro_rows, out=str(Path(config.out) / ".rehearsal"))
    return replace(config, max_steps=1, warmup=1, eval_documents=1, wandb="", **parts)


def rehearse(config, set_up, train_step, validate, averaged_model, evaluate):
    """Run these functions of train.py once. Raises what they raise; a RuntimeError becomes a ValueError."""
    cpu = pick_device(config.device).type == "cpu"
    if cpu and takes_minutes(config):
        return say("no stage is tried out first: at this size that takes minutes on a CPU", known=True)
    small, said = smallest(config, int(os.environ.get("WORLD_SIZE", 1)), cpu), io.StringIO()
    try:
        with torch.random.fork_rng(), redirect_stdout(said), redirect_stderr(said):
            run = set_up(small)
            train_step(run)
            validate(run)
            model = averaged_model(run)
            if model:
                evaluate(model, 1, splits=["held_out"])
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if NO_MEMORY.search(str(error)):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        odd = f"a trial of these options fails: {reason(error)}"
        told = odd if isinstance(error, RuntimeError) else str(error).replace(small.out, config.out)
        raise kind(told) from error
    finally:
        say.cache_clear()
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(small.out, ignore_errors=True)
    run = model = None
    gc.collect()
    torch.cuda.empty_cache()
