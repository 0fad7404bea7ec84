"""Sampling (paper, section 3, "Inference"): text token by token, images by diffusion, in one sequence.

    python sample.py --prompt "a red circle at the top left"     a picture of it
    python sample.py --image picture.png                         its caption
    python sample.py --image picture.png --prompt "make it blue" another picture, after both
    python sample.py --prompt "a red circle at the top left" --max_images 3
                                                                 a story: the model writes what changes, and draws it
    python sample.py                                             the model starts by itself; --free: it goes on by itself

The rule for a batch of sequences in different modes. A sequence is in text mode until it samples <BOI>; then in image mode for
T' denoising steps and one more call at t = 0, which leaves the clean picture's keys and values behind; then in text mode
again, beginning with an inserted <EOI>; until it samples <EOS>, or has used up its tokens, images or positions, and gives its
place to the next one that waits. Each round makes TEXT_CALLS calls that give every sequence in text mode one token each, then
one denoising call that takes every sequence in image mode one step further, each from its own t. So none ever waits for
another's whole text or picture, only for a few calls: a token is cheap beside a denoising step, and the sooner a sequence has
written its text, the more of them share each denoising step. Every sequence has its own cache rows, position and random
generator: what it produces does not depend on its neighbours, nor on how calls are shared out.

A denoising step runs only the image's own patches, of the sequence and of its guidance branch (<BOS> <BOI> patches) in one batch:
what came before is in the KV cache, and inside an image everything sees everything, so there is no mask, but for the one that
hides the unused slots of shorter prefixes.

A discrete model (Chameleon) samples an image's codes as it samples text, one a call; everything else is the same (`CodeEngine`).

From Python: `generate(load("out/small"), [["a red circle"], [image, "make it blue"], []], seeds=[0, 1, 2])`.
"""

import argparse
import base64
import difflib
import html
import io
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from attention_mask import transfusion_mask
from data import Picture, Tokenizer, collate, document_length, fill_codes, fit_image, load_image, restore_tokenizer
from diffusion import DDPM, SAMPLERS, guide, needs_noise
from model import KVCache, Transfusion, TransfusionConfig
from vae import VAE, VAEConfig, load_checkpoint, read_json, read_safetensors, write_safetensors


@dataclass
class Trained:
    """A model and all that sampling from it needs; `config` is the training run's, as nested dicts."""

    model: Transfusion
    vae: VAE
    ddpm: DDPM
    tokenizer: Tokenizer
    config: dict


def load(path, device="cpu"):
    """Read a checkpoint of train.py (a file, or the run's folder), or a folder of `export` -> Trained, with the averaged weights, in eval mode.

    Raises ValueError, naming the file, if it is missing, broken or of other sizes than it says.
    """
    path = Path(path)
    if (path / "config.json").exists() and not (path / "checkpoint.pt").exists():
        state = read_json(path / "config.json")
        if state.get("model_type") != "transfusion":
            raise ValueError(f"{path}: is a model of type {state.get('model_type')!r}, not one that sample.py --export wrote")
        state |= {"ema": read_safetensors(path / "model.safetensors"), "vae": read_safetensors(path / "vae.safetensors")}
    else:
        path = path / "checkpoint.pt" if path.is_dir() else path
        state = load_checkpoint(path)
    if not isinstance(state, dict) or "ema" not in state:
        raise ValueError(f"{path}: is not a checkpoint of train.py")
    try:
        config = state["config"]
        model, vae, ddpm = Transfusion(TransfusionConfig(**config["model"])), VAE(VAEConfig(**state["vae_config"])), DDPM(**config["diffusion"])
        tokenizer = restore_tokenizer(state["tokenizer"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its configuration is not of this version ({error})") from None
    try:
        model.load_state_dict(state["ema"])
        vae.load_state_dict(state["vae"])
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not have the sizes of its configuration ({str(error).splitlines()[-1].strip()})") from None
    return Trained(model.to(device).eval(), vae.to(device).eval(), ddpm.to(device), tokenizer, config)


def export(trained, folder):
    """Write a model for others, without what only training needs: model.safetensors, vae.safetensors, and config.json with the
    tokenizer and all sizes. `load` reads it back. Raises OSError if it cannot be written."""
    config = {"model_type": "transfusion", "config": trained.config, "vae_config": asdict(trained.vae.config), "tokenizer": trained.tokenizer.state()}
    write_safetensors(Path(folder) / "model.safetensors", trained.model.state_dict())
    write_safetensors(Path(folder) / "vae.safetensors", trained.vae.state_dict())
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))


# ---- The engine -----------------------------------------------------------------------------------------------------
# A *sequence* is one document being decoded; a *place* is a slot of the engine's batch, which holds one sequence or none; a *cache row*
# is a row of the KV cache: one for each place, or with guidance two, of which the second is the guidance branch's.

