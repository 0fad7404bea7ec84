"""How good is it? Exact scores on the built-in scenes, and perplexity on any data (paper, section 4.2, has FID and CIDEr there).

    python evaluate.py                        the newest checkpoint under out/
    python evaluate.py out/small --judged 500 --json scores.json

A picture is judged by `read_scene`, a program without a neural network: it finds the connected blobs, takes their colour,
and compares their outline with each shape's. A caption is parsed by the grammar that wrote the training captions. The one
function `judge` says whether a caption and a picture agree; it scores pictures drawn from captions, and captions written
from pictures. A caption need not repeat the one that the picture was drawn from: either object may come first, and a
relation may be told from either side.
"""

import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from attention_mask import transfusion_mask
from data import BACKGROUNDS, COLOURS, GRAMMARS, NO_LOSS, PLACES, RELATIONS, DataConfig, Pairs, Scenes, collate, open_pairs, readable, sprite
from sample import Parser, generate, load, newest_checkpoint, pick_device

ASPECTS = ("all", "number", "colours", "shapes", "relation")


# ---- Reading a picture ----------------------------------------------------------------------------------------------


@dataclass
class Blob:
    """One object found in a picture: colour and kind ("?" if it is like none), centre and width as fractions of the side."""

    colour: str
    kind: str
    x: float
    y: float
    width: float


def components(mask):
    """Label the 4-connected regions of a bool mask (H, W) -> list of bool masks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = np.stack([padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        spread = np.where(mask, around.max(0), 0)
        if (spread == labels).all():
            return [labels == n for n in np.unique(labels) if n]
        labels = spread


def nearest(rgb, palette, tolerance):
    """Name of the palette's colour nearest to rgb, "?" if all are farther than the tolerance."""
    name, distance = min(((n, np.linalg.norm(rgb - np.array(c))) for n, c in palette.items()), key=lambda item: item[1])
    return name if distance <= tolerance else "?"


