"""The switchboard: what an option names is looked up here, and here alone.

Each function imports the one room that it needs. Delete a room and its lines here, and all the rest still
works.
"""

from extras import runs  # isort: skip, it goes before torch

import importlib
import itertools
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import PairDocuments, Stream, Tokenizer, to_pixels
from extras import checkpoints, cli, sources
from extras.loader import Loader
from extras.machine import say
from extras.parallel import first, seen_by_all
from model import Transfusion
from vae import VAE, VAEConfig, train_vae


@dataclass
class Choices:
    """The options that name an extra, or are of one."""

    # Sources of pairs and of text.
    # Images with captions: a folder, tars, parquet or COCO's JSON; several: a,b.tar:2 ("" = scenes).
    data: str = ""  # Or documents of texts and images: .jsonl, .jsonl.gz
    text: str = ""  # .txt or .jsonl files or folders of them, with commas; "" = sentences about scenes
    tokenizer: str = ""  # a tokenizer.json, read with the package tokenizers; "" = bytes and `merges`
    merges: int = 0  # at most so many pairs of tokens are merged, as captions suggest; 0 = plain bytes
    grammar: Literal["places", "relations", "rich"] = "places"  # of the built-in scenes
    documents: Literal["pairs", "edits", "stories"] = "pairs"  # edits (section 4.5) and stories of scenes
    by_folder: bool = False  # pairs in one folder (of a tar, too) are all trained on, or all held out
    latents: str = ""  # folder that vae.py --encode wrote: read in the place of the images
    cache: str = ""  # for tar indexes and tokenised text; "" = .transfusion beside the data, or out/cache
    # The U-Net.
    patch_encoder: Literal["linear", "unet"] = "linear"  # the paper's alternatives (section 3)
    unet_channels: int = 1024  # width where a pixel is a patch; half as wide at each doubled resolution
    unet_blocks: int = 4  # residual blocks at each resolution, on the way in and on the way out
    unet_norm: Literal["layer", "group"] = "layer"  # layer norms are the paper's (footnote 7)
    # Chameleon.
    images: Literal["continuous", "discrete"] = "continuous"  # discrete: codes of a VQ-VAE as tokens
    codebook: int = 16384  # codes of the VQ-VAE
    commitment_weight: float = 0.25  # of the VQ-VAE's commitment loss, summed over an image
    post_norm: bool = False  # norms after attention and MLP, as in Chameleon, instead of before
    z_loss: float = 0.0  # weight of log^2 Z, Z being the softmax's denominator; Chameleon's is 1e-5
    code_temperature: float = 1.0  # at which codes are sampled; 0 = the likeliest
    code_top_p: float = 1.0  # among the likeliest codes that together have this probability


def room(name):
    """The module extras/NAME.py. Raises ValueError if it was deleted."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"extras.{name}":
            raise
        raise ValueError(f"extras/{name}.py is not here, and what you ask for is in it") from None


def baseline(choices):
    """The room of the paper's baseline, where --images discrete asks for it."""
    return room("chameleon") if choices.images == "discrete" else None


def in_lines(extra):
    """Does --data name documents in JSON lines?"""
    return re.search(r"\.jsonl(\.gz)?(:[0-9.]+)?(,|$)", extra.data)


def check(config):
    """Raises ValueError on options of a train.Config that cannot go together."""
    extra, start, copies = config.extra, config.init_from, not config.fsdp
    latents, frozen, chameleon = extra.latents, config.freeze_text, baseline(extra)
    pairs = extra.documents == "pairs" or in_lines(extra)
    together = {
        f"min_lr is {config.min_lr}; it must be at most lr, {config.lr}": config.min_lr <= config.lr,
        "latents are of continuous images; leave them out": not (latents and chameleon),
        "latents need the VAE that made them; give --vae too": not latents or config.vae or start,
        "latents are of your own images; give --data too": not latents or extra.data,
        "freeze_text is true, but there is nothing to freeze: give --init_from too": not frozen or start,
        "optimizer muon needs whole matrices, which --fsdp cuts": config.optimizer == "adamw" or copies,
        "freeze_text needs whole vocabularies, which --fsdp cuts; leave one out": not frozen or copies,
        f"{extra.documents} are of the built-in scenes; leave --data out, or give .jsonl": pairs
        or not extra.data,
        "latents are of pairs; leave them out with documents in .jsonl": not (latents and in_lines(extra)),
        f"{extra.documents} need places; give --grammar places or rich": pairs
        or extra.grammar != "relations",
    }
    for sentence, holds in together.items():
        if not holds:
            raise ValueError(sentence)
    if chameleon:
        config.model = chameleon.model_config(config.model)
    if extra.patch_encoder == "unet":
        room("unet").check_widths(config.model.patch_size, extra.unet_channels)