TEXT_CALLS = 4  # tokens that each sequence in text mode gets between two denoising steps of the others; `tests/bench.py sampling` compares
COMPILE_FROM = 10_000  # image denoising steps, on CUDA: from about here on they repay a minute of compilation


@dataclass
class Sequence:
    """One document being decoded, or waiting for that."""

    number: int  # of the document
    prompt: list  # its segments, as in data.Documents
    generator: torch.Generator  # on the CPU, so that a seed gives the same numbers on every device
    temperature: float
    tokens_left: int
    images_left: int
    position: int  # of the next token or patch, in the document and in the cache
    step: int | None = None  # denoising steps done; None = in text mode
    after_image: bool = False  # <EOI> comes next
    new: list = field(default_factory=list)  # ids and latents (or an image's codes), in order
    said: int = 0  # characters of the current text that were reported


class Engine:
    """The sequences in their places, and the three calls of the model that move them on: the prompts of new ones, a token for each
    in text mode, a denoising step for each in image mode."""

    def __init__(self, trained, n_places, cache_length, n_images, *, steps, sampler, eta, guidance_scale, top_k, top_p, on_text, on_step):
        self.trained, self.model, self.tokenizer = trained, trained.model, trained.tokenizer
        c, self.device = self.model.config, next(self.model.parameters()).device
        self.sampler, self.eta, self.noisy = sampler, eta, needs_noise(sampler, eta)
        self.guidance_scale, self.top_k, self.top_p, self.on_text, self.on_step = guidance_scale, top_k, top_p, on_text, on_step
        self.n_patches, self.shape, self.limit = c.n_patches, (c.latent_channels, c.latent_size, c.latent_size), trained.config["data"]["seq_len"]
        self.steps = steps
        if c.images == "continuous":
            self.timesteps = np.array(trained.ddpm.sampling_timesteps(steps) + [0])  # the last: once more, clean
        self.causal = c.image_attention == "causal"
        self.sequences = [None] * n_places  # None: the place is free
        self.logits = torch.zeros(n_places, c.vocab_size, device=self.device)  # of each sequence's next token
        self.x, self.x_0 = torch.zeros(2, n_places, *self.shape, device=self.device)  # x_t, and the last step's estimate of x_0
        self.compiled = self.compiles(n_images * steps)
        self.branches = 1 if guidance_scale == 1.0 else 2  # cache rows of each place
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.cache = KVCache(c, self.branches * n_places, max(cache_length, 2 + c.n_patches), self.device, dtype)
        if self.branches == 2:
            start = self.embed([[self.tokenizer.bos, self.tokenizer.boi]] * n_places)
            self.run(start, self.cache_rows(range(n_places), 2)[1::2], [0] * n_places, torch.ones(2, 2, dtype=torch.bool, device=self.device).tril())

    def compiles(self, image_steps):
        """Does it pay to compile the denoising step?"""
        return self.device.type == "cuda" and image_steps >= COMPILE_FROM

    def embed(self, tokens):
        return self.model.embedding(torch.tensor(tokens, device=self.device))

    def places(self, drawing):
        """The places of the sequences in image mode, or of those in text mode."""
        return [p for p, sequence in enumerate(self.sequences) if sequence and (sequence.step is not None) == drawing]

    def cache_rows(self, places, branches=1):
        """The cache rows of these places: of each the first, or with branches = 2 also the guidance branch's."""
        return [self.branches * p + branch for p in places for branch in range(branches)]

    def reserve(self, cache_rows, starts, n):
        """Have the cache take n new positions of each of these cache rows -> the positions (R, n), and the mask that hides what
        other cache rows alone have reached, and what comes later in an image that is read causally: None if there is nothing to hide."""
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(n, device=self.device)
        visible = max(starts) + n
        self.cache.at(cache_rows, positions, visible)
        hidden = min(starts) < max(starts) or self.causal and n > 1
        ends = positions if self.causal else positions[:, -1:]  # how far each looks
        return positions, (torch.arange(visible, device=self.device) <= ends[:, :, None])[:, None] if hidden else None

    def run(self, h, cache_rows, starts, mask=None):
        """New tokens h (R, n, dim) of these cache rows through the trunk. mask: if not the one that `reserve` finds."""
        positions, hiding = self.reserve(cache_rows, starts, h.shape[1])
        return self.model.trunk(h, positions, hiding if mask is None else mask, self.cache)

    # ---- prompts ----

    def admit(self, waiting):
        """Move waiting sequences to the free places, and run their prompts, padded on the right, in one call."""
        places = [p for p, sequence in enumerate(self.sequences) if sequence is None][: len(waiting)]
        if not places:
            return
        sequences = [waiting.popleft() for _ in places]
        lengths = [sequence.position for sequence in sequences]
        batch = collate([[sequence.prompt] for sequence in sequences], self.tokenizer, max(lengths), self.n_patches).to(self.device)
        # Padding comes last, so nothing looks at it; prompts of text alone share one mask.
        mask = transfusion_mask(batch.image_id if len(batch.images) else batch.image_id[:1], causal=self.causal)
        h = self.run(self.embed_prompts(batch), self.cache_rows(places), [0] * len(sequences), mask)
        last = h[torch.arange(len(lengths), device=self.device), torch.tensor(lengths, device=self.device) - 1]
        self.logits[places] = self.model.head(last).float()
        for p, sequence in zip(places, sequences):
            self.sequences[p] = sequence
            if sequence.step == 0:
                self.begin_image(p)

    def embed_prompts(self, batch):
        with torch.autocast(self.device.type, enabled=False):
            x_0 = self.trained.vae.encode(batch.images) if len(batch.images) else torch.zeros(0, *self.shape, device=self.device)
        return self.model.embed(batch.tokens, batch.image_id, x_0, torch.zeros(len(x_0), dtype=torch.long, device=self.device))[0]

    def finish(self, p):
        self.say(self.sequences[p], everything=True)
        self.sequences[p] = None

    # ---- text mode ----

    def text_step(self):
        """One token for each sequence in text mode."""
        places = self.places(drawing=False)
        tokens = self.sample_tokens(places) if places else []
        going_on = [(p, self.sequences[p], token) for p, token in zip(places, tokens) if self.accept(p, token)]
        if not going_on:
            return
        places, sequences, tokens = zip(*going_on)
        h = self.run(self.embed(tokens)[:, None], self.cache_rows(places), [sequence.position for sequence in sequences])
        self.logits[list(places)] = self.model.head(h[:, 0]).float()
        for p, sequence, token in going_on:
            sequence.position += 1
            sequence.after_image = False
            if token == self.tokenizer.boi:
                sequence.images_left -= 1
                self.begin_image(p)

    def sample_tokens(self, places):
        """The next token of each of these sequences. <EOI> is inserted, <BOS>, padding and codes never occur, <BOI> only if an image is left."""
        t, sequences = self.tokenizer, [self.sequences[p] for p in places]
        logits = self.logits[places]
        logits[:, [t.bos, t.eoi, t.pad]] = logits[:, t.vocab_size :] = -torch.inf
        full = [sequence.images_left <= 0 or sequence.position + 1 + self.n_patches > self.limit for sequence in sequences]
        logits[torch.tensor(full, device=self.device), t.boi] = -torch.inf
        temperature = torch.tensor([sequence.temperature for sequence in sequences])
        sampled = lambda sequence: sequence.temperature > 0 and not sequence.after_image
        u = torch.stack([torch.rand((), generator=sequence.generator) if sampled(sequence) else torch.zeros(()) for sequence in sequences])
        tokens = pick_tokens(logits, temperature.to(self.device), u.to(self.device), self.top_k, self.top_p).tolist()
        return [t.eoi if sequence.after_image else token for sequence, token in zip(sequences, tokens)]

    def accept(self, p, token):
        """Note the new token of a sequence, and finish the sequence if that was its last -> does it go on?"""
        sequence, t = self.sequences[p], self.tokenizer
        if token not in (t.eos, t.boi, t.eoi):
            sequence.new.append(token)
            sequence.tokens_left -= 1
            self.say(sequence)
        ends = token == t.eos or (sequence.tokens_left <= 0 and token != t.boi) or sequence.position >= self.limit
        if ends:
            self.finish(p)
        return not ends

    def say(self, sequence, everything=False):
        """Report text that was not reported yet; a character that is still incomplete waits for its other bytes."""
        if not self.on_text:
            return
        ids = list(itertools.takewhile(lambda item: isinstance(item, int), reversed(sequence.new)))[::-1]
        text = self.tokenizer.decode(ids)
        if len(text) > sequence.said and (everything or not text.endswith("\ufffd")):
            self.on_text(sequence.number, text[sequence.said :])
            sequence.said = len(text)

    # ---- image mode ----

    def noise(self, sequences):
        return torch.stack([torch.randn(self.shape, generator=sequence.generator) for sequence in sequences]).to(self.device)

    def begin_image(self, p):
        sequence = self.sequences[p]
        self.say(sequence, everything=True)
        sequence.step, sequence.said = 0, 0
        self.x[p] = self.noise([sequence])[0]
        if self.on_step:
            self.on_step(sequence.number, 0, self.x[p])

    def image_step(self):
        """One denoising step for each sequence in image mode; for those that have made them all, the call that leaves the clean
        picture's keys and values."""
        places = self.places(drawing=True)
        if not places:
            return
        step = np.array([self.sequences[p].step for p in places])
        t, going_on = self.timesteps[step], step < self.steps
        branches = self.branches if going_on.any() else 1  # a clean picture needs no guidance
        cache_rows = self.cache_rows(places, branches)
        starts = [(self.sequences[p].position, 2)[branch] for p in places for branch in range(branches)]  # 2: after <BOS> <BOI>
        positions, mask = self.reserve(cache_rows, starts, self.n_patches)
        if self.compiled and len(cache_rows) < self.cache.k.shape[1]:
            self.cache.rows = self.cache.row_index[:, 0]  # a slice would be compiled in, and every other one compiled again
        x_t = self.x[places].repeat_interleave(branches, 0)
        prediction = self.denoise(x_t, torch.tensor(t, device=self.device).repeat_interleave(branches), positions, mask)
        if branches == 2:
            prediction = guide(prediction[0::2], prediction[1::2], self.guidance_scale)
        if going_on.any():
            going, step, t = [p for p, on in zip(places, going_on) if on], step[going_on], t[going_on]
            noise = self.noise([self.sequences[p] for p in going]) if self.noisy else None
            t_before = np.where(step > 0, self.timesteps[step - 1], 0)
            self.x[going], self.x_0[going] = self.trained.ddpm.step(
                self.sampler, prediction[going_on], self.x[going], t, self.timesteps[step + 1], noise, self.eta, t_before, self.x_0[going]
            )
        for p in places:
            self.advance(p)

    def advance(self, p):
        """Note that a sequence has made a denoising step, or left its clean picture behind."""
        sequence = self.sequences[p]
        sequence.step += 1
        if sequence.step > self.steps:
            sequence.position += self.n_patches
            sequence.step, sequence.after_image = None, True
            return
        if self.on_step:
            self.on_step(sequence.number, sequence.step, self.x[p])
        if sequence.step == self.steps:
            sequence.new.append(self.x[p].clone())
            if sequence.tokens_left <= 0 or sequence.position + self.n_patches >= self.limit:  # nothing follows that could see it
                self.finish(p)

    def denoise(self, *inputs):
        if self.compiled:
            try:
                return compiled_denoise()(self.model, self.cache, *inputs)
            except Exception as error:  # of many kinds: no C++ compiler, no Triton, a GPU that it does not know
                warnings.warn(f"going on without torch.compile ({type(error).__name__})", stacklevel=2)
                self.compiled = False
        return denoise(self.model, self.cache, *inputs)