def outline_match(alpha, kind):
    """How well a blob's coverage (h, w), cut at its bounding box, fits a shape: intersection over union, in 0..1, at the best
    of a few sizes and positions."""
    h, w = alpha.shape
    pad = 2
    padded = np.pad(alpha, pad)
    best = 0.0
    for side in range(max(3, min(h, w) - 1), max(h, w) + 2):
        template = sprite(kind, side)
        for top in {(h - side) // 2 + pad, (h - side + 1) // 2 + pad}:
            for left in {(w - side) // 2 + pad, (w - side + 1) // 2 + pad}:
                if top < 0 or left < 0 or top + side > padded.shape[0] or left + side > padded.shape[1]:
                    continue
                window = padded[top : top + side, left : left + side]
                both = np.minimum(window, template).sum()
                best = max(best, both / (padded.sum() + template.sum() - both))
    return best


def read_scene(pixels, kinds):
    """What a picture shows: uint8 (H, W, 3) -> (background's name, list of Blobs). kinds: the shapes that may occur."""
    if len(pixels) > 64:
        pixels = np.array(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX))
    image = pixels.astype(np.float32)
    n = len(image)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    blobs = []
    for mask in components(np.linalg.norm(image - ground, axis=-1) > 60):
        if mask.sum() < 0.008 * n * n:  # a speck: the smallest object covers three times as much
            continue
        distance = np.linalg.norm(image - ground, axis=-1) * mask
        colour = np.median(image[distance > 0.7 * distance.max()], axis=0)  # the inside, not the antialiased edge
        towards = colour - ground
        alpha = np.clip((image - ground) @ towards / (towards @ towards), 0, 1)
        ys, xs = np.nonzero(mask & (alpha > 0.4))
        if not len(ys):
            continue
        box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        cut = (alpha * mask)[box]
        fits = {kind: outline_match(cut, kind) for kind in kinds}
        kind = max(fits, key=fits.get)
        blobs.append(Blob(nearest(colour, COLOURS, 75), kind if fits[kind] > 0.7 else "?", (xs.min() + xs.max() + 1) / 2 / n,
                          (ys.min() + ys.max() + 1) / 2 / n, max(cut.shape) / n))  # fmt: skip
    return nearest(ground, BACKGROUNDS, 40), blobs


# ---- Reading a caption ----------------------------------------------------------------------------------------------


@dataclass
class Claims:
    """What a caption says: objects as (size, colour, kind, place), the relation of the first to the second, the background."""

    objects: list
    relation: str = ""
    background: str = ""


@lru_cache(maxsize=None)
def object_pattern(grammar):
    """The regular expression of one object in a caption: size, colour, kind and place as groups."""
    kinds, _, cells, sizes, _ = GRAMMARS[grammar]
    size = f"(?:({'|'.join(sizes)}) )" if sizes != ("",) else "()"
    place = f"(?: at the ({'|'.join(sorted(PLACES[cells], key=len, reverse=True))}))?" if cells else "()"
    return re.compile(f"a {size}({'|'.join(COLOURS)}) ({'|'.join(kinds)}){place}")


def parse_caption(text, grammar):
    """A sentence of a grammar -> Claims, or None if it is no sentence of it."""
    backgrounds = GRAMMARS[grammar][4]
    text, background = text.strip(), ""
    if len(backgrounds) > 1:
        found = re.fullmatch(f"(.*) on a ({'|'.join(backgrounds)}) background", text)
        if not found:
            return None
        text, background = found.groups()
    relation = re.search(f" ({'|'.join(RELATIONS)}) (?=a )", text)
    parts = [text[: relation.start()], text[relation.end() :]] if relation else re.split(", | and ", text)
    objects = [object_pattern(grammar).fullmatch(part) for part in parts]
    if None in objects:
        return None
    objects = [o.groups(default="") for o in objects]
    if any(bool(place) == bool(relation) for *_, place in objects) or (len(objects) > 1 and not relation and not GRAMMARS[grammar][2]):
        return None  # either every place is told, or the relation
    return Claims(objects, relation.group(1) if relation else "", background)


def judge(caption, pixels, grammar):
    """Do a caption and a picture agree? -> {aspect: bool}: the number of objects, the colours, the shapes (with sizes), the
    relation or places (with the background), each alone, and "all": one assignment of the objects that satisfies everything."""
    kinds, _, cells, sizes, _ = GRAMMARS[grammar]
    claims = parse_caption(caption, grammar)
    background, blobs = read_scene(pixels, kinds)
    if claims is None or len(claims.objects) != len(blobs):
        same = {"number": claims is not None and len(claims.objects) == len(blobs), "colours": False, "shapes": False, "relation": False}
        return same | {"all": False}

    def size_of(blob):
        return "" if sizes == ("",) else "large" if blob.width > 0.21 else "small"

    def place_of(blob):
        return PLACES[cells][int(blob.y * cells) * cells + int(blob.x * cells)]

    def related(a, b):
        dx, dy = RELATIONS[claims.relation]
        across, along = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx), (a.x - b.x) * dx + (a.y - b.y) * dy
        return along > across

    def compare(order):
        """How one assignment of blobs to the claimed objects fares: names right, places right."""
        names = sum((b.colour == colour) + ((size_of(b), b.kind) == (size, kind)) for b, (size, colour, kind, _) in zip(order, claims.objects))
        placed = related(*order) if claims.relation else all(place_of(b) == place for b, (*_, place) in zip(order, claims.objects))
        return names, placed and claims.background in ("", background)

    names, placed = max(compare(order) for order in itertools.permutations(blobs))
    return {
        "all": names == 2 * len(blobs) and placed,
        "number": True,
        "colours": sorted(b.colour for b in blobs) == sorted(colour for _, colour, _, _ in claims.objects),
        "shapes": sorted((size_of(b), b.kind) for b in blobs) == sorted((size, kind) for size, _, kind, _ in claims.objects),
        "relation": placed,
    }


# ---- Scores ---------------------------------------------------------------------------------------------------------


def prompt_accuracy(trained, captions, grammar, seed=0, progress=lambda x: x, **options):
    """Draw each caption and judge the picture -> ({aspect: share}, pictures)."""
    documents = []
    for i in progress(range(0, len(captions), 100)):
        chunk = captions[i : i + 100]
        documents += generate(trained, [[c] for c in chunk], range(seed + i, seed + i + len(chunk)), max_tokens=0, **options)
    pictures = [document[-1] for document in documents]
    verdicts = [judge(caption, np.array(picture), grammar) for caption, picture in zip(captions, pictures)]
    return {aspect: float(np.mean([v[aspect] for v in verdicts])) for aspect in ASPECTS}, pictures


def write_captions(trained, pictures, progress=lambda x: x):
    """Greedy captions of uint8 pictures."""
    captions = []
    for i in progress(range(0, len(pictures), 100)):
        chunk = [[Image.fromarray(p)] for p in pictures[i : i + 100]]
        captions += [document[1] if len(document) > 1 else "" for document in generate(trained, chunk, temperature=0.0, max_images=0, max_tokens=64)]
    return captions


