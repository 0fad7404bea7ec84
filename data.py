"""The data: captioned pictures, as tokens, documents and batches (paper, section 3, "Data representation", and 4.1).

    Tokenizer   byte-pair encoding learned from the captions, falling back to bytes; <BOI>, <EOI> and the like after it
    Scenes      the built-in pictures: coloured shapes drawn with Pillow, and the captions that describe them exactly
    Folder      your own pictures with same-named .txt captions
    Documents   pairs in both orders: <BOS> caption <BOI> patches <EOI> <EOS>, or <BOS> <BOI> patches <EOI> caption <EOS>
    Stream      documents packed into rows of a fixed length
    Batch       what travels from here to the loss; every other file reads it by these names

Everything is a function of (seed, index), so any position of the stream can be returned to.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from attention_mask import PADDING, TEXT

NO_LOSS = -100  # a target that cross-entropy ignores


@dataclass
class DataConfig:
    """What the documents are made of. Raises ValueError on a value out of range."""

    data: str = ""  # folder of pictures with same-named .txt captions; "" = the built-in scenes
    grammar: str = "places"  # of the built-in scenes: "places", "relations" or "rich"
    image_size: int = 256  # pixels a side
    seq_len: int = 4096  # tokens a row; documents are packed into it
    merges: int = 512  # at most so many pairs are merged into tokens; 0 = plain bytes
    caption_first: float = 0.8  # share of pairs whose caption precedes the picture (section 4.1)
    drop_caption: float = 0.1  # share of caption-first pairs without the caption: the unconditional branch of guidance
    image_first_max_t: int = 500  # noise limit where the picture precedes its caption (section 4.3); 1000 = none

    def __post_init__(self):
        for name in ("caption_first", "drop_caption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.seq_len < 1 or self.image_size < 1:
            raise ValueError(f"seq_len is {self.seq_len} and image_size {self.image_size}; both must be above 0")
        if self.grammar not in GRAMMARS:
            raise ValueError(f"grammar is {self.grammar!r}; it must be one of {', '.join(GRAMMARS)}")


# ---- Text -----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016): ids 0..255 are bytes, then one id per merge, then the five special tokens.
    `merges` is all of its state; without merges it is a plain byte tokenizer, and with any it falls back to bytes."""

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
        then across words (Liu et al. 2025), there only where one never occurs without the other, in a tenth of the texts or
        more: "at the" becomes one token, "red circle" must not, or no red square would share anything with it."""
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
        grow(Counter(tuple(inside.encode(text)) for text in texts), lambda n, a, b: n == min(a, b) and n >= max(2, len(texts) / 10))
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
        return list(self._merge(tuple(i for word in re.findall(WORD, text) for i in self._encode_word(word))))

    def decode(self, ids):
        """Ids -> str; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids if i < len(self.pieces)).decode(errors="replace")


WORD = re.compile(r"\s*\S+|\s+")  # a word with the space before it


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


# ---- The built-in scenes --------------------------------------------------------------------------------------------

COLOURS = {"red": (226, 48, 56), "green": (52, 168, 83), "blue": (46, 92, 222), "yellow": (246, 190, 22),
           "purple": (150, 62, 186), "cyan": (38, 186, 212)}  # fmt: skip