class CodeEngine(Engine):
    """The same for a discrete model. A step of a sequence in image mode samples one code, with guidance on the logits: it runs the token
    before it, first <BOI>. After the last, one more call leaves that code's keys and values behind."""

    def __init__(self, trained, n_places, *args, code_temperature, code_top_p, **options):
        super().__init__(trained, n_places, *args, **options)
        self.code_temperature, self.code_top_p = code_temperature, code_top_p
        self.x = torch.zeros(n_places, self.n_patches, dtype=torch.long, device=self.device)  # the codes

    def embed_prompts(self, batch):
        if len(batch.images):
            with torch.autocast(self.device.type, enabled=False):
                batch = fill_codes(batch, self.tokenizer.vocab_size + self.trained.vae.codes(batch.images))
        return self.model.embedding(batch.tokens)

    def noise(self, sequences):
        """What images begin with: the commonest code everywhere. Only who watches them come about sees it."""
        return self.trained.vae.codebook.counts.argmax().expand(len(sequences), self.n_patches)

    def image_step(self):
        places = self.places(drawing=True)
        if not places:
            return
        step = torch.tensor([self.sequences[p].step for p in places], device=self.device)
        starts = [(self.sequences[p].position, 2)[branch] + self.sequences[p].step - 1 for p in places for branch in range(self.branches)]
        tokens = torch.where(step > 0, self.tokenizer.vocab_size + self.x[places, step - 1], self.tokenizer.boi)
        h = self.run(self.model.embedding(tokens.repeat_interleave(self.branches))[:, None], self.cache_rows(places, self.branches), starts)
        logits = self.model.head(h[:, 0]).float()[:, self.tokenizer.vocab_size :]
        if self.branches == 2:
            logits = guide(logits[0::2], logits[1::2], self.guidance_scale)
        going_on = [n for n, p in enumerate(places) if self.sequences[p].step < self.steps]
        if going_on:
            going = [places[n] for n in going_on]
            u = torch.stack([torch.rand((), generator=self.sequences[p].generator) for p in going]).to(self.device)
            self.x[going, step[going_on]] = pick_tokens(logits[going_on], torch.full_like(u, self.code_temperature), u, top_p=self.code_top_p)
        for p in places:
            self.advance(p)


