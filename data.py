"""The data: captioned pictures and text, as tokens, documents and batches (paper, section 3, "Data representation", and 4.1).

The paper's part:
    DataConfig  what the documents are made of
    Tokenizer   bytes, or byte-pair encoding learned from the captions; <BOS>, <EOS>, <BOI>, <EOI> and padding after its pieces
    Batch       what travels from here to the loss; every other file reads it by these names. `collate` makes it
    Documents   pairs in both orders, <BOS> caption <BOI> patches <EOI> <EOS> or <BOS> <BOI> patches <EOI> caption <EOS>; edits, stories, text
    Stream      documents packed into rows of a fixed length
    Loader      the batches of a stream, their pictures decoded ahead of need in other processes
    open_pairs, open_text and open_tokenizer open what a DataConfig names; `readable` gives pictures alone, for the VAE and the evaluation

Then the sources, of pairs (`pair(index)` -> caption and picture), of stories and of text (`ids(index)` -> tokens):
    Scenes      the built-in pictures: coloured shapes drawn with Pillow, and the captions that describe them exactly; SceneText
    Stories     scenes that change as instructions say: edits (section 4.5), and longer ones
    Pairs       your own pictures with captions: a folder, tars or COCO. With TextFiles, your own text, JSONTokenizer and Latents it
                comes last, and can be skipped

Everything is a function of (seed, index), so any position of the stream can be returned to, by any number of ranks.
"""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import struct
import sys
import tarfile
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

from attention_mask import PADDING, TEXT

NO_LOSS = -100  # a target that cross-entropy ignores


@dataclass
class DataConfig:
    """What the documents are made of. Raises ValueError on a value out of range."""

    data: str = ""  # a folder of pictures with .txt captions, tars or COCO captions, or several: a,b.tar:2,c.json (:2 = drawn twice as often); "" = the scenes
    text: str = ""  # .txt or .jsonl files, or folders of them, comma-separated; "" = sentences about scenes beside the scenes, none beside --data
    text_fraction: float = 0.5  # share of all positions that is in documents of text alone (section 4.1: text and image tokens 1 : 1)
    tokenizer: str = ""  # a tokenizer.json, read with the package tokenizers; "" = bytes and `merges`
    merges: int = 0  # at most so many pairs of tokens are merged, as the captions suggest; 0 = plain bytes
    grammar: str = "places"  # of the built-in scenes: "places", "relations" or "rich"
    documents: str = "pairs"  # of caption and picture; of the built-in scenes also "edits" (section 4.5) and "stories"
    image_size: int = 256  # pixels a side
    seq_len: int = 4096  # tokens a row; documents are packed into it
    caption_first: float = 0.8  # share of pairs whose caption precedes the picture (section 4.1)
    drop_caption: float = 0.1  # share of caption-first pairs, and of stories, without the caption: the unconditional branch of guidance
    image_first_max_t: int = 500  # noise limit where the picture precedes its caption (section 4.3); 1000 = none
    latents: str = ""  # folder that vae.py --encode wrote: read in the place of the pictures, for the VAE's encoder takes long at 256x256
    max_broken: float = 0.05  # training stops if more than this share of the pairs, pictures or texts cannot be used
    workers: int = 4  # processes that decode pictures, for each rank, but no more than there are cores; 0 = none but the training's own
    cache: str = ""  # folder for what is made once (tar indexes, tokenised text); "" = .transfusion beside the data, or else out/cache

    def __post_init__(self):
        for name in ("caption_first", "drop_caption", "text_fraction", "max_broken"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.seq_len < 1 or self.image_size < 1:
            raise ValueError(f"seq_len is {self.seq_len} and image_size {self.image_size}; both must be above 0")
        if self.merges < 0 or self.workers < 0:
            raise ValueError(f"merges is {self.merges} and workers {self.workers}; neither may be below 0")
        if self.grammar not in GRAMMARS:
            raise ValueError(f"grammar is {self.grammar!r}; it must be one of {', '.join(GRAMMARS)}")
        if self.documents not in ("pairs", *CHANGES):
            raise ValueError(f"documents is {self.documents!r}; it must be one of pairs, {', '.join(CHANGES)}")
        if self.documents != "pairs" and (self.data or not GRAMMARS[self.grammar].cells):
            needed = "for which the built-in scenes must tell places: leave --data out, and give --grammar places or rich"
            raise ValueError(f"documents is {self.documents!r}, {needed}")


# ---- Text as tokens -------------------------------------------------------------------------------------------------


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016): ids 0..255 are bytes, then one id per merge, then the five special tokens.
    Without merges it is a plain byte tokenizer, and with any it falls back to bytes."""

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.pieces = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.bos, self.eos, self.boi, self.eoi, self.pad = range(len(self.pieces), len(self.pieces) + 5)
        self.vocab_size = len(self.pieces) + 5
        self._encode_word = lru_cache(maxsize=100_000)(lambda word: self._merge(tuple(word.encode())))

    @classmethod
    def learn(cls, texts, merges):
        """The tokenizer of at most `merges` merges that `texts` suggest: the most frequent neighbours, first inside words,
        then across words (Liu et al. 2025), there only in a quarter of the texts or more, or in a tenth where one of the two never
        occurs without the other: "at the top left" becomes one token, and so a place is one decision. "red circle" must not,
        or no red square would share anything with it."""
        learned = []

        def grow(sequences, wanted):
            """Merge the most frequent wanted pair of neighbours, again and again. sequences: {ids: how often}."""
            while len(learned) < merges:
                pairs, single = Counter(), Counter()
                for ids, count in sequences.items():
                    for pair in zip(ids, ids[1:]):
                        pairs[pair] += count
                    for i in ids:
                        single[i] += count
                best = max(((n, pair) for pair, n in pairs.items() if wanted(n, single[pair[0]], single[pair[1]])), default=None)
                if best is None:
                    return
                merged = Counter()
                for ids, count in sequences.items():
                    merged[_replace(ids, best[1], 256 + len(learned))] += count
                sequences = merged
                learned.append(best[1])

        words = Counter(word for text in texts for word in re.findall(WORD, text))
        grow({tuple(word.encode()): count for word, count in words.items()}, lambda n, a, b: n > 1)
        inside = cls(learned)
        grow(Counter(tuple(inside.encode(text)) for text in texts), lambda n, a, b: n >= max(2, len(texts) / (10 if n == min(a, b) else 4)))
        return cls(learned)

    def _merge(self, ids):
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
            if pair not in self.rank:
                break
            ids = _replace(ids, pair, 256 + self.rank[pair])
        return ids

    def encode(self, text):
        """str -> list of ids, without special tokens. Any text can be encoded, and decodes to itself."""
        if not self.merges:
            return list(text.encode())
        words, ids = re.findall(WORD, text), []
        for i in range(0, len(words), 32):  # phrases are looked for in stretches of 32 words: merging takes quadratic time
            ids += self._merge(tuple(i for word in words[i : i + 32] for i in self._encode_word(word)))
        return ids

    def decode(self, ids):
        """Ids -> str; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids if i < len(self.pieces)).decode(errors="replace")

    def state(self):
        """What a checkpoint keeps of it: plain values, for `restore_tokenizer`."""
        return {"merges": self.merges}

    def __reduce__(self):  # how it travels to worker processes that are not forked
        return restore_tokenizer, (self.state(),)


WORD = re.compile(r"\s{0,64}\S{1,64}|\s{1,64}")  # a word with the space before it


