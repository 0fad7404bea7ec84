"""An exact judge of the built-in images, which has learned nothing.

`read_scene` finds an image's connected blobs, and for each its colour and the shape whose outline fits best.
`parse_caption` reads sentences like the training captions. `judge` says whether an image and a caption agree,
whichever of them a model made. The objects may come in any order, and a relation from either side.
"""

import itertools
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from extras.scenes import BACKGROUNDS, COLOURS, GRAMMARS, PLACES, RELATIONS, Shape, sprite

ASPECTS = ("all", "number", "colours", "shapes", "relation")


def components(mask):
    """The 4-connected regions of a bool mask (H, W), as a list of bool masks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        rows, columns = padded[:, 1:-1], padded[1:-1]
        around = np.stack([labels, rows[:-2], rows[2:], columns[:, :-2], columns[:, 2:]])
        spread = np.where(mask, around.max(0), 0)
        if (spread == labels).all():
            return [labels == n for n in np.unique(labels) if n]
        labels = spread


def nearest(rgb, palette, tolerance):
    """The name of the palette's colour nearest to rgb, "?" if all are farther than the tolerance."""
    distances = {name: np.linalg.norm(rgb - np.array(colour)) for name, colour in palette.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= tolerance else "?"


def outline_match(alpha, kind):
    """How well a blob's coverage (h, w), cut at its bounding box, fits a shape: 0..1, the best overlap."""
    h, w = alpha.shape
    padded = np.pad(alpha, 2)
    best = 0.0
    for side in range(max(3, min(h, w) - 1), max(h, w) + 2):
        template = sprite(kind, side)
        tops = {(h - side) // 2 + 2, (h - side + 1) // 2 + 2}
        lefts = {(w - side) // 2 + 2, (w - side + 1) // 2 + 2}
        for top, left in itertools.product(tops, lefts):
            if min(top, left) >= 0 and top + side <= h + 4 and left + side <= w + 4:
                both = np.minimum(padded[top : top + side, left : left + side], template).sum()
                best = max(best, both / (padded.sum() + template.sum() - both))
    return best


def read_shape(image, ground, mask, grammar):
    """The Shape in one region of an image, or None if the region has no colour of its own."""
    n = len(image)
    distance = np.linalg.norm(image - ground, axis=-1) * mask
    colour = np.median(image[distance > 0.7 * distance.max()], axis=0)  # the inside, not the antialiased edge
    towards = colour - ground
    alpha = np.clip((image - ground) @ towards / (towards @ towards), 0, 1)
    ys, xs = np.nonzero(mask & (alpha > 0.4))
    if not len(ys):
        return None
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    cut = (alpha * mask)[top:bottom, left:right]
    fits = {kind: outline_match(cut, kind) for kind in grammar.kinds}
    kind = max(fits, key=fits.get)
    x, y, width = (left + right) / 2 / n, (top + bottom) / 2 / n, max(cut.shape) / n
    size = grammar.sizes[-1 if width > 0.21 else 0]
    place = PLACES[grammar.cells][int(y * grammar.cells) * grammar.cells + int(x * grammar.cells)]
    return Shape(nearest(colour, COLOURS, 75), kind if fits[kind] > 0.7 else "?", size, x, y, width, place)


def read_scene(pixels, grammar):
    """What uint8 pixels (H, W, 3) show -> (background, list of Shapes). "?" stands for what has no name."""
    if len(pixels) > 64:
        pixels = np.array(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX))
    image = pixels.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    masks = components(np.linalg.norm(image - ground, axis=-1) > 60)
    speck = 0.008 * len(image) * len(image)  # the smallest object covers three times as much
    shapes = [read_shape(image, ground, mask, GRAMMARS[grammar]) for mask in masks if mask.sum() >= speck]
    return nearest(ground, BACKGROUNDS, 40), list(filter(None, shapes))


def read_places(pixels, grammar):
    """What an image shows: (background, {place: Shape}). Several shapes in one place have no name."""
    background, shapes = read_scene(pixels, grammar)
    found = {}
    for shape in shapes:
        found[shape.place] = replace(shape, colour="?", kind="?") if shape.place in found else shape
    return background, found


class Claims(NamedTuple):
    """What a caption says."""

    objects: list  # (size, colour, kind, place) each
    relation: str  # of the first object to the second, or ""
    background: str


def parse_caption(text, grammar):
    """A sentence of a grammar -> Claims, or None if it is no sentence of it."""
    kinds, _, cells, sizes, backgrounds = GRAMMARS[grammar]
    ground = f" on a ({'|'.join(backgrounds)}) background" if len(backgrounds) > 1 else "()"
    size = f"({'|'.join(sizes)}) " if len(sizes) > 1 else "()"
    place = f"(?: at the ({'|'.join(PLACES[cells])}))?" if cells else "()"
    thing = f"a {size}({'|'.join(COLOURS)}) ({'|'.join(kinds)}){place}"
    found = re.fullmatch(f"(.*){ground}", text.strip())
    if not found:
        return None
    text, background = found.groups()
    relation = re.search(f" ({'|'.join(RELATIONS)}) (?=a )", text)
    parts = [text[: relation.start()], text[relation.end() :]] if relation else re.split(", | and ", text)
    found = [re.fullmatch(thing, part) for part in parts]
    if None in found:
        return None
    objects = [match.groups(default="") for match in found]
    if any(bool(place) == bool(relation) for *_, place in objects):
        return None  # a caption tells either every place, or the relation
    return Claims(objects, relation.group(1) if relation else "", background)


def judge(caption, pixels, grammar):
    """Do a caption and an image agree? -> {aspect: bool}.

    Each aspect is compared alone, shapes with their sizes, the relation or places with the background. "all":
    one assignment of the image's objects to the caption's is right in everything.
    """
    claims = parse_caption(caption, grammar)
    background, found = read_scene(pixels, grammar)
    if claims is None or len(claims.objects) != len(found):
        return dict.fromkeys(ASPECTS, False)
    best = (0, False)  # how many names are right, and whether the places are
    for order in itertools.permutations(found):
        names, placed = 0, claims.background in ("", background)
        for shape, (size, colour, kind, place) in zip(order, claims.objects):
            names += (shape.colour == colour) + ((shape.size, shape.kind) == (size, kind))
            placed = placed and place in ("", shape.place)
        if claims.relation:
            (a, b), (dx, dy) = order, RELATIONS[claims.relation]
            along = (a.x - b.x) * dx + (a.y - b.y) * dy
            placed = placed and along > abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx)
        best = max(best, (names, placed))
    names, placed = best
    sizes, colours, kinds, _ = zip(*claims.objects)
    return {
        "all": names == 2 * len(found) and placed,
        "number": True,
        "colours": sorted(shape.colour for shape in found) == sorted(colours),
        "shapes": sorted((shape.size, shape.kind) for shape in found) == sorted(zip(sizes, kinds)),
        "relation": placed,
    }


def shares(verdicts):
    """A list of {aspect: bool} -> {aspect: in which share of them it is true}."""
    means = np.mean([list(verdict.values()) for verdict in verdicts], axis=0)
    return dict(zip(verdicts[0], means.tolist()))


def exact(grammar):
    """The metric of the built-in images: which share of the drawn images and written captions is right."""

    def metric(pictures, drawn, written, references):
        prompts = [judge(reference[0], image, grammar) for reference, image in zip(references, drawn)]
        captions = [judge(text, image, grammar) for text, image in zip(written, pictures)]
        return {"prompts": shares(prompts), "captions": shares(captions)}

    return metric