@torch.no_grad()
def perplexity(trained, captions):
    """Of the captions as text alone (<BOS> caption, each token from those before it) -> (per token, per byte)."""
    tokenizer, device = trained.tokenizer, next(trained.model.parameters()).device
    total, tokens = 0.0, 0
    for i in range(0, len(captions), 100):
        documents = [[tokenizer.encode(caption)] for caption in captions[i : i + 100]]
        longest = max(1 + len(document[0]) for document in documents)
        batch = collate([[document] for document in documents], tokenizer, longest, 0).to(device)
        targets = batch.targets.masked_fill(batch.targets == tokenizer.eos, NO_LOSS)  # what follows a caption is no text
        no_images = torch.zeros(0, trained.model.config.latent_channels, *2 * [trained.model.config.latent_size], device=device)
        mask = transfusion_mask(batch.image_id, batch.doc_id)
        logits, _ = trained.model(batch.tokens, batch.image_id, batch.positions, mask, no_images, no_images[:, 0, 0, 0])
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_LOSS, reduction="sum").item()
        tokens += int((targets != NO_LOSS).sum())
    return math.exp(total / tokens), math.exp(total / sum(len(caption.encode()) for caption in captions))


def evaluate(trained, judged=300, seed=1, progress=lambda x: x):
    """Score a model on `judged` pictures of each split -> nested dict, as `format_scores` prints and --json writes it.

    On the built-in scenes: prompts and captions, judged exactly. On a folder: the share of captions that are the picture's
    own word for word (drawn pictures have no exact judge there).
    """
    data = DataConfig(**trained.config["data"])
    splits = Pairs.SPLITS[1:] if data.data else Scenes.SPLITS[1:]
    scores = {"judged": judged, "seed": seed, "splits": {}}
    for split in progress(splits):
        pairs = open_pairs(data, split, seed)
        n = min(judged, len(pairs)) if data.data else judged
        captions, pictures = zip(*readable(pairs, 0, n))
        written = write_captions(trained, pictures)
        if data.data:
            found = {"captions": {"all": float(np.mean([a == b for a, b in zip(written, captions)]))}}
        else:
            found = {"prompts": prompt_accuracy(trained, captions, data.grammar, seed)[0]}
            verdicts = [judge(text, picture, data.grammar) for text, picture in zip(written, pictures)]
            found["captions"] = {aspect: float(np.mean([v[aspect] for v in verdicts])) for aspect in ASPECTS}
        found["perplexity_per_token"], found["perplexity_per_byte"] = perplexity(trained, captions)
        scores["splits"][split] = {"n": n} | found
    return scores


def format_scores(scores):
    """The scores as a table to print."""
    lines = [f"{'':24}{'right':>8}" + "".join(f"{aspect:>10}" for aspect in ASPECTS[1:]) + "     (% of those judged)"]
    for split, found in scores["splits"].items():
        for what in ("prompts", "captions"):
            if what in found:
                cells = "".join(f"{100 * found[what][aspect]:{8 if aspect == 'all' else 10}.1f}" for aspect in ASPECTS if aspect in found[what])
                lines.append(f"{split.replace('_', ' ') + ', ' + what:24}{cells}     n = {found['n']}")
    for split, found in scores["splits"].items():
        lines.append(f"{split.replace('_', ' '):24}text perplexity {found['perplexity_per_token']:.3f} per token, {found['perplexity_per_byte']:.3f} per byte")
    return "\n".join(lines)


def main(argv=None):
    """The command line."""
    parser = Parser(description="Score a checkpoint.", allow_abbrev=False)
    parser.add_argument("ckpt", nargs="?", help="checkpoint or a run's folder (default: the newest under out/)")
    parser.add_argument("--judged", type=int, default=300, help="pictures per split (default 300)")
    parser.add_argument("--seed", type=int, default=1, help="which pictures and noise (default 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), help="(default: the preset's)")
    parser.add_argument("--guidance_scale", type=float, help="1 = none (default: the preset's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", metavar="FILE", help="also write the scores there")
    args = parser.parse_args(argv)
    if args.judged < 1:
        raise ValueError(f"--judged is {args.judged}; it must be at least 1")
    trained = load(args.ckpt or newest_checkpoint(), pick_device(args.device))
    trained.config.update({name: getattr(args, name) for name in ("steps", "sampler", "guidance_scale") if getattr(args, name) is not None})
    scores = evaluate(trained, args.judged, args.seed, lambda splits: tqdm(splits, desc="evaluate"))
    print(format_scores(scores))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