BACKGROUNDS = {"white": (246, 245, 241), "pink": (250, 200, 206), "black": (26, 26, 32)}
GRAMMARS = {  # kinds of shape, most objects, cells a side of the grid of places, sizes, backgrounds
    "places": (("circle", "square", "triangle", "cross"), 2, 2, ("",), ("white",)),
    "relations": (("circle", "square", "triangle", "cross"), 2, 0, ("",), ("white",)),
    "rich": (("circle", "square", "triangle", "cross", "diamond", "ring"), 4, 3, ("small", "large"), tuple(BACKGROUNDS)),
}
PLACES = {2: ("top left", "top right", "bottom left", "bottom right"),
          3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")}  # fmt: skip
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # direction from second to first
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
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 15


class Scenes:
    """The built-in captioned pictures, drawn on the fly: endless, and example(i) is always the same.

    split: "train"; "seen", other pictures of the same combinations; "held_out", two objects in a combination (in
    whichever places and wording) that training never shows; "never_seen", at least one object whose colour-shape pair
    training never shows. The VAE, too, is trained on "train" only.
    """

    SPLITS = ("train", "seen", "held_out", "never_seen")

    def __init__(self, grammar="places", image_size=32, split="train", seed=0):
        self.grammar, self.image_size, self.split, self.seed = grammar, image_size, split, seed
        self.kinds, self.most, self.cells, self.sizes, self.backgrounds = GRAMMARS[grammar]
        self.pairs = list(itertools.product(COLOURS, self.kinds))

    def example(self, index):
        """The Scene number `index` of this split."""
        rng = np.random.default_rng([self.seed, self.SPLITS.index(self.split), index])
        while True:
            pairs = self._draw_pairs(rng)
            if self._belongs(pairs):
                return self._arrange(pairs, rng)

    def _draw_pairs(self, rng):
        least = 2 if self.split == "held_out" or not self.cells else 1
        # Two objects in most pictures: a single one teaches neither binding nor counting.
        number = least if rng.random() < 0.2 else int(rng.integers(2, self.most + 1))
        return [self.pairs[i] for i in rng.integers(len(self.pairs), size=number)]

    def _belongs(self, pairs):
        if any(pair in NEVER_SEEN for pair in pairs):
            return self.split == "never_seen"
        held_out = any(held_out_combination(a, b) for a, b in itertools.combinations(pairs, 2))
        return self.split == "held_out" if held_out else self.split in ("train", "seen")

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
        unit = 0.375 if self.cells == 2 or not self.cells else 0.25
        width = {"": unit, "small": 0.16, "large": 0.26}
        shapes = [Shape(colour, kind, size, float(c[0]), float(c[1]), width[size], place)
                  for (colour, kind), size, c, place in zip(pairs, sizes, centres, places)]  # fmt: skip
        return Scene(tuple(shapes), self.image_size, relation, background, tell_background)

    def pair(self, index):
        """(caption, function that draws the picture)."""
        scene = self.example(index)
        return scene.caption, scene.render


# ---- Your own pictures ----------------------------------------------------------------------------------------------


class Folder:
    """Pictures (.png, .jpg, .jpeg, .webp, .bmp) with captions in .txt files of the same name. Every tenth pair, by a hash
    of its name, is the "held_out" split; the rest is "train", in a new order each epoch. "seen" is a part of "train".

    Raises ValueError if the folder holds no such pair, or a caption is missing, empty or not UTF-8.
    """

    SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    SPLITS = ("train", "seen", "held_out")

    def __init__(self, path, image_size, split="train", seed=0):
        self.image_size, self.seed = image_size, seed
        pictures = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in self.SUFFIXES) if Path(path).is_dir() else []
        if not pictures:
            raise ValueError(f"{path}: no pictures here; --data wants a folder of {', '.join(self.SUFFIXES)} files with same-named .txt captions")
        if len(pictures) < 2:
            raise ValueError(f"{path}: holds one picture; at least two are needed, one of them to be held out")
        held_out = {p: int(hashlib.sha256(p.stem.encode()).hexdigest(), 16) % 10 == 0 for p in pictures}
        if not 0 < sum(held_out.values()) < len(pictures):  # a handful of files: the first is the held-out one
            held_out = {p: p == pictures[0] for p in pictures}
        self.pictures = [p for p in pictures if held_out[p] == (split == "held_out")]
        self.captions = [self._caption(p) for p in self.pictures]
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(self.pictures)))
        self._load = lru_cache(maxsize=20_000)(lambda i: load_image(self.pictures[i], image_size))

    @staticmethod
    def _caption(picture):
        text = picture.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise ValueError(f"{picture}: has no caption; expected it in {text.name} beside it") from None
        except UnicodeDecodeError:
            raise ValueError(f"{text}: is not UTF-8 text") from None
        if not caption:
            raise ValueError(f"{text}: is empty; write the picture's caption into it")
        return caption

    def pair(self, index):
        """(caption, function that loads the picture); index runs on over the epochs."""
        epoch, i = divmod(index, len(self.pictures))
        i = int(self._order(epoch)[i])
        return self.captions[i], lambda: self._load(i)


