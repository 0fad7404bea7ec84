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

import copy
import itertools
import math
import operator
import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import torch
from PIL import Image
from torch import nn

from attention_mask import transfusion_mask
from data import ImageSegment, collate, document_length
from diffusion import guide, needs_noise
from extras.cli import NO_MEMORY, RANGES, RULE
from extras.machine import has_bf16
from extras.pairs import fit_image
from extras.parallel import sent
from extras.text import read_prompt

# Tokens for each sequence in text mode between two denoising steps; see tests/bench.py sampling.
TEXT_CALLS = 4
COMPILE_FROM = {"cuda": 10_000}  # denoising steps that repay a minute of compilation, by device


class KVCache:
    """Keys and values of the positions decoded so far; position p of a document is in slot p.

    `at` says which rows the next call concerns, where its tokens stand and how many slots are visible.
    Writing a slot again replaces it: so an image being denoised moves from x_t to x_{t-1} in its place.
    """

    def __init__(self, config, rows, length, device="cpu", dtype=torch.float32):
        shape = rows, config.kv_heads, length, config.head_dim
        made = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * config.n_layers)]
        self.layers = list(zip(made[::2], made[1::2]))  # keys and values

    def at(self, rows, row_index, positions, visible):
        """rows: R ints, row_index the same (R,) on the device; positions (R, n) being written now.

        visible: attention spans slots 0..visible-1.
        """
        rows, self.row_index = list(rows), row_index[:, None]
        self.positions, self.visible = positions, visible
        # Evenly spaced rows are looked at where they lie; others are copied in every layer of every call.
        evenly = slice(rows[0], rows[-1] + 1, rows[1] - rows[0] if len(rows) > 1 else 1)
        is_even = list(range(len(self.layers[0][0]))[evenly]) == rows
        self.rows = evenly if is_even else row_index
        return self

    def update(self, layer, *now):
        """Write this call's keys and values (R, H, n, d), return all visible ones (R, H, visible, d)."""
        for kept, new in zip(self.layers[layer], now):
            kept[self.row_index, :, self.positions] = new.transpose(1, 2).to(kept.dtype)
        seen = self.rows, slice(None), slice(self.visible)
        return [kept[seen].to(new.dtype) for kept, new in zip(self.layers[layer], now)]


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
    token: int | None  # the last one, which may be yet to be run; None = none but the prompt's
    step: int | None = None  # denoising steps done; None = in text mode
    new: list = field(default_factory=list)  # ids and latents, in order
    said: int = 0  # characters of the current text that were reported
    place: int = 0  # where it stands in the engine's batch, and in the cache
    x: torch.Tensor | None = None  # the image x_t
    x_0: torch.Tensor | None = None  # the last step's estimate of the clean image