def _replace(ids, pair, new):
    """The sequence with every occurrence of the pair replaced by one id."""
    out, i = [], 0
    while i < len(ids):
        if ids[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return tuple(out)


# ---- The batch ------------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """An image inside a document, loaded only when its batch is made."""

    load: Callable  # () -> uint8 (H, W, 3); raises ValueError if that cannot be done
    max_t: int  # the largest timestep it may be noised to; 0: it is shown clean, as conditioning, and has no loss
    instead: Callable | None = None  # () -> the document, no longer, that takes the place of this one if the picture is broken


class Cut(list):
    """The tokens of a text that goes on in another document: the end of its sequence is not its own, and <EOS> is no target there."""


def document_length(document, n_patches):
    """Positions that a document takes as input: <BOS>, its tokens, and <BOI> patches <EOI> for each picture."""
    return 1 + sum(n_patches + 2 if isinstance(segment, Picture) else len(segment) for segment in document)


@dataclass
class Batch:
    """B rows of S positions and the N images in them, in reading order."""

    tokens: torch.Tensor  # (B, S) int64: the input; at a patch or padding, the padding id, which nothing reads
    targets: torch.Tensor  # (B, S) int64: the next token, NO_LOSS where the language model has none
    image_id: torch.Tensor  # (B, S) int64: which of `images` a patch belongs to, -1 for text
    doc_id: torch.Tensor  # (B, S) int64: which document of its row a position belongs to, -1 for padding
    positions: torch.Tensor  # (B, S) int64: place within the document, for RoPE
    images: torch.Tensor  # (N, 3, H, W) float32 in -1..1; with cached latents (N, 2 C, h, w), the posterior's mean and log-variance;
    # empty once they have become noised latents beside the batch (train.Run.prepare) or tokens in it (`fill_codes`)
    max_t: torch.Tensor  # (N,) int64: the largest timestep of each image, 0 = clean conditioning without a loss

    def to(self, device):
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def to_pixels(images):
    """uint8 pictures (..., H, W, 3) -> float32 (..., 3, H, W) in -1..1, as the VAE takes them."""
    return torch.as_tensor(np.asarray(images)).movedim(-1, -3).float() / 127.5 - 1


def load_pictures(document, errors):
    """-> (document, its pictures' pixels); if one cannot be read, those of the document that takes its place."""
    while True:
        pictures = [segment for segment in document if isinstance(segment, Picture)]
        try:
            return document, [picture.load() for picture in pictures]
        except ValueError as error:
            if errors is None or not pictures[0].instead:
                raise
            errors.append(str(error))
            document = pictures[0].instead()


def collate(rows, tokenizer, seq_len, n_patches, errors=None):
    """Lay rows of documents out as a Batch. Of a document whose picture cannot be read, another takes the place, and the list
    `errors` says why; without such a list, ValueError is raised.

    A position's target is the next token of its document, <EOS> after the last. There is none where the input is <BOI>
    (footnote 8) or a patch; so <BOI> is a target, <EOI> is not (it is inserted, never sampled), and <EOI> as input
    predicts the text that follows it. A piece of a longer text (`Cut`) has none at its end.
    """
    shape = len(rows), seq_len
    tokens, targets = np.full(shape, tokenizer.pad), np.full(shape, NO_LOSS)
    image_id, doc_id, positions = np.full(shape, TEXT), np.full(shape, PADDING), np.zeros(shape, int)
    images, max_t = [], []
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            document, pixels = load_pictures(document, errors)
            ids, owner, pixels = [tokenizer.bos], [TEXT], iter(pixels)
            for segment in document:
                if isinstance(segment, Picture):
                    ids += [tokenizer.boi] + [tokenizer.pad] * n_patches + [tokenizer.eoi]
                    owner += [TEXT] + [len(images)] * n_patches + [TEXT]
                    images.append(next(pixels))
                    max_t.append(segment.max_t)
                else:
                    ids += segment
                    owner += [TEXT] * len(segment)
            here = slice(start, start + len(ids))
            ids, owner = np.array(ids), np.array(owner)
            has_loss = (ids != tokenizer.boi) & (owner == TEXT)
            tokens[b, here], image_id[b, here], doc_id[b, here] = ids, owner, d
            end = NO_LOSS if document and isinstance(document[-1], Cut) else tokenizer.eos
            targets[b, here] = np.where(has_loss, np.append(ids[1:], end), NO_LOSS)
            positions[b, here] = np.arange(len(ids))
            start += len(ids)
    images = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
    images = to_pixels(images) if images.dtype == np.uint8 else torch.from_numpy(images).float()
    return Batch(*map(torch.from_numpy, (tokens, targets, image_id, doc_id, positions)), images, torch.tensor(max_t, dtype=torch.long))


def fill_codes(batch, codes):
    """A Batch for a discrete model (Chameleon): images become tokens, each the target of the position before it, and <EOI> of the
    last; those that only condition (max_t 0) have no loss. codes: (N, n_patches) int64, ids of the shared vocabulary."""
    tokens = batch.tokens.masked_scatter(batch.image_id != TEXT, codes)
    # roll(-1, 1) shows a position its right neighbour. It wraps round, but column 0 is always <BOS> (or padding), no part of an image.
    image = torch.maximum(batch.image_id, batch.image_id.roll(-1, 1))  # whose patch the target is, or which <EOI> ends; -1 = text
    has_loss = F.pad(batch.max_t, (0, 1))[image] > 0  # -1 picks the last entry, the appended 0
    targets = torch.where(has_loss, tokens.roll(-1, 1), batch.targets)
    return replace(batch, tokens=tokens, targets=targets, images=batch.images[:0], max_t=batch.max_t[:0])


# ---- Documents ------------------------------------------------------------------------------------------------------


def mix(*numbers):
    """Integers to 64 well-mixed bits (splitmix64, Steele et al. 2014)."""
    x, word = 0, 2**64 - 1
    for n in numbers:
        x = ((x ^ n) + 0x9E3779B97F4A7C15) & word
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & word
        x ^= x >> 31
    return x


def shuffled(i, n, key):
    """Where number i comes in the shuffle of 0..n-1 that the integer `key` picks. It needs no table: a Feistel network permutes
    the numbers below the next power of 4, and is applied again to what falls outside (Black & Rogaway 2002)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & ((1 << half) - 1))
        i = left << half | right
        if i < n:
            return i


def interleave(index, weights, seed):
    """Which of several sources number `index` comes from, and its number there. Each source is used in proportion to its weight,
    at irregular intervals, and walked through in order 0, 1, 2, ... but for a shuffle of neighbours."""
    if len(weights) == 1:
        return 0, index
    block, i = divmod(index, 1024)
    index = 1024 * block + shuffled(i, 1024, mix(seed, 9, block))
    for which in range(len(weights) - 1):
        share = round(weights[which] / sum(weights[which:]) * 2**32)  # of those that the sources before have left
        before = index * share >> 32
        if (index + 1) * share >> 32 > before:
            return which, before
        index -= before
    return len(weights) - 1, index


class Documents:
    """document(index): a list of segments, each a list of token ids or a Picture. Pairs come in the paper's two orders; between
    them (or edits, or stories), text alone, so that it makes `text_fraction` of all positions (mean lengths are measured first).

    pairs: as Scenes or Pairs; for edits and stories, Stories. text: as SceneText or TextFiles, or None. n_patches: positions a picture takes, needed with text
    """

    def __init__(self, pairs, tokenizer, config, timesteps=1000, seed=0, text=None, n_patches=0):
        self.options = pairs, tokenizer, config, timesteps, seed, text, n_patches
        self.pairs, self.tokenizer, self.config, self.timesteps, self.seed, self.text = self.options[:6]
        self.n_pairs = len(pairs) if hasattr(pairs, "__len__") else None  # None: without end
        self._illustrated = {"pairs": self._pair, "edits": self._edit, "stories": self._story}[config.documents]
        self.weights = [1.0]  # of documents with pictures and of text, by their number
        if text:
            of_pictures, of_text = (np.mean([document_length(make(i), n_patches) for i in range(500)]) for make in (self._illustrated, self._text))
            self.weights = [(1 - config.text_fraction) / of_pictures, config.text_fraction / of_text]
        self._made = lru_cache(maxsize=1024)(self._make)  # the stream asks for a document's length, then for the document

    def __call__(self, index):
        return self._made(index)

    def __reduce__(self):
        return Documents, self.options

    def _make(self, index):
        is_text, number = interleave(index, self.weights, self.seed)
        return self._text(number) if is_text else self._illustrated(number)

    def _text(self, number):
        return [self.text.ids(number)]

    def _pair(self, number, attempt=0, room=None):
        """Pair `number`. Its picture may prove broken only after the row was packed: then a later pair, number + `attempt`, stands in, in
        the same order, and without its caption where that is longer than the first one's, of `room` tokens."""
        caption, load = self.pairs.pair(number + attempt)
        ids = self.tokenizer.encode(caption)
        order, drop = np.random.default_rng([self.seed, 7, number]).random(2)
        caption_first = order < self.config.caption_first
        dropped = caption_first and drop < self.config.drop_caption
        if dropped or (room is not None and len(ids) > room):
            ids = []
        room = len(ids) if room is None else room
        instead = (lambda: self._pair(number, attempt + 1, room)) if attempt < 100 else None
        picture = Picture(load, self.timesteps if caption_first else min(self.config.image_first_max_t, self.timesteps), instead)
        return [ids, picture] if caption_first else [picture, ids]

    def _edit(self, number):
        """<BOI> input <EOI> instruction <BOI> output <EOI> (section 4.5): the input is conditioning, clean and without a diffusion loss.
        Nothing is dropped: what is left open by a picture and an instruction is too little for guidance to sharpen."""
        (before, after), (instruction,) = self.pairs.example(number)
        return [Picture(before.render, 0), self.tokenizer.encode(instruction), Picture(after.render, self.timesteps)]

    def _story(self, number):
        """caption <BOI> picture <EOI> instruction <BOI> picture <EOI> ...: a picture that is sampled has finished ones before it. So one
        picture is picked: those before it are clean, without a diffusion loss, and from it on all are noised. The later ones are
        picked more often, for they must learn to look at pictures; the first has words alone, as in a pair. Those after it see a noised
        picture before them, as in the paper's training, which sampling never shows."""
        scenes, instructions = self.pairs.example(number)
        u, drop = np.random.default_rng([self.seed, 7, number]).random(2)
        picked = int(len(scenes) * u**0.5)  # of three pictures: 1, 3 and 5 times in 9
        texts = [self.tokenizer.encode(text) for text in ("" if drop < self.config.drop_caption else scenes[0].caption, *instructions)]
        limits = [self.timesteps if k >= picked else 0 for k in range(len(scenes))]
        return [part for ids, scene, max_t in zip(texts, scenes, limits) for part in (ids, Picture(scene.render, max_t))]

    def name(self, index):
        """What messages call document `index`."""
        is_text, number = interleave(index, self.weights, self.seed)
        return f"text {number}" if is_text else self.pairs.name(number)


# ---- Packing documents into rows ------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def say(message):
    """Print on stderr what somebody should know, once, whatever odd characters a file's name brings."""
    print("".join(c if c.isprintable() else "?" for c in message), file=sys.stderr, flush=True)


class Skipped:
    """Counts what is left out, each thing once, names it on stderr, and raises ValueError when it is more than a share `max_broken` of
    what was seen, or of 100. what: the plural of what is counted."""

    def __init__(self, what, max_broken):
        self.what, self.max_broken, self.seen, self.named = what, max_broken, 0, set()

    @property
    def skipped(self):
        """How many different things were left out."""
        return len(self.named)

    def count(self, seen, messages=()):
        """`seen` more things, of which those that `messages` name were left out."""
        self.seen, self.named = self.seen + seen, self.named | set(messages)
        for message in messages:
            say(f"skipped: {message}")
        if messages and self.skipped > self.max_broken * max(self.seen, 100):
            share = f"{self.skipped} of {self.seen} {self.what} had to be left out"
            raise ValueError(f"{share}, more than --max_broken {self.max_broken:g} allows; the last: {messages[-1]}")


class Stream:
    """Documents packed into rows of seq_len positions, `rows` rows a step. Row r is packed from documents r, r + rows, r + 2 rows,
    ..., and from nothing else: whichever rows are `mine`, all ranks together make the rows that one process would.

    Best fit with a look-ahead: a row takes its oldest waiting document, then the longest waiting ones that still fit.
    Packing looks at lengths only; pictures are loaded by `collate`. A document longer than a row is left out, and counted once,
    in however many epochs it comes.
    state: {row: [its next document, those that wait]} of the rows that are mine. The union of all ranks' states says where the
    whole stream stands, and can be given to any other set of ranks.
    """

    LOOK_AHEAD = 16  # documents that wait for each row

    def __init__(self, document, seq_len, rows, n_patches, mine=None):
        self.document, self.seq_len, self.rows, self.n_patches = document, seq_len, rows, n_patches
        self.mine = list(range(rows) if mine is None else mine)
        self.state = {r: [r, []] for r in self.mine}
        self.skipped = Skipped(f"documents (with --seq_len {seq_len})", document.config.max_broken)
        self.too_long = set()  # the names of what was left out
        self._lengths = {}  # of the waiting documents

    def load_state(self, state):
        """Go on from a state, which holds my rows and perhaps others. Raises ValueError if it is of a stream of other rows."""
        if not set(self.mine) <= set(state):
            raise ValueError(f"the stream was saved with {len(state)} rows a step and now has {self.rows}; give the --rows that it was started with")
        self.state = {r: state[r] for r in self.mine}

    def _length(self, i):
        if i not in self._lengths:
            self._lengths[i] = document_length(self.document(i), self.n_patches)
        return self._lengths[i]

    def numbers(self, r):
        """Pack the next row r: the numbers of its documents, in order."""
        (ahead, waiting), row, free = self.state[r], [], self.seq_len
        waiting = list(waiting)  # states that were handed out stay as they are
        while True:
            while len(waiting) < self.LOOK_AHEAD:
                n = self._length(ahead)
                if n <= self.seq_len:
                    waiting.append(ahead)
                    self.skipped.count(1)
                elif (name := self.document.name(ahead)) not in self.too_long:
                    self.too_long.add(name)
                    message = f"{name} takes {n} positions and seq_len is {self.seq_len}; raise --seq_len or shorten its caption"
                    self.skipped.count(1, [message])
                    if len(self.too_long) == self.document.n_pairs:
                        raise ValueError(f"all {self.document.n_pairs} pairs of a split are too long: {message}")
                ahead += self.rows
            fitting = [i for i in waiting if self._length(i) <= free]
            if not fitting:
                self.state[r] = [ahead, waiting]
                return row
            i = max(fitting, key=self._length) if row else fitting[0]
            waiting.remove(i)
            row.append(i)
            free -= self._lengths.pop(i)

    def __next__(self):
        """My rows of the next step: a list of lists of documents."""
        return [[self.document(i) for i in self.numbers(r)] for r in self.mine]


# ---- Loading --------------------------------------------------------------------------------------------------------


class Loader:
    """The batches of a stream, in order, `batch_rows` of its rows at a time (default: all of them, a whole step).

    workers: processes that load pictures ahead of need; 0 = they are loaded when asked for. Batches are the same either way
    state: of the stream, after the batches handed out so far; to go on from there, `stream.load_state` before the first `next`
    skipped: counts pictures that could not be read. Raises ValueError when they are too many, OSError if a worker dies.
    """

    def __init__(self, stream, tokenizer, workers=0, batch_rows=None):
        self.stream, self.tokenizer, self.workers, self.batch_rows = stream, tokenizer, workers, batch_rows or len(stream.mine)
        self.skipped = Skipped("pictures", stream.document.config.max_broken)
        self._batches, self._states = None, deque()  # the states after the batches that are on their way

    @property
    def state(self):
        """Where the stream stands for who has used all the batches handed out, and no more."""
        return dict(self.stream.state) if self._batches is None else self._state

    def __next__(self):
        """The next Batch."""
        if self._batches is None:
            self._state = self.state
            batches = DataLoader(BatchDataset(self.stream, self.tokenizer), batch_size=None, sampler=pack(self.stream, self.batch_rows, self._states),
                                 num_workers=min(self.workers, os.cpu_count() or 1), worker_init_fn=leave_signals, generator=torch.Generator())  # fmt: skip
            self._batches = iter(batches)
        try:
            batch, errors = next(self._batches)
        except (RuntimeError, EOFError, OSError) as error:
            raise OSError(f"a process that loads pictures has died ({error}); out of memory, perhaps: try fewer --workers") from None
        if isinstance(batch, Exception):
            raise batch
        self._state = self._states.popleft()
        self.skipped.count(len(batch.images) + len(errors), errors)
        return batch


def pack(stream, batch_rows, states):
    """The documents' numbers in the rows of each batch, for ever; `states` takes where the stream stands after it."""
    while True:
        for i in range(0, len(stream.mine), batch_rows):
            rows = [stream.numbers(r) for r in stream.mine[i : i + batch_rows]]
            states.append(dict(stream.state))
            yield rows


@dataclass
class BatchDataset:
    """What DataLoader's workers index: the documents' numbers, row by row, that `pack` gives -> their batch."""

    stream: Stream
    tokenizer: Tokenizer

    def __getitem__(self, rows):
        """Documents' numbers -> a Batch and what went wrong. What stops training is a value too: a worker would raise it with its traceback."""
        stream, errors = self.stream, []
        try:
            return collate([[stream.document(i) for i in row] for row in rows], self.tokenizer, stream.seq_len, stream.n_patches, errors), errors
        except (ValueError, OSError) as error:
            return error, errors


def leave_signals(worker):
    """In a worker: Ctrl-C is for the training process, which then ends its workers and says all that there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # of the thread that hands tensors over, when nobody takes them any more


# ---- Opening what a DataConfig names --------------------------------------------------------------------------------


def open_pairs(config, split="train", seed=0):
    """The source of pairs that a DataConfig names, cut to a split: Scenes, Stories, Pairs, or a Mixture. Raises ValueError, saying what is wrong."""
    if config.documents != "pairs":
        return Stories(config.grammar, config.image_size, split, seed, CHANGES[config.documents])
    if not config.data:
        return Scenes(config.grammar, config.image_size, split, seed)
    sources, weights = [], []
    for item in [config.data] if Path(config.data).exists() else config.data.split(","):
        path, colon, weight = item.rpartition(":")
        if not colon or not re.fullmatch(r"[0-9.]+", weight) or Path(item).exists():
            path, weight = item, 1
        try:
            weights.append(float(weight))
        except ValueError:
            raise ValueError(f"--data {item}: {weight!r} is no weight") from None
        if not path or weights[-1] <= 0:
            raise ValueError(f"--data {config.data}: wants paths with commas between them, each with a weight above 0 if any, as in a:2,b.tar")
        latents = str(Path(config.latents) / str(len(sources))) if config.latents else ""
        sources.append(Pairs(path, config.image_size, split, seed, config.max_broken, config.cache, latents))
    return Mixture(sources, weights, seed) if len(sources) > 1 else sources[0]


def open_text(config, tokenizer, split="train", seed=0):
    """The source of text alone that a DataConfig names, cut to a split: TextFiles, or SceneText beside the scenes; None = there is none."""
    if not config.text_fraction:
        return None
    if config.text:
        return TextFiles(config, tokenizer, split, seed)
    return None if config.data else SceneText(config, tokenizer, split, seed)


def restore_tokenizer(state):
    """The tokenizer whose `state()` a checkpoint holds."""
    return JSONTokenizer(state["json"]) if "json" in state else Tokenizer(state["merges"])


def open_tokenizer(config, pairs):
    """The tokenizer that a DataConfig names; merges are learned from the first 2000 captions. Raises ValueError, naming the file."""
    if not config.tokenizer:
        return Tokenizer.learn([pairs.pair(i)[0] for i in range(2000)], config.merges) if config.merges else Tokenizer()
    try:
        return JSONTokenizer(Path(config.tokenizer).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise ValueError(f"--tokenizer {config.tokenizer}: {reason}") from None


def fitting(pairs, n, tokenizer, seq_len, n_patches):
    """Numbers of the first n pairs of an epoch, fewer if there are fewer, whose first caption fits a row beside the picture: a
    longer one is not trained on, and cannot be drawn. Raises ValueError if there is none."""
    numbers = range(len(pairs)) if hasattr(pairs, "__len__") else itertools.count()
    taken = lambda i: document_length([tokenizer.encode(pairs.captions(i)[0])], 0) + n_patches + 2
    found = list(itertools.islice((i for i in numbers if taken(i) <= seq_len), n))
    if not found:
        raise ValueError(f"no caption is short enough for seq_len {seq_len}, of which a picture takes {n_patches + 2}; raise --seq_len")
    return found


def readable(pairs, numbers, n, skipped=None):
    """The first n of these pairs' numbers whose pictures can be read -> list of (number, uint8 pixels). skipped: counts the others,
    and stops if they are too many. Raises ValueError if n + 100 pictures cannot be read."""
    found, errors = [], []
    for number in numbers:
        if len(found) == n:
            break
        _, load = pairs.pair(number)
        try:
            found.append((number, load()))
        except ValueError as error:
            errors.append(str(error))
            if len(errors) >= n + 100:
                raise
    (skipped or Skipped("pictures", 1.0)).count(len(found) + len(errors), errors)
    return found


def fit_image(image, image_size):
    """A PIL image as uint8 (image_size, image_size, 3): upright, on white, centre-cropped and resized (section 4.1)."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of whose range nothing is known; save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS))


# ---- The built-in scenes --------------------------------------------------------------------------------------------


class Grammar(NamedTuple):
    """What may occur in a scene, and in its caption."""

    kinds: tuple  # of shape
    max_objects: int
    cells: int  # a side of the grid of places; 0: a relation is told, no places
    sizes: tuple = ("",)
    backgrounds: tuple = ("white",)


COLOURS = {"red": (226, 48, 56), "green": (52, 168, 83), "blue": (46, 92, 222), "yellow": (246, 190, 22),
           "purple": (150, 62, 186), "cyan": (38, 186, 212)}  # fmt: skip
BACKGROUNDS = {"white": (246, 245, 241), "pink": (250, 200, 206), "black": (26, 26, 32)}
GRAMMARS = {
    "places": Grammar(("circle", "square", "triangle", "cross"), max_objects=2, cells=2),
    "relations": Grammar(("circle", "square", "triangle", "cross"), max_objects=2, cells=0),
    "rich": Grammar(("circle", "square", "triangle", "cross", "diamond", "ring"), max_objects=4, cells=3, sizes=("small", "large"),
                    backgrounds=tuple(BACKGROUNDS)),
}  # fmt: skip
PLACES = {2: ("top left", "top right", "bottom left", "bottom right"),
          3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")}  # fmt: skip
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # direction from second to first
WIDTHS = {"": 0.375, "small": 0.16, "large": 0.26}
NEVER_SEEN = {("green", "triangle"), ("purple", "circle"), ("yellow", "square"), ("cyan", "cross")}  # in no training picture


@dataclass(frozen=True)
class Shape:
    """One object of a scene: what it is, where its centre is and how wide it is, both as fractions of the picture."""

    colour: str
    kind: str
    size: str = ""
    x: float = 0.5
    y: float = 0.5
    width: float = 0.375
    place: str = ""

    def __str__(self):
        words = f"a {self.size} {self.colour} {self.kind}".replace("  ", " ")
        return f"{words} at the {self.place}" if self.place else words


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn, with its caption. `relation` is that of the first object to the second, if it is told."""

    shapes: tuple
    image_size: int
    relation: str = ""
    background: str = "white"
    tell_background: bool = False

    @property
    def caption(self):
        """The sentence that describes this scene, e.g. `a red circle at the top left and a blue square at the bottom right`."""
        names = [str(shape) for shape in self.shapes]
        if self.relation:
            text = f"{names[0]} {self.relation} {names[1]}"
        else:
            text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return f"{text} on a {self.background} background" if self.tell_background else text

    def render(self):
        """Draw it: uint8 (image_size, image_size, 3)."""
        n = self.image_size
        pixels = np.empty((n, n, 3), np.float32)
        pixels[:] = BACKGROUNDS[self.background]
        for shape in self.shapes:
            alpha = sprite(shape.kind, round(shape.width * n))
            w = len(alpha)
            left, top = round(shape.x * n - w / 2), round(shape.y * n - w / 2)
            window = pixels[top : top + w, left : left + w]
            window += alpha[..., None] * (np.array(COLOURS[shape.colour], np.float32) - window)
        return (pixels + 0.5).astype(np.uint8)


@lru_cache(maxsize=1024)
def sprite(kind, width):
    """Coverage of a shape, antialiased: float32 (width, width) in 0..1. Its bounding box touches all four sides."""
    k = 8  # supersampling
    n = width * k
    canvas = Image.new("L", (n, n))
    draw = ImageDraw.Draw(canvas)
    if kind == "circle" or kind == "ring":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if kind == "ring":
            draw.ellipse((0.27 * n, 0.27 * n, 0.73 * n - 1, 0.73 * n - 1), fill=0)
    elif kind == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif kind == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    elif kind == "diamond":
        draw.polygon([(n / 2, 0), (n - 1, n / 2), (n / 2, n - 1), (0, n / 2)], fill=255)
    elif kind == "cross":
        draw.rectangle((0, 0.33 * n, n - 1, 0.67 * n), fill=255)
        draw.rectangle((0.33 * n, 0, 0.67 * n, n - 1), fill=255)
    else:
        raise ValueError(f"no shape is called {kind!r}")
    return np.asarray(canvas, np.float32).reshape(width, k, width, k).mean((1, 3)) / 255


@lru_cache(maxsize=None)
def held_out_combination(*pairs):
    """Is this combination of two objects, ((colour, kind), (colour, kind)), one of the 15 % never trained on? Order,
    places and wording play no part, and neither does any seed: the split is the same for every run and for the VAE."""
    name = "|".join(" ".join(pair) for pair in sorted(pairs))
    return int(sha256(name.encode()).hexdigest(), 16) % 100 < 15


def split_of(pairs):
    """Where a picture of these objects, (colour, kind) each, may occur: "train" (and "seen"), "held_out" or "never_seen"."""
    if any(pair in NEVER_SEEN for pair in pairs):
        return "never_seen"
    return "held_out" if any(held_out_combination(a, b) for a, b in itertools.combinations(pairs, 2)) else "train"


class Scenes:
    """The built-in captioned pictures, drawn on the fly: endless, and example(i) is always the same.

    split: "train"; "seen", other pictures of the same combinations; "held_out", two objects in a combination (in
    whichever places and wording) that training never shows; "never_seen", at least one object whose colour-shape pair
    training never shows. The VAE, too, is trained on "train" only.
    """

    SPLITS = ("train", "seen", "held_out", "never_seen")

    def __init__(self, grammar="places", image_size=32, split="train", seed=0):
        self.grammar, self.image_size, self.split, self.seed = grammar, image_size, split, seed
        self.kinds, self.max_objects, self.cells, self.sizes, self.backgrounds = GRAMMARS[grammar]
        self.pairs = list(itertools.product(COLOURS, self.kinds))

    def example(self, index):
        """The Scene number `index` of this split."""
        rng = np.random.default_rng([self.seed, self.SPLITS.index(self.split), index])
        while True:
            pairs = self._draw_pairs(rng)
            if split_of(pairs) == ("train" if self.split == "seen" else self.split):
                return self._arrange(pairs, rng)

    def _draw_pairs(self, rng):
        least = 2 if self.split == "held_out" or not self.cells else 1
        # Two objects in most pictures: a single one teaches neither binding nor counting.
        number = least if rng.random() < 0.2 else int(rng.integers(2, self.max_objects + 1))
        return [self.pairs[i] for i in rng.integers(len(self.pairs), size=number)]

    def _arrange(self, pairs, rng):
        background = self.backgrounds[rng.integers(len(self.backgrounds))]
        tell_background = len(self.backgrounds) > 1
        sizes = [self.sizes[i] for i in rng.integers(len(self.sizes), size=len(pairs))]
        related = not self.cells or (len(pairs) == 2 and self.grammar == "rich" and rng.random() < 0.5)
        if related:
            relation = list(RELATIONS)[rng.integers(4)]
            direction = np.array(RELATIONS[relation])
            centre = 0.5 + rng.uniform(-0.06, 0.06, 2)
            drift = rng.uniform(-0.12, 0.12) * direction[::-1]  # across the relation's axis
            centres = [centre + 0.24 * direction + drift, centre - 0.24 * direction - drift]
            places = ["", ""]
        else:
            relation = ""
            cells = rng.permutation(self.cells**2)[: len(pairs)]
            jitter = rng.uniform(-1, 1, (len(pairs), 2)) * (0.03 if self.cells == 2 else 0.02)
            centres = [(np.array([c % self.cells, c // self.cells]) + 0.5) / self.cells + j for c, j in zip(cells, jitter)]
            places = [PLACES[self.cells][c] for c in cells]
        shapes = [Shape(colour, kind, size, float(c[0]), float(c[1]), WIDTHS[size], place)
                  for (colour, kind), size, c, place in zip(pairs, sizes, centres, places)]  # fmt: skip
        return Scene(tuple(shapes), self.image_size, relation, background, tell_background)

    def pair(self, index):
        """(caption, function that draws the picture)."""
        scene = self.example(index)
        return scene.caption, scene.render

    def captions(self, index):
        """All that is written about picture number `index`."""
        return [self.example(index).caption]

    def name(self, index):
        """What messages call it."""
        return f"scene {index}"


class SceneText:
    """Text without pictures beside the scenes: one to twelve sentences, each about a scene of its own; the same splits.
    ids(i) is always the same list of at most seq_len - 1 tokens."""

    OPENINGS = ("There is", "I see", "The picture shows", "Here we have", "Somebody drew", "Then comes")

    def __init__(self, config, tokenizer, split="train", seed=0):
        self.scenes, self.tokenizer, self.max_length = Scenes(config.grammar, 0, split, seed), tokenizer, config.seq_len - 1

    def text(self, index):
        """Text number `index`."""
        rng = np.random.default_rng([self.scenes.seed, 8, index])
        captions = [self.scenes.example(2**40 + 12 * index + k).caption for k in range(rng.integers(1, 13))]  # far from the pictures' scenes
        return " ".join(f"{self.OPENINGS[rng.integers(len(self.OPENINGS))]} {caption}." for caption in captions)

    def ids(self, index):
        """Text number `index` as tokens."""
        return self.tokenizer.encode(self.text(index))[: self.max_length]


# ---- The built-in edits and stories ---------------------------------------------------------------------------------

CHANGES = {"edits": 1, "stories": 2}  # how often a scene changes in these documents


class Stories:
    """Scenes that change, one thing at a time, as an instruction says. example(i) is always the same.

    changes: how many; each is of another of KINDS. With one, a story is an edit: a scene, an instruction, the scene after it
    split: as of Scenes. No scene of a training story is held out or never seen; a held-out (or never-seen) story ends in such a
        scene, so that what an edit draws is one. Nothing is removed in held-out stories: one object alone is no combination.
        Training has TRAINED stories, over and over
    """

    KINDS = ("recolour", "move", "remove", "add")
    TRAINED = 8192  # section 4.5: "8k"

    def __init__(self, grammar="places", image_size=32, split="train", seed=0, changes=1):
        self.scenes, self.split, self.seed, self.changes = Scenes(grammar, image_size, "train", seed), split, seed, changes

    def example(self, index):
        """Story number `index`: its Scenes, one more than there are changes, and the instructions between them."""
        index, splits = index % self.TRAINED if self.split == "train" else index, Scenes.SPLITS
        rng = np.random.default_rng([self.seed, 10, splits.index(self.split), index])
        kinds = rng.permutation([kind for kind in self.KINDS if (self.split, kind) != ("held_out", "remove")])[: self.changes]
        while True:
            scenes, instructions = [self.scenes._arrange(self.scenes._draw_pairs(rng), rng)], []
            for kind in kinds:
                instruction, scene = self._change(scenes[-1], kind, rng)
                instructions.append(instruction)
                scenes.append(scene)
            found = [split_of([(s.colour, s.kind) for s in scene.shapes]) for scene in scenes]
            if all(instructions) and max(found, key=splits.index) == found[-1] == ("train" if self.split == "seen" else self.split):
                return scenes, instructions

    def _change(self, scene, kind, rng):
        """One change at random -> the instruction and the Scene after it; "" and the same Scene where such a change is not possible."""
        shapes, cells = list(scene.shapes), self.scenes.cells
        i, new = rng.integers(len(shapes)), self.scenes._arrange([self.scenes.pairs[rng.integers(len(self.scenes.pairs))]], rng).shapes[0]
        shape, free = shapes[i], [place for place in PLACES[cells] if place not in {s.place for s in shapes}]
        impossible = {"remove": len(shapes) == 1, "add": len(shapes) == self.scenes.max_objects or new.place not in free}
        if scene.relation or impossible.get(kind):  # a scene told by a relation names no places
            return "", scene

        def one(choices):
            return choices[rng.integers(len(choices))]

        the = one(references(shape, shapes))
        if kind == "recolour":
            colour = one([colour for colour in COLOURS if colour != shape.colour])
            shapes[i], instruction = replace(shape, colour=colour), f"make {the} {colour}"
        elif kind == "move":
            shapes[i], words = moved(shape, one(free), cells)
            instruction = f"move {the} to the {one(words)}"
        elif kind == "remove":
            del shapes[i]
            instruction = f"remove {the}"
        else:
            shapes.append(new)
            instruction = f"add {new}"
        return instruction, replace(scene, shapes=tuple(shapes))

    def following(self, scene):
        """Every instruction that a scene allows, to understand what others write -> {instruction: the Scene after it}. What is added stands
        in the middle of its place."""
        shapes, cells, found = list(scene.shapes), self.scenes.cells, {}
        free = [place for place in PLACES[cells] if place not in {s.place for s in shapes}]
        for i, shape in enumerate(shapes):
            others = shapes[:i], shapes[i + 1 :]
            for the in references(shape, shapes):
                changed = {f"make {the} {colour}": [replace(shape, colour=colour)] for colour in COLOURS if colour != shape.colour}
                for place in free:
                    there, words = moved(shape, place, cells)
                    changed |= {f"move {the} to the {word}": [there] for word in words}
                changed |= {f"remove {the}": []} if len(shapes) > 1 else {}
                found |= {text: [*others[0], *new, *others[1]] for text, new in changed.items()}
        for size, (colour, kind), place in itertools.product(self.scenes.sizes, self.scenes.pairs, free if len(shapes) < self.scenes.max_objects else ()):
            row, column = divmod(PLACES[cells].index(place), cells)
            new = Shape(colour, kind, size, (column + 0.5) / cells, (row + 0.5) / cells, WIDTHS[size], place)
            found[f"add {new}"] = [*shapes, new]
        return {text: replace(scene, shapes=tuple(now)) for text, now in found.items()}

    def pair(self, index):
        """A picture of a story, and the text before it: the caption of the first, the instruction for the others; as `Scenes.pair`."""
        index, k = divmod(index, self.changes + 1)
        scenes, instructions = self.example(index)
        return (instructions[k - 1] if k else scenes[0].caption), scenes[k].render

    def name(self, index):
        """What messages call it."""
        return f"story {index}"


def moved(shape, place, cells):
    """An object at another place, and the words that say so: "top left", or the side alone. By whole cells: they leave nothing open."""
    (row, column), (row_before, column_before) = (divmod(PLACES[cells].index(p), cells) for p in (place, shape.place))
    side = [word for word in place.split() if word not in shape.place]
    there = replace(shape, place=place, x=shape.x + (column - column_before) / cells, y=shape.y + (row - row_before) / cells)
    return there, [place, *side] if cells == 2 and len(side) == 1 else [place]


def references(shape, shapes):
    """The ways to name one of several objects that mean no other: "it", "the circle", "the red circle", "the red circle at the top left"."""

    def names(s):
        return f"the {s.kind}", f"the {s.colour} {s.kind}", f"the{str(s)[1:]}"

    found = [name for way, name in enumerate(names(shape)) if sum(names(other)[way] == name for other in shapes) == 1]
    return [*found, "it"] if len(shapes) == 1 else found


# ---- Your own data: the formats of other people (skip this on a first reading) --------------------------------------

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no others, whatever a file is called: Pillow runs a program for EPS


def load_image(file, image_size, name=None):
    """An image file (a path, or a binary file with its name) as `fit_image` makes it; of an animation, the first frame.
    Raises ValueError, naming it, if it is no readable image, or larger than Pillow's decompression-bomb limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image.draft(None, (2 * image_size, 2 * image_size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is enough
                return fit_image(image, image_size)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for broken files: OSError, SyntaxError, struct.error, ...
        reason = "it is in none of the formats " + ", ".join(FORMATS) if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name or file}: cannot be read as an image ({reason})") from None


class Found:
    """What reading a source found: good records, and others by kind, with the first of each kind by name."""

    def __init__(self, what):
        self.what, self.good, self.bad, self.kinds, self.first = what, 0, 0, Counter(), {}

    def skip(self, kind, name, lost=True):
        """Leave `name` out, because it is of this kind. lost: it would have been a record."""
        self.bad += lost
        self.kinds[kind] += 1
        self.first.setdefault(kind, name)

    def report(self, source, max_broken):
        """One sentence on what was left out, "" if nothing. Raises ValueError if that is too much, or nothing is left."""
        note = ", ".join(f"{n:,} {kind} (first: {self.first[kind]})" for kind, n in self.kinds.items())
        if not self.good:
            raise ValueError(f"{source}: holds {self.what} of no kind that can be used" + (f": {note}" if note else ""))
        if self.bad > max_broken * (self.good + self.bad):
            share = f"{self.bad:,} of {self.good + self.bad:,} {self.what} cannot be used"
            raise ValueError(f"{source}: {share}, more than --max_broken {max_broken:g} allows: {note}")
        return f"{source}: {self.good:,} {self.what}; left out: {note}" if note else ""


def held_out(name):
    """Is what is called so one of the tenth that is never trained on?"""
    return int(sha256(name.encode(errors="surrogateescape")).hexdigest(), 16) % 10 == 0


def files_below(folder):
    """The files in a folder and below, as paths relative to it, without what is hidden (.git, our own .transfusion) -> sorted list of str."""
    found, start = [], len(os.path.join(folder, ""))
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name)[start:] for name in names if not name.startswith(".")]
    return sorted(found)


