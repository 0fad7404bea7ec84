"""The recipe: train the VAE, then the transformer, then measure (paper, sections 3 and 4.1).

    L = L_LM + 5 L_DDPM   (eq. 4; means over all the text targets and all the noised images of a step)

    python train.py --config small          on a laptop's CPU, in minutes
    python train.py --config small --lr 1e-3 --seed 1 --out out/mine      any field of a preset can be overridden

`PRESETS` below is the one place where recipes live; a field that it does not name has the default written beside its
definition, which is the paper's. Read `train` first.
"""

import copy
import difflib
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# OpenMP threads that wait by spinning for long collapse when another program takes a core; those that never spin are slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention_mask import transfusion_mask
from data import (NO_LOSS, DataConfig, Documents, Loader, Skipped, Stream, collate, open_pairs, open_text, open_tokenizer, readable, restore_tokenizer,
                  to_pixels)  # fmt: skip
from diffusion import DDPM, DiffusionConfig
from evaluate import evaluate, format_scores
from model import SIZES, Transfusion, TransfusionConfig, freeze_text, inspect_llama, load_llama
from sample import Parser, Trained, contact_sheet, generate, load, pick_device
from vae import VAE, VAEConfig, load_checkpoint, load_vae, read_json, save_checkpoint, standardise, train_vae