# ---- Presets -------------------------------------------------------------------------------------

PRESETS = {
    "chameleon": "chameleon",
    "small_edit": "stories",
    "small_story": "stories",
}  # name -> the room that has it


def preset(name):
    """What a preset changes in `small`: {option: value}."""
    return room(PRESETS[name]).PRESETS[name]


def suited(device):
    """The preset where no --config is given: the largest that suits the machine and needs no data."""
    gpu = torch.cuda.is_available() and device in (None, "auto", "cuda")
    name, why = ("rich", "a GPU is used") if gpu else ("small", "no GPU is used")
    if os.environ.get("RANK", "0") == "0":
        print(f"--config {name}: {why}, and it needs no data")
    return name


# ---- Data ----------------------------------------------------------------------------------------
# config: a train.Config or a sample.Trained; both have `data` (a DataConfig) and `extra` (Choices).


def open_pairs(config, split="train", seed=0):
    """The source of pairs that the options name, cut to a split. Raises ValueError, saying what is wrong."""
    extra, size = config.extra, config.data.image_size
    if extra.data:
        return room("pairs").open_sources(config, split, seed, partial(kind_of, extra))
    if extra.documents != "pairs":
        return room("stories").Stories(
            extra.grammar, size, split, seed, room("stories").CHANGES[extra.documents]
        )
    return room("scenes").Scenes(extra.grammar, size, split, seed)


def kind_of(extra, path):
    """The class of the source that a path of --data is."""
    if in_lines(extra):
        return room("interleaved").Interleaved
    folder = Path(path)
    parquet = path.endswith(".parquet") or any(folder.glob("*.parquet")) and not any(folder.glob("*.tar"))
    return room("parquet").Parquet if parquet else room("pairs").Pairs


def open_text(config, tokenizer, split="train", seed=0):
    """The source of text alone: your own, or sentences about scenes; None = there is none."""
    extra, data = config.extra, config.data
    if not data.text_fraction:
        return None
    if extra.text:
        return room("text").TextFiles(config, tokenizer, split, seed)
    return (
        None if extra.data else room("scenes").SceneText(extra.grammar, tokenizer, data.seq_len, split, seed)
    )


def open_documents(config, tokenizer, n_patches, split="train"):
    """The recipe of documents: pairs, edits, stories or your own, with text alone between them."""
    pairs = open_pairs(config, split, config.seed)
    recipe = PairDocuments if config.extra.documents == "pairs" else room("stories").StoryDocuments
    if in_lines(config.extra):
        recipe = room("interleaved").InterleavedDocuments
    documents = recipe(pairs, tokenizer, config.data, config.diffusion.timesteps, config.seed)
    text = open_text(config, tokenizer, split, config.seed)
    if not text:
        return documents
    return room("sources").WithText(documents, text, config.data.text_fraction, n_patches, config.seed)


def open_loader(run, split, workers):
    """This process's share of a split: every `ranks`-th row of a step."""
    config, n_patches = run.config, run.config.model.n_patches
    documents = open_documents(config, run.tokenizer, n_patches, split)
    seq_len, max_broken = config.data.seq_len, config.data.max_broken
    too_long = sources.Skipped(f"documents (with --seq_len {seq_len})", max_broken)
    my_rows = range(run.rank, config.rows, run.ranks)
    stream = Stream(documents, seq_len, config.rows, n_patches, my_rows, too_long)
    skipped, pin = sources.Skipped("pictures", max_broken), run.device.type == "cuda"
    return Loader(stream, run.tokenizer, workers, config.micro_rows, skipped, pin)


