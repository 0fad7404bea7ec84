"""The built-in captioned images: coloured shapes, and the sentences that describe them exactly.

`Scenes` is a source of pairs, `SceneText` one of text alone. Neither ends, and number i of either is always
the same. `extras/judge.py` reads images and captions back.
"""

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw


class Grammar(NamedTuple):
    """What may occur in a scene and in its caption."""

    kinds: tuple  # of shape
    max_objects: int
    cells: int  # places form a grid of cells x cells; with 0, captions tell a relation and no place
    sizes: tuple = ("",)
    backgrounds: tuple = ("white",)


COLOURS = {"red": (226, 48, 56), "green": (52, 168, 83), "blue": (46, 92, 222), "yellow": (246, 190, 22)}
COLOURS |= {"purple": (150, 62, 186), "cyan": (38, 186, 212)}
BACKGROUNDS = {"white": (246, 245, 241), "pink": (250, 200, 206), "black": (26, 26, 32)}
KINDS = ("circle", "square", "triangle", "cross")
GRAMMARS = {
    "places": Grammar(KINDS, max_objects=2, cells=2),
    "relations": Grammar(KINDS, max_objects=2, cells=0),
    "rich": Grammar((*KINDS, "diamond", "ring"), 4, 3, ("small", "large"), tuple(BACKGROUNDS)),
}
PLACES = {0: [""], 2: "top left, top right, bottom left, bottom right".split(", ")}  # row by row
PLACES[3] = "top left, top, top right, left, centre, right, bottom left, bottom, bottom right".split(", ")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # (dx, dy)
WIDTHS = {"": 0.375, "small": 0.16, "large": 0.26}  # of a shape, by its size
NEVER_SEEN = {("green", "triangle"), ("purple", "circle"), ("yellow", "square"), ("cyan", "cross")}


