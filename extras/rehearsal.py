"""A rehearsal: before the first long stage, everything that will be run later is run once, at its smallest.

It finds what no list of checks finds: a sampler with more steps than there are timesteps, images that no row
is long enough for, a discriminator too deep for the image, too little memory, a folder or a disk that cannot
be written to. It leaves nothing behind: no file, no line on the terminal, no random number used.
"""

import gc
import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from extras.cli import NO_MEMORY
from extras.runs import reason
from extras.sources import say


def smallest(config, ranks):
    """The configuration of a run that takes one step of everything, in a folder of its own."""
    vae = config.autoencoder
    plays = vae.disc_start < vae.steps and vae.disc_weight > 0
    parts = dict(autoencoder=replace(vae, steps=1, disc_start=0 if plays else 1))
    parts |= dict(data=replace(config.data, workers=0), model=replace(config.model))
    rows = config.micro_rows * ranks or config.rows
    out = str(Path(config.out) / ".rehearsal")
    return replace(config, out=out, rows=rows, max_steps=1, warmup=1, eval_documents=1, wandb="", **parts)


def rehearse(config, set_up, train_step, validate, trained, evaluate):
    """Run these functions of train.py once. Raises what they raise; a RuntimeError becomes a ValueError."""
    small, said = smallest(config, int(os.environ.get("WORLD_SIZE", 1))), io.StringIO()
    try:
        with torch.random.fork_rng(), redirect_stdout(said), redirect_stderr(said):
            run = set_up(small)
            train_step(run)
            validate(run)
            model = trained(run)
            if model:
                evaluate(model, 1, progress=lambda splits: splits[1:2])
    except (ValueError, OSError, RuntimeError) as error:
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