def first_captions(pairs):
    """What tokenizers and the style of prompts are learned from."""
    return [pairs.pair(i)[0] for i in range(2000)]


def open_tokenizer(config, pairs):
    """The tokenizer that the options name. Merges and style are learned from the first captions."""
    extra, captions = config.extra, first_captions(pairs)
    tokenizer = Tokenizer()
    if extra.tokenizer:
        tokenizer = room("tokenizers").read_tokenizer(extra.tokenizer, captions, config.data.max_broken)
    elif extra.merges:
        tokenizer = room("tokenizers").BPETokenizer.learn(captions, extra.merges)
    tokenizer.style = room("text").style_of(captions, tokenizer)
    return tokenizer


def restore_tokenizer(state):
    """The tokenizer whose `state()` a checkpoint holds."""
    tokenizer = Tokenizer()
    if "json" in state:
        tokenizer = room("tokenizers").JSONTokenizer(state["json"])
    elif "merges" in state:
        tokenizer = room("tokenizers").BPETokenizer(state["merges"])
    tokenizer.style = state.get("style")
    return tokenizer


# ---- Models --------------------------------------------------------------------------------------


def vae_kind(config):
    """The class of the autoencoder, and its configuration."""
    chameleon, extra = baseline(config.extra), config.extra
    if not chameleon:
        return VAE, config.autoencoder
    codes = dict(codebook=extra.codebook, commitment_weight=extra.commitment_weight)
    return chameleon.VQVAE, chameleon.VQConfig(**asdict(config.autoencoder), **codes)


def read_trained(path):
    """A checkpoint of train.py, the folder of a run, or an export -> the path of the file, and its dict.

    Raises ValueError, naming the path, if it is none of them.
    """
    if path.suffix == ".safetensors":
        state = room("exports").read_export(path)
    else:
        path = path / "checkpoint.pt" if path.is_dir() else path
        state = runs.load_checkpoint(path)
    if not isinstance(state, dict) or "ema" not in state or not isinstance(state.get("config"), dict):
        raise ValueError(f"{path}: is not a checkpoint of train.py")
    choices = state["config"].get("extra")
    if path.suffix == ".safetensors" and isinstance(choices, dict):
        choices["cache"] = "out/cache"  # not where somebody else's export says
    return path, state


def restore_vae(state, where):
    """The VAE of a checkpoint's dict, in eval mode. Raises ValueError that names `where`."""
    network, kind = VAE, VAEConfig
    settings = state.get("vae_config")
    if isinstance(settings, dict) and "codebook" in settings:
        network, kind = room("chameleon").VQVAE, room("chameleon").VQConfig
    vae = network(cli.make(kind, state.get("vae_config"), where))
    runs.load_weights(vae, state.get("vae"), where)
    if network is VAE and not (vae.latent_std > 0).all():
        raise ValueError(f"{where}: its latents have no spread, latent_std is {vae.latent_std.min():g}")
    return vae.eval()


def load_vae(path, device="cpu"):
    """The VAE in a file or folder, in eval mode: ours, or a pretrained one. Raises ValueError, naming it.

    Ours is what train.py wrote, or vae.py when it was done.
    """
    ours = [Path(path) / name for name in ("vae.pt", "checkpoint.pt")]  # of a run's folder
    path = next((file for file in ours if file.exists()), path)
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":
        return room("weights").load_pretrained(path).to(device)
    state = runs.load_checkpoint(path)
    if not isinstance(state, dict) or "vae_config" not in state:
        return room("weights").from_latent_diffusion(state, path).to(device)
    if "step" in state and not ("done" in state or "ema" in state):
        stopped = f"its training was stopped at step {state['step']:,} of {state['vae_config']['steps']:,}"
        raise ValueError(f"{path}: {stopped}; finish it first: the same command as then, with --resume")
    return restore_vae(state, path).to(device)


