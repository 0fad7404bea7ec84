"""The engine: `sample.generate_one` for many documents at once, with a KV cache.

A sequence is a document being decoded. It is in text mode until it samples <BOI>. It is then in image mode
for all its denoising steps, and for one more call at t = 0, which leaves the clean image in the cache. Then
it is in text mode again, beginning with an inserted <EOI>. It ends with <EOS>, or when its tokens, images
or positions are used up, and gives its place to one that waits.

A round makes TEXT_CALLS calls, each a token for every sequence in text mode, then one denoising call, a
step for every sequence in image mode, from its own t. So none waits for another's whole text or image. Each
has its own cache row, position and random generator: its neighbours change nothing.

A denoising step runs the patches of the image alone, and those of its guidance branch (<BOS> <BOI> patches)
with them: what came before is in the cache. A mask is needed only to hide unused slots of shorter prefixes.
"""

import itertools
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image

from attention_mask import transfusion_mask
from data import Picture, clean_text, collate, document_length
from diffusion import guide, needs_noise
from extras.cli import RANGES, RULE
from extras.pairs import fit_image

TEXT_CALLS = (
    4  # tokens for each sequence in text mode between two denoising steps; see tests/bench.py sampling
)
COMPILE_FROM = 10_000  # denoising steps, on CUDA, that repay a minute of compilation


class KVCache:
    """Keys and values of the positions decoded so far; position p of a document is in slot p.

    `at` says which rows the next call concerns, where its tokens stand and how many slots are visible.
    Writing a slot again replaces it: so an image being denoised moves from x_t to x_{t-1} in its place.
    """

    def __init__(self, config, rows, length, device="cpu", dtype=torch.float32):
        shape = config.n_layers, rows, config.kv_heads, length, config.head_dim
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)

    def at(self, rows, positions, visible):
        """rows: R ints; positions (R, n) being written now; visible: attention spans slots 0..visible-1."""
        rows = [int(row) for row in rows]
        self.row_index = torch.tensor(rows, device=self.k.device)[:, None]
        self.positions, self.visible = positions, visible
        # Evenly spaced rows are looked at where they lie; others are copied in every layer of every call.
        evenly = range(rows[0], rows[-1] + 1, rows[1] - rows[0] if len(rows) > 1 else 1)
        is_even = list(evenly) == rows
        self.rows = slice(evenly.start, evenly.stop, evenly.step) if is_even else self.row_index[:, 0]
        return self

    def update(self, layer, k, v):
        """Write this call's keys and values (R, H, n, d), return all visible ones (R, H, visible, d)."""
        self.k[layer, self.row_index, :, self.positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer, self.row_index, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)
        seen = layer, self.rows, slice(None), slice(self.visible)
        return self.k[seen].to(k.dtype), self.v[seen].to(v.dtype)


@dataclass
class Options:
    """What `generate` takes besides documents, seeds and the settings of images."""

    draw: bool = True  # a document that ends in text goes on with an image; False lets the model decide
    temperature: float | None = None  # 0 = greedy; None = 0 after a prompt, 1 from nothing
    top_k: int = 0  # sample text among the k likeliest tokens; 0 = all
    top_p: float = 1.0  # and among the likeliest that together have this probability
    max_tokens: int = 256  # at most so many new ones a document; it ends where trained sequences do, too
    max_images: int = 1  # at most so many new ones a document
    max_batch: int = 64  # documents in work at a time; as one ends, the next takes its place
    on_text: Callable | None = None  # on_text(number, piece) is called as text is sampled
    on_step: Callable | None = None  # on_step(number, steps done, x_t), as an image begins and at each step


@dataclass
class Sequence:
    """One document being decoded, or waiting for that."""

    number: int  # of the document
    prompt: list  # its segments, as data.collate takes them
    generator: torch.Generator  # on the CPU, so that a seed gives the same numbers on every device
    temperature: float
    tokens_left: int
    images_left: int
    position: int  # of the next token or patch, in the document and in the cache
    step: int | None = None  # denoising steps done; None = in text mode
    after_image: bool = False  # <EOI> comes next
    new: list = field(default_factory=list)  # ids and latents, in order
    said: int = 0  # characters of the current text that were reported
    place: int = 0  # where it stands in the engine's batch, and in the cache
    logits: torch.Tensor | None = None  # of the next token
    x: torch.Tensor | None = None  # the image x_t
    x_0: torch.Tensor | None = None  # the last step's estimate of the clean image