# ---- Configuration --------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """A run. The four parts belong to the concept files; their fields are options of the command line too, those of
    `autoencoder` with the prefix vae_."""

    out: str = ""  # folder of checkpoints, log and pictures; "" = out/<preset>
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps
    vae: str = ""  # checkpoint of a trained VAE, or one of diffusers or latent diffusion; "" = train one first
    init_from: str = ""  # a Llama's folder, or a checkpoint of ours, whose weights to start from; its sizes are then the model's
    freeze_text: bool = False  # with init_from: train only what is new, the ways in and out of patches and the special tokens
    rows: int = 512  # rows of seq_len tokens a step: 2M tokens with the default 4096
    max_steps: int = 250_000
    lr: float = 3e-4
    min_lr: float = 1.5e-5  # where the cosine ends
    warmup: int = 4000
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    lambda_ddpm: float = 5.0  # weight of the diffusion loss (eq. 4)
    ema: float = 0.9999  # decay of the averaged weights that are sampled from; warmed up
    log_every: int = 10
    eval_every: int = 5000  # validation loss, sample grid and checkpoint
    eval_documents: int = 128
    judged: int = 300  # pictures and captions per split in the closing evaluation
    steps: int = 250  # denoising steps when sampling
    sampler: str = "ddpm"  # ddpm or ddim
    guidance_scale: float = 3.0
    model: TransfusionConfig = field(default_factory=TransfusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoencoder: VAEConfig = field(default_factory=VAEConfig)

    def __post_init__(self):
        if self.freeze_text and not self.init_from:
            raise ValueError("freeze_text is true, but there is nothing to freeze: give --init_from too")
        for name, allowed in (("device", ("auto", "cpu", "cuda", "mps")), ("sampler", ("ddpm", "ddim"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("rows", "max_steps", "lr", "warmup", "clip", "log_every", "eval_every", "eval_documents", "steps", "judged"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


# A preset names what differs from the defaults, and the defaults are the paper's: the five sizes are nothing but sizes.
# The small presets depart from the paper where minutes on two CPU cores ask for it, each time for a reason:
SMALL = dict(
    model=dict(
        dim=128, n_layers=6, n_heads=4, mlp_multiple=64,
        qk_norm=True,  # departs: allows ten times the learning rate
    ),
    data=dict(
        grammar="places", image_size=32,
        seq_len=112,  # four pictures with captions and hardly a gap
        merges=512,  # "at the top" is one token instead of eleven bytes
        text_fraction=0.0,  # departs (0.5): the captions are all the text there is to learn
        workers=0,  # a scene is drawn faster than sent from another process
        caption_first=0.45,  # departs (0.8): drawing is learned sooner than describing, so most pairs teach the latter
        image_first_max_t=0,  # departs (500): a picture that is to be described is clean, as it will be when it is asked about
    ),
    diffusion=dict(
        prediction="v",  # departs (eps): learns at least as fast, and no step divides by a vanishing alpha_t
        t_draw="logit_normal", t_mean=0.7, t_std=1.4,  # departs (uniform): high noise is where colours and places are decided
    ),
    autoencoder=dict(
        channels=64, channel_multiples=(1,), n_res=0, unshuffle=4, mid_attention=False, steps=3000, batch=8, lr=2e-3, warmup=100,
        kl_weight=0.01,  # departs (1e-6): latents that are easier to diffuse
        perceptual_weight=0.0, disc_weight=0.0,  # departs (1, 0.5): flat shapes need neither
    ),
    rows=8, max_steps=2400, lr=3e-3, min_lr=0.0, warmup=100, eval_every=500, judged=200,
    beta2=0.98, ema=0.996,  # shorter memories for a shorter run
    steps=12, sampler="ddim",  # departs (250 ancestral): 25 steps drew no more prompts right than 12
)  # fmt: skip
PRESETS = {
    **{name: dict(model=size) for name, size in SIZES.items()},
    "small": SMALL,
    # Relations instead of places ("a red circle above a blue square"): the model must bind two objects through one word.
    "relations": SMALL | dict(data=SMALL["data"] | dict(grammar="relations", seq_len=100), max_steps=6500, eval_every=1000),
    # For a GPU: 64x64 pictures of up to four objects with sizes, places, relations and backgrounds.
    "rich": SMALL | dict(
        model=SMALL["model"] | dict(dim=384, n_layers=8, n_heads=6), data=SMALL["data"] | dict(grammar="rich", image_size=64, seq_len=512),
        autoencoder=SMALL["autoencoder"] | dict(channels=128, steps=10_000, batch=32), rows=32, max_steps=20_000, lr=1e-3, warmup=500, eval_every=2000,
    ),
}  # fmt: skip
PARTS = {"model": TransfusionConfig, "data": DataConfig, "diffusion": DiffusionConfig, "autoencoder": VAEConfig}
DERIVED = {"vocab_size", "latent_channels", "latent_size"}  # of the model: they follow from the tokenizer and the VAE


def options():
    """Every field that the command line can set: option name -> (part that it belongs to or None, its dataclass field)."""
    found = {f.name: (None, f) for f in fields(Config) if f.name not in PARTS}
    for part, cls in PARTS.items():
        prefix = "vae_" if part == "autoencoder" else ""
        found |= {prefix + f.name: (part, f) for f in fields(cls) if not (part == "model" and f.name in DERIVED)}
    return found


def build(values):
    """Nested dicts, as a preset or a checkpoint holds them, to a Config. Raises ValueError on a value out of range."""
    return Config(**{name: PARTS[name](**value) if name in PARTS else value for name, value in values.items()})


def parse(argv=None, description=__doc__.split("\n")[0]):
    """The command line -> (Config, resume). Exits with one sentence if it is not understood."""

    def value_of(f):
        def boolean(text):
            if text.lower() not in ("true", "false"):
                raise ValueError
            return text.lower() == "true"

        def integers(text):
            return tuple(int(n) for n in text.split(","))

        return {bool: boolean, tuple: integers}.get(f.type, f.type)

    known = options()
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", default="0.16b", help=f"preset: {', '.join(PRESETS)} (default: 0.16b)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    for name, (part, f) in known.items():
        parser.add_argument(f"--{name}", type=value_of(f), default=None, metavar=str(getattr(f.type, "__name__", f.type)).upper(), help=f"of the {part}" if part else None)
    args = parser.parse_args(argv)
    if args.config not in PRESETS:
        close = difflib.get_close_matches(args.config, PRESETS, n=1, cutoff=0.0)
        sys.exit(f"error: no preset is called {args.config!r}; did you mean {close[0]}? The presets are {', '.join(PRESETS)}")
    values = copy.deepcopy(PRESETS[args.config])
    for name, (part, f) in known.items():
        if (value := getattr(args, name)) is not None:
            (values.setdefault(part, {}) if part else values)[f.name] = value
    values["out"] = values.get("out") or f"out/{args.config}"
    return build(values), args.resume


# ---- Training -------------------------------------------------------------------------------------------------------


def autocast(device):
    """bfloat16 for matrix products where the hardware has it, else float32 throughout."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported() or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if has_bf16 else nullcontext()