def denoise(model, cache, x, t, positions, mask):
    """What the model predicts for the images x (N, C, H, W) at timesteps t (N,), given what is in the cache -> (N, C, H, W)."""
    h, skips = model.patches.encode(x, t)
    return model.patches.decode(model.trunk(h, positions, mask, cache), skips).float()


@cache
def compiled_denoise():
    """One compilation for all numbers of cache rows and lengths of prefixes, which are symbols in it: sequences end and prefixes
    differ, and with static shapes each pair of numbers would be compiled anew."""
    return torch.compile(denoise, dynamic=True)


def pick_tokens(logits, temperature, u, top_k=0, top_p=1.0):
    """Sample a token from each row of logits (R, vocab): temperature (R,), 0 = the likeliest; u (R,), uniform in [0, 1), decides.

    top_k: only among the k likeliest, 0 = all; top_p: only among the likeliest that together have at least this probability
    (Holtzman et al. 2020), after top_k.
    """
    greedy = logits.argmax(-1)
    logits = logits / torch.where(temperature == 0, 1, temperature)[:, None]
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        descending = probabilities.sort(descending=True).values
        likelier = descending.cumsum(-1) - descending  # the probability of all those before
        least = descending.masked_fill(likelier >= top_p, torch.inf).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    cumulative = probabilities.cumsum(-1)
    # 1 - u lies in (0, 1]: so the first token to reach it has a probability above 0, and there always is one.
    drawn = torch.searchsorted(cumulative, (1 - u)[:, None] * cumulative[:, -1:])[:, 0]
    return torch.where(temperature == 0, greedy, drawn)