@dataclass(frozen=True)
class Shape:
    """One object of a scene. Its centre and its width are fractions of the image's side."""

    colour: str
    kind: str
    size: str = ""
    x: float = 0.5
    y: float = 0.5
    width: float = 0.375
    place: str = ""

    def __str__(self):
        words = ["a", self.size, self.colour, self.kind, self.place and f"at the {self.place}"]
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn, with its caption."""

    shapes: tuple
    image_size: int
    relation: str = ""  # of the first object to the second; "" = the caption tells places
    background: str = "white"
    tell_background: bool = False

    @property
    def objects(self):
        """The (colour, kind) of each shape."""
        return [(shape.colour, shape.kind) for shape in self.shapes]

    @property
    def caption(self):
        """The sentence that describes this scene."""
        *first, last = map(str, self.shapes)
        text = f"{', '.join(first)} {self.relation or 'and'} {last}" if first else last
        return f"{text} on a {self.background} background" if self.tell_background else text

    def render(self):
        """Draw the scene: uint8 (image_size, image_size, 3)."""
        n = self.image_size
        pixels = np.full((n, n, 3), BACKGROUNDS[self.background], np.float32)
        for shape in self.shapes:
            alpha = sprite(shape.kind, round(shape.width * n))
            w = len(alpha)
            left, top = round(shape.x * n - w / 2), round(shape.y * n - w / 2)
            window = pixels[top : top + w, left : left + w]
            window += alpha[..., None] * (np.array(COLOURS[shape.colour], np.float32) - window)
        return (pixels + 0.5).astype(np.uint8)


@lru_cache(maxsize=1024)
def sprite(kind, width):
    """How much of each pixel a shape covers: float32 (width, width) in 0..1. It touches all four sides."""
    n = width * 8  # supersampling
    canvas = Image.new("L", (n, n))
    draw = ImageDraw.Draw(canvas)
    if kind in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    if kind == "ring":
        draw.ellipse((0.27 * n, 0.27 * n, 0.73 * n - 1, 0.73 * n - 1), fill=0)
    if kind == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    if kind == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    if kind == "diamond":
        draw.polygon([(n / 2, 0), (n - 1, n / 2), (n / 2, n - 1), (0, n / 2)], fill=255)
    if kind == "cross":
        draw.rectangle((0, 0.33 * n, n - 1, 0.67 * n), fill=255)
        draw.rectangle((0.33 * n, 0, 0.67 * n, n - 1), fill=255)
    return np.asarray(canvas, np.float32).reshape(width, 8, width, 8).mean((1, 3)) / 255


@cache
def held_out_combination(a, b):
    """Are objects a and b, (colour, kind) each, one of the 15 % of combinations held out from training?"""
    name = "|".join(" ".join(thing) for thing in sorted((a, b)))
    return int(sha256(name.encode()).hexdigest(), 16) % 100 < 15


def split_of(objects):
    """The split of an image of these (colour, kind): "train" (as of "seen"), "held_out" or "never_seen"."""
    if any(thing in NEVER_SEEN for thing in objects):
        return "never_seen"
    held_out = any(held_out_combination(a, b) for a, b in itertools.combinations(objects, 2))
    return "held_out" if held_out else "train"


class Scenes:
    """Captioned images. Models, and VAEs too, are trained on "train" alone.

    "seen" has other images of the same combinations of objects. In "held_out", two objects are a combination
    that training never shows. In "never_seen", an object's colour and shape never occur together in training.
    """

    SPLITS = ("train", "seen", "held_out", "never_seen")

    def __init__(self, grammar="places", image_size=32, split="train", seed=0):
        self.grammar, self.image_size, self.split, self.seed = grammar, image_size, split, seed
        self.kinds, self.max_objects, self.cells, self.sizes, self.backgrounds = GRAMMARS[grammar]
        self.objects = list(itertools.product(COLOURS, self.kinds))

    def example(self, index):
        """Scene number `index` of this split."""
        rng = np.random.default_rng([self.seed, self.SPLITS.index(self.split), index])
        while True:
            objects = self.draw_objects(rng)
            if split_of(objects) == ("train" if self.split == "seen" else self.split):
                return self.arrange(objects, rng)

    def draw_objects(self, rng):
        """A random list of (colour, kind)."""
        least = 2 if self.split == "held_out" or not self.cells else 1
        # Two objects in most images: a single one teaches neither binding nor counting.
        number = least if rng.random() < 0.2 else rng.integers(2, self.max_objects + 1)
        return [self.objects[i] for i in rng.integers(len(self.objects), size=number)]

    def arrange(self, objects, rng):
        """A Scene of these objects, all else drawn at random."""
        background = self.backgrounds[rng.integers(len(self.backgrounds))]
        sizes = [self.sizes[i] for i in rng.integers(len(self.sizes), size=len(objects))]
        related = not self.cells or (len(objects) == 2 and self.grammar == "rich" and rng.random() < 0.5)
        relation, places = "", ["", ""]
        if related:
            relation = list(RELATIONS)[rng.integers(4)]
            direction = np.array(RELATIONS[relation])
            centre = 0.5 + rng.uniform(-0.06, 0.06, 2)
            drift = rng.uniform(-0.12, 0.12) * direction[::-1]  # across the relation's axis
            centres = [centre + 0.24 * direction + drift, centre - 0.24 * direction - drift]
        else:
            cells = rng.permutation(self.cells**2)[: len(objects)]
            jitter = rng.uniform(-1, 1, (len(objects), 2)) * (0.03 if self.cells == 2 else 0.02)
            centres = (np.stack([cells % self.cells, cells // self.cells], 1) + 0.5) / self.cells + jitter
            places = [PLACES[self.cells][cell] for cell in cells]
        shapes = []
        for thing, size, (x, y), place in zip(objects, sizes, centres, places):
            shapes.append(Shape(*thing, size, float(x), float(y), WIDTHS[size], place))
        return Scene(tuple(shapes), self.image_size, relation, background, len(self.backgrounds) > 1)

    def pair(self, index):
        """Pair number `index`: (caption, function that draws the image)."""
        scene = self.example(index)
        return scene.caption, scene.render

    def captions(self, index):
        """All that is written about image number `index`."""
        return [self.example(index).caption]

    def name(self, index):
        """What messages call pair number `index`."""
        return f"scene {index}"


class SceneText:
    """Text without images: one to twelve sentences, each about another scene of the split."""

    OPENINGS = ("There is", "I see", "The picture shows", "Here we have", "Somebody drew", "Then comes")

    def __init__(self, grammar, tokenizer, seq_len, split="train", seed=0):
        self.scenes, self.tokenizer, self.seq_len = Scenes(grammar, 0, split, seed), tokenizer, seq_len

    def ids(self, index):
        """Text number `index` as tokens, no more than fit a row after <BOS>."""
        rng = np.random.default_rng([self.scenes.seed, 8, index])
        sentences = []
        for k in range(rng.integers(1, 13)):
            caption = self.scenes.example(2**40 + 12 * index + k).caption  # far from those that are drawn
            sentences.append(f"{self.OPENINGS[rng.integers(len(self.OPENINGS))]} {caption}.")
        return self.tokenizer.encode(" ".join(sentences))[: self.seq_len - 1]


if __name__ == "__main__":
    for split in Scenes.SPLITS:
        print(f"{split:>10}: " + "; ".join(Scenes(split=split).example(i).caption for i in range(2)))