def check_vae(config, vae, network, own):
    """Raises ValueError unless --vae is of the kind that --images needs, with latents like those of `own`."""
    if type(vae) is not network:
        kinds = f"is a {type(vae).__name__}, but --images {config.extra.images} needs a {network.__name__}"
        raise ValueError(f"--vae {config.vae}: {kinds}; give another --images, or another VAE")
    sizes = [
        (v.config.latent_channels, v.config.factor, getattr(v.config, "codebook", 0))
        for v in (vae, own or vae)
    ]
    if sizes[0] != sizes[1]:
        has, trained = (
            "latents of {} channels, {} pixels apart, and {} codes".format(*size) for size in sizes
        )
        advice = "leave --vae out to use the checkpoint's own"
        raise ValueError(
            f"--vae {config.vae}: has {has}, but the checkpoint was trained on {trained}; {advice}"
        )


def images_of(pairs, max_broken):
    """The function (first, n) -> float32 (n, 3, H, W) in -1..1: readable images of pairs number first.. ."""
    skipped = sources.Skipped("pictures", max_broken)

    def images(first, n):
        found = sources.readable(pairs, itertools.count(first), n, skipped)
        return to_pixels(np.stack([pixels for _, pixels in found]))

    return images


def lpips(device):
    """LPIPS (Zhang et al. 2018) if its package and weights are at hand; else None, with a line."""
    try:
        from lpips import LPIPS

        return LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except Exception as error:  # not installed, or its VGG weights cannot be fetched
        print(f"training the VAE without LPIPS ({type(error).__name__}); `pip install lpips` gives it")
        return None


def prepare_vae(config, device, resume=False, own=None):
    """The VAE that --vae names, or else `own` (of the model to start from), or else one trained here.

    resume: go on from <out>/vae.pt, or take it if it is finished. Raises ValueError if it does not suit.
    """
    vae = load_vae(config.vae, device) if config.vae else own
    network, settings = vae_kind(config)
    if vae:
        check_vae(config, vae, network, own)
    if config.data.image_size % (vae.config if vae else settings).factor:
        factor = (vae.config if vae else settings).factor
        raise ValueError(
            f"image_size is {config.data.image_size}; it must be a multiple of the VAE's factor, {factor}"
        )
    if vae and ((vae.latent_std != 1).any() or vae.latent_mean.any()):
        return vae

    pairs = open_pairs(replace(config, extra=replace(config.extra, latents="")), "train", config.seed)
    images, known = images_of(pairs, config.data.max_broken), checkpoints.known(config, pairs)
    if vae:
        print(
            f"1. the VAE is {config.vae}, which does not say how its latents are scaled: measuring them",
            flush=True,
        )
        torch.manual_seed(config.seed)
        vae.measure_statistics(images, config.autoencoder.batch)
        return vae
    path = Path(config.out) / "vae.pt"
    state = checkpoints.read_vae(path, config, known) if resume and path.exists() else None
    if state and state.get("done"):
        return load_vae(path, device)
    runs.claim(config.out, ["vae.pt"], resume)
    print(f"1. the VAE ({config.autoencoder.steps:,} steps; to use it again: --vae {path})", flush=True)
    with runs.Interrupt() as interrupt:
        save = partial(checkpoints.save_vae, path, config, known)
        keep = dict(save=save, state=state, interrupted=lambda: interrupt.asked)
        keep["lpips"] = lpips(device) if settings.perceptual_weight else None
        if settings.optimizer == "muon":
            keep["optimizer"] = room("optimizers").MuonForConvolutions
        if settings.bf16 and room("machine").machine(config, device)[0]:
            keep["autocast"] = partial(torch.autocast, device.type, torch.bfloat16)
        torch.manual_seed(config.seed)
        return train_vae(network(settings).to(device), images, seed=config.seed, **keep)


def shared_vae(run, resume):
    """As prepare_vae; where it must be trained, the first process does that for all."""
    if run.ranks > 1 and not run.config.vae:
        first(lambda: prepare_vae(run.config, run.device, resume) and None)
        seen_by_all(run.out / "vae.pt", run.device)
    return prepare_vae(run.config, run.device, resume or run.ranks > 1)


