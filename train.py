"""The recipe: train the VAE, then the transformer, then measure (paper, sections 3 and 4.1).

    L = L_LM + 5 L_DDPM   (eq. 4; means over all the text targets and all the noised images of a step)

    python train.py --config small                           on a laptop's CPU, in minutes
    python train.py --config small --lr 1e-3 --out out/mine  any field of a preset can be overridden
    python train.py --config chameleon                       the paper's baseline: images as tokens, next-token loss alone
    python train.py --config small_edit --init_from out/small
                                                             that model learns to edit pictures; small_story: to tell stories of three
    torchrun --nproc_per_node=8 train.py                     the paper's 0.16B model on eight GPUs

Ctrl-C saves before it stops, and so it does under torchrun, which kills what takes more than 30 seconds to do so, or more
than TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds from torch 2.12 on.

A step is a function of (seed, step, row): however many processes share its rows, and however many micro-batches each
cuts its share into, the global batch, its noise and its loss are the same.

`PRESETS` below is the one place where recipes live; a field that it does not name has the default written beside its
definition, which is the paper's. Read `losses`, then `Run.train_step`, then `train`.
"""

import copy
import difflib
import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

# OpenMP threads that wait by spinning for long collapse when another program takes a core; those that never spin are slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attention_mask import PADDING, TEXT, flex_mask, transfusion_mask
from data import NO_LOSS, DataConfig, Documents, Loader, Skipped, Stream, fill_codes, fitting, open_pairs, open_text, open_tokenizer, readable, restore_tokenizer, to_pixels
from diffusion import DDPM, SAMPLERS, DiffusionConfig
from evaluate import evaluate, format_scores, tell
from model import SIZES, Transfusion, TransfusionConfig, freeze_text, inspect_llama, load_llama, mean_context, peak_flops, training_flops
from sample import Parser, Trained, captioned, contact_sheet, generate, load, pick_device, report_errors
from vae import VAE, VAEConfig, fingerprint, load_checkpoint, load_vae, measure_statistics, read_json, save_checkpoint, train_vae


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
    rows: int = 512  # rows of seq_len tokens a step, over all processes: 2M tokens with the default 4096
    micro_rows: int = 4  # rows that a process runs at once; gradients are accumulated over the rest. 0 = all
    max_steps: int = 250_000
    optimizer: str = "adamw"  # adamw, or muon (Jordan et al. 2024) for the matrices of the blocks and adamw for the rest
    lr: float = 3e-4
    min_lr: float = 1.5e-5  # where the cosine ends
    warmup: int = 4000
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    compile: str = "auto"  # torch.compile of every block: on, off, or auto = on CUDA
    attention: str = "auto"  # sdpa (dense mask), flex (block mask, CUDA), or auto = flex where the blocks are compiled
    precision: str = "auto"  # of matrix products: bf16 (autocast; weights stay float32), fp32, or auto = bf16 where the hardware has it
    checkpoint_activations: bool = False  # run every block twice rather than keep its activations
    fsdp: bool = False  # several processes share the weights (FSDP2) instead of each keeping a copy (DDP)
    shard: int = 0  # with fsdp: this many processes share one copy (HSDP: those of a node, say); 0 = all
    lambda_ddpm: float = 5.0  # weight of the diffusion loss (eq. 4)
    z_loss: float = 0.0  # weight of log^2 Z, Z being the softmax's denominator, which it keeps near 1; Chameleon's is 1e-5
    ema: float = 0.9999  # decay of the averaged weights that are sampled from; warmed up
    log_every: int = 10
    wandb: str = ""  # project in Weights & Biases to log to as well
    eval_every: int = 5000  # validation loss, sample grid and checkpoint
    eval_documents: int = 128
    judged: int = 300  # pictures and captions per split in the closing evaluation
    steps: int = 250  # denoising steps when sampling
    sampler: str = "ddpm"  # ddpm, ddim or dpm++
    guidance_scale: float = 3.0
    code_temperature: float = 1.0  # at which a discrete model samples the codes of images, and
    code_top_p: float = 1.0  # among the likeliest that together have this probability
    model: TransfusionConfig = field(default_factory=TransfusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoencoder: VAEConfig = field(default_factory=VAEConfig)

    def __post_init__(self):
        if self.model.images == "discrete":
            self.autoencoder.codebook = self.autoencoder.codebook or 16384  # the paper's
            if self.data.latents:
                raise ValueError("latents are of continuous images; leave them out with --images discrete")
        elif self.autoencoder.codebook:
            raise ValueError(f"vae_codebook is {self.autoencoder.codebook}, but images are continuous; give --images discrete")
        if self.data.latents and not (self.vae or self.init_from):
            raise ValueError("latents need the VAE that made them; give --vae too")
        if self.freeze_text and not self.init_from:
            raise ValueError("freeze_text is true, but there is nothing to freeze: give --init_from too")
        if self.optimizer == "muon" and self.fsdp:
            raise ValueError("optimizer muon needs whole matrices, which --fsdp cuts; leave one of them out")
        if self.freeze_text and self.fsdp:
            raise ValueError("freeze_text does not work with --fsdp, which cuts the rows of the vocabulary; leave one of them out")
        choices = dict(device=("auto", "cpu", "cuda", "mps"), sampler=SAMPLERS, compile=("auto", "on", "off"),
                       attention=("auto", "sdpa", "flex"), precision=("auto", "bf16", "fp32"), optimizer=("adamw", "muon"))  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("rows", "max_steps", "lr", "warmup", "clip", "log_every", "eval_every", "eval_documents", "steps", "judged"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("seed", "micro_rows", "shard", "min_lr", "weight_decay", "lambda_ddpm", "z_loss", "code_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        for name in ("ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 < self.code_top_p <= 1:
            raise ValueError(f"code_top_p is {self.code_top_p}; it must be above 0, and at most 1")
        if self.shard and not self.fsdp:
            raise ValueError(f"shard is {self.shard}, but every process keeps a copy of the weights; give --fsdp too, or leave it out")


# A preset names what differs from the defaults, and the defaults are the paper's: the five sizes are nothing but sizes.
# The small presets depart from the paper where minutes on two CPU cores ask for it, each time for a reason:
SMALL = dict(
    model=dict(
        dim=128, n_layers=6, n_heads=4, mlp_multiple=64,
        patch_size=4,  # departs (2): with a VAE of half the paper's downsampling, so that a patch is 16 pixels wide, as there
        unet_channels=64, unet_blocks=1,  # departs (1024, 4): with --patch_encoder unet, a step then costs a seventh more FLOPs than with linear
        qk_norm=True,  # departs: allows ten times the learning rate
    ),
    data=dict(
        grammar="places", image_size=32,
        seq_len=112,  # seven pictures with captions
        merges=512,  # "at the top left" is one token instead of sixteen bytes
        text_fraction=0.0,  # departs (0.5): the captions are all the text there is to learn
        workers=0,  # a scene is drawn faster than sent from another process
        caption_first=0.4,  # departs (0.8): drawing is learned sooner than describing, so most pairs teach the latter
    ),
    diffusion=dict(
        prediction="v",  # departs (eps): learns at least as fast, and no step divides by a vanishing alpha_t
        t_draw="logit_normal", t_mean=0.7, t_std=1.4,  # departs (uniform): high noise is where colours and places are decided
    ),
    autoencoder=dict(
        channels=64, channel_multiples=(1,), n_res=0, unshuffle=4, mid_attention=False, latent_channels=4, steps=3000, batch=8, lr=2e-3, warmup=100,
        kl_weight=0.01,  # departs (1e-6): latents that are easier to diffuse
        perceptual_weight=0.0, disc_weight=0.0,  # departs (1, 0.5): flat shapes need neither
    ),
    optimizer="muon",  # departs (AdamW): learns in a quarter of the steps which object is where
    rows=8, micro_rows=0, max_steps=1500, lr=3e-3, min_lr=0.0, warmup=100, log_every=100, eval_every=500, judged=200,
    beta2=0.98, ema=0.996,  # shorter memories for a shorter run
    compile="off",  # which would take as long as the training
    steps=12, sampler="ddim",  # departs (250 ancestral): 25 steps drew no more prompts right than 12
)  # fmt: skip
PRESETS = {
    **{name: dict(model=size) for name, size in SIZES.items()},
    "7b": dict(model=SIZES["7b"], micro_rows=1, fsdp=True),
    "small": SMALL,
    # Relations instead of places ("a red circle above a blue square"): the model must bind two objects through one word.
    # Drawing that is the slow part here, so more pairs teach it.
    "relations": SMALL | dict(data=SMALL["data"] | dict(grammar="relations", seq_len=104, caption_first=0.6), max_steps=4500, eval_every=1000),
    # The paper's baseline on the same data, at the same FLOPs a step. As in the paper a picture is four times as many codes (16) as
    # patches, and the norms' places and z-loss are Chameleon's (RMSNorm on queries and keys where it has LayerNorm).
    "chameleon": SMALL | dict(
        model=SMALL["model"] | dict(images="discrete", post_norm=True), z_loss=1e-5,
        lr=6e-3,  # draws more prompts right than 3e-3 and 1.2e-2
        data=SMALL["data"] | dict(seq_len=104, caption_first=0.6),  # drawing is the slow part here
        # departs (the VAE's shape): twice its downsampling, for 64 codes a picture are learned far more slowly than 16
        autoencoder=SMALL["autoencoder"] | dict(unshuffle=8, latent_channels=16, codebook=1024, batch=32),
        guidance_scale=1.5, code_temperature=0.0,  # the likeliest code: it draws far more prompts right than one drawn at random
    ),
    # Fine-tuning, with --init_from a checkpoint of "small": edits (section 4.5), and stories of three pictures. What is to be copied from a
    # picture is decided at the highest noise: at less, the noised picture gives it away.
    "small_edit": SMALL | dict(
        data=SMALL["data"] | dict(documents="edits"), diffusion=SMALL["diffusion"] | dict(t_mean=2.0), guidance_scale=1.0,
    ),
    "small_story": SMALL | dict(
        data=SMALL["data"] | dict(documents="stories", seq_len=128), diffusion=SMALL["diffusion"] | dict(t_mean=2.0),
    ),
    # For a GPU: 64x64 pictures of up to four objects with sizes, places, relations and backgrounds.
    "rich": SMALL | dict(
        model=SMALL["model"] | dict(dim=384, n_layers=8, n_heads=6), data=SMALL["data"] | dict(grammar="rich", image_size=64, seq_len=512),
        autoencoder=SMALL["autoencoder"] | dict(channels=128, steps=10_000, batch=32), rows=32, max_steps=20_000, lr=1e-3, warmup=500, eval_every=2000,
        compile="auto",
    ),
}  # fmt: skip
PARTS = {"model": TransfusionConfig, "data": DataConfig, "diffusion": DiffusionConfig, "autoencoder": VAEConfig}
# With --resume MUST_MATCH, like model, data and diffusion, may not change; MAY_DIFFER may without a word, for it makes no other model.
MUST_MATCH = ("seed", "rows", "optimizer", "freeze_text")
MAY_DIFFER = {"out", "device", "vae", "init_from", "micro_rows", "compile", "attention", "checkpoint_activations", "fsdp", "shard", "log_every", "wandb",
              "workers", "cache", "max_broken"}  # fmt: skip
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


def parse(argv=None):
    """The command line -> (Config, resume). Exits with one sentence if it is not understood."""
    config, args = read_options(argv)
    return config, args.resume


def read_options(argv=None, description=__doc__.split("\n")[0], **more):
    """The same, with {option: help} that a script has besides -> (Config, all that argparse found)."""

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
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    for name, (part, f) in known.items():
        flag = dict(nargs="?", const=True) if f.type is bool else {}  # --fsdp is --fsdp true
        kind = str(getattr(f.type, "__name__", f.type)).upper()
        parser.add_argument(f"--{name}", type=value_of(f), default=None, **flag, metavar=kind, help=f"of the {part}" if part else None)
    args = parser.parse_args(argv)
    if args.config not in PRESETS:
        close = difflib.get_close_matches(args.config, PRESETS, n=1, cutoff=0.0)
        sys.exit(f"error: no preset is called {args.config!r}; did you mean {close[0]}? The presets are {', '.join(PRESETS)}")
    values = copy.deepcopy(PRESETS[args.config])
    for name, (part, f) in known.items():
        if (value := getattr(args, name)) is not None:
            (values.setdefault(part, {}) if part else values)[f.name] = value
    values["out"] = values.get("out") or f"out/{args.config}"
    return build(values), args


# ---- One process or many ---------------------------------------------------------------------------------------------


def join(name):
    """Join the processes that torchrun started, if it did -> (rank, number of processes, device). name: a Config's device."""
    device = pick_device(name)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # A long patience: the others wait while the first process trains the VAE, draws samples and saves.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if not dist.is_initialized():
        return 0, 1, device
    return dist.get_rank(), dist.get_world_size(), torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def total(values, device):
    """Sums over all processes: list of numbers -> list of floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def wrap(model, config, device):
    """Compile the blocks, then make the model one of several: what it returns is to be called, for its gradients to be
    averaged over the processes. DDP: each has a copy. FSDP2: they share one; a block's weights are gathered as it is run."""
    model.checkpoint_activations = config.checkpoint_activations
    if compiles(config, device):
        for block in model.blocks:
            block.compile()
    if not dist.is_initialized():
        return model
    if not config.fsdp:
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)  # which are constants
    ranks, shard = dist.get_world_size(), config.shard or dist.get_world_size()
    if ranks % shard:
        raise ValueError(f"shard is {shard}; it must divide the number of processes, {ranks}")
    mesh = init_device_mesh(device.type, (ranks // shard, shard), mesh_dim_names=("replicas", "shards"))  # HSDP
    dtype = torch.bfloat16 if in_bf16(config, device) else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh["shards"] if ranks == shard else mesh, mp_policy=policy)
    return model


def compiles(config, device):
    """Does this run compile its blocks? Not by default on a CPU, where that takes as long as it saves in some minutes."""
    return config.compile == "on" or config.compile == "auto" and device.type == "cuda"


def in_bf16(config, device):
    """Are matrix products in bfloat16?"""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported() or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return config.precision == "bf16" or config.precision == "auto" and has_bf16


def autocast(config, device):
    """bfloat16 for matrix products and convolutions; RMSNorm, softmax, losses and all of the diffusion stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if in_bf16(config, device) else nullcontext()


def mask_for(config, device):
    """The function of (image_id, doc_id) that makes this run's masks. FlexAttention wants whole blocks of 128 positions."""
    possible = device.type == "cuda" and compiles(config, device) and config.data.seq_len % 128 == 0
    if config.attention == "flex" and not possible:
        raise ValueError("--attention flex needs CUDA, compiled blocks and a --seq_len that is a multiple of 128; leave it at auto")
    return partial(flex_mask if possible and config.attention != "sdpa" else transfusion_mask, causal=config.model.image_attention == "causal")


class Average:
    """An exponential moving average of a model's weights; of the own shard of each, where they are shared."""

    def __init__(self, model):
        self.of = [p.to_local() if hasattr(p, "to_local") else p.data for p in model.parameters()]
        self.weights = [p.clone() for p in self.of]

    @torch.no_grad()
    def update(self, decay):
        torch._foreach_lerp_(self.weights, self.of, 1 - decay)

    @contextmanager
    def applied(self):
        """While it is entered, the model's weights are the averaged ones."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for p, average in zip(self.of, self.weights):
            p_before = p.clone()
            p.copy_(average)
            average.copy_(p_before)


# ---- Training -------------------------------------------------------------------------------------------------------


def losses(model, ddpm, batch, x_0, t, eps, mask=transfusion_mask, z_loss=0.0):
    """The two losses of a batch, not yet averaged: cross-entropy (+ z-loss) at each position (B, S), 0 where there is no target, and
    the diffusion loss of each image (N,). mask: the function of (image_id, doc_id) that makes the model's mask, once for all its layers."""
    mask = mask(batch.image_id, batch.doc_id)
    logits, prediction = model(batch.tokens, batch.image_id, batch.positions, mask, ddpm.q_sample(x_0, t, eps), t)
    lm = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=NO_LOSS, reduction="none").view_as(batch.targets)
    if z_loss:
        lm = lm + z_loss * logits.float().logsumexp(-1).square() * (batch.targets != NO_LOSS)
    return lm, ddpm.loss(prediction, x_0, t, eps)


def learning_rate(config, step):
    """Linear warm-up, then a cosine from lr down to min_lr at the last step."""
    progress = max(0.0, (step - config.warmup) / max(1, config.max_steps - config.warmup))
    cosine = config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (step + 1) / config.warmup)


def make_optimizers(model, config, undecayed=()):
    """AdamW, weight decay on matrices only; for optimizer="muon" also Muon, which makes the update of every matrix in the
    blocks orthogonal and so learns faster per step, scaled to the size of AdamW's so that one learning rate serves both."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_muon = [p for p in model.blocks.parameters() if p.requires_grad and p.ndim == 2 and config.optimizer == "muon"]
    matrices = [p for p in parameters if p.ndim >= 2 and not any(p is q for q in [*by_muon, *undecayed])]
    others = [p for p in parameters if p.ndim < 2 or any(p is q for q in undecayed)]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)]
    if by_muon:
        optimizers.append(torch.optim.Muon(by_muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


STOPPED = "stopped. Training that had begun was saved: the same command with --resume goes on from there"


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
        print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def check_vae(config, vae, own):
    """Raises ValueError if the latents of the VAE that --vae names are not of the size, and its codebook, that a checkpoint's own VAE has."""
    sizes = [(v.config.latent_channels, v.config.factor, v.config.codebook) for v in (vae, own)]
    if sizes[0] != sizes[1]:
        says = [f"latents of {channels} channels, {factor} pixels apart" + (f", and {codes} codes" if codes else "") for channels, factor, codes in sizes]
        raise ValueError(f"--vae {config.vae}: has {says[0]}, but the checkpoint was trained on {says[1]}; leave --vae out to use the checkpoint's own")


def prepare_vae(config, device, resume=False, own=None):
    """The VAE that a Config names, or else `own` (of the checkpoint that training starts from), or else one trained on the
    pictures; from <out>/vae.pt if `resume` and that is finished."""
    vae = load_vae(config.vae, device) if config.vae else own
    if own:
        check_vae(config, vae, own)
    if config.vae and bool(vae.config.codebook) != (config.model.images == "discrete"):
        kind, wanted = ("a VQ-VAE", "discrete") if vae.config.codebook else ("no VQ-VAE", "continuous")
        raise ValueError(f"--vae {config.vae}: is {kind}, but images are {config.model.images}; give --images {wanted}, or another VAE")
    factor = (vae.config if vae else config.autoencoder).factor
    if config.data.image_size % factor:
        raise ValueError(f"image_size is {config.data.image_size}; it must be a multiple of the VAE's factor, {factor}")
    if vae and ((vae.latent_std != 1).any() or vae.latent_mean.any()):
        return vae
    path = Path(config.out) / "vae.pt"
    if not vae and resume and path.exists() and load_checkpoint(path).get("done"):
        return load_vae(path, device)
    pairs, skipped = open_pairs(replace(config.data, latents=""), "train", config.seed), Skipped("pictures", config.data.max_broken)

    def pictures(first, n):
        return to_pixels(np.stack([pixels for _, pixels in readable(pairs, itertools.count(first), n, skipped)]))

    if vae:
        print(f"1. the VAE is {config.vae}, which does not say how its latents are scaled: measuring them", flush=True)
        torch.manual_seed(config.seed)
        measure_statistics(vae, pictures, config.autoencoder.batch)
        return vae
    print(f"1. the VAE ({config.autoencoder.steps:,} steps; to use it again: --vae {path})", flush=True)
    with Interrupt() as interrupt:
        return train_vae(config.autoencoder, pictures, path, config.seed, device, resume, interrupted=lambda: interrupt.asked)


def check_latents(config, vae):
    """Raises ValueError unless --latents were made by this VAE."""
    for index in Path(config.data.latents).glob("*/index.json"):
        if read_json(index)["vae"] != fingerprint(vae):
            raise ValueError(f"--latents {config.data.latents}: were made by another VAE; give the one that made them with --vae, or encode again")


def is_llama(path):
    """Is it a folder to be read by load_llama, rather than a checkpoint or an export of ours?"""
    settings = Path(path) / "config.json"
    return settings.exists() and read_json(settings).get("model_type") != "transfusion"


def initial_model(config, tokenizer, start=None):
    """The model that training begins with; config.model becomes its sizes. start: what --init_from names, if it is ours."""
    c = config.model
    if start:
        theirs = asdict(start.model.config) | {"prediction": start.config["diffusion"]["prediction"]}
        for name, ours in (("images", c.images), ("patch_size", c.patch_size), ("patch_encoder", c.patch_encoder), ("image_attention", c.image_attention),
                           ("prediction", config.diffusion.prediction)):  # fmt: skip
            if theirs[name] != ours:
                raise ValueError(f"--init_from {config.init_from}: was trained with {name} {theirs[name]}; give --{name} {theirs[name]}")
        model = start.model.train()
        model.config.latent_size = c.latent_size
    elif config.init_from:
        model = load_llama(config.init_from, c, c.vocab_size - tokenizer.bos)
    else:
        model = Transfusion(c)
    config.model = model.config
    return model


def import_wandb():
    """The optional package wandb. Raises ValueError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs a package that is not installed: pip install wandb") from None
    return wandb


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of several processes, gathered in the first


class Run:
    """A training run: its data, its models, its optimiser, and where it stands. One of each process, where there are several."""

    def __init__(self, config, resume=False):
        self.config, self.out = config, Path(config.out)
        self.rank, self.ranks, self.device = join(config.device)
        self.checkpoint = self.out / "checkpoint.pt"
        self._check_options()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what is not in bfloat16
        state = self._read_checkpoint() if resume else None
        start = load(config.init_from) if config.init_from and not state and not is_llama(config.init_from) else None
        if config.data.documents != "pairs" and not config.init_from and not state:
            self.say(f"learning {config.data.documents} from nothing; --init_from out/small would start from a model that can draw")
        self._open_tokenizer_and_vae(state, start, resume)
        config.model = replace(  # checked once more, now that the sizes are known; a VQ-VAE's codes come last in the vocabulary
            TransfusionConfig(**state["config"]["model"]) if state and config.init_from else config.model,  # whose sizes stand in the checkpoint
            vocab_size=self.tokenizer.vocab_size + self.vae.config.codebook, latent_channels=self.vae.config.latent_channels,
            latent_size=config.data.image_size // self.vae.config.factor,
        )  # fmt: skip

        torch.manual_seed(config.seed)
        self.model = (Transfusion(config.model) if state else initial_model(config, self.tokenizer, start)).to(self.device)
        self.mask = mask_for(config, self.device)  # only now: a checkpoint's model may have taken the place of the command line's
        undecayed = self._freeze_text() if config.freeze_text else ()
        self.parallel = wrap(self.model, config, self.device)
        self.average = Average(self.model)
        self.ddpm = DDPM(**asdict(config.diffusion)).to(self.device)
        self.optimizers = make_optimizers(self.model, config, undecayed)

        self.loader = self._loader("train", config.rows, config.data.workers, config.micro_rows)
        held_out, self.validation, images = self._loader("held_out", config.rows, 0, config.micro_rows), [], 0  # of training's shape: nothing is compiled anew
        while images < config.eval_documents:
            self.validation.append(next(held_out))
            images += total([len(self.validation[-1].images)], self.device)[0]  # of all processes: none may stop before the others, which would wait for it
        self.step = 0
        if state:
            self._restore(state)
        self._open_log(state)  # only now that nothing can be wrong with the options

    def _check_options(self):
        """What can be wrong with the options on this machine is said before anything is made."""
        config = self.config
        if config.rows % (self.ranks * (config.micro_rows or 1)):
            times = f" times micro_rows, {config.micro_rows}" if config.micro_rows else ""
            raise ValueError(f"rows is {config.rows}; it must be a multiple of the {self.ranks} processes{times}")
        mask_for(config, self.device)  # if it cannot be, say so now
        if config.attention == "auto" and self.device.type == "cuda" and compiles(config, self.device) and config.data.seq_len % 128:
            self.say(f"attention is SDPA with a dense mask, which is slower: FlexAttention wants a --seq_len that is a multiple of 128, not {config.data.seq_len}")
        if config.wandb:
            import_wandb()  # if it is missing, say so now
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "log.jsonl").open("a").close()
        except OSError as error:
            raise ValueError(f"--out {self.out}: cannot be written to ({error.strerror})") from None

    def _read_checkpoint(self):
        """What --resume goes on from, or None if nothing is there yet."""
        state = load_checkpoint(self.checkpoint) if self._exists(self.checkpoint) else None
        if not state and not (self.out / "vae.pt").exists():
            self.say(f"--resume: nothing is saved in {self.out} yet; starting from the beginning")
        if state and not {"optimizer", "tokenizer", "stream"} <= set(state):
            raise ValueError(f"{self.checkpoint}: is not a checkpoint of train.py")
        return state

    def _open_tokenizer_and_vae(self, state, start, resume):
        """Both are the checkpoint's, or those of the model to start from, or new: then the VAE is trained here."""
        config = self.config
        if state:
            self.tokenizer = restore_tokenizer(state["tokenizer"])
            self.vae = VAE(VAEConfig(**state["vae_config"])).to(self.device).eval()
            self.vae.load_state_dict(state["vae"])
            if config.vae and Path(config.vae).exists():
                check_vae(config, load_vae(config.vae), self.vae)
        elif start:
            self.tokenizer, self.vae = start.tokenizer, prepare_vae(config, self.device, own=start.vae.to(self.device))
        else:
            self.tokenizer = open_tokenizer(config.data, open_pairs(config.data, "train", config.seed))
            # Whatever is wrong with the Llama, say so before a VAE is trained.
            if config.init_from and (theirs := inspect_llama(config.init_from)[0]["vocab_size"]) != self.tokenizer.bos:
                raise ValueError(f"--init_from {config.init_from}: knows {theirs} tokens, but the tokenizer {self.tokenizer.bos}; give --tokenizer {config.init_from}/tokenizer.json")
            self.vae = self._prepare_vae(resume)
        if config.data.latents:
            check_latents(config, self.vae)

    def _freeze_text(self):
        """Train the ways in and out of patches and the special tokens alone -> the weights that the optimiser may not decay."""
        n_special, n_all = self.config.model.vocab_size - self.tokenizer.bos, sum(p.numel() for p in self.model.parameters())
        n_trained = freeze_text(self.model, n_special)
        self.say(f"--freeze_text: of {n_all:,} parameters, {n_trained:,} are trained: those of patches, and the rows of the {n_special} special tokens")
        return {self.model.embedding.weight, self.model.head.weight}  # decay would move their frozen rows

    def _open_log(self, state):
        """The first process's log; what an earlier run left in the folder is kept under another name."""
        self.log_file = self.wandb = None
        if self.rank:
            return
        for before in (self.checkpoint, self.out / "log.jsonl"):
            if not state and before.exists() and before.stat().st_size:
                before.replace(before.with_stem(f"{before.stem}.old"))
                self.say(f"{before} of an earlier run is now {before.stem}.old{before.suffix}; --resume would have gone on with it")
        self.log_file = (self.out / "log.jsonl").open("a")
        if state:
            self.log_file.truncate(min(self.log_file.tell(), state.get("log", math.inf)))  # a killed run may have logged steps after its checkpoint
        if self.config.wandb:
            self.wandb = import_wandb().init(project=self.config.wandb, config=asdict(self.config), dir=self.out, id=state and state.get("wandb"), resume="allow")

    def _exists(self, path):
        """Is there such a file? Raises ValueError if some processes see it and others do not."""
        seen = total([path.exists()], self.device)[0]
        if 0 < seen < self.ranks:
            raise ValueError(f"{path}: {seen:.0f} of the {self.ranks} processes can see it; --out must be a folder that all nodes share")
        return seen > 0

    def say(self, text):
        """Print, once for all processes, and without cutting a progress bar in two."""
        if self.rank == 0:
            tqdm.write(text)

    def _prepare_vae(self, resume):
        """As prepare_vae; where it must be trained, the first process does that, and the others read what it wrote."""
        if self.ranks > 1 and self.rank == 0 and not self.config.vae:
            prepare_vae(self.config, self.device, resume)
        if self.ranks > 1:
            dist.barrier()
            if not self.config.vae:
                self._exists(self.out / "vae.pt")
        return prepare_vae(self.config, self.device, resume or self.ranks > 1)

    def _loader(self, split, rows, workers=0, batch_rows=0):
        """This process's share of a split: every `ranks`-th of so many rows a step."""
        config, n_patches = self.config, self.config.model.n_patches
        pairs, text = open_pairs(config.data, split, config.seed), open_text(config.data, self.tokenizer, split, config.seed)
        documents = Documents(pairs, self.tokenizer, config.data, config.diffusion.timesteps, config.seed, text, n_patches)
        stream = Stream(documents, config.data.seq_len, rows, n_patches, range(self.rank, rows, self.ranks))
        return Loader(stream, self.tokenizer, workers, batch_rows)

    # ---- one step ----

    @torch.no_grad()
    def prepare(self, batch, rows, *key, t_draw=None):
        """A Batch, and the numbers of its rows -> (the Batch without its pictures, clean latents (N, C, h, w), t (N,), eps like the latents),
        on the device.

        All that is random (the draw of the VAE's posterior, the timesteps, the noise) is a function of the seed, `key` and the
        row's number: the same for any division of a step's rows, and again when the step is repeated. For a discrete model nothing
        is: its Batch is one of tokens, and there are no latents.
        """
        c = self.config.model
        if c.images == "discrete":
            batch = batch.to(self.device)
            if len(batch.images):
                batch = fill_codes(batch, self.tokenizer.vocab_size + self.vae.codes(batch.images))
            nothing = torch.zeros(0, c.latent_channels, c.latent_size, c.latent_size, device=self.device)
            return batch, nothing, batch.max_t, nothing
        images_of_row = ((batch.image_id >= 0).sum(1) // c.n_patches).tolist()
        batch, draws = batch.to(self.device), []
        for row, max_t in zip(rows, batch.max_t.split(images_of_row)):
            seed = np.random.SeedSequence([self.config.seed, *key, row]).generate_state(1)[0]
            generator = torch.Generator(self.device).manual_seed(int(seed))
            of_posterior, eps = torch.randn(2, len(max_t), c.latent_channels, c.latent_size, c.latent_size, generator=generator, device=self.device)
            draws.append((of_posterior, self.ddpm.draw_timesteps(max_t, generator, t_draw), eps))
        of_posterior, t, eps = (torch.cat(parts) for parts in zip(*draws))
        if not len(eps):
            return batch, eps, t, eps
        posterior = batch.images.chunk(2, dim=1) if self.config.data.latents else self.vae.posterior(batch.images)
        x_0 = self.vae.to_latents(*posterior, of_posterior)
        return replace(batch, images=x_0.new_empty(0)), x_0, t, eps

    def micro_batches(self):
        """This process's rows of the next step, micro_rows at a time: [(Batch on the CPU, the numbers of its rows)]."""
        rows, n = self.loader.stream.mine, self.loader.batch_rows
        return [(next(self.loader), rows[i : i + n]) for i in range(0, len(rows), n)]

    def counts(self, batch):
        """How many text targets (codes included) and noised images a Batch holds; of a discrete model, before its codes are filled in."""
        noised = int((batch.max_t > 0).sum())
        codes = (self.config.model.n_patches + 1) * noised if self.config.model.images == "discrete" else 0  # and the <EOI> after them
        return int((batch.targets != NO_LOSS).sum()) + codes, noised

    def train_step(self):
        """One optimiser step -> the numbers for the log. fill: the share of positions that are not padding."""
        config, lr = self.config, learning_rate(self.config, self.step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        batches = self.micro_batches()
        # The means of eq. 1 and eq. 3 are over the whole step. Ranks and micro-batches differ in how many text targets and
        # noised images they hold, so a mean of their means would be another number.
        counts = zip(*(self.counts(batch) for batch, _ in batches))
        targets, images = (max(1.0, count) for count in total([sum(each) for each in counts], self.device))
        lm, ddpm = 0.0, 0.0
        for n, (batch, rows) in enumerate(batches):
            batch, x_0, t, eps = self.prepare(batch, rows, 1, self.step)
            with self._synchronised(n == len(batches) - 1):
                with autocast(config, self.device):
                    per_token, per_image = losses(self.parallel, self.ddpm, batch, x_0, t, eps, self.mask, config.z_loss)
                lm_part, ddpm_part = per_token.sum() / targets, (per_image * (batch.max_t > 0)).sum() / images
                loss = lm_part + config.lambda_ddpm * ddpm_part  # eq. 4
                (loss * self.ranks).backward()  # times ranks: DDP and FSDP average the gradients, and a sum is wanted
            lm, ddpm = lm + lm_part.detach(), ddpm + ddpm_part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        flops, filled = sum(self.flops(batch) for batch, _ in batches), sum(int((batch.doc_id != PADDING).sum()) for batch, _ in batches)
        lm, ddpm, flops, filled = total([lm, ddpm, flops, filled], self.device)
        if not math.isfinite(lm + ddpm + norm):  # before the weights are touched, so that what is here and on disk stays good
            raise FloatingPointError(
                f"the loss is {lm + config.lambda_ddpm * ddpm:g} and its gradient's norm {norm:g} at step {self.step}: lower --lr (now {config.lr:g}) or --clip; "
                f"--resume goes on from the last checkpoint in {self.out}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(min(config.ema, (1 + self.step) / (10 + self.step)))  # warmed up: the first weights are soon forgotten
        self.step += 1
        fill = filled / (config.rows * config.data.seq_len)
        return {"lm": lm} | ({"ddpm": ddpm} if config.model.images == "continuous" else {}) | {"norm": norm, "lr": lr, "fill": fill, "flops": flops}

    def flops(self, batch):
        """Training FLOPs that a batch costs, forward and backward."""
        c, positions = self.config.model, batch.tokens.numel()
        context = mean_context(batch, c.n_patches if c.image_attention == "bidirectional" else 1)
        return positions * training_flops(self.model, context, len(batch.max_t) / positions)

    @contextmanager
    def _synchronised(self, last):
        """Gradients travel between the processes in the last micro-batch of a step only."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            with self.parallel.no_sync():
                yield
        else:
            if self.ranks > 1 and self.config.fsdp:
                self.parallel.set_requires_gradient_sync(last)
            yield

    # ---- what is measured and kept on the way ----

    @torch.no_grad()
    def validate(self):
        """The losses of the averaged weights on held-out documents, t drawn uniformly; ddpm also per quarter of the t range. Of a
        discrete model lm is the text's, the same targets as without codes, and the codes' stands beside it."""
        sums = np.zeros((6, 2))  # of text, of codes, and of the quarters of t's range: the sum of the losses, and how many they are
        with self.average.applied():
            self.parallel.eval()
            mine, size = self.loader.stream.mine, self.loader.batch_rows
            for n, batch in enumerate(self.validation):
                step, first = divmod(n * size, len(mine))
                batch, x_0, t, eps = self.prepare(batch, mine[first : first + size], 2, step, t_draw="uniform")
                with autocast(self.config, self.device):
                    per_token, per_image = losses(self.parallel, self.ddpm, batch, x_0, t, eps, self.mask)
                is_code = batch.targets >= self.tokenizer.vocab_size
                is_text = (batch.targets != NO_LOSS) & (batch.image_id == TEXT) & ~is_code
                sums[0] += per_token[is_text].sum().item(), int(is_text.sum())
                sums[1] += per_token[is_code].sum().item(), int(is_code.sum())
                for loss, when in zip(per_image.tolist(), t.tolist()):
                    if when > 0:
                        sums[2 + (when - 1) * 4 // self.ddpm.timesteps] += loss, 1
            self.parallel.train()
        text, codes, *quarters = np.reshape(total(sums.flatten().tolist(), self.device), (6, 2))
        mean = lambda sums: float(sums[0] / sums[1]) if sums[1] else None
        found = {"val_lm": mean(text) or 0.0}
        if self.config.model.images == "discrete":
            return found | {"val_codes": mean(codes)}
        return found | {"val_ddpm": mean(sum(quarters)), "val_ddpm_by_t": [mean(quarter) for quarter in quarters]}

    def averaged_weights(self):
        """The averaged weights as one state dict on the CPU; of several processes, the first receives it and the others {}."""
        with self.average.applied():
            return {name: p.clone() for name, p in get_model_state_dict(self.model, options=FULL).items()}  # on a CPU they were views

    def trained(self):
        """The averaged weights, as sample.py and evaluate.py take them; in every process but the first None."""
        weights = self.averaged_weights()
        if self.rank:
            return None
        model = Transfusion(self.config.model).to(self.device).eval().requires_grad_(False)
        model.load_state_dict(weights)
        return Trained(model, self.vae, self.ddpm, self.tokenizer, asdict(self.config))

    def draw_samples(self, name, n=12):
        """Pictures for held-out captions, or of held-out edits or stories, with the text before each under it, as a PNG in the output folder."""
        trained = self.trained()
        if trained:
            pairs = open_pairs(self.config.data, "held_out", self.config.seed)
            if self.config.data.documents == "pairs":
                numbers = fitting(pairs, n, self.tokenizer, self.config.data.seq_len, self.config.model.n_patches)
                documents = generate(trained, [[pairs.captions(i)[0]] for i in numbers], max_tokens=0)
            else:
                documents = tell(trained, [pairs.example(i) for i in range(n)])
            images, texts = zip(*(shown for document in documents for shown in captioned(document)))
            contact_sheet(images, texts, columns=6).save(self.out / name)

    def log(self, values):
        """One JSON line in log.jsonl, and the same to Weights & Biases."""
        if self.rank == 0:
            self.log_file.write(json.dumps({"step": self.step, **values}) + "\n")
            self.log_file.flush()
            if self.wandb:
                quarters = {f"val_ddpm_q{n}": value for n, value in enumerate(values.get("val_ddpm_by_t", []), 1)}
                self.wandb.log({name: value for name, value in values.items() if name != "val_ddpm_by_t"} | quarters, step=self.step)

    def save(self):
        """Write the checkpoint: everything that going on, on any number of processes, sampling and evaluating need."""
        weights = {"model": get_model_state_dict(self.model, options=FULL), "ema": self.averaged_weights(),
                   "optimizer": get_optimizer_state_dict(self.model, self.optimizers, options=FULL)}  # fmt: skip
        streams = [self.loader.state]
        if self.ranks > 1:
            dist.all_gather_object(streams := [None] * self.ranks, self.loader.state)
        if self.rank == 0:
            save_checkpoint(self.checkpoint, {
                "config": asdict(self.config), "step": self.step, "stream": {row: at for stream in streams for row, at in stream.items()},
                "tokenizer": self.tokenizer.state(), "vae_config": asdict(self.vae.config), "vae": self.vae.state_dict(), **weights,
                "log": self.log_file.tell(), "wandb": self.wandb and self.wandb.id,  # where the log ends, and under which name the other is
            })  # fmt: skip

    def _restore(self, state):
        before, now = asdict(build(state["config"])), asdict(self.config)
        settled = [(name, before[part][name], now[part][name]) for part in ("model", "data", "diffusion") for name in now[part]]
        for name, was, value in settled + [(name, before[name], now[name]) for name in MUST_MATCH]:
            if was != value and name not in MAY_DIFFER:
                raise ValueError(f"{self.checkpoint}: was trained with {name} {was}, not {value}; give the options that it was started with")
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if now[name] != before[name] and name not in {*PARTS, *MAY_DIFFER}]
        if changed:
            self.say(f"--resume: changed from here on: {', '.join(changed)}")
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, state["ema"], options=options)
        self.average = Average(self.model)  # which copies what the model has: so the averaged weights go first
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=options)
        self.loader.stream.load_state(state["stream"])
        self.step = state["step"]


def train(config, resume=False):
    """The whole recipe -> the finished Run."""
    began = time.time()
    run = Run(config, resume)
    parameters, peak = sum(p.numel() for p in run.model.parameters()), peak_flops(run.device) if in_bf16(config, run.device) else None
    where = f"{run.ranks} x {run.device.type}" if run.ranks > 1 else str(run.device)
    of_peak = f"; MFU is of {peak / 1e12:.0f} TFLOP/s, dense bf16" if peak else ""
    run.say(f"2. the transformer ({parameters / 1e6:.2f} M parameters, {config.max_steps:,} steps, on {where}){of_peak}")
    steps, seconds, flops = 0, 0.0, 0.0  # since the last line of the log
    with Interrupt() as interrupt, tqdm(desc="train", initial=run.step, total=config.max_steps, mininterval=1, disable=run.rank > 0) as bar:
        while run.step < config.max_steps:
            started = time.perf_counter()
            values = run.train_step()
            steps, seconds, flops = steps + 1, seconds + time.perf_counter() - started, flops + values["flops"]
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.max_steps:
                values |= {"flops": flops / steps, "ms": 1000 * seconds / steps, "tokens_per_s": steps * config.rows * config.data.seq_len / seconds}
                if peak:
                    values["mfu"] = flops / seconds / (peak * run.ranks)
                steps, seconds, flops = 0, 0.0, 0.0
                run.log(values)
                line = f"iter {run.step:6} | lm {values['lm']:.3f}" + (f" | ddpm {values['ddpm']:.3f}" if "ddpm" in values else "")
                line += f" | norm {values['norm']:.2f} | lr {values['lr']:.1e} | fill {values['fill']:.1%} | {values['ms']:.0f} ms | {values['tokens_per_s']:,.0f} tokens/s"
                run.say(line + (f" | MFU {values['mfu']:.1%}" if peak else ""))
            if run.step % config.eval_every == 0 or run.step == config.max_steps:
                found = run.validate()
                run.log(found)
                shown = lambda v: "-" if v is None else " ".join(map(shown, v)) if isinstance(v, list) else f"{v:.3f}"
                run.say("held out: " + " | ".join(f"{name.removeprefix('val_')} {shown(value)}" for name, value in found.items()))
                run.save()
                run.draw_samples(f"samples_{run.step:06d}.png")
            if any(total([interrupt.asked], run.device)):  # in all processes, whichever was told
                run.save()
                raise KeyboardInterrupt
    trained = run.trained()
    if trained:
        print(f"trained in {time.time() - began:.0f} s; 3. the evaluation", flush=True)
        scores = evaluate(trained, config.judged)
        print(format_scores(scores))
        (run.out / "scores.json").write_text(json.dumps(scores, indent=1))
        print(f"{time.time() - began:.0f} s in all. In {run.out}: checkpoint.pt, samples_*.png, log.jsonl, scores.json. Now try:")
        text, more = {"pairs": (0, ""), "edits": (1, " --image PICTURE.png"), "stories": (0, " --max_images 3")}[config.data.documents]
        print(f"    python sample.py --ckpt {run.checkpoint}{more} --prompt \"{open_pairs(config.data, 'held_out', 1).pair(text)[0]}\"")
    return run


if __name__ == "__main__":
    report_errors(lambda: train(*parse()), STOPPED)
