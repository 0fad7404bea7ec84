"""The checkpoint of a run: all that going on, on any number of processes, sampling and evaluating need."""

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states

from extras import cli, runs
from extras.average import Average
from extras.machine import say
from extras.parallel import first, seen_by_all

FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered in the first process
# With --resume the first may not change; the second may without a word, for they make no other model.
MUST_MATCH = (
    "seed rows optimizer freeze_text images patch_encoder unet_channels unet_blocks unet_norm".split()
)
MUST_MATCH += "post_norm data text tokenizer merges grammar documents latents".split()
OF_THE_VAE = "seed images codebook commitment_weight data grammar documents image_size".split()
MAY_DIFFER = "out device vae init_from micro_rows compile attention checkpoint_activations".split()
MAY_DIFFER += "fsdp shard log_every wandb workers cache max_broken".split()


def averaged_weights(run):
    """The averaged weights as one state dict on the CPU; the first process receives it, the others {}."""
    with run.average.applied():
        weights = states.get_model_state_dict(run.model, options=FULL)
        return {name: p.clone() for name, p in weights.items()}  # on a CPU they were views


def known(config, pairs, text=None):
    """What the data are, wherever they lie: {option: what is compared in the place of a path}."""
    tokenizer, latents = Path(config.extra.tokenizer).name, bool(config.extra.latents)
    found = dict(tokenizer=tokenizer, latents=latents)  # the tokenizer's text is in the checkpoint
    for name, source in (("data", pairs), ("text", text)):
        if hasattr(source, "fingerprint"):
            weights = (f":{weight:g}" for weight in getattr(source, "weights", ()))
            found[name] = source.fingerprint + "".join(weights)
    return found


def known_of(run):
    """The same of a run's data."""
    documents = run.loader.stream.documents
    return known(run.config, documents.pairs, getattr(documents, "text", None))


def changes(state, config, found, settled, where):
    """What differs from the options and the data (`known`) of a saved state -> {option: (then, now)}.

    Raises ValueError that begins with `where` if one of those in `settled` does.
    """
    before, now = cli.flat(cli.make(type(config), state.get("config"), where)), cli.flat(config)
    for name in found.keys() & state.get("known", {}).keys():
        before[name], now[name] = state["known"][name], found[name]
    changed = {name: (before[name], now[name]) for name in now if now[name] != before[name]}
    for name in filter(changed.get, settled):
        was = "was trained with {} {}, not {}".format(name, *changed[name])
        raise ValueError(f"{where}: {was}; give the options that it was started with")
    return changed


def save_vae(path, config, found, state):
    """Write what train_vae saves, with the options and the data (`known`) that it is made of."""
    runs.save_checkpoint(path, state | dict(config=asdict(config), known=found))


def read_vae(path, config, found):
    """What save_vae wrote. Raises ValueError if other options or data make another VAE."""
    state = runs.load_checkpoint(path)
    vae = list(cli.flat(config, ("autoencoder",)))
    changes(state, config, found, vae + OF_THE_VAE, path)
    return state


def save(run):
    """Write the checkpoint: all that going on, on any number of processes, sampling and evaluating need."""
    state = dict(model=states.get_model_state_dict(run.model, options=FULL), ema=averaged_weights(run))
    state["optimizer"] = states.get_optimizer_state_dict(run.model, run.optimizers, options=FULL)
    streams = [run.loader.state]
    if run.ranks > 1:
        streams = [None] * run.ranks
        dist.all_gather_object(streams, run.loader.state)
    state |= dict(config=asdict(run.config), step=run.step, tokenizer=run.tokenizer.state())
    state |= dict(stream={row: at for stream in streams for row, at in stream.items()})
    state |= dict(vae_config=asdict(run.vae.config), vae=run.vae.state_dict(), known=known_of(run))
    first(lambda: runs.save_checkpoint(run.checkpoint, state | run.log.state()))


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
    settled = MUST_MATCH + list(cli.flat(run.config, ("model", "data", "diffusion")))
    settled = [name for name in settled if name not in MAY_DIFFER]
    changed = changes(state, run.config, known_of(run), settled, run.checkpoint)
    notes = [f"{name} {then} -> {now}" for name, (then, now) in changed.items() if name not in MAY_DIFFER]
    if notes:
        say(run, f"--resume: changed from here on: {', '.join(notes)}")
    options = states.StateDictOptions(full_state_dict=True)
    states.set_model_state_dict(run.model, state["ema"], options=options)
    run.average = Average(run.model)  # of the averaged weights, which go first for its sake
    states.set_model_state_dict(run.model, state["model"], options=options)
    states.set_optimizer_state_dict(run.model, run.optimizers, state["optimizer"], options=options)
    run.loader.stream.load_state(state["stream"])
    run.step = state["step"]