def losses(model, ddpm, batch, x_0, t, eps):
    """The two losses of a batch, not yet averaged: cross-entropy summed over the text targets (scalar), and the diffusion
    loss of each image (N,)."""
    mask = transfusion_mask(batch.image_id, batch.doc_id)
    logits, prediction = model(batch.tokens, batch.image_id, batch.positions, mask, ddpm.q_sample(x_0, t, eps), t)
    lm = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=NO_LOSS, reduction="sum")
    return lm, ddpm.loss(prediction, x_0, t, eps)


def learning_rate(config, step):
    """Linear warm-up, then a cosine from lr down to min_lr at the last step."""
    progress = max(0.0, (step - config.warmup) / max(1, config.max_steps - config.warmup))
    cosine = config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (step + 1) / config.warmup)


class Interrupt:
    """While it is entered, Ctrl-C (or SIGTERM) sets `asked` instead of stopping the program in the middle of a step; a
    second one stops it at once."""

    def __enter__(self):
        self.asked = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def check_vae(config, vae, own):
    """Raises ValueError if the latents of the VAE that --vae names are not of the size that a checkpoint's own VAE has."""
    sizes = [(v.config.latent_channels, v.config.factor) for v in (vae, own)]
    if sizes[0] != sizes[1]:
        says = [f"latents of {channels} channels, {factor} pixels apart" for channels, factor in sizes]
        raise ValueError(f"--vae {config.vae}: has {says[0]}, but the checkpoint was trained on {says[1]}; leave --vae out to use the checkpoint's own")


def prepare_vae(config, device, resume=False, own=None):
    """The VAE that a Config names, or else `own` (of the checkpoint that training starts from), or else one trained on the
    pictures; from <out>/vae.pt if `resume` and that is finished."""
    vae = load_vae(config.vae, device) if config.vae else own
    if own:
        check_vae(config, vae, own)
    factor = (vae.config if vae else config.autoencoder).factor
    if config.data.image_size % factor:
        raise ValueError(f"image_size is {config.data.image_size}; it must be a multiple of the VAE's factor, {factor}")
    if vae and ((vae.latent_std != 1).any() or vae.latent_mean.any()):
        return vae
    path = Path(config.out) / "vae.pt"
    if not vae and resume and path.exists() and load_checkpoint(path).get("done"):
        return load_vae(path, device)
    pairs = open_pairs(config.data, "train", config.seed)

    skipped = Skipped("pictures", config.data.max_broken)

    def pictures(first, n):
        return to_pixels(np.stack([pixels for _, pixels in readable(pairs, first, n, skipped)]))

    if vae:
        print(f"1. the VAE is {config.vae}, which does not say how its latents are scaled: measuring them", flush=True)
        torch.manual_seed(config.seed)
        standardise(vae, pictures, config.autoencoder.batch)
        return vae
    print(f"1. the VAE ({config.autoencoder.steps:,} steps; to use it again: --vae {path})", flush=True)
    with Interrupt() as interrupt:
        return train_vae(config.autoencoder, pictures, path, config.seed, device, resume, interrupted=lambda: interrupt.asked)


def is_llama(path):
    """Is it a folder to be read by load_llama, rather than a checkpoint or an export of ours?"""
    settings = Path(path) / "config.json"
    return settings.exists() and read_json(settings).get("model_type") != "transfusion"


