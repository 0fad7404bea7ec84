"""The recipe: train the VAE, then the transformer, then measure (paper, sections 3 and 4.1).

    L = L_LM + 5 L_DDPM   (eq. 4; means over all the text targets and all the noised images of a step)

    python train.py --config small                           on a laptop's CPU, in minutes
    python train.py --config small --lr 1e-3 --out out/mine  any field of a preset can be overridden
    torchrun --nproc_per_node=8 train.py --config 0.16b      the paper's smallest model on eight GPUs

Ctrl-C saves before it stops. A step is a function of (seed, step, row): its batch, noise and loss do not
depend on how many processes share its rows, nor on how many micro-batches they cut them into.

Read `losses` and `train_step`, then `train`; skip `set_up` at first.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import extras  # before torch, so that Ctrl-C during its import prints one line
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention_mask import PADDING, transfusion_mask
from data import NO_LOSS, DataConfig
from diffusion import DDPM, DiffusionConfig, SamplingConfig
from evaluate import evaluate
from extras import Choices, cli, costs, gap, machine, report, runs
from extras.average import Average
from extras.checkpoints import averaged_weights, read_checkpoint, restore, save
from extras.idle import refuse_idle
from extras.logs import Log
from extras.optimizers import make_optimizers
from extras.parallel import first, join, synchronise, summed, total, wrap
from extras.rehearsal import rehearse
from extras.scores import format_scores
from model import SIZES, TransfusionConfig
from sample import Trained, load
from vae import VAEConfig

# ---- The recipes ---------------------------------------------------------------------------------


@dataclass
class Config:
    """A run. The fields of its parts are options, too; those of the VAE with vae_ before their names."""

    out: str = ""  # folder of checkpoints, log and images; "" = out/<preset>
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    vae: str = ""  # a trained VAE: ours, or one of diffusers or latent diffusion; "" = train one first
    init_from: str = ""  # a Llama's folder, or a checkpoint of ours, to start from, with its sizes
    freeze_text: bool = False  # with init_from: train only the ways of patches and the special tokens
    rows: int = 512  # rows of seq_len tokens a step, over all processes: 2M tokens with the default 4096
    micro_rows: int = 4  # rows that a process runs at once; gradients are accumulated over the rest. 0 = all
    max_steps: int = 250_000
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon (Jordan et al. 2024): for the blocks' matrices
    lr: float = 3e-4
    min_lr: float = 1.5e-5  # where the cosine ends
    warmup: int = 4000  # steps
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of every block; auto = on CUDA
    attention: Literal["auto", "sdpa", "flex"] = "auto"  # dense or block mask; auto = flex where compiled
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products; auto = bf16 if it is there
    checkpoint_activations: bool = False  # run every block twice rather than keep its activations
    fsdp: bool = False  # several processes share the weights (FSDP2) instead of each keeping a copy (DDP)
    shard: int = 0  # with fsdp: this many processes share one copy (HSDP: those of a node, say); 0 = all
    lambda_ddpm: float = 5.0  # weight of the diffusion loss (eq. 4)
    ema: float = 0.9999  # decay of the averaged weights that are sampled from; warmed up
    log_every: int = 10  # steps
    wandb: str = ""  # project in Weights & Biases to log to as well
    eval_every: int = 5000  # steps between validation losses, sample sheets and checkpoints
    eval_documents: int = 128  # held-out images in a validation
    judged: int = 300  # images and captions per split in the closing evaluation
    model: TransfusionConfig = field(default_factory=TransfusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    autoencoder: VAEConfig = field(default_factory=VAEConfig)
    extra: Choices = field(default_factory=Choices)

    def __post_init__(self):
        extras.check(self)


# A preset names what differs from the defaults, which are the paper's.
SMALL = dict(dim=128, n_layers=6, n_heads=4, mlp_multiple=64, unet_channels=64, unet_blocks=1)
SMALL |= dict(unet_norm="group")  # paper: layer; in one trial group norms learned a little more
SMALL |= dict(patch_size=4)  # paper: 2, of a VAE that halves once more: a patch is 16 pixels in both
SMALL |= dict(qk_norm=True)  # paper: none; it allows ten times the learning rate
SMALL |= dict(grammar="places", image_size=32, seq_len=112)  # paper: 256, 4096
SMALL |= dict(merges=512)  # paper: 32,000 tokens; "at the top left" becomes one instead of 16 bytes
SMALL |= dict(text_fraction=0.0)  # paper: 0.5; the captions are all the text there is to learn
SMALL |= dict(caption_first=0.3)  # paper: 0.8; drawing is learned sooner than describing
SMALL |= dict(image_first_max_t=500)  # paper: 1000, and 500 in an ablation (section 4.3)
SMALL |= dict(prediction="v")  # paper: eps; v learns as fast, and no step divides by a vanishing alpha_t
SMALL |= dict(t_draw="logit_normal", t_mean=0.7, t_std=1.4)  # paper: uniform; high noise decides the scene
SMALL |= dict(steps=12, sampler="ddim")  # paper: 250, ancestral; 25 steps drew no more prompts right
SMALL |= dict(vae_channels=64, vae_channel_multiples=(1,), vae_n_res=0, vae_unshuffle=4)
SMALL |= dict(vae_mid_attention=False, vae_steps=500, vae_batch=32, vae_lr=4e-3, vae_warmup=100)
SMALL |= dict(vae_optimizer="muon", vae_bf16=True)  # paper: open; AdamW needs four times as many images
SMALL |= dict(vae_latent_channels=4, vae_kl_weight=0.01)  # paper: 8, 1e-6; this is easier to diffuse
SMALL |= dict(vae_perceptual_weight=0.0, vae_disc_weight=0.0)  # paper: 1, 0.5; flat shapes need neither
SMALL |= dict(optimizer="muon")  # paper: AdamW; Muon learns in a quarter of the steps what is where
SMALL |= dict(rows=8, micro_rows=0, max_steps=1000)  # paper: 512, 250,000
SMALL |= dict(lr=3e-3, min_lr=0.0, warmup=100, beta2=0.98, ema=0.996)  # paper: 3e-4, 1.5e-5, 4000, 0.95
SMALL |= dict(log_every=100, eval_every=500, judged=200, compile="off", workers=0)  # compiling is too slow
PRESETS = {**SIZES, "7b": SIZES["7b"] | dict(micro_rows=1, fsdp=True), "small": SMALL}
# "A red circle above a blue square": one word binds two objects. Drawing is slow here: more pairs teach it.
PRESETS["relations"] = SMALL | dict(grammar="relations", seq_len=104, caption_first=0.6)
PRESETS["relations"] |= dict(max_steps=4500, eval_every=1000)
# For a GPU: 64x64 images of up to four objects with sizes, places, relations and backgrounds.
PRESETS["rich"] = SMALL | dict(grammar="rich", image_size=64, seq_len=512, dim=384, n_layers=8, n_heads=6)
PRESETS["rich"] |= dict(rows=32, max_steps=20_000, lr=1e-3, warmup=500, eval_every=2000, compile="auto")
PRESETS["rich"] |= dict(vae_channels=128, vae_steps=10_000, vae_batch=32)
DERIVED = {"vocab_size", "latent_channels", "latent_size"}  # no options: they follow from tokenizer and VAE


def read_options(argv=None, description=__doc__.split("\n")[0], **more):
    """The command line -> (Config, all that argparse found). more: {option: help} besides."""
    names, more = [*PRESETS, *extras.PRESETS], more | dict(hidden=DERIVED, check=refuse_idle)
    preset = lambda name: PRESETS[name] if name in PRESETS else SMALL | extras.preset(name)
    return cli.read_options(Config, preset, names, argv, description, extras.suited, **more)


def parse(argv=None):
    """The command line -> (Config, resume)."""
    config, args = read_options(argv)
    return config, args.resume


# ---- The objective -------------------------------------------------------------------------------


def losses(model, ddpm, batch, x_0, t, eps, make_mask=transfusion_mask):
    """The two losses of the paper: of each position (B, S), 0 without a target, and of each image (N,)."""
    x_t = ddpm.q_sample(x_0, t, eps)  # (N, C, h, w), eq. 2: noise the latents, one t an image
    mask = make_mask(batch.image_id, batch.doc_id)  # (B, 1, S, S), once for all layers
    # One transformer over both: logits (B, S, vocab_size), prediction (N, C, h, w).
    logits, prediction = model(batch.tokens, batch.image_id, batch.positions, mask, x_t, t)
    logits, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
    lm = F.cross_entropy(logits, targets, ignore_index=NO_LOSS, reduction="none")  # eq. 1, text alone
    return lm.view_as(batch.targets), ddpm.loss(prediction, x_0, t, eps)  # eq. 3


class Objective:
    """The sums of the two losses over a batch. (The baseline, Chameleon, has another class of this form.)"""

    NAMES = ("lm", "ddpm")  # what the log calls the two losses

    def __init__(self, config, vae, ddpm, tokenizer, make_mask, device, autocast):
        self.config, self.vae, self.ddpm, self.make_mask = config, vae, ddpm, make_mask
        self.device, self.autocast = device, autocast  # autocast() enters the model's precision

    def counts(self, batch):
        """How many text targets and noised images a Batch holds."""
        return int((batch.targets != NO_LOSS).sum()), int((batch.max_t > 0).sum())

    @torch.no_grad()
    def latents_and_noise(self, batch, row_numbers, key, t_draw=None):
        """The Batch on the device, clean latents (N, C, h, w), timesteps (N,), and noise like the latents.

        The seed, `key` and a row's number fix its posterior draw, t and eps, however the rows are divided.
        key: (1, step) in training and (2, step) in validation, so that their random streams are separate.
        """
        c = self.config.model
        images_of_row = ((batch.image_id >= 0).sum(1) // c.n_patches).tolist()
        batch, noise_of_rows = batch.to(self.device), []
        for row, max_t in zip(row_numbers, batch.max_t.split(images_of_row)):
            seed = np.random.SeedSequence([self.config.seed, *key, row]).generate_state(1)[0]
            generator = torch.Generator(self.device).manual_seed(int(seed))
            shape = (2, len(max_t), c.latent_channels, c.latent_size, c.latent_size)
            posterior_noise, eps = torch.randn(shape, generator=generator, device=self.device)
            t = self.ddpm.draw_timesteps(max_t, generator, t_draw)
            noise_of_rows.append((posterior_noise, t, eps))
        posterior_noise, t, eps = (torch.cat(parts) for parts in zip(*noise_of_rows))
        if not len(eps):
            return batch, eps, t, eps  # no images: eps is empty, and serves as x_0
        with self.autocast():
            encoded = self.config.extra.latents  # ahead: then `images` are their means and log-variances
            posterior = batch.images.chunk(2, dim=1) if encoded else self.vae.posterior(batch.images)
        x_0 = self.vae.to_latents(*posterior, posterior_noise)
        return replace(batch, images=x_0.new_empty(0)), x_0, t, eps  # the pixels are no longer needed

    def loss_sums(self, model, batch, row_numbers, key):
        """The sum of the text targets' losses, and that of the noised images'."""
        batch, x_0, t, eps = self.latents_and_noise(batch, row_numbers, key)
        with self.autocast():
            lm, image = losses(model, self.ddpm, batch, x_0, t, eps, self.make_mask)
        return lm.sum(), (image * (t > 0)).sum()

    def validation_sums(self, model, batch, row_numbers, key):
        """With t drawn uniformly: {name: (sum of the losses, how many they are)}."""
        batch, x_0, t, eps = self.latents_and_noise(batch, row_numbers, key, t_draw="uniform")
        losses_of = partial(losses, model, self.ddpm, make_mask=self.make_mask)
        with self.autocast():
            lm, image = losses_of(batch, x_0, t, eps)
            gap_sums = gap.measure(losses_of, self.ddpm.timesteps, batch, x_0, t, eps, lm, image)
        is_target = batch.targets != NO_LOSS
        found = {"val_lm": (lm[is_target].sum().item(), int(is_target.sum()))}
        quarter = torch.where(t > 0, (t - 1) * 4 // self.ddpm.timesteps, -1)  # (N,): of the range of t
        chosen = {"val_ddpm": t > 0} | {f"val_ddpm_q{n + 1}": quarter == n for n in range(4)}
        for name, is_chosen in chosen.items():
            found[name] = sum(image[is_chosen].tolist()), int(is_chosen.sum())
        return found | gap_sums


# ---- One step ------------------------------------------------------------------------------------


def learning_rate(config, step):
    """Linear warm-up, then a cosine from lr down to min_lr at the last step."""
    progress = max(0.0, (step - config.warmup) / max(1, config.max_steps - config.warmup))
    cosine = config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (step + 1) / config.warmup)


def train_step(run):
    """Take one optimiser step -> log values; `fill` is the share of positions that are not padding."""
    config, objective = run.config, run.objective
    rate = learning_rate(config, run.step)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    micro_batches = [(next(run.loader), row_numbers) for row_numbers in run.loader.rows]

    # The means of eq. 1 and eq. 3 are over the whole step. Micro-batches hold unequal numbers of targets and
    # images, so a mean of means would be wrong.
    counts = np.sum([objective.counts(batch) for batch, _ in micro_batches], axis=0)  # targets, images
    n_targets, n_images = summed(counts.tolist(), run.device).clamp(min=1).float()
    lm_total, image_total = 0.0, 0.0
    for n, (batch, row_numbers) in enumerate(micro_batches):
        synchronise(run.parallel, run.ranks, last=n == len(micro_batches) - 1)
        lm_sum, image_sum = objective.loss_sums(run.parallel, batch, row_numbers, (1, run.step))
        lm, image = lm_sum / n_targets, image_sum / n_images
        loss = lm + config.lambda_ddpm * image  # eq. 4
        (loss * run.ranks).backward()  # times ranks: DDP and FSDP average the gradients, and a sum is wanted
        lm_total += lm.detach()
        image_total += image.detach()
        run.loader.fetch()  # a batch of the next step, while the device works

    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) / run.ranks
    flops = sum(costs.batch_flops(run.model, batch) for batch, _ in micro_batches)
    filled = sum(int((batch.doc_id != PADDING).sum()) for batch, _ in micro_batches)
    lm, image, gradient_norm, flops, filled = total([lm_total, image_total, norm, flops, filled], run.device)
    if not math.isfinite(lm + image + gradient_norm):  # before it touches the weights
        found = f"the loss is {lm + config.lambda_ddpm * image:g} and its gradient's norm {gradient_norm:g}"
        advice = f"lower --lr (now {config.lr:g}) or --clip; --resume goes on from the last checkpoint"
        raise FloatingPointError(f"{found} at step {run.step}: {advice} in {run.out}")
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.average.update(min(config.ema, (1 + run.step) / (10 + run.step)))  # warmed up
    run.step += 1
    fill = filled / (config.rows * config.data.seq_len)
    return dict(zip(objective.NAMES, (lm, image)), norm=gradient_norm, lr=rate, fill=fill, flops=flops)


@torch.no_grad()
def validate(run):
    """The losses of the averaged weights on held-out documents: {name: mean}."""
    sums = {}  # {name: (2,): the sum of the losses, how many they are}
    with run.average.applied():
        run.parallel.eval()
        for n, batch in enumerate(run.validation):
            step, micro_batch = divmod(n, len(run.loader.rows))
            row_numbers = run.loader.rows[micro_batch]
            found = run.objective.validation_sums(run.parallel, batch, row_numbers, (2, step))
            for name, sum_and_count in found.items():
                sums[name] = sums.get(name, 0.0) + np.array(sum_and_count)
        run.parallel.train()
    summed = np.reshape(total(np.concatenate(list(sums.values())).tolist(), run.device), (-1, 2))
    return gap.summary(dict(zip(sums, summed.tolist())))


# ---- Set-up --------------------------------------------------------------------------------------


def set_up(config, resume=False):
    """A run, one in each process: its data, its models, its optimisers, and where it stands.

    run.model: the network. run.parallel: the same in DDP or FSDP; training calls this. run.average: its EMA.
    run.loader: batches, and `rows`, the row numbers of each of a step. run.validation: held-out batches.
    """
    rank, ranks, device = join(cli.pick_device(config.device))
    run = SimpleNamespace(config=config, rank=rank, ranks=ranks, device=device, out=Path(config.out), step=0)
    run.checkpoint = run.out / "checkpoint.pt"
    machine.check(run, resume)
    saved_state = read_checkpoint(run) if resume else None
    initial = None if saved_state else extras.open_start(run, load)  # what --init_from names

    # The tokenizer and the VAE, then the model, three of whose sizes follow from these two.
    run.tokenizer, run.vae = extras.tokenizer_and_vae(run, saved_state, initial, resume)
    config.model = extras.sized(run, saved_state)
    torch.manual_seed(config.seed)
    run.model = extras.first_model(run, initial).to(device)
    config.model = run.model.config
    undecayed = extras.freeze(run) if config.freeze_text else ()
    bf16, compiled, make_mask = machine.machine(config, device)
    run.parallel = wrap(run, bf16, compiled)
    run.average = Average(run.model)
    run.ddpm = DDPM(**asdict(config.diffusion)).to(device)
    run.optimizers = make_optimizers(run.model, config, undecayed)
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
    run.objective = extras.objective(run, Objective, make_mask, autocast)

    # The data. Validation batches have the shape of training's, so that nothing is compiled anew.
    run.loader = extras.open_loader(run, "train", config.data.workers)
    held_out = extras.open_loader(run, "held_out", 0)
    run.validation, n_images = [], 0
    while n_images < config.eval_documents:
        run.validation.append(next(held_out))
        # Images of all processes are counted, so all stop together. A text-only batch counts as one.
        n_images += total([max(1, len(run.validation[-1].images))], device)[0]
    if saved_state:
        restore(run, saved_state)
    run.log = Log(run, saved_state)  # only now that nothing can be wrong with the options
    return run


# ---- The loop ------------------------------------------------------------------------------------


def averaged_model(run):
    """The averaged weights, as sample.py and evaluate.py take them; in every process but the first None."""
    weights, config = averaged_weights(run), run.config
    if run.rank:
        return None
    model = extras.new_model(config.model, config.extra).to(run.device).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return Trained(model, run.vae, run.ddpm, run.tokenizer, config.data, config.sampling, config.extra)


def train(config, resume=False):
    """The whole recipe -> the finished run."""
    began = time.time()
    run = set_up(config, resume)
    run.log.begin(run)
    bar = tqdm(desc="train", initial=run.step, total=config.max_steps, mininterval=1, disable=run.rank > 0)
    with runs.Interrupt() as interrupt, bar:
        while run.step < config.max_steps:
            started = time.perf_counter()
            values = train_step(run)
            run.log.pace(time.perf_counter() - started, values["flops"])
            bar.update()
            last = run.step == config.max_steps
            if run.step % config.log_every == 0 or last:
                run.log.step(run.step, values, run.objective.NAMES)
            if run.step % config.eval_every == 0 or last:
                run.log.validation(run.step, validate(run))
                save(run)
                sheet = run.out / f"samples_{run.step:06d}.png"
                # All processes gather the averaged weights; the first one draws with them.
                first(partial(extras.draw_held_out, averaged_model(run), config.seed, sheet))
            if any(total([interrupt.asked], run.device)):  # in all processes, whichever was told
                save(run)
                raise KeyboardInterrupt

    model = averaged_model(run)
    if model:
        print(f"trained in {time.time() - began:.0f} s; 3. the evaluation", flush=True)
        scores = evaluate(model, config.judged) | {"validation": run.log.found}
        print(format_scores(scores))
        runs.write_json(run.out / "scores.json", scores)
        report.write(run.out, config)
        made = "report.html, checkpoint.pt, samples_*.png, log.jsonl, scores.json"
        print(f"{time.time() - began:.0f} s in all. In {run.out}: {made}. Now try:")
        print("    " + extras.next_command(config, run.checkpoint))
    return run


def main():
    """The command line."""
    config, resume = parse()
    machine.claim(config, resume)
    if not resume:
        rehearse(config, set_up, train_step, validate, averaged_model, evaluate)
    train(config, resume)


if __name__ == "__main__":
    cli.report_errors(main, runs.STOPPED)
