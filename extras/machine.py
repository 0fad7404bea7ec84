"""What this machine does of what the options ask for: precision, compilation, FlexAttention."""

from contextlib import suppress
from functools import partial

import torch
from tqdm import tqdm

from attention_mask import flex_mask, transfusion_mask
from extras import runs
from extras.cli import pick_device
from extras.parallel import first, join


def say(run, text):
    """Print, once for all processes, and without cutting a progress bar in two."""
    if run.rank == 0:
        with suppress(OSError):  # nobody listens any more
            tqdm.write(text)


def has_bf16(device):
    """Does this device multiply matrices in bfloat16? (T4 and V100 emulate it, slowly.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def machine(config, device):
    """What this machine does of what is asked for: (bfloat16?, compiled blocks?, what makes the masks)."""
    cuda = device.type == "cuda"
    bf16 = config.precision == "bf16" or config.precision == "auto" and has_bf16(device)
    compiled = config.compile == "on" or config.compile == "auto" and cuda
    blocks = cuda and compiled and config.data.seq_len % 128 == 0
    if config.attention == "flex" and not blocks:
        needed = "CUDA, compiled blocks and a --seq_len that is a multiple of 128"
        raise ValueError(f"--attention flex needs {needed}; leave it at auto")
    make = flex_mask if blocks and config.attention != "sdpa" else transfusion_mask
    return bf16, compiled, partial(make, causal=config.model.image_attention == "causal")


def import_wandb():
    """The optional package wandb. Raises ValueError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package that is not installed: pip install wandb") from None
    return wandb


def claim(config, resume):
    """Make --out the own folder of a run, of one process or several. Raises ValueError as runs.claim does."""
    machine(config, join(pick_device(config.device))[2])  # what it raises, it raises before a folder is made
    first(partial(runs.claim, config.out, [*runs.WORK, *([] if config.vae else ["vae.pt"])], resume))


def check(run, resume):
    """Raises ValueError, before anything is made, on what cannot be done here, or where the run is to be."""
    config, device = run.config, run.device
    if config.rows % (run.ranks * (config.micro_rows or 1)):
        times = f" times micro_rows, {config.micro_rows}" if config.micro_rows else ""
        raise ValueError(f"rows is {config.rows}; it must be a multiple of the {run.ranks} processes{times}")
    _, compiled, _ = machine(config, device)
    if config.attention == "auto" and device.type == "cuda" and compiled and config.data.seq_len % 128:
        wanted = f"FlexAttention wants a --seq_len that is a multiple of 128, not {config.data.seq_len}"
        say(run, f"attention is SDPA with a dense mask, which is slower: {wanted}")
    if config.wandb:
        import_wandb()
    claim(config, resume)