class Engine:
    """The sequences in their places, and the three calls that move them on: prompts, tokens, denoising steps.

    With guidance a place has two rows of the cache, of which the second is the guidance branch's.
    """

    SETTINGS = ("steps", "sampler", "guidance_scale", "eta")  # of images
    IMAGES = "this model denoises its images"  # the reason why it has no other settings

    @staticmethod
    def defaults(trained):
        """The settings of the training run."""
        return vars(trained.sampling) | {"eta": 0.0}

    @staticmethod
    def count_steps(trained, settings):
        """How many steps an image takes."""
        return settings["steps"]

    @staticmethod
    def to_image(latents, trained):
        """Latents (C, H, W) -> PIL image."""
        return to_pil(trained.vae.decode(latents[None])[0])

    def __init__(self, trained, n_places, cache_length, n_images, settings, options):
        self.trained, self.model, self.tokenizer = trained, trained.model, trained.tokenizer
        self.options, self.guidance_scale = options, settings["guidance_scale"]
        c, self.device = self.model.config, next(self.model.parameters()).device
        self.causal = c.image_attention == "causal"
        self.n_patches, self.limit = c.n_patches, trained.data.seq_len
        self.sequences = [None] * n_places  # None: the place is free
        self.branches = 1 if self.guidance_scale == 1.0 else 2  # cache rows of each place
        self.prepare_images(n_images, settings)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        length = max(cache_length, 2 + c.n_patches)
        self.cache = KVCache(c, self.branches * n_places, length, self.device, dtype)
        if self.branches == 2:
            h = self.model.embedding(self.tensor([[self.tokenizer.bos, self.tokenizer.boi]] * n_places))
            causal = self.tensor([[True, False], [True, True]])
            self.run(h, range(1, 2 * n_places, 2), [0] * n_places, causal)

    def prepare_images(self, n_images, settings):
        """What image mode needs."""
        c, self.steps = self.model.config, settings["steps"]
        self.sampler, self.eta = settings["sampler"], settings["eta"]
        self.noisy = needs_noise(self.sampler, self.eta)
        self.timesteps = torch.tensor(self.trained.ddpm.sampling_timesteps(self.steps) + [0])  # last: clean
        self.shape = c.latent_channels, c.latent_size, c.latent_size
        self.compiled = self.compiles(n_images * self.steps)

    def compiles(self, image_steps):
        """Does it pay to compile the denoising step?"""
        return self.device.type == "cuda" and image_steps >= COMPILE_FROM

    def tensor(self, values):
        return torch.tensor(values, device=self.device)

    def in_mode(self, drawing):
        """The sequences in image mode, or those in text mode."""
        return [s for s in self.sequences if s and (s.step is not None) == drawing]

    def slots(self, sequences, branches=1):
        """The cache rows of sequences and of their guidance branches, and the next position in each."""
        rows = [self.branches * s.place + branch for s in sequences for branch in range(branches)]
        starts = [2 if branch else s.position for s in sequences for branch in range(branches)]
        return rows, starts

    def reserve(self, rows, starts, n):
        """Point the cache at n new positions of these rows -> the positions (R, n), and a mask or None.

        The mask hides what other rows alone have reached, and what comes later in an image read causally.
        """
        positions = self.tensor(starts)[:, None] + torch.arange(n, device=self.device)
        visible = max(starts) + n
        self.cache.at(rows, positions, visible)
        if min(starts) == max(starts) and not (self.causal and n > 1):
            return positions, None
        ends = positions if self.causal else positions[:, -1:]  # how far each looks
        return positions, (torch.arange(visible, device=self.device) <= ends[:, :, None])[:, None]

    def run(self, h, rows, starts, mask=None):
        """New tokens h (R, n, dim) of these cache rows through the trunk. mask: instead of `reserve`'s."""
        positions, hiding = self.reserve(rows, starts, h.shape[1])
        return self.model.trunk(h, positions, hiding if mask is None else mask, self.cache.update)

    # ---- Prompts ----

    def admit(self, waiting):
        """Move waiting sequences to the free places, and run their prompts, padded on the right."""
        free = [place for place, s in enumerate(self.sequences) if s is None][: len(waiting)]
        if not free:
            return
        for place in free:
            self.sequences[place] = waiting.popleft()
            self.sequences[place].place = place
        new = [self.sequences[place] for place in free]
        lengths = self.tensor([s.position for s in new])
        rows = [[s.prompt] for s in new]
        batch = collate(rows, self.tokenizer, int(lengths.max()), self.n_patches).to(self.device)
        # Padding comes last, so nothing looks at it; prompts of text alone share one mask.
        mask = transfusion_mask(batch.image_id[: len(new) if len(batch.images) else 1], causal=self.causal)
        h = self.run(self.embed_prompts(batch), self.slots(new)[0], [0] * len(new), mask)
        h = h[torch.arange(len(new), device=self.device), lengths - 1]  # (R, dim)
        for sequence, logits in zip(new, self.model.head(h).float()):
            sequence.logits = logits
            if sequence.step == 0:
                self.begin_image(sequence)

    def embed_prompts(self, batch):
        """A Batch of prompts -> what the trunk takes (R, S, dim); images are clean."""
        x_0 = torch.zeros(0, *self.shape, device=self.device)
        if len(batch.images):
            with torch.autocast(self.device.type, enabled=False):
                x_0 = self.trained.vae.encode(batch.images)
        t = torch.zeros(len(x_0), dtype=torch.long, device=self.device)
        return self.model.embed(batch.tokens, batch.image_id, x_0, t)[0]

    # ---- Text mode ----

    def text_step(self):
        """One token for each sequence in text mode."""
        sequences = self.in_mode(drawing=False)
        tokens = self.sample_tokens(sequences) if sequences else []
        going_on = [(s, token) for s, token in zip(sequences, tokens) if self.accept(s, token)]
        if not going_on:
            return
        sequences, tokens = zip(*going_on)
        h = self.run(self.model.embedding(self.tensor(tokens)[:, None]), *self.slots(sequences))
        for sequence, token, logits in zip(sequences, tokens, self.model.head(h[:, 0]).float()):
            sequence.logits, sequence.after_image = logits, False
            sequence.position += 1
            if token == self.tokenizer.boi:
                sequence.images_left -= 1
                self.begin_image(sequence)

    def sample_tokens(self, sequences):
        """The next token of each. <EOI> is inserted; <BOI> only if an image is left, and fits."""
        t = self.tokenizer
        logits = torch.stack([s.logits for s in sequences])  # (R, vocab_size)
        logits[:, [t.bos, t.eoi, t.pad]] = -torch.inf
        logits[:, t.vocab_size :] = -torch.inf  # codes, if it has them
        last = self.limit - self.n_patches - 1  # position from which an image fits
        full = self.tensor([s.images_left <= 0 or s.position > last for s in sequences])
        logits[full, t.boi] = -torch.inf
        u = torch.zeros(len(sequences))
        for n, sequence in enumerate(sequences):
            if sequence.temperature > 0 and not sequence.after_image:
                u[n] = torch.rand((), generator=sequence.generator)
        temperature = self.tensor([s.temperature for s in sequences])
        among = self.options.top_k, self.options.top_p
        tokens = pick_tokens(logits, temperature, u.to(self.device), *among).tolist()
        return [t.eoi if s.after_image else token for s, token in zip(sequences, tokens)]

    def accept(self, sequence, token):
        """Note the new token of a sequence, and finish the sequence if that was its last -> does it go on?"""
        t = self.tokenizer
        if token not in (t.eos, t.boi, t.eoi):
            sequence.new.append(token)
            sequence.tokens_left -= 1
            self.say(sequence)
        used_up = sequence.position >= self.limit or (sequence.tokens_left <= 0 and token != t.boi)
        if token == t.eos or used_up:
            self.finish(sequence)
            return False
        return True

    def finish(self, sequence):
        """Free the place of a sequence."""
        self.say(sequence, everything=True)
        self.sequences[sequence.place] = None

    def say(self, sequence, everything=False):
        """Report text that was not reported yet; an incomplete character waits for its other bytes."""
        if not self.options.on_text:
            return
        ids = list(itertools.takewhile(lambda item: isinstance(item, int), reversed(sequence.new)))[::-1]
        text = self.tokenizer.decode(ids)
        if len(text) > sequence.said and (everything or not text.endswith("\ufffd")):
            self.options.on_text(sequence.number, text[sequence.said :])
            sequence.said = len(text)

    # ---- Image mode ----

    def noise(self, sequences):
        """Noise for each, from its own generator (R, C, H, W)."""
        noise = torch.stack([torch.randn(self.shape, generator=s.generator) for s in sequences])
        return noise.to(self.device)

    def begin_image(self, sequence):
        """Put a sequence in image mode."""
        self.say(sequence, everything=True)
        sequence.step, sequence.said = 0, 0
        sequence.x = sequence.x_0 = self.noise([sequence])[0]
        if self.options.on_step:
            self.options.on_step(sequence.number, 0, sequence.x)

    def image_step(self):
        """One denoising step for each sequence in image mode, or the call that shows it its clean image."""
        sequences = self.in_mode(drawing=True)
        if not sequences:
            return
        going = [n for n, s in enumerate(sequences) if s.step < self.steps]
        prediction = self.predict(sequences, self.branches if going else 1)
        if going:
            self.move([sequences[n] for n in going], prediction[going])
        for sequence in sequences:
            self.advance(sequence)

    def predict(self, sequences, branches):
        """What the model predicts for the images, with guidance if there are two branches -> (R, C, H, W)."""
        rows, starts = self.slots(sequences, branches)
        positions, mask = self.reserve(rows, starts, self.n_patches)
        if self.compiled and len(rows) < self.cache.k.shape[1]:
            self.cache.rows = self.cache.row_index[:, 0]  # every other slice would be compiled anew
        x_t = torch.stack([s.x for s in sequences]).repeat_interleave(branches, 0)
        t = self.timesteps[[s.step for s in sequences]].to(self.device).repeat_interleave(branches)
        inputs = self.model, self.cache, x_t, t, positions, mask
        if self.compiled:
            try:
                prediction = compiled_denoise()(*inputs)
            except Exception as error:  # of many kinds: no C++ compiler, no Triton, an unknown GPU
                warnings.warn(f"going on without torch.compile ({type(error).__name__})", stacklevel=2)
                self.compiled = False
        if not self.compiled:
            prediction = denoise(*inputs)
        return guide(prediction[0::2], prediction[1::2], self.guidance_scale) if branches == 2 else prediction

    def move(self, sequences, prediction):
        """One step of the sampler for each of these images."""
        step = torch.tensor([s.step for s in sequences])
        t, s = self.timesteps[step], self.timesteps[step + 1]
        t_before = torch.where(step > 0, self.timesteps[step - 1], 0)
        x_t = torch.stack([s.x for s in sequences])
        x_0 = torch.stack([s.x_0 for s in sequences])
        noise = self.noise(sequences) if self.noisy else None
        before = t_before, x_0
        x_s, x_0 = self.trained.ddpm.step(self.sampler, prediction, x_t, t, s, noise, self.eta, *before)
        for n, sequence in enumerate(sequences):
            sequence.x, sequence.x_0 = x_s[n], x_0[n]

    def advance(self, sequence):
        """Note that a sequence has made a step of its image, or was shown the whole."""
        sequence.step += 1
        if sequence.step > self.steps:
            sequence.position += self.n_patches
            sequence.step, sequence.after_image = None, True
            return
        if self.options.on_step:
            self.options.on_step(sequence.number, sequence.step, sequence.x)
        if sequence.step == self.steps:
            sequence.new.append(sequence.x)
            if sequence.tokens_left <= 0 or sequence.position + self.n_patches >= self.limit:
                self.finish(sequence)  # nothing follows that could see it