def encode(config, device, resume, folder):
    """Write the latents of --data to a folder, for train.py --latents. Raises ValueError if it has none."""
    if not config.extra.data:
        raise ValueError("--encode needs --data: scenes have no end, and are encoded as they are drawn")
    if in_lines(config.extra):
        raise ValueError("--encode writes latents of pairs; documents in .jsonl are encoded as they are read")
    if baseline(config.extra):
        raise ValueError("--encode writes continuous latents; leave it out with --images discrete")
    vae, pairs = prepare_vae(config, device, resume), open_pairs(config, "held_out")
    broken = room("latents").write_latents(vae, getattr(pairs, "sources", [pairs]), folder)
    print(f"wrote {folder}" + (f"; {broken:,} pictures could not be read" if broken else ""))
    used = f"--data {config.extra.data} --latents {folder}"
    print(f"Now: python train.py ... {used} --vae {config.vae or config.out + '/vae.pt'}")


def new_model(config, choices):
    """A model with random weights. config: a TransfusionConfig."""
    if chameleon := baseline(choices):
        return chameleon.Chameleon(config, choices.post_norm)
    if choices.patch_encoder == "unet":
        sizes = choices.unet_channels, choices.unet_blocks, choices.unet_norm
        return room("unet").unet_transfusion(config, *sizes)
    return Transfusion(config)


def open_start(run, load):
    """What --init_from names: a Trained that `load` reads, the path of a Llama, or None."""
    config = run.config
    if config.init_from:
        is_llama = room("weights").is_llama(config.init_from)
        return Path(config.init_from) if is_llama else check_start(config, load(config.init_from))
    if config.extra.documents != "pairs":
        advice = "--init_from out/small would start from a model that can draw"
        say(run, f"learning {config.extra.documents} from nothing; {advice}")
    return None


def check_start(config, start):
    """A sample.Trained, if it is built as the options say. Raises ValueError if not."""
    now = asdict(config.model) | asdict(config.diffusion) | asdict(config.extra)
    then = asdict(start.model.config) | asdict(start.ddpm.config) | asdict(start.extra)
    for name in ("images", "patch_size", "patch_encoder", "image_attention", "prediction"):
        if then[name] != now[name]:
            wanted = f"was trained with {name} {then[name]}; give --{name} {then[name]}"
            raise ValueError(f"--init_from {config.init_from}: {wanted}")
    return start


def tokenizer_and_vae(run, state, start, resume):
    """The checkpoint's, or those of the model to start from, or new: then the VAE is trained here."""
    config, device = run.config, run.device
    if state:
        tokenizer, vae = restore_tokenizer(state["tokenizer"]), restore_vae(state, run.checkpoint).to(device)
        if config.vae and Path(config.vae).exists():
            check_vae(config, load_vae(config.vae, device), type(vae), vae)
    elif start and not isinstance(start, Path):
        tokenizer, vae = start.tokenizer, prepare_vae(config, device, own=start.vae.to(device))
        captions = first_captions(open_pairs(config, "train", config.seed))
        tokenizer.style = room("text").style_of(captions, tokenizer)
    else:
        tokenizer = open_tokenizer(config, open_pairs(config, "train", config.seed))
        if start:  # whatever is wrong with the Llama, say so before a VAE is trained
            room("weights").check_vocabulary(start, tokenizer)
        vae = shared_vae(run, resume)
    if config.extra.latents:
        room("latents").check_latents(config.extra.latents, vae)
    return tokenizer, vae


def sized(run, state):
    """The model's configuration, with the three sizes that follow from the tokenizer and the VAE."""
    config, vae = run.config, run.vae.config
    model = config.model
    if state and config.init_from:  # it keeps the sizes of the model that it was started from
        model = cli.make(type(model), state["config"]["model"], run.checkpoint)
    vocab_size = run.tokenizer.vocab_size + getattr(vae, "codebook", 0)
    side = config.data.image_size // vae.factor
    return replace(model, vocab_size=vocab_size, latent_channels=vae.latent_channels, latent_size=side)