@torch.inference_mode()
def generate(trained, documents, seeds=None, *, draw=True, steps=None, sampler=None, eta=0.0, guidance_scale=None, temperature=None,
             top_k=0, top_p=1.0, code_temperature=None, code_top_p=None, max_tokens=256, max_images=1, max_batch=64, on_text=None, on_step=None):  # fmt: skip
    """Continue documents, each a list of strings and PIL images ([] = from nothing) -> list of documents, prompts included.

    seeds: one per document (default 0, 1, ...); a document's output depends on its own seed and prompt only
    draw: a document that ends in text goes on with an image at once; False lets the model decide when to draw
    steps, sampler, guidance_scale: of the denoising; default: as in the training run. eta: of DDIM, 0 = no added noise
    temperature: 0 = greedy; default: 0 after a prompt, 1 from nothing. top_k, top_p: as in `pick_tokens`
    code_temperature, code_top_p: of the images of a discrete model, whose steps are its codes; default: as in the training run
    max_tokens, max_images: at most so many new ones per document, which also ends where the trained sequences do
    max_batch: documents in work at a time; as one ends, the next takes its place
    on_text(number, piece) is called as text is sampled, on_step(number, steps done, x_t) as an image begins and after each step,
        which overwrites that x_t (C, H, W), or its codes
    Raises ValueError for an empty prompt, one too long for the sequences that the model was trained on, or an argument of another kind or out
    of range.
    """
    config, c, device = trained.config, trained.model.config, next(trained.model.parameters()).device
    kind, options = Engine, dict(steps=steps, sampler=sampler, guidance_scale=guidance_scale)
    if c.images == "discrete":
        kind, options = CodeEngine, options | dict(steps=c.n_patches, code_temperature=code_temperature, code_top_p=code_top_p)
    options = {name: config[name] if value is None else value for name, value in options.items()}
    check_numbers(options["guidance_scale"], top_p, code_top_p, max_batch, temperature=temperature, code_temperature=code_temperature,
                  top_k=top_k, max_tokens=max_tokens, max_images=max_images)  # fmt: skip
    options |= dict(eta=eta, top_k=top_k, top_p=top_p, on_text=on_text, on_step=on_step)
    sequences = to_sequences(documents, seeds, trained, draw, temperature, max_tokens, max_images)
    waiting = deque(sequence for sequence in sequences if sequence.tokens_left > 0 or sequence.step == 0)
    cache_length = max((sequence.position + max_tokens + max(1, max_images) * (c.n_patches + 2) for sequence in waiting), default=0)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        engine = kind(trained, min(max_batch, max(1, len(waiting))), min(cache_length, config["data"]["seq_len"]), max_images * len(waiting), **options)
        while waiting or any(engine.sequences):
            for _ in range(TEXT_CALLS):
                engine.admit(waiting)
                engine.text_step()
            engine.image_step()
    return [document + to_document(sequence.new, trained) for document, sequence in zip(documents, sequences)]


