"""The checkpoint of a run: all that going on, on any number of processes, sampling and evaluating need."""

from dataclasses import asdict

import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states

from extras import cli, runs
from extras.average import Average
from extras.machine import say
from extras.parallel import seen_by_all

FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered in the first process
# With --resume the first may not change; the second may without a word, for they make no other model.
MUST_MATCH = (
    "seed rows optimizer freeze_text images patch_encoder unet_channels unet_blocks unet_norm".split()
)
MUST_MATCH += "post_norm data text tokenizer merges grammar documents latents".split()
MAY_DIFFER = "out device vae init_from micro_rows compile attention checkpoint_activations".split()
MAY_DIFFER += "fsdp shard log_every wandb workers cache max_broken".split()


def averaged_weights(run):
    """The averaged weights as one state dict on the CPU; the first process receives it, the others {}."""
    with run.average.applied():
        weights = states.get_model_state_dict(run.model, options=FULL)
        return {name: p.clone() for name, p in weights.items()}  # on a CPU they were views


def save(run):
    """Write the checkpoint: all that going on, on any number of processes, sampling and evaluating need."""
    state = dict(model=states.get_model_state_dict(run.model, options=FULL), ema=averaged_weights(run))
    state["optimizer"] = states.get_optimizer_state_dict(run.model, run.optimizers, options=FULL)
    streams = [run.loader.state]
    if run.ranks > 1:
        streams = [None] * run.ranks
        dist.all_gather_object(streams, run.loader.state)
    if run.rank == 0:
        state |= dict(config=asdict(run.config), step=run.step, tokenizer=run.tokenizer.state())
        state |= dict(stream={row: at for stream in streams for row, at in stream.items()})
        state |= dict(vae_config=asdict(run.vae.config), vae=run.vae.state_dict())
        runs.save_checkpoint(run.checkpoint, state | run.log.state())


def read_checkpoint(run):
    """What --resume goes on from, or None if nothing is there yet."""
    state = runs.load_checkpoint(run.checkpoint) if seen_by_all(run.checkpoint, run.device) else None
    if not state and not (run.out / "vae.pt").exists():
        say(run, f"--resume: nothing is saved in {run.out} yet; starting from the beginning")
    if state and not {"optimizer", "tokenizer", "stream"} <= set(state):
        raise ValueError(f"{run.checkpoint}: is not a checkpoint of train.py")
    return state


def restore(run, state):
    """Go on where a checkpoint was written. Raises ValueError if its options make another model."""
    before, now = cli.flat(cli.make(type(run.config), state["config"], run.checkpoint)), cli.flat(run.config)
    changed = [name for name in now if now[name] != before[name] and name not in MAY_DIFFER]
    settled = MUST_MATCH + list(cli.flat(run.config, ("model", "data", "diffusion")))
    for name in changed:
        if name in settled:
            was = f"was trained with {name} {before[name]}, not {now[name]}"
            raise ValueError(f"{run.checkpoint}: {was}; give the options that it was started with")
    if changed:
        notes = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
        say(run, f"--resume: changed from here on: {notes}")
    options = states.StateDictOptions(full_state_dict=True)
    states.set_model_state_dict(run.model, state["ema"], options=options)
    run.average = Average(run.model)  # of the averaged weights, which go first for its sake
    states.set_model_state_dict(run.model, state["model"], options=options)
    states.set_optimizer_state_dict(run.model, run.optimizers, state["optimizer"], options=options)
    run.loader.stream.load_state(state["stream"])
    run.step = state["step"]