def initial_model(config, tokenizer, start=None):
    """The model that training begins with; config.model becomes its sizes. start: what --init_from names, if it is ours."""
    c = config.model
    if start:
        theirs = asdict(start.model.config) | {"prediction": start.config["diffusion"]["prediction"]}
        for name, ours in (("patch_size", c.patch_size), ("prediction", config.diffusion.prediction)):
            if theirs[name] != ours:
                raise ValueError(f"--init_from {config.init_from}: was trained with {name} {theirs[name]}; give --{name} {theirs[name]}")
        model = start.model.train()
        model.config.latent_size = c.latent_size
    elif config.init_from:
        model = load_llama(config.init_from, c, tokenizer.vocab_size - tokenizer.bos)
    else:
        model = Transfusion(c)
    config.model = model.config
    return model


class Run:
    """A training run: its data, its models, its optimiser, and where it stands."""

    def __init__(self, config, resume=False):
        self.config, self.device, self.out = config, pick_device(config.device), Path(config.out)
        self.checkpoint = self.out / "checkpoint.pt"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "log.jsonl").open("a").close()
        except OSError as error:
            raise ValueError(f"--out {self.out}: cannot be written to ({error.strerror})") from None
        state = load_checkpoint(self.checkpoint) if resume and self.checkpoint.exists() else None
        if resume and not state and not (self.out / "vae.pt").exists():
            print(f"--resume: nothing is saved in {self.out} yet; starting from the beginning")

        if state and not {"optimizer", "tokenizer", "stream"} <= set(state):
            raise ValueError(f"{self.checkpoint}: is not a checkpoint of train.py")
        pairs = open_pairs(config.data, "train", config.seed)
        start = load(config.init_from) if config.init_from and not state and not is_llama(config.init_from) else None
        if state:
            self.tokenizer = restore_tokenizer(state["tokenizer"])
            self.vae = VAE(VAEConfig(**state["vae_config"])).to(self.device).eval()
            if config.vae and Path(config.vae).exists():
                check_vae(config, load_vae(config.vae), self.vae)
            if config.init_from:  # its sizes stand in the checkpoint, and so do the weights by now
                config.model = TransfusionConfig(**state["config"]["model"])
        elif start:
            self.tokenizer, self.vae = start.tokenizer, prepare_vae(config, self.device, own=start.vae.to(self.device))
        else:
            self.tokenizer = open_tokenizer(config.data, pairs)
            # Whatever is wrong with the Llama, say so before a VAE is trained.
            if config.init_from and (theirs := inspect_llama(config.init_from)[0]["vocab_size"]) != self.tokenizer.bos:
                raise ValueError(f"--init_from {config.init_from}: knows {theirs} tokens, but the tokenizer {self.tokenizer.bos}; give --tokenizer {config.init_from}/tokenizer.json")
            self.vae = prepare_vae(config, self.device, resume)
        c = config.model
        c.vocab_size, c.latent_channels = self.tokenizer.vocab_size, self.vae.config.latent_channels
        c.latent_size = config.data.image_size // self.vae.config.factor
        c.__post_init__()  # check once more, now that the sizes are known

        torch.manual_seed(config.seed)
        self.model = (initial_model(config, self.tokenizer, start) if not state else Transfusion(c)).to(self.device)
        c, partly = config.model, set()
        if config.freeze_text:
            n_special, total = self.tokenizer.vocab_size - self.tokenizer.bos, sum(p.numel() for p in self.model.parameters())
            print(f"--freeze_text: of {total:,} parameters, {freeze_text(self.model, n_special):,} are trained: those of patches, and the rows of the {n_special} special tokens")
            partly = {self.model.embedding.weight, self.model.head.weight}  # decay would move their frozen rows
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ddpm = DDPM(**asdict(config.diffusion)).to(self.device)
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2 and p not in partly]
        others = [p for p in self.model.parameters() if p.requires_grad and (p.ndim < 2 or p in partly)]
        groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)

        def stream(split, data, rows):
            pairs, text = open_pairs(data, split, config.seed), open_text(data, self.tokenizer, split, config.seed)
            documents = Documents(pairs, self.tokenizer, data, config.diffusion.timesteps, config.seed, text, c.n_patches)
            return Stream(documents, data.seq_len, rows, c.n_patches)

        self.stream = stream("train", config.data, config.rows)
        self.loader = Loader(self.stream, self.tokenizer, config.data.workers)
        held_out, self.validation = stream("held_out", config.data, min(config.rows, 8)), []
        while sum(len(row) for rows in self.validation for row in rows) < config.eval_documents:
            self.validation.append(next(held_out))
        self.step = 0
        if state:
            self._restore(state)
        self.log_file = (self.out / "log.jsonl").open("a" if state else "w")  # only now that nothing can be wrong with the options

    # ---- one step ----

    def batch(self, rows):
        """Rows of documents -> a Batch on the device."""
        errors = []
        batch = collate(rows, self.tokenizer, self.config.data.seq_len, self.config.model.n_patches, errors)
        self.loader.skipped.count(len(batch.images) + len(errors), errors)
        return batch.to(self.device)

    def noise(self, batch, *key, t_draw=None):
        """Everything random about a batch, a function of the seed and `key` alone, so that any step can be repeated: clean
        latents (a draw of the VAE's posterior), timesteps and noise."""
        key = np.random.SeedSequence([self.config.seed, *key]).generate_state(1)[0]
        generator = torch.Generator(self.device).manual_seed(int(key))
        c = self.config.model
        shape = len(batch.images), c.latent_channels, c.latent_size, c.latent_size
        of_posterior, eps = (torch.randn(shape, generator=generator, device=self.device) for _ in range(2))
        x_0 = self.vae.encode(batch.images, of_posterior) if len(batch.images) else eps
        return x_0, self.ddpm.draw_timesteps(batch.max_t, generator, t_draw), eps

    def train_step(self):
        """One optimiser step -> the numbers for the log."""
        config, lr = self.config, learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.loader).to(self.device)
        x_0, t, eps = self.noise(batch, 1, self.step)
        with autocast(self.device):
            lm, per_image = losses(self.model, self.ddpm, batch, x_0, t, eps)
        noised = batch.max_t > 0
        lm = lm / (batch.targets != NO_LOSS).sum().clamp(min=1)
        ddpm = (per_image * noised).sum() / noised.sum().clamp(min=1)
        loss = lm + config.lambda_ddpm * ddpm  # eq. 4
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not math.isfinite(loss.item() + norm.item()):  # before the weights are touched, so that what is here and on disk stays good
            raise FloatingPointError(
                f"the loss is {loss.item():g} and its gradient's norm {norm.item():g} at step {self.step}: lower --lr (now {config.lr:g}) or --clip; "
                f"--resume goes on from the last checkpoint in {self.out}"
            )
        self.optimizer.step()
        decay = min(config.ema, (1 + self.step) / (10 + self.step))  # warmed up: the first weights are soon forgotten
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return {"lm": lm.item(), "ddpm": ddpm.item(), "norm": norm.item(), "lr": lr}

    # ---- what is measured and kept on the way ----

    @torch.no_grad()
    def validate(self):
        """The losses of the averaged weights on held-out documents, t drawn uniformly; ddpm also per quarter of the t range."""
        lm, targets, quarters = 0.0, 0, [[] for _ in range(4)]
        for n, rows in enumerate(self.validation):
            batch = self.batch(rows)
            x_0, t, eps = self.noise(batch, 2, n, t_draw="uniform")
            with autocast(self.device):
                loss, per_image = losses(self.ema, self.ddpm, batch, x_0, t, eps)
            lm, targets = lm + loss.item(), targets + int((batch.targets != NO_LOSS).sum())
            for one, when in zip(per_image.tolist(), t.tolist()):
                if when > 0:
                    quarters[(when - 1) * 4 // self.ddpm.timesteps].append(one)
        mean = lambda values: float(np.mean(values)) if values else None
        return {"val_lm": lm / max(1, targets), "val_ddpm": mean(sum(quarters, [])), "val_ddpm_by_t": [mean(q) for q in quarters]}

    def trained(self):
        """The averaged weights, as sample.py and evaluate.py take them."""
        return Trained(self.ema, self.vae, self.ddpm, self.tokenizer, asdict(self.config))

    def draw_samples(self, name, n=12):
        """Pictures for held-out captions, with the captions under them, as a PNG in the output folder."""
        pairs = open_pairs(self.config.data, "held_out", self.config.seed)
        captions = [pairs.pair(i)[0] for i in range(n)]
        documents = generate(self.trained(), [[caption] for caption in captions], max_tokens=0)
        contact_sheet([document[-1] for document in documents], captions, columns=6).save(self.out / name)

    def log(self, values):
        """One JSON line in log.jsonl."""
        self.log_file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.log_file.flush()

    def save(self):
        """Write the checkpoint: everything that going on, sampling and evaluating need."""
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "vae": self.vae}
        save_checkpoint(self.checkpoint, {
            "config": asdict(self.config), "step": self.step, "stream": self.loader.state, "tokenizer": self.tokenizer.state(),
            "vae_config": asdict(self.vae.config), **{name: part.state_dict() for name, part in parts.items()},
        })  # fmt: skip

    def _restore(self, state):
        for name, value in asdict(self.config.model).items():
            if state["config"]["model"].get(name) != value:
                raise ValueError(f"{self.checkpoint}: was trained with {name} {state['config']['model'].get(name)}, not {value}; give the options that it was started with")
        for name in ("model", "ema", "optimizer", "vae"):
            getattr(self, name).load_state_dict(state[name])
        self.stream.load_state(state["stream"])
        self.step = state["step"]