def check_numbers(guidance_scale, top_p, code_top_p, max_batch, **not_negative):
    """Raises ValueError if one of these arguments of `generate` is out of range. None, which stands for a default, is not."""
    for name, value, least in (*((name, value, 0) for name, value in not_negative.items()), ("max_batch", max_batch, 1)):
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be at least {least}, and finite")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite")
    for name, value in (("top_p", top_p), ("code_top_p", code_top_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")


def to_sequences(documents, seeds, trained, draw, temperature, max_tokens, max_images):
    """The Sequence of each document, with `generate`'s arguments. Raises ValueError for a document that it cannot continue."""
    if not isinstance(documents, (list, tuple)) or not all(isinstance(document, list) for document in documents):
        raise ValueError('documents must be lists of strings and PIL images in a list, as in [["a red circle"], [image, "make it blue"], []]')
    seeds, sequences = list(range(len(documents)) if seeds is None else seeds), []
    if len(seeds) != len(documents):
        raise ValueError(f"there are {len(seeds)} seeds for {len(documents)} documents; give one for each")
    seq_len, n_patches = trained.config["data"]["seq_len"], trained.model.config.n_patches
    for document, seed in zip(documents, seeds):
        prompt = to_segments(document, trained, draw)
        drawing, position = bool(prompt) and prompt[-1] == [trained.tokenizer.boi], document_length(prompt, n_patches)
        if drawing and max_images < 1:
            raise ValueError("max_images is 0, but a document that ends in text is drawn at once; draw=False (--free) lets the model go on with text")
        limit = seq_len - (n_patches + 1 if drawing else 0)
        if position > limit:
            raise ValueError(f"the prompt takes {position} positions; at most {limit} fit the model's sequences of {seq_len}")
        generator, temper = torch.Generator().manual_seed(seed), (0.0 if document else 1.0) if temperature is None else temperature
        sequences.append(Sequence(len(sequences), prompt, generator, temper, max_tokens, max_images - drawing, position, step=0 if drawing else None))
    return sequences


def to_segments(document, trained, draw):
    """A list of strings and PIL images -> the segments of a data.Documents document, pictures as clean conditioning."""
    size, segments = trained.config["data"]["image_size"], []
    for part in document:
        if isinstance(part, str):
            if not part.strip():
                raise ValueError("the prompt is empty; say what to draw, or leave it out to let the model start by itself")
            segments.append(trained.tokenizer.encode(part))
        elif isinstance(part, Image.Image):
            pixels = fit_image(part, size)
            segments.append(Picture(lambda pixels=pixels: pixels, 0))
        else:
            raise ValueError(f"a document is of strings and PIL images, and here has a {type(part).__name__}; of an array, Image.fromarray makes an image")
    if draw and document and isinstance(document[-1], str):
        segments.append([trained.tokenizer.boi])
    return segments


def to_picture(latents, trained):
    """Latents (C, H, W), or the codes (n_patches,) of a discrete model -> PIL image."""
    if trained.model.config.images == "discrete":
        pixels = trained.vae.decode_codes(latents.view(1, *2 * [trained.model.config.latent_size]))[0]
    else:
        pixels = trained.vae.decode(latents[None])[0]
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy())


def to_document(generated, trained):
    """Ids and latents (or codes) -> strings and PIL images."""
    document, ids = [], []
    for item in [*generated, None]:
        if isinstance(item, int):
            ids.append(item)
            continue
        if ids:
            document.append(trained.tokenizer.decode(ids))
            ids = []
        if item is not None:
            document.append(to_picture(item, trained))
    return document


# ---- What people see ------------------------------------------------------------------------------------------------


def captioned(document):
    """The pictures of a document, each with the text right before it, if there is any: (PIL image, str)."""
    return [(part, before if isinstance(before, str) else "") for before, part in zip(["", *document], document) if not isinstance(part, str)]


def contact_sheet(images, captions, columns=None, side=128):
    """PIL images in a grid, each with its caption under it -> PIL image."""
    root = math.sqrt(len(images))
    columns = columns or min(range(math.ceil(root), math.ceil(1.5 * root) + 1), key=lambda n: -len(images) % n)  # as few empty places as can be
    font, gap, line = ImageFont.load_default(size=12), 10, 15

    def wrap(caption):
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = lines + [word] if lines[-1] and font.getlength(longer) > side else lines[:-1] + [longer]
        return lines

    texts = [wrap(caption) for caption in captions]
    height = side + 6 + line * max(map(len, texts))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (image, text) in enumerate(zip(images, texts)):
        x, y = gap + n % columns * (side + gap), gap + n // columns * (height + gap)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(205, 205, 205))
        for k, words in enumerate(text):
            draw.text((x, y + side + 4 + k * line), words, fill=(40, 40, 40), font=font)
    return sheet


def html_page(documents, given):
    """Documents as one self-contained HTML page -> str. given: how many parts of each were the prompt's (shown in grey)."""
    parts = []
    for document, n in zip(documents, given):
        parts.append("<article>")
        for i, part in enumerate(document):
            kind = "given" if i < n else "new"
            if isinstance(part, str):
                parts.append(f'<p class="{kind}">{html.escape(part.strip())}</p>')
                continue
            file = io.BytesIO()
            part.save(file, "PNG")
            parts.append(f'<img class="{kind}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="">')
        parts.append("</article>")
    style = ("body { font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 2em auto; padding: 0 1em } .given { color: #888 } "
             "article { border-bottom: 1px solid #ddd; padding: 1em 0 } img { width: 256px; max-width: 100%; image-rendering: pixelated }")  # fmt: skip
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Transfusion</title><style>{style}</style><body>{"".join(parts)}</body></html>\n'


def save_film(path, films, captions, trained, columns=None, frames=40):
    """The denoising as an animated GIF of contact sheets. films: for each picture, its latents x_t from noise to the end; or its codes."""
    steps = len(films[0]) - 1
    shown = sorted({round(n * steps / min(frames, steps)) for n in range(min(frames, steps) + 1)})
    sheets = [contact_sheet([to_picture(film[n], trained) for film in films], captions, columns) for n in shown]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=[80] * (len(sheets) - 1) + [2000], loop=0)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and which names the option nearest to a mistyped one."""

    def error(self, message):
        sys.exit(f"error: {message.removeprefix('argument ')}; --help lists the options")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option.lstrip("-") for option in self._option_string_actions]
            close = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), known, n=1, cutoff=0.6)
            sys.exit(f"error: unknown option {unknown[0]}; " + (f"did you mean --{close[0]}?" if close else "--help lists the options"))
        return found


def report_errors(work, stopped=""):
    """Run `work()`; turn what a person can mend into one sentence and a non-zero exit code, and Ctrl-C into 130 and the sentence `stopped`.
    Under torchrun the first process of a node speaks for all."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        work()
    except KeyboardInterrupt:
        if first and stopped:
            print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if not first:
            time.sleep(5)  # what all processes find wrong, the first says, and torchrun then ends the others
        sys.exit(f"error: {error}")