def first_model(run, start):
    """The model that training begins with."""
    config = run.config
    if isinstance(start, Path):
        config.extra = replace(config.extra, post_norm=False)  # a Llama's blocks are pre-norm
        make = partial(new_model, choices=config.extra)
        new_tokens = config.model.vocab_size - run.tokenizer.bos
        return room("weights").load_llama(start, config.model, new_tokens, make)
    if start:
        start.model.config.latent_size = config.model.latent_size
        return start.model.train()
    return new_model(config.model, config.extra)


def freeze(run):
    """Train only what a Llama lacks -> the weights that the optimiser may not decay."""
    new_tokens = run.config.model.vocab_size - run.tokenizer.bos
    undecayed, told = room("weights").freeze_text(run.model, new_tokens)
    say(run, f"--freeze_text: {told}")
    return undecayed


def objective(run, ordinary, make_mask, autocast):
    """The objective of a run: the baseline's, or of the `ordinary` class."""
    chameleon = baseline(run.config.extra)
    kind = chameleon.Objective if chameleon else ordinary
    return kind(run.config, run.vae, run.ddpm, run.tokenizer, make_mask, run.device, autocast)


# ---- Sampling and scores -------------------------------------------------------------------------


def engine_of(trained):
    """The class of the engine that continues documents with this model."""
    chameleon = baseline(trained.extra)
    return chameleon.CodeEngine if chameleon else room("engine").Engine


def generate(trained, documents, seeds=None, **settings):
    """Continue documents, each a list of strings and PIL images -> list of documents; see engine.generate."""
    return room("engine").generate(trained, documents, seeds, engine=engine_of(trained), **settings)


def draw_held_out(trained, seed, path, n=12):
    """Have n images drawn for held-out captions, or n held-out edits or stories: a sheet, a PNG at `path`."""
    pairs, show = open_pairs(trained, "held_out", seed), room("show")
    if in_lines(trained.extra):
        documents, _ = room("interleaved").draw_again(trained, pairs, n, generate)
        if not documents:
            return
    elif trained.extra.documents == "pairs":
        sizes = trained.data.seq_len, trained.model.config.n_patches
        numbers = sources.fitting(pairs, n, trained.tokenizer, *sizes)
        documents = generate(trained, [[pairs.captions(i)[0]] for i in numbers], max_tokens=0)
    else:
        documents = room("stories").tell(trained, [pairs.example(i) for i in range(n)], generate)
    images, texts = zip(*itertools.chain(*map(show.captioned, documents)))
    with runs.written(path) as file:
        show.contact_sheet(images, texts, columns=6).save(file, "png")


def next_command(config, checkpoint):
    """What to type after training: sample.py with a held-out caption."""
    pairs = open_pairs(config, "held_out", 1)
    return room("show").next_command(checkpoint, config.extra.documents, pairs)


def measures(trained, inception="", clip=""):
    """What evaluation needs: the splits, the metrics, and for edits and stories their own scorer instead."""
    extra, device = trained.extra, next(trained.model.parameters()).device
    splits, told = ("seen", "held_out", "never_seen"), in_lines(extra)
    if told or extra.documents != "pairs":
        if inception or clip:
            kind = "documents in .jsonl" if told else extra.documents
            scored = f"score what is drawn from captions, but this model was trained on {kind}"
            raise ValueError(f"--inception and --clip {scored}; leave them out")
        if told:
            return splits[:2], (), partial(room("interleaved").score, open_pairs)
        return splits, (), room("stories").score
    if extra.data:
        splits = splits[:2]
        metrics = [room("metrics").captions_metric, room("metrics").latent_metric(trained.vae, device)]
    else:
        metrics = [room("judge").exact(extra.grammar)]
    if inception:
        metrics.append(room("metrics").fid_metric(inception, device))
    if clip:
        metrics.append(room("metrics").clip_metric(clip, device))
    return splits, metrics, None