class Engine:
    """The sequences in their places, and the three calls that move them on: prompts, tokens, denoising steps.

    With guidance a place has two rows of the cache, of which the second is the guidance branch's.
    """

    IMAGES = "this model denoises its images"  # the reason why it has no other settings of images

    @staticmethod
    def defaults(trained):
        """The settings of images, those of the training run."""
        return vars(trained.sampling) | {"eta": 0.0}

    @staticmethod
    def count_steps(trained, settings):
        """How many steps an image takes."""
        return settings["steps"]

    @staticmethod
    def to_image(latents, trained):
        """Latents (C, H, W) -> PIL image."""
        return to_pil(trained.vae.decode(latents[None])[0])

    def __init__(self, trained, n_places, cache_length, n_images, options):
        self.trained, self.model, self.tokenizer = trained, trained.model, trained.tokenizer
        self.options, self.config = options, self.model.config
        self.device = self.model.embedding.weight.device
        self.n_patches, self.limit = self.config.n_patches, trained.data.seq_len
        self.causal = self.config.image_attention == "causal"
        self.sequences = [None] * n_places  # None: the place is free
        self.branches, self.compiled = branches_of(options), False  # cache rows of each place
        self.prepare_images(n_images)
        dtype = torch.bfloat16 if draws_in_bf16(self.device) else torch.float32
        # More than one row and an unused slot: a compiled step takes the numbers 1 and "all" for others.
        rows = max(self.branches * n_places, 1 + self.compiled)
        length = max(cache_length, 2 + self.n_patches) + self.compiled
        self.cache = KVCache(self.config, rows, length, self.device, dtype)
        if self.branches == 2:
            h = self.model.embedding(self.tensor([[self.tokenizer.bos, self.tokenizer.boi]] * n_places))
            causal = self.tensor([[True, False], [True, True]])
            self.run(h, range(1, 2 * n_places, 2), [0] * n_places, causal)

    def prepare_images(self, n_images):
        """What image mode needs; at most so many images are to come."""
        c, self.steps = self.config, self.options.steps
        self.noisy = needs_noise(self.options.sampler, self.options.eta)
        visited = self.trained.ddpm.sampling_timesteps(self.steps)
        # The schedule lies on the device, so that a step waits for nothing. (MPS has no float64.)
        place = "cpu" if self.device.type == "mps" else self.device
        # Before the first is none; the last: clean.
        self.timesteps = torch.tensor([0, *visited, 0], device=place)
        self.ddpm = copy.copy(self.trained.ddpm)
        self.ddpm.alphas_cumprod = self.ddpm.alphas_cumprod.to(place)
        self.shape = c.latent_channels, c.latent_size, c.latent_size
        self.compiled = n_images * self.steps >= COMPILE_FROM.get(self.device.type, math.inf)

    def tensor(self, values):
        """Values on the device."""
        return sent(torch.as_tensor(values), self.device)

    def in_mode(self, drawing):
        """The sequences in image mode, or those in text mode."""
        return [s for s in self.sequences if s and (s.step is not None) == drawing]

    def slots(self, sequences, branches=1):
        """The cache rows of sequences and of their guidance branches, and the next position in each."""
        rows = [self.branches * s.place + branch for s in sequences for branch in range(branches)]
        starts = [2 if branch else s.position for s in sequences for branch in range(branches)]
        return rows, starts

    def reserve(self, rows, starts, n, masked=False):
        """Point the cache at n new positions of these rows -> the positions (R, n), and a mask or None.

        The mask hides what other rows alone have reached, and what comes later in an image read causally.
        masked: make one even if it hides nothing.
        """
        row_index, first = self.tensor([list(rows), starts])
        positions = first[:, None] + torch.arange(n, device=self.device)
        visible = max(starts) + n
        self.cache.at(rows, row_index, positions, visible)
        if min(starts) == max(starts) and not (self.causal and n > 1) and not masked:
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
        new = []
        for place, taken in enumerate(self.sequences):
            if waiting and not taken:
                new.append(waiting.popleft())
                new[-1].place, self.sequences[place] = place, new[-1]
        if not new:
            return
        lengths, rows = [s.position for s in new], [[s.prompt] for s in new]
        batch = collate(rows, self.tokenizer, max(lengths), self.n_patches).to(self.device)
        mask = transfusion_mask(batch.image_id, causal=self.causal)  # nothing looks at padding: it comes last
        h = self.run(self.embed_prompts(batch), self.slots(new)[0], [0] * len(new), mask)
        self.go_on(new, h[torch.arange(len(new), device=self.device), self.tensor(lengths) - 1])

    def embed_prompts(self, batch):
        """A Batch of prompts -> what the trunk takes (R, S, dim); images are clean."""
        if not len(batch.images):
            return self.model.embedding(batch.tokens)
        with torch.autocast(self.device.type, enabled=False):  # few at a time: 256x256 takes 0.1 GB each
            few = max(1, 2**19 // batch.images[0, 0].numel())
            x_0 = torch.cat([self.trained.vae.encode(images) for images in batch.images.split(few)])
        t = torch.zeros(len(x_0), dtype=torch.long, device=self.device)
        return self.model.embed(batch.tokens, batch.image_id, x_0, t)[0]

    # ---- Text mode ----

    def text_step(self):
        """Run the token of each sequence in text mode."""
        sequences = self.in_mode(drawing=False)
        if sequences:
            tokens = self.tensor([[s.token] for s in sequences])
            h = self.run(self.model.embedding(tokens), *self.slots(sequences))
            for sequence in sequences:
                sequence.position += 1
            self.go_on(sequences, h[:, 0])

    def go_on(self, sequences, h):
        """Begin an image where the last token is <BOI>, and sample the next token elsewhere. h: (R, dim)."""
        t, writing = self.tokenizer, [s.token != self.tokenizer.boi for s in sequences]
        for sequence in sequences:
            if sequence.token == t.boi:
                self.begin_image(sequence)
        if not any(writing):
            return
        sequences = list(itertools.compress(sequences, writing))
        h = h[self.tensor([n for n, writes in enumerate(writing) if writes])]
        tokens = self.sample_tokens(sequences, self.model.head(h).float())
        for sequence, token in zip(sequences, tokens):
            sequence.token = token
            if token not in (t.eos, t.boi):
                sequence.new.append(token)
                sequence.tokens_left -= 1
                self.say(sequence)
            used_up = sequence.position >= self.limit or (sequence.tokens_left <= 0 and token != t.boi)
            if token == t.eos or used_up:
                self.finish(sequence)

    def sample_tokens(self, sequences, logits):
        """The next token of each: logits (R, vocab_size). <BOI> only if an image is left, and fits."""
        t, last = self.tokenizer, self.limit - self.n_patches - 1  # position from which an image fits
        for never in (t.bos, t.eoi, t.pad, slice(t.vocab_size, None)):  # the last: codes, if it has them
            logits[:, never] = -torch.inf
        full = [s.images_left <= 0 or s.position > last for s in sequences]
        logits[:, t.boi].masked_fill_(self.tensor(full), -torch.inf)
        u = [float(torch.rand((), generator=s.generator)) if s.temperature > 0 else 0.0 for s in sequences]
        temperature, u = self.tensor([[s.temperature for s in sequences], u])
        return pick_tokens(logits, temperature, u, self.options.top_k, self.options.top_p).tolist()

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
        return self.tensor(torch.stack([torch.randn(self.shape, generator=s.generator) for s in sequences]))

    def begin_image(self, sequence):
        """Put a sequence in image mode."""
        self.say(sequence, everything=True)
        sequence.step, sequence.said = 0, 0
        sequence.images_left -= 1
        sequence.x = sequence.x_0 = self.noise([sequence])[0]
        self.options.on_step(sequence.number, sequence.step, sequence.x)

    def image_step(self):
        """One denoising step for each sequence in image mode, or the call that shows it its clean image."""
        sequences = sorted(self.in_mode(drawing=True), key=lambda s: s.step == self.steps)
        going = [s for s in sequences if s.step < self.steps]  # the first of them
        if sequences:
            prediction = self.predict(sequences, self.branches if going else 1)
        if going:
            self.move(going, prediction[: len(going)])
        for sequence in sequences:
            sequence.step += 1
            if sequence.step > self.steps:
                sequence.position += self.n_patches
                sequence.step, sequence.token = None, self.tokenizer.eoi
                continue
            self.options.on_step(sequence.number, sequence.step, sequence.x)
            if sequence.step == self.steps:
                sequence.new.append(sequence.x)
                if sequence.tokens_left <= 0 or sequence.position + self.n_patches >= self.limit:
                    self.finish(sequence)  # nothing follows that could see it

    def predict(self, sequences, branches):
        """What the model predicts for the images, with guidance if there are two branches -> (R, C, H, W)."""
        rows, starts = self.slots(sequences, branches)
        positions, mask = self.reserve(rows, starts, self.n_patches, masked=self.compiled)
        x_t = torch.stack([s.x for s in sequences]).repeat_interleave(branches, 0)
        t = self.timesteps[self.steps_of(sequences) + 1].to(self.device).repeat_interleave(branches)
        inputs = self.model, self.cache, x_t, t, positions, mask
        try:
            prediction = (compiled_denoise() if self.compiled else denoise)(*inputs)
        except Exception as error:  # of many kinds: no C++ compiler, no Triton, an unknown GPU
            if not self.compiled or NO_MEMORY.search(str(error)):
                raise
            warnings.warn(f"going on without torch.compile ({type(error).__name__})", stacklevel=2)
            self.compiled = False
            return self.predict(sequences, branches)
        return self.guided(prediction) if branches == 2 else prediction

    def steps_of(self, sequences):
        """How many denoising steps each has done (R,)."""
        return sent(torch.tensor([s.step for s in sequences]), self.timesteps.device)

    def guided(self, prediction):
        """Of the sequences and their guidance branches in turn (2 R, ...) -> guided (R, ...)."""
        return guide(prediction[0::2], prediction[1::2], self.options.guidance_scale)

    def move(self, sequences, prediction):
        """One step of the sampler for each of these images."""
        steps = self.steps_of(sequences)
        t_before, t, s = (self.timesteps[steps + k] for k in range(3))
        x_t, x_0 = torch.stack([s.x for s in sequences]), torch.stack([s.x_0 for s in sequences])
        noise = self.noise(sequences) if self.noisy else None
        how = self.options.sampler, prediction, x_t, t, s, noise, self.options.eta
        x_s, x_0 = self.ddpm.step(*how, t_before, x_0)
        for n, sequence in enumerate(sequences):
            sequence.x, sequence.x_0 = x_s[n], x_0[n]


def denoise(model, cache, x, t, positions, mask):
    """What the model predicts for x (R, C, H, W) at timesteps t (R,), given the cache -> (R, C, H, W)."""
    h, kept = model.patches.encode(x, t)
    return model.patches.decode(model.trunk(h, positions, mask, cache.update), kept).float()


@cache
def compiled_denoise(**options):
    """denoise with one compilation for all numbers of rows and lengths, which are symbols in it.

    options: of torch.compile. What else would be compiled anew is kept from it: one row is run twice, there
    always is a mask, and rows are always looked up by their numbers.
    """
    from torch._dynamo import maybe_mark_dynamic

    @torch.compile(**options)
    def step(model, cache, x, t, positions, mask):
        cache.visible = mask.shape[-1]  # a symbol, as the number itself would not be
        return denoise(model, cache, x, t, positions, mask)

    def call(model, cache, *inputs):
        rows = len(inputs[0])
        if rows == 1:
            cache.row_index, *inputs = (part.repeat_interleave(2, 0) for part in (cache.row_index, *inputs))
        cache.positions, cache.rows = inputs[2], cache.row_index[:, 0]
        for part in (*inputs, cache.row_index, cache.rows):
            maybe_mark_dynamic(part, 0)
        maybe_mark_dynamic(inputs[3], 3)
        for part in itertools.chain(*cache.layers):
            maybe_mark_dynamic(part, (0, 2))
        return step(model, cache, *inputs)[:rows]

    return call


def pick_tokens(logits, temperature, u, top_k=0, top_p=1.0):
    """Sample a token from each row of logits (R, vocab_size); u (R,), uniform, decides.

    temperature (R,): 0 = the likeliest. top_k: only among the k likeliest, 0 = all. top_p: then only among
    the likeliest that together have at least this probability (Holtzman et al. 2020).
    """
    if logits.isnan().any():
        raise FloatingPointError("the next token came out as NaN: broken weights, or too high an --lr")
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

OPTIONS = dict(draw=True)  # a document that ends in text goes on with an image; False lets the model decide
OPTIONS |= dict(temperature=None)  # 0 = greedy; None = 0 after a prompt, 1 from nothing
OPTIONS |= dict(top_k=0)  # sample text among the k likeliest tokens; 0 = all
OPTIONS |= dict(top_p=1.0)  # and among the likeliest that together have this probability
OPTIONS |= dict(max_tokens=256)  # new ones a document, at most; it ends where trained sequences do, too
OPTIONS |= dict(max_images=1)  # new ones a document, at most
OPTIONS |= dict(max_batch=64)  # documents in work at a time; as one ends, the next takes its place
OPTIONS |= dict(on_text=None)  # on_text(number, piece) is called as text is sampled
OPTIONS |= dict(on_step=lambda *_: None)  # on_step(number, steps done, x_t): at 0 steps, and at each
RULES = RULE | dict.fromkeys(("temperature", "top_k", "max_tokens", "max_images"), "0 or above")
RULES |= {"max_batch": "above 0", "top_p": "above 0 and at most 1"}


def branches_of(options):
    """Cache rows of a document: two where images are drawn with guidance."""
    return 2 if options.max_images and options.guidance_scale != 1.0 else 1


def draws_in_bf16(device):
    """Are matrix products in bfloat16 when this device samples?"""
    return device.type == "cuda" and has_bf16(device)


def bf16_copy(model):
    """A copy with matrices and convolutions in bfloat16, as autocast would cast them in every call.

    All else is shared.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    memo = {id(part): part for part in itertools.chain(model.parameters(), model.buffers())}
    for p in itertools.chain(*(layer.parameters(recurse=False) for layer in layers)):
        memo[id(p)] = nn.Parameter(p.to(torch.bfloat16), requires_grad=False)
    return copy.deepcopy(model, memo)


def places_that_fit(config, length, branches, device):
    """For how many documents half of the free memory holds the cache; at least one."""
    if device.type != "cuda":
        return math.inf
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    slot = 2 * config.n_layers * config.kv_heads * config.head_dim * (2 if draws_in_bf16(device) else 4)
    return max(1, free // (2 * slot * length * branches))


@torch.no_grad()
def generate(trained, documents, seeds=None, engine=Engine, **given):
    """Continue documents, each a list of strings and PIL images ([] = from nothing), prompts included.

    seeds: whole numbers, one a document (default 0, 1, ...); these and the prompts alone decide
    engine: the class that does it; given: see OPTIONS, and for images `engine.defaults`
    Raises ValueError for a prompt that is empty or too long, or an option out of range.
    """
    options = OPTIONS | engine.defaults(trained)
    for name in given.keys() - options.keys():
        names = ", ".join(engine.defaults(trained))
        raise ValueError(f"{name} is {given[name]}, but {engine.IMAGES}; it has the settings {names}")
    options = SimpleNamespace(**options | given)
    for name, value in vars(options).items():
        if name in RULES and value is not None and not RANGES[RULES[name]](value):
            raise ValueError(f"{name} is {value}; it must be {RULES[name]}")
    if not isinstance(documents, list) or not all(isinstance(document, list) for document in documents):
        raise ValueError("documents must be lists of strings and PIL images in a list, as [['a cat']]")
    seeds = range(len(documents)) if seeds is None else seeds
    try:
        seeds = [operator.index(seed) % 2**64 for seed in seeds]  # as torch takes negative ones
    except TypeError:
        raise ValueError(f"seeds is {seeds!r}; give a whole number for each document") from None
    if len(seeds) != len(documents):
        raise ValueError(f"there are {len(seeds)} seeds for {len(documents)} documents; give one for each")
    numbered = enumerate(zip(documents, seeds))
    sequences = [to_sequence(n, document, seed, trained, options) for n, (document, seed) in numbered]
    waiting = deque(s for s in sequences if s.tokens_left > 0 or s.token is not None)
    config, device = trained.model.config, trained.model.embedding.weight.device
    bf16 = draws_in_bf16(device)
    if bf16:
        trained = copy.copy(trained)
        trained.model = bf16_copy(trained.model)
    more = options.max_tokens + options.max_images * (config.n_patches + 2)
    length = min(trained.data.seq_len, max((s.position + more for s in waiting), default=0))
    fitting = places_that_fit(config, length + config.n_patches + 2, branches_of(options), device)
    n_places = min(options.max_batch, max(1, len(waiting)), fitting)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        work = engine(trained, n_places, length, options.max_images * len(waiting), options)
        while waiting or any(work.sequences):
            for _ in range(TEXT_CALLS):
                work.text_step()
                work.admit(waiting)
            work.image_step()
    return [document + to_document(s.new, trained, engine) for document, s in zip(documents, sequences)]


def to_sequence(number, document, seed, trained, options):
    """The Sequence of a document. Raises ValueError if it cannot be continued."""
    segments, tokenizer, n_patches = [], trained.tokenizer, trained.model.config.n_patches
    for part in document:
        if isinstance(part, Image.Image):
            pixels = fit_image(part, trained.data.image_size)
            segments.append(ImageSegment(lambda pixels=pixels: pixels, 0))  # clean: conditioning
        elif not isinstance(part, str):
            found = f"here has a {type(part).__name__}; of an array, Image.fromarray makes an image"
            raise ValueError(f"a document is of strings and PIL images, and {found}")
        elif not (text := read_prompt(part, trained.tokenizer)):
            advice = "say what to draw, or leave it out to let the model start by itself"
            raise ValueError(f"the prompt is empty; {advice}")
        else:
            segments.append(tokenizer.encode(text))
    drawing = bool(options.draw and document and isinstance(document[-1], str))
    limit = trained.data.seq_len
    if drawing:
        segments.append([tokenizer.boi])
        limit -= n_patches + 1
        if options.max_images < 1:
            advice = "draw=False (--free) lets the model go on with text"
            raise ValueError(f"max_images is 0, but a document that ends in text is drawn at once; {advice}")
    position = document_length(segments, n_patches)
    if position > limit:
        most = f"at most {limit} fit the model's sequences of {trained.data.seq_len}"
        raise ValueError(f"the prompt takes {position} positions; {most}")
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if document else 1.0
    generator = torch.Generator().manual_seed(seed)
    left, token = (options.max_tokens, options.max_images), tokenizer.boi if drawing else None
    return Sequence(number, segments, generator, temperature, *left, position, token)


def to_document(items, trained, engine):
    """Ids and latents -> strings and PIL images."""
    document = []
    for is_text, run in itertools.groupby(items, lambda item: isinstance(item, int)):
        texts = [trained.tokenizer.decode(list(run))] if is_text else []
        document += texts or [engine.to_image(item, trained) for item in run]
    return document


def to_pil(pixels):
    """Pixels (3, H, W) in -1..1 -> PIL image. Raises FloatingPointError if there are NaNs among them."""
    if not pixels.isfinite().all():
        raise FloatingPointError("an image came out as NaN: broken weights, or too much --guidance_scale")
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy())