def pick_device(name):
    """The torch device of a --device option; auto = the best there is. Raises ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name):
        raise ValueError(f"--device {name}: " + ("torch sees none here; use --device auto" if name in available else "it must be auto, cpu, cuda or mps"))
    return torch.device(name)


def check_folder(path, option):
    """To be asked before long work. Raises ValueError, naming the option, unless the folder can be made, or is there, and be written to."""
    try:
        new = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
        Path(path).mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path, os.W_OK) else "no permission"
        for folder in new:  # until there is something to write
            folder.rmdir()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{option}: {path} is not a folder") from None
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"{option}: {path} cannot be written to ({reason})")


def newest_checkpoint():
    """The checkpoint under out/ that was written last. Raises ValueError if there is none."""
    found = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError("no checkpoint under out/; train one first: python train.py --config small")
    print(f"with {found[-1]}, the newest under out/", file=sys.stderr)
    return found[-1]


def read_prompts(path):
    """The lines of a text file, without the empty ones. Raises ValueError, naming the file."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text") from None
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one a line")
    return prompts


class Terminal:
    """What is seen while documents are written: a bar for the denoising and, of a single document, its text. Keeps the films."""

    def __init__(self, steps, keep, prefix=None):
        self.steps, self.keep, self.films, self.bar = steps, keep, {}, None
        self.prefix = prefix  # printed before the first text; None: no text is

    def on_text(self, number, piece):
        if self.prefix is not None:
            print(self.prefix + piece, end="", flush=True)
            self.prefix = ""

    def on_step(self, number, step, x_t):
        films = self.films.setdefault(number, [])
        if step == 0:
            films.append([])
            self.on_text(number, "\n")  # the bar takes the next line
            if self.bar is None:
                self.bar = tqdm(desc="denoise", total=self.steps, leave=False)
            else:
                self.bar.total += self.steps
        self.bar.update(step > 0)
        if self.keep:
            films[-1].append(x_t.clone())