def fit_image(image, image_size):
    """A PIL image as uint8 (image_size, image_size, 3): upright, on white, centre-cropped and resized (section 4.1)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS))


def load_image(path, image_size):
    """An image file as `fit_image` makes it. Raises ValueError, naming the file, if it is no readable image."""
    try:
        with Image.open(path) as image:
            return fit_image(image, image_size)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for broken files: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None


def open_pairs(config, split="train", seed=0):
    """The source that a DataConfig names: Scenes or a Folder, cut to a split."""
    if config.data:
        return Folder(config.data, config.image_size, split, seed)
    return Scenes(config.grammar, config.image_size, split, seed)


# ---- Documents ------------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """An image inside a document, loaded only when its batch is made."""

    load: Callable  # () -> uint8 (H, W, 3)
    max_t: int  # the largest timestep it may be noised to; 0: it is shown clean, as conditioning, and has no loss


class Documents:
    """document(index): a list of segments, each a list of token ids or a Picture, in one of the paper's two orders."""

    def __init__(self, pairs, tokenizer, config, timesteps=1000, seed=0):
        self.pairs, self.tokenizer, self.config, self.timesteps, self.seed = pairs, tokenizer, config, timesteps, seed

    def __call__(self, index):
        caption, load = self.pairs.pair(index)
        ids = self.tokenizer.encode(caption)
        order, drop = np.random.default_rng([self.seed, 7, index]).random(2)
        if order >= self.config.caption_first:
            return [Picture(load, min(self.config.image_first_max_t, self.timesteps)), ids]
        return [[] if drop < self.config.drop_caption else ids, Picture(load, self.timesteps)]


def length(document, n_patches):
    """Positions that a document takes as input: <BOS>, its tokens, and <BOI> patches <EOI> for each picture."""
    return 1 + sum(n_patches + 2 if isinstance(segment, Picture) else len(segment) for segment in document)


class Stream:
    """Documents packed into rows of seq_len positions, `rows` rows a step. Row r of every step is packed from documents r,
    r + rows, r + 2 rows, ...; so any process can make any of them, and `mine` says which (default: all).

    Best fit with a look-ahead: a row takes the oldest waiting document, then the longest waiting ones that still fit.
    Packing looks at lengths only; pictures are loaded by `collate`. `state` says where each row stands.
    """

    LOOK_AHEAD = 24

    def __init__(self, document, seq_len, rows, n_patches, mine=None):
        self.document, self.seq_len, self.rows, self.n_patches = document, seq_len, rows, n_patches
        self.state = {r: {"next": r, "waiting": []} for r in (range(rows) if mine is None else mine)}
        self._open = {}  # the waiting documents and their lengths, by index

    def _waiting(self, state):
        while len(state["waiting"]) < self.LOOK_AHEAD:
            state["waiting"].append(state["next"])
            state["next"] += self.rows
        for i in state["waiting"]:
            if i not in self._open:
                document = self.document(i)
                n = length(document, self.n_patches)
                if n > self.seq_len:
                    raise ValueError(f"document {i} takes {n} positions and seq_len is {self.seq_len}: raise --seq_len or shorten its caption")
                self._open[i] = document, n
        return state["waiting"]

    def __next__(self):
        """The next rows: a list of lists of documents."""
        rows = []
        for state in self.state.values():
            row, free = [], self.seq_len
            while fitting := [i for i in self._waiting(state) if self._open[i][1] <= free]:
                i = fitting[0] if not row else max(fitting, key=lambda i: self._open[i][1])
                state["waiting"].remove(i)
                document, n = self._open.pop(i)
                row.append(document)
                free -= n
            rows.append(row)
        return rows