def train(config, resume=False):
    """The whole recipe -> the finished Run."""
    began = time.time()
    run = Run(config, resume)
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"2. the transformer ({parameters / 1e6:.2f} M parameters, {config.max_steps:,} steps, on {run.device})", flush=True)
    with Interrupt() as interrupt, tqdm(desc="train", initial=run.step, total=config.max_steps, mininterval=1) as bar:
        while run.step < config.max_steps:
            started = time.perf_counter()
            values = run.train_step()
            values["ms"] = 1000 * (time.perf_counter() - started)
            values["tokens_per_s"] = config.rows * config.data.seq_len / values["ms"] * 1000
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.max_steps:
                run.log(values)
                bar.set_postfix_str(f"lm {values['lm']:.3f}, ddpm {values['ddpm']:.3f}, norm {values['norm']:.2f}, {values['tokens_per_s']:,.0f} tok/s")
            if run.step % config.eval_every == 0 or run.step == config.max_steps:
                found = run.validate()
                run.log(found)
                by_t = " ".join("-" if v is None else f"{v:.3f}" for v in found["val_ddpm_by_t"])
                tqdm.write(f"step {run.step}: held-out lm {found['val_lm']:.3f}, ddpm {found['val_ddpm']:.3f} (by quarter of t: {by_t})")
                run.draw_samples(f"samples_{run.step:06d}.png")
                run.save()
            if interrupt.asked:
                run.save()
                raise KeyboardInterrupt
    print(f"trained in {time.time() - began:.0f} s; 3. the evaluation", flush=True)
    scores = evaluate(run.trained(), config.judged)
    print(format_scores(scores))
    (run.out / "scores.json").write_text(json.dumps(scores, indent=1))
    print(f"{time.time() - began:.0f} s in all. In {run.out}: checkpoint.pt, samples_*.png, log.jsonl, scores.json. Now try:")
    print(f"    python sample.py --ckpt {run.checkpoint} --prompt \"{open_pairs(config.data, 'held_out', 1).pair(0)[0]}\"")
    return run


def report_errors(work):
    """Run `work()`; turn what a person can mend into one sentence and a non-zero exit code, and Ctrl-C into 130."""
    try:
        work()
    except KeyboardInterrupt:
        print("\nstopped. Training that had begun was saved: the same command with --resume goes on from there", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    report_errors(lambda: train(*parse()))