def main(argv=None):
    """The command line."""
    parser = Parser(description="Sample from a checkpoint of train.py.", allow_abbrev=False)
    parser.add_argument("--ckpt", help="checkpoint or a run's folder (default: the newest under out/)")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--image", help="picture to caption (or, with --prompt, what precedes the prompt: an instruction)")
    parser.add_argument("--free", action="store_true", help="let the model decide when to draw, instead of drawing each prompt at once")
    parser.add_argument("--num", type=int, help="samples per prompt (default 4; 1 for captions; 8 without a prompt)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample of each prompt (default 0); the next ones count on")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's); a discrete model has none")
    parser.add_argument("--sampler", choices=SAMPLERS, help="(default: the preset's)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise that ddim adds, 0 to 1 (default 0)")
    parser.add_argument("--guidance_scale", type=float, help="1 = none (default: the preset's)")
    parser.add_argument("--temperature", type=float, help="of the text; 0 = greedy (default: 0 after a prompt, else 1)")
    parser.add_argument("--top_k", type=int, default=0, help="sample text among the k likeliest tokens; 0 = all")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample text among the likeliest tokens that together have this probability")
    parser.add_argument("--code_temperature", type=float, help="of the image codes of a discrete model (default: the preset's)")
    parser.add_argument("--code_top_p", type=float, help="sample image codes among the likeliest that together have this probability (default: the preset's)")
    parser.add_argument("--max_tokens", type=int, default=64, help="at most so much new text per document (default 64)")
    parser.add_argument("--max_images", type=int, help="at most so many new pictures per document (default 1; 0 for captions)")
    parser.add_argument("--max_batch", type=int, default=64, help="documents in work at a time (default 64)")
    parser.add_argument("--out", default="out/samples", help="folder for the pictures (default out/samples)")
    parser.add_argument("--export", metavar="FOLDER", help="write the model there as safetensors and JSON, and stop; --ckpt FOLDER reads it back")
    parser.add_argument("--gif", action="store_true", help="also write the denoising as film.gif")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    ckpt = args.ckpt or newest_checkpoint()
    if not args.export:
        check_folder(args.out, "--out")
    texts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    trained = load(ckpt, pick_device(args.device))
    if args.export:
        export(trained, args.export)
        return print(f"wrote {args.export}: config.json, model.safetensors, vae.safetensors")
    image = [Image.fromarray(load_image(args.image, trained.config["data"]["image_size"]))] if args.image else []
    prompts = [[*image, text] for text in texts] or [image]
    num = (4 if texts else 1 if image else 8) if args.num is None else args.num
    if num < 1:
        raise ValueError(f"--num is {num}; it must be at least 1")
    documents = [prompt for prompt in prompts for _ in range(num)]
    seeds = [args.seed + n for _ in prompts for n in range(num)]
    drawing = bool(texts) and not args.free
    discrete, n_patches = trained.model.config.images == "discrete", trained.model.config.n_patches
    if discrete and args.steps is not None:
        raise ValueError(f"--steps is {args.steps}, but a discrete model has no denoising steps: it samples an image's {n_patches} codes one by one")
    of_run = ["code_temperature", "code_top_p", "guidance_scale"] if discrete else ["steps", "sampler", "guidance_scale"]
    settings = {name: trained.config[name] if getattr(args, name) is None else getattr(args, name) for name in of_run}
    settings |= {name: getattr(args, name) for name in ("eta", "top_k", "top_p")}
    settings["temperature"] = (0.0 if texts or image else 1.0) if args.temperature is None else args.temperature
    settings["max_images"] = max_images = (0 if image and not texts else 1) if args.max_images is None else args.max_images
    settings["max_tokens"] = 0 if drawing and max_images == 1 else args.max_tokens
    prefix = " ".join(["0:", *texts, ""]) if len(documents) == 1 else None
    terminal = Terminal(n_patches if discrete else settings["steps"], args.gif, prefix)
    results = generate(
        trained, documents, seeds, **settings, draw=drawing, max_batch=args.max_batch, on_text=terminal.on_text, on_step=terminal.on_step
    )
    if terminal.bar:
        terminal.bar.close()
    settings |= {"free": args.free} | ({"image": Path(args.image).name} if args.image else {})
    notes = ", ".join(f"{name} {value}" for name, value in settings.items())
    show(trained, results, documents, Path(args.out), terminal, [f"checkpoint {ckpt}, seed {seed}, {notes}" for seed in seeds])


def show(trained, results, documents, out, terminal, settings):
    """Print the documents' text, and write their pictures and what gathers them to the folder `out`. A picture's PNG holds the
    prompt, the whole document's text and the settings. What an earlier run left there and this one does not write is named."""
    pictures, captions, numbers = [], [], set()
    before = {path.name for path in out.glob("*") if re.fullmatch(r"\d{3,}(_\d+)?\.png|sheet\.png|film\.gif|page\.html", path.name)}
    for n, (document, prompt) in enumerate(zip(results, documents)):
        text = " ".join(part.strip() for part in document if isinstance(part, str)) or "(no text)"
        new = captioned(document)[len(captioned(prompt)) :]
        numbers.add(len(new))
        paths = [out / (f"{n:03d}_{k}.png" if k else f"{n:03d}.png") for k in range(len(new))]
        print(("" if terminal.prefix == "" else f"{n}: {text}") + "".join(f"  [{path}]" for path in paths))
        for (picture, caption), path in zip(new, paths):
            out.mkdir(parents=True, exist_ok=True)
            notes = PngInfo()
            for key, value in (("prompt", " ".join(part for part in prompt if isinstance(part, str))), ("text", text), ("settings", settings[n])):
                notes.add_text(key, value)
            picture.save(path, pnginfo=notes)
            before.discard(path.name)
            pictures.append(picture)
            captions.append(caption or text)
    columns = max(numbers) if len(numbers) == 1 < max(numbers) else None  # a row for each story
    if len(pictures) > 1:
        contact_sheet(pictures, captions, columns).save(out / "sheet.png")
        before.discard("sheet.png")
        print(f"all of them: {out / 'sheet.png'}")
    if pictures and terminal.keep:
        save_film(out / "film.gif", [film for n in sorted(terminal.films) for film in terminal.films[n]], captions, trained, columns)
        before.discard("film.gif")
        print(f"how they came about: {out / 'film.gif'}")
    if pictures and any(len(document) > 2 or len(document) - len(prompt) > 1 for document, prompt in zip(results, documents)):
        (out / "page.html").write_text(html_page(results, [len(prompt) for prompt in documents]), encoding="utf-8")
        before.discard("page.html")
        print(f"text and pictures in their order: {out / 'page.html'}")
    if before:
        print(f"{out} still has {len(before)} files of an earlier run: {', '.join(sorted(before)[:5])}{', ...' * (len(before) > 5)}")


if __name__ == "__main__":
    report_errors(main)