def stamp(folder, name=""):
    """What tells a file's present content from that of another time: its name, size and time of change; None if it cannot be read."""
    with contextlib.suppress(OSError):  # it vanished, or is a link to nothing
        status = os.stat(os.path.join(folder, name))
        return name or os.path.basename(folder), status.st_size, status.st_mtime_ns


class Table:
    """Records (bytes, three numbers, 1 if held out else 0), one after the other in two files: the bytes end to end, and a row of
    int64 for each record, first where its bytes end. Mapped into memory, they take no Python object per record.

    key: of what `records()` reads, such as the files' `stamp`s. The table is made once, and again when that changes; it lies in
    the folder `cache`, else in .transfusion beside the source, else (if that cannot be written) in out/cache. Several processes
    may make it at the same time. Length and `at` are those of a split.
    """

    def __init__(self, source, key, records, found, split, seed, max_broken, cache):
        self.seed, source = seed, Path(source)
        name = f"{source.stem}-{sha256(repr((found.what, key, max_broken)).encode()).hexdigest()[:16]}"
        beside = (source if source.is_dir() else source.parent) / ".transfusion"
        places = [Path(cache)] if cache else [beside, Path("out/cache")]
        if not any((place / name).is_dir() for place in places):
            self._make(source, places, name, records, found, max_broken)
        folder = next(place / name for place in places if (place / name).is_dir())
        self.blob, self.rows = np.memmap(folder / "blob", np.uint8, "r"), np.memmap(folder / "rows", np.int64, "r").reshape(-1, 5)
        if note := (folder / "note").read_text(encoding="utf-8"):
            say(note)
        if len(self.rows) < 2:
            raise ValueError(f"{source}: holds only one of {found.what}; at least two are needed, one of them to be held out")
        out = self.rows[:, 4] > 0
        if not 0 < out.sum() < len(out):  # a handful: the first is the held-out one
            out = np.arange(len(out)) == 0
        self.members = np.flatnonzero(out == (split == "held_out"))

    def _make(self, source, places, name, records, found, max_broken):
        for place in places:
            try:
                place.mkdir(parents=True, exist_ok=True)
                partial = tempfile.TemporaryDirectory(dir=place)
                break
            except OSError as error:
                if place == places[-1]:
                    raise ValueError(f"--cache {place}: cannot be written to ({error.strerror}); name another folder with --cache") from None
        with partial as made:
            say(f"{source}: reading it once; what is found is kept in {place}")
            made = Path(made) / "table"
            made.mkdir()
            with open(made / "blob", "wb") as blob, open(made / "rows", "wb") as rows:
                self._write(records, blob, rows)
            (made / "note").write_text(found.report(source, max_broken), encoding="utf-8", errors="backslashreplace")
            with contextlib.suppress(OSError):  # another process was faster
                made.rename(place / name)

    @staticmethod
    def _write(records, blob, rows):
        end = 0
        for data, *numbers in records():
            end += len(data)
            blob.write(data)
            rows.write(struct.pack("=5q", end, *numbers))

    def __len__(self):
        return len(self.members)

    def at(self, index):
        """Number `index` of the split, in a new order each epoch -> (row, epoch)."""
        epoch, k = divmod(index, len(self))
        return int(self.members[shuffled(k, len(self), mix(self.seed, epoch))]), epoch

    def data(self, row):
        """The bytes of a row, as an array."""
        return self.blob[self.rows[row - 1, 0] if row else 0 : self.rows[row, 0]]