@dataclass
class Batch:
    """B rows of S positions and the N images in them, in reading order."""

    tokens: torch.Tensor  # (B, S) int64: the input; at a patch or padding, the padding id, which nothing reads
    targets: torch.Tensor  # (B, S) int64: the next token, NO_LOSS where the language model has none
    image_id: torch.Tensor  # (B, S) int64: which of `images` a patch belongs to, -1 for text
    doc_id: torch.Tensor  # (B, S) int64: which document of its row a position belongs to, -1 for padding
    positions: torch.Tensor  # (B, S) int64: place within the document, for RoPE
    images: torch.Tensor  # (N, 3, H, W) float32 in -1..1
    max_t: torch.Tensor  # (N,) int64: the largest timestep of each image, 0 = clean conditioning without a loss

    def to(self, device):
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def to_pixels(images):
    """uint8 pictures (..., H, W, 3) -> float32 (..., 3, H, W) in -1..1, as the VAE takes them."""
    return torch.as_tensor(np.asarray(images)).movedim(-1, -3).float() / 127.5 - 1


def collate(rows, tokenizer, seq_len, n_patches):
    """Lay rows of documents out as a Batch.

    A position's target is the next token of its document, <EOS> after the last. There is none where the input is <BOI>
    (footnote 8) or a patch; so <BOI> is a target, <EOI> is not (it is inserted, never sampled), and <EOI> as input
    predicts the text that follows it.
    """
    shape = len(rows), seq_len
    tokens, targets = np.full(shape, tokenizer.pad), np.full(shape, NO_LOSS)
    image_id, doc_id, positions = np.full(shape, TEXT), np.full(shape, PADDING), np.zeros(shape, int)
    images, max_t = [], []
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            ids, owner = [tokenizer.bos], [TEXT]
            for segment in document:
                if isinstance(segment, Picture):
                    ids += [tokenizer.boi] + [tokenizer.pad] * n_patches + [tokenizer.eoi]
                    owner += [TEXT] + [len(images)] * n_patches + [TEXT]
                    images.append(segment.load())
                    max_t.append(segment.max_t)
                else:
                    ids += segment
                    owner += [TEXT] * len(segment)
            here = slice(start, start + len(ids))
            ids, owner = np.array(ids), np.array(owner)
            has_loss = (ids != tokenizer.boi) & (owner == TEXT)
            tokens[b, here], image_id[b, here], doc_id[b, here] = ids, owner, d
            targets[b, here] = np.where(has_loss, np.append(ids[1:], tokenizer.eos), NO_LOSS)
            positions[b, here] = np.arange(len(ids))
            start += len(ids)
    pixels = to_pixels(np.stack(images)) if images else torch.zeros(0, 3, 1, 1)
    return Batch(*map(torch.from_numpy, (tokens, targets, image_id, doc_id, positions)), pixels, torch.tensor(max_t, dtype=torch.long))


if __name__ == "__main__":
    scenes = Scenes()
    tokenizer = Tokenizer.learn([scenes.example(i).caption for i in range(1000)], 512)
    stream = Stream(Documents(scenes, tokenizer, DataConfig(image_size=32)), seq_len=128, rows=8, n_patches=16)
    batch = collate(next(stream), tokenizer, 128, 16)
    print(f"vocabulary {tokenizer.vocab_size}; one batch: {len(batch.images)} images, {(batch.doc_id >= 0).float().mean():.1%} filled")
    names = {tokenizer.bos: "<BOS>", tokenizer.boi: "<BOI>", tokenizer.eoi: "<EOI>", tokenizer.pad: "#"}
    for split in Scenes.SPLITS:
        print(f"{split:>10}: " + "; ".join(Scenes(split=split).example(i).caption for i in range(2)))
    print("first row:", " ".join(names.get(i) or repr(tokenizer.decode([i])) for i in batch.tokens[0].tolist()))