def denoise(model, cache, x, t, positions, mask):
    """What the model predicts for x (R, C, H, W) at timesteps t (R,), given the cache -> (R, C, H, W)."""
    h, kept = model.patches.encode(x, t)
    return model.patches.decode(model.trunk(h, positions, mask, cache.update), kept).float()


@cache
def compiled_denoise():
    """One compilation for all numbers of cache rows and lengths of prefixes, which are symbols in it."""
    return torch.compile(denoise, dynamic=True)


def pick_tokens(logits, temperature, u, top_k=0, top_p=1.0):
    """Sample a token from each row of logits (R, vocab_size); u (R,), uniform, decides.

    temperature (R,): 0 = the likeliest. top_k: only among the k likeliest, 0 = all. top_p: then only among
    the likeliest that together have at least this probability (Holtzman et al. 2020).
    """
    greedy = logits.argmax(-1)
    logits = logits / torch.where(temperature == 0, 1, temperature)[:, None]
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        descending = probabilities.sort(descending=True).values
        likelier = descending.cumsum(-1) - descending  # the probability of all those before
        least = descending.masked_fill(likelier >= top_p, torch.inf).amin(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    cumulative = probabilities.cumsum(-1)
    # 1 - u is in (0, 1]: the first token to reach it has a probability above 0, and there always is one.
    drawn = torch.searchsorted(cumulative, (1 - u)[:, None] * cumulative[:, -1:])[:, 0]
    return torch.where(temperature == 0, greedy, drawn)


# ---- From documents to documents -----------------------------------------------------------------

RULES = RULE | dict.fromkeys(("temperature", "top_k", "max_tokens", "max_images"), "0 or above")
RULES |= {"max_batch": "above 0", "top_p": "above 0 and at most 1"}


@torch.inference_mode()
def generate(trained, documents, seeds=None, engine=Engine, **options):
    """Continue documents, each a list of strings and PIL images ([] = from nothing), prompts included.

    seeds: one a document (default 0, 1, ...); what becomes of it depends on its own seed and prompt only
    engine: the class that does it; options: see `Options`, and for images `engine.SETTINGS`
    Raises ValueError for a prompt that is empty or too long, or an option out of range.
    """
    known = {name: options.pop(name) for name in vars(Options()) if name in options}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - set(engine.SETTINGS):
        names = ", ".join(engine.SETTINGS)
        raise ValueError(f"{name} is {given[name]}, but {engine.IMAGES}; it has the settings {names}")
    settings, options = engine.defaults(trained) | given, Options(**known)
    for name, value in (vars(options) | settings).items():
        if name in RULES and value is not None and not RANGES[RULES[name]](value):
            raise ValueError(f"{name} is {value}; it must be {RULES[name]}")
    sequences = to_sequences(documents, seeds, trained, options)
    waiting = deque(s for s in sequences if s.tokens_left > 0 or s.step == 0)
    n_places = min(options.max_batch, max(1, len(waiting)))
    more = options.max_tokens + max(1, options.max_images) * (trained.model.config.n_patches + 2)
    length = min(trained.data.seq_len, max((s.position + more for s in waiting), default=0))
    device = next(trained.model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        work = engine(trained, n_places, length, options.max_images * len(waiting), settings, options)
        while waiting or any(work.sequences):
            for _ in range(TEXT_CALLS):
                work.admit(waiting)
                work.text_step()
            work.image_step()
    return [document + to_document(s.new, trained, engine) for document, s in zip(documents, sequences)]


def to_sequences(documents, seeds, trained, options):
    """The Sequence of each document. Raises ValueError for a document that cannot be continued."""
    kinds = {type(document) for document in documents} if isinstance(documents, (list, tuple)) else {None}
    if kinds - {list}:
        raise ValueError("documents must be lists of strings and PIL images in a list, as [['a cat']]")
    seeds = list(range(len(documents)) if seeds is None else seeds)
    if len(seeds) != len(documents):
        raise ValueError(f"there are {len(seeds)} seeds for {len(documents)} documents; give one for each")
    sequences, n_patches = [], trained.model.config.n_patches
    for document, seed in zip(documents, seeds):
        prompt, drawing = to_segments(document, trained, options.draw)
        if drawing and options.max_images < 1:
            advice = "draw=False (--free) lets the model go on with text"
            raise ValueError(f"max_images is 0, but a document that ends in text is drawn at once; {advice}")
        position = document_length(prompt, n_patches)
        limit = trained.data.seq_len - (n_patches + 1 if drawing else 0)
        if position > limit:
            most = f"at most {limit} fit the model's sequences of {trained.data.seq_len}"
            raise ValueError(f"the prompt takes {position} positions; {most}")
        sequence = Sequence(
            number=len(sequences),
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            temperature=options.temperature,
            tokens_left=options.max_tokens,
            images_left=options.max_images - drawing,
            position=position,
            step=0 if drawing else None,
        )
        if options.temperature is None:
            sequence.temperature = 0.0 if document else 1.0
        sequences.append(sequence)
    return sequences


def to_segments(document, trained, draw):
    """A list of strings and PIL images -> its segments, images as clean conditioning; is an image next?"""
    segments = []
    for part in document:
        if isinstance(part, Image.Image):
            pixels = fit_image(part, trained.data.image_size)
            segments.append(Picture(lambda pixels=pixels: pixels, 0))
        elif not isinstance(part, str):
            found = f"here has a {type(part).__name__}; of an array, Image.fromarray makes an image"
            raise ValueError(f"a document is of strings and PIL images, and {found}")
        elif not (text := clean_text(part)):
            advice = "say what to draw, or leave it out to let the model start by itself"
            raise ValueError(f"the prompt is empty; {advice}")
        else:
            segments.append(trained.tokenizer.encode(text))
    drawing = bool(draw and document and isinstance(document[-1], str))
    if drawing:
        segments.append([trained.tokenizer.boi])
    return segments, drawing


def to_document(items, trained, engine):
    """Ids and latents -> strings and PIL images."""
    document = []
    for is_text, run in itertools.groupby(items, lambda item: isinstance(item, int)):
        if is_text:
            document.append(trained.tokenizer.decode(list(run)))
        else:
            document += [engine.to_image(item, trained) for item in run]
    return document


def to_pil(pixels):
    """Pixels (3, H, W) in -1..1 -> PIL image."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy())