class Pairs:
    """Pictures with captions, whose path is one of three things:

    a folder of pictures (.png, .jpg, ...) with captions in .txt files of the same name;
    a tar, or a folder of tars, as img2dataset and WebDataset write them: 000.jpg beside 000.txt, or 000.json with a "caption";
    COCO's captions JSON, the pictures' folder near it; each epoch takes another one of a picture's captions.

    Every tenth pair, by a hash of its name, is the "held_out" split; the rest is "train", in a new order each epoch. "seen" is
    a part of "train". Each is read through once (`Table`), then at random, tars by offset; nothing is unpacked. What cannot be
    used is left out and counted. Raises ValueError if that is more than `max_broken` of all, or all.
    """

    SPLITS = ("train", "seen", "held_out")

    def __init__(self, path, image_size, split="train", seed=0, max_broken=0.05, cache="", latents=""):
        self.options = path, image_size, split, seed, max_broken, cache, latents
        self.image_size, self.root, self.shards, found = image_size, Path(path), [], Found("pictures with captions")
        suffix = self.root.suffix.lower()
        if self.root.is_dir():
            files = files_below(self.root)
            tars, pictures = ([name for name in files if name.lower().endswith(kind)] for kind in (".tar", SUFFIXES))
            if tars and pictures:
                raise ValueError(f"{path}: holds {len(tars):,} tars and {len(pictures):,} pictures; name the tars, or a folder of the pictures alone")
            self.shards, records = [self.root / name for name in tars], lambda: folder_records(self.root, files, pictures, found)
            if not tars and not pictures:
                raise ValueError(f"{path}: no pictures here; --data wants {', '.join(SUFFIXES)} files with same-named .txt captions, or tars of them")
            key = pictures, [stamp(self.root, name) for name in files if name.lower().endswith((".tar", ".txt"))]
        elif suffix not in (".tar", ".json") or not self.root.is_file():
            reason = "no such file or folder"
            if self.root.exists():
                reason = "is no folder, .tar or .json" + "; a .tar must not be compressed" * (".tar" in self.root.suffixes)
            raise ValueError(f"{path}: {reason}; --data wants a folder of pictures with same-named .txt captions, tars of them, or COCO captions in a .json")
        elif suffix == ".tar":
            self.shards, key = [self.root], stamp(self.root)
        else:
            key, records = (stamp(self.root), coco_stamp(self.root)), lambda: coco_records(Path(path), found)
            self.root = self.root.parent
        if self.shards:
            records = lambda: tar_records(self.shards, found)
        self.table = Table(path, key, records, found, split, seed, max_broken, cache)
        load = Latents(latents, len(self.table.rows), image_size) if latents else self.read
        self._load = lru_cache(maxsize=2**26 // (3 * image_size**2))(load)  # at most 64 MB of pixels

    def __len__(self):
        return len(self.table)

    def __reduce__(self):
        return Pairs, self.options

    def _text(self, row):
        """Name and captions of a row."""
        return self.table.data(row).tobytes().decode(errors="surrogateescape").split("\0")

    def read(self, row):
        """The picture in row `row` of the table, train and held out alike. Raises ValueError if it is broken."""
        _, shard, offset, size, _ = self.table.rows[row]
        if not self.shards:
            return load_image(self.root / self._text(row)[0], self.image_size)
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return load_image(io.BytesIO(file.read(size)), self.image_size, self._name(row))

    def _name(self, row):
        name = self._text(row)[0]
        return f"{self.shards[self.table.rows[row, 1]]}: {name}" if self.shards else str(self.root / name)

    def pair(self, index):
        """(caption, function that loads the picture, which raises ValueError if it is broken); index runs on over the epochs."""
        row, epoch = self.table.at(index)
        _, *captions = self._text(row)
        return captions[(row + epoch) % len(captions)], lambda: self._load(row)

    def captions(self, index):
        """All that is written about the picture of pair number `index`."""
        return self._text(self.table.at(index)[0])[1:]

    def name(self, index):
        """The file that pair number `index` is in."""
        return self._name(self.table.at(index)[0])


def clean_caption(text):
    """A caption as it is kept, "" if it is none."""
    return text.strip().replace("\0", " ").encode(errors="replace").decode() if isinstance(text, str) else ""


def record(name, captions, shard=0, offset=0, size=0):
    """One record of the Table of Pairs: the name is a hash's and a message's, and in a folder the file's."""
    return "\0".join([name, *captions]).encode(errors="surrogateescape"), shard, offset, size, held_out(Path(name).stem)


def folder_records(root, files, pictures, found):
    """The pairs of a folder, in which these files are, and of them these are pictures."""
    texts = {name for name in files if name.lower().endswith(".txt")}
    for name in pictures:
        text = os.path.splitext(name)[0] + ".txt"
        if text not in texts:
            found.skip("without a caption", name)
            continue
        try:
            caption = clean_caption((root / text).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            found.skip("with a caption that is not UTF-8", text)
            continue
        if not caption:
            found.skip("with an empty caption", text)
            continue
        found.good += 1
        yield record(name, [caption])
    stems = {os.path.splitext(name)[0] for name in pictures}
    for name in sorted(texts):
        if name[:-4] not in stems:
            found.skip("captions without a picture", name, lost=False)


def tar_records(shards, found):
    """The pairs of some tars. Nothing is written; a member's name is a label, and a link is never followed."""
    for number, shard in enumerate(tqdm(shards, desc="index", disable=len(shards) < 10)):
        parts, size = {}, shard.stat().st_size  # name without suffix -> {suffix: (offset, size)}
        with open(shard, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # or it would keep every one
                        name = "".join(c if c.isprintable() else "?" for c in member.name)
                        if member.size < 0:
                            raise tarfile.ReadError(f"{name} is of size {member.size}")
                        stem, suffix = os.path.splitext(name)
                        suffix = suffix.lower()
                        if member.isdir():
                            continue
                        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                            found.skip("links and special files", f"{shard}: {name}", lost=False)
                        elif name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
                            found.skip("names that lead out of the tar", f"{shard}: {name}", lost=suffix in SUFFIXES)
                        elif member.offset_data + member.size > size:
                            found.skip("cut short", f"{shard}: {name}")
                        elif suffix in SUFFIXES or suffix in (".txt", ".json"):
                            if suffix in parts.setdefault(stem, {}):
                                found.skip("names that come twice (the last one counts)", f"{shard}: {name}", lost=False)
                            parts[stem][suffix] = member.offset_data, member.size
                    file.seek(tar.offset)
                    if file.read(512) != bytes(512):  # a tar ends with zeros
                        found.skip("tars cut short or damaged", shard, lost=False)
            except tarfile.ReadError as error:
                if not parts:
                    raise ValueError(f"{shard}: is not an uncompressed tar, or is broken from the start ({error})") from None
                found.skip("tars cut short or damaged", shard, lost=False)
            for stem, files in parts.items():
                picture = next((suffix for suffix in SUFFIXES if suffix in files), None)
                if not picture:
                    found.skip("captions without a picture", f"{shard}: {stem}", lost=False)
                    continue
                caption = ""
                for suffix in (".txt", ".json"):
                    if suffix in files and not caption:
                        file.seek(files[suffix][0])
                        try:
                            text = file.read(files[suffix][1]).decode("utf-8-sig")
                            caption = clean_caption(text if suffix == ".txt" else json.loads(text).get("caption"))
                        except (ValueError, AttributeError, RecursionError):  # not UTF-8, not JSON, not an object
                            pass
                if caption:
                    found.good += 1
                    yield record(stem + picture, [caption], number, *files[picture])
                elif len(files) > 1:
                    found.skip("with a caption that is empty, or not UTF-8, or no JSON", f"{shard}: {stem}")
                else:
                    found.skip("without a caption", f"{shard}: {stem}{picture}")


def coco_folders(path):
    """Where the pictures of a COCO captions file may be."""
    part = path.stem.removeprefix("captions_")
    return [parent / child for parent in (path.parent, path.parent.parent) for child in (".", "images", part, f"images/{part}")]


def coco_stamp(path):
    """How many pictures are in each of these folders: when more come, they are looked up again."""
    return [sum(name.lower().endswith(SUFFIXES) for name in os.listdir(folder)) if folder.is_dir() else 0 for folder in coco_folders(path)]


def coco_records(path, found):
    """The pictures of a COCO captions file, each with all its captions; their folder is near it, wherever the first of them is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images, captions = {image["id"]: Path(image["file_name"]) for image in content["images"]}, {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(clean_caption(annotation["caption"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'{path}: is not COCO captions ({type(error).__name__}: {error}); expected {{"images": [{{"id", "file_name"}}, ...], '
                         f'"annotations": [{{"image_id", "caption"}}, ...]}}') from None  # fmt: skip
    folders = coco_folders(path)
    first = [name for name in itertools.islice(images.values(), 10)]
    root = next((folder for folder in folders for name in first if (folder / name).is_file()), None)
    if first and not root:
        raise ValueError(f"{path}: its pictures ({first[0]}, ...) are not there; looked in {', '.join(map(str, folders))}")
    for _ in range(len(content["images"]) - len(images)):
        found.skip("images with an id that was there before", path, lost=False)
    for image, name in images.items():
        texts = [text for text in captions.pop(image, []) if text]
        if name.is_absolute() or ".." in name.parts or "\0" in str(name):
            found.skip("names that lead out of the folder", name)
        elif not texts:
            found.skip("without a caption", name)
        elif not (root / name).is_file():
            found.skip("without the picture", root / name)
        else:
            found.good += 1
            yield record(os.path.relpath(root / name, path.parent), texts)
    for image in captions:
        found.skip("captions of unknown images", f"image_id {image}", lost=False)


class Latents:
    """What vae.write_latents wrote about one of the sources. latents(row): float16 (2 C, h, w), the posterior's mean and
    log-variance; raises ValueError if that picture could not be read."""

    def __init__(self, folder, pictures, image_size):
        self.folder = Path(folder)
        try:
            self.index = json.loads((self.folder / "index.json").read_text())
            self.shards = [np.load(file, mmap_mode="r") for file in sorted(self.folder.glob("*.npy"))]
        except (OSError, ValueError) as error:
            raise ValueError(f"--latents {folder}: cannot be read ({error}); write them with vae.py --encode") from None
        of, side = self.index["pictures"], self.index["image_size"]
        if (of, side) != (pictures, image_size):
            raise ValueError(f"--latents {folder}: are of {of:,} pictures of {side} pixels, not of {pictures:,} of {image_size}")
        if (done := sum(map(len, self.shards))) != pictures:
            raise ValueError(f"--latents {folder}: only {done:,} of {pictures:,} pictures are encoded; start vae.py --encode again, it goes on")

    def __call__(self, row):
        latents = np.array(self.shards[row // self.index["shard"]][row % self.index["shard"]])
        if np.isnan(latents[0, 0, 0]):
            raise ValueError(f"picture {row} of {self.folder}: could not be read when it was to be encoded")
        return latents


class Mixture:
    """Several Pairs as one, each drawn from in proportion to its weight. Epochs are each source's own."""

    def __init__(self, sources, weights, seed=0):
        self.sources, self.weights, self.seed = sources, weights, seed

    def __len__(self):
        return sum(map(len, self.sources))

    def _at(self, index):
        which, number = interleave(index, self.weights, self.seed)
        return self.sources[which], number

    def pair(self, index):
        """As Pairs.pair."""
        source, number = self._at(index)
        return source.pair(number)

    def captions(self, index):
        """As Pairs.captions."""
        source, number = self._at(index)
        return source.captions(number)

    def name(self, index):
        """As Pairs.name."""
        source, number = self._at(index)
        return source.name(number)


class TextFiles:
    """Your own text, tokenised once into a Table: UTF-8 .txt files, each a document, .jsonl files with a "text" on every line, or
    folders of them. Documents are cut into pieces that fit a row. Every tenth piece, by a hash of where it is, is the "held_out"
    split; the rest is "train", in a new order each epoch. Raises ValueError, naming the file, if one cannot be read as text."""

    def __init__(self, config, tokenizer, split="train", seed=0):
        self.options = config, tokenizer, split, seed
        files, max_length, found = [], config.seq_len - 1, Found("texts")
        for path in map(Path, config.text.split(",")):
            files += [path / name for name in files_below(path) if name.endswith((".txt", ".jsonl"))] if path.is_dir() else [path]
            if not files or not files[-1].is_file():
                raise ValueError(f"--text {path}: " + ("no .txt or .jsonl files here" if path.is_dir() else "no such file or folder"))
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

        def records():
            for file in files:
                for where, text in read_jsonl(file, found) if file.suffix in (".jsonl", ".json") else read_txt(file):
                    found.good += 1
                    ids = np.array(tokenizer.encode(text), self.dtype)
                    for start in range(0, len(ids), max_length):
                        end = start + max_length
                        yield ids[start:end].tobytes(), end < len(ids), 0, 0, held_out(f"{file.name}:{where}:{start}")

        key = list(map(stamp, files)), max_length, sha256(repr(tokenizer.state()).encode()).hexdigest()
        self.table = Table(config.text.split(",")[0], key, records, found, split, seed, config.max_broken, config.cache)

    def __len__(self):
        return len(self.table)

    def __reduce__(self):
        return TextFiles, self.options

    def ids(self, index):
        """Piece number `index`, a list of tokens, or a Cut if its text goes on; index runs on over the epochs."""
        row, _ = self.table.at(index)
        return (Cut if self.table.rows[row, 1] else list)(self.table.data(row).view(self.dtype).tolist())


def read_txt(path):
    """A text file in stretches of whole lines -> (number, text)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number in itertools.count():
                if not (text := file.read(2**20) + file.readline()):
                    return
                yield number, text
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: is not UTF-8 text ({error.reason}); convert it, e.g. with iconv") from None


def read_jsonl(path, found):
    """The texts of a file of JSON lines -> (line number, text)."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"].encode(errors="replace").decode()
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                if line.strip():
                    found.skip('lines that are no JSON object with a "text"', f"{path}:{number}")
                continue
            if text:
                yield number, text


class JSONTokenizer:
    """A tokenizer.json of the Hugging Face library `tokenizers`, with the five special tokens after its vocabulary. The interface
    of Tokenizer. Raises ValueError if the package is missing or `text`, the file's content, is no such tokenizer."""

    def __init__(self, text):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from None
        try:
            self.inner = Library.from_str(text)
            self.n_pieces = 1 + max(self.inner.get_vocab(with_added_tokens=True).values())
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"is not a tokenizer.json of the package tokenizers ({str(error)[:100]})") from None
        self.bos, self.eos, self.boi, self.eoi, self.pad = range(self.n_pieces, self.n_pieces + 5)
        self.vocab_size = self.n_pieces + 5

    def encode(self, text):
        """str -> list of ids, without special tokens."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> str; special tokens are left out."""
        return self.inner.decode([i for i in ids if i < self.n_pieces])

    def state(self):
        """What a checkpoint keeps of it: the whole file's text."""
        return {"json": self.inner.to_str()}

    def __reduce__(self):
        return restore_tokenizer, (self.state(),)


if __name__ == "__main__":
    scenes, config = Scenes(), DataConfig(image_size=32, seq_len=128, merges=512)
    tokenizer = open_tokenizer(config, scenes)
    documents = Documents(scenes, tokenizer, config, text=open_text(config, tokenizer), n_patches=16)
    batch = next(Loader(Stream(documents, config.seq_len, rows=8, n_patches=16), tokenizer))
    print(f"vocabulary {tokenizer.vocab_size}; one batch: {len(batch.images)} images, {(batch.doc_id >= 0).float().mean():.1%} filled")
    names = {tokenizer.bos: "<BOS>", tokenizer.boi: "<BOI>", tokenizer.eoi: "<EOI>", tokenizer.pad: "#"}
    for split in Scenes.SPLITS:
        print(f"{split:>10}: " + "; ".join(Scenes(split=split).example(i).caption for i in range(2)))
    stories = [Stories(changes=2).example(i) for i in range(2)]
    print("   stories: " + "; ".join(f"{scenes[0].caption}, {', '.join(instructions)}: {scenes[-1].caption}" for scenes, instructions in stories))
    row = batch.tokens[(batch.image_id >= 0).sum(1).argmax()].tolist()
    print("the row with most pictures:", " ".join(names.get(i) or repr(tokenizer.decode([i])) for i in row))
