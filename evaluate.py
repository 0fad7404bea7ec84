"""How good is it? Exact scores on the built-in scenes; CIDEr, FID, CLIP score and perplexity on real data (paper, section 4.2).

    python evaluate.py                        the newest checkpoint under out/
    python evaluate.py out/small --judged 500 --json scores.json
    python evaluate.py out/coco --judged 5000 --inception weights-inception-2015-12-05-6726825d.pth --clip clip-vit-base-patch32 --text wiki.txt

A picture is judged by `read_scene`, a program without a neural network: it finds the connected blobs, takes their colour,
and compares their outline with each shape's. A caption is parsed by the grammar that wrote the training captions. The one
function `judge` says whether a caption and a picture agree; it scores pictures drawn from captions, and captions written
from pictures. A caption need not repeat the one that the picture was drawn from: either object may come first, and a
relation may be told from either side. `judge_change` compares two pictures, for edits and stories: is what was asked done, and all
else as it was? Real data has no such judge: the last section has what is measured there.
"""

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from attention_mask import transfusion_mask
from data import (BACKGROUNDS, COLOURS, GRAMMARS, NO_LOSS, PLACES, RELATIONS, DataConfig, Found, Pairs, Scenes, collate, fitting, open_pairs,
                  read_jsonl, read_txt, readable, sprite, to_pixels)  # fmt: skip
from diffusion import SAMPLERS
from sample import Parser, check_folder, generate, load, newest_checkpoint, pick_device, report_errors
from vae import load_checkpoint

ASPECTS = ("all", "number", "colours", "shapes", "relation")
CHANGE_ASPECTS = ("all", "scene", "changed", "kept")  # of edits and stories


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
    allowed = GRAMMARS[grammar]
    size = f"(?:({'|'.join(allowed.sizes)}) )" if allowed.sizes != ("",) else "()"
    place = f"(?: at the ({'|'.join(sorted(PLACES[allowed.cells], key=len, reverse=True))}))?" if allowed.cells else "()"
    return re.compile(f"a {size}({'|'.join(COLOURS)}) ({'|'.join(allowed.kinds)}){place}")


def parse_caption(text, grammar):
    """A sentence of a grammar -> Claims, or None if it is no sentence of it."""
    allowed, text, background = GRAMMARS[grammar], text.strip(), ""
    if len(allowed.backgrounds) > 1:
        found = re.fullmatch(f"(.*) on a ({'|'.join(allowed.backgrounds)}) background", text)
        if not found:
            return None
        text, background = found.groups()
    relation = re.search(f" ({'|'.join(RELATIONS)}) (?=a )", text)
    parts = [text[: relation.start()], text[relation.end() :]] if relation else re.split(", | and ", text)
    objects = [object_pattern(grammar).fullmatch(part) for part in parts]
    if None in objects:
        return None
    objects = [o.groups(default="") for o in objects]
    if any(bool(place) == bool(relation) for *_, place in objects) or (len(objects) > 1 and not relation and not allowed.cells):
        return None  # either every place is told, or the relation
    return Claims(objects, relation.group(1) if relation else "", background)


def place_of(blob, cells):
    """The name of the place, of cells x cells, in which an object's centre lies."""
    return PLACES[cells][int(blob.y * cells) * cells + int(blob.x * cells)]


def judge(caption, pixels, grammar):
    """Do a caption and a picture agree? -> {aspect: bool}: the number of objects, the colours, the shapes (with sizes), the
    relation or places (with the background), each alone, and "all": one assignment of the objects that satisfies everything."""
    allowed, claims = GRAMMARS[grammar], parse_caption(caption, grammar)
    background, blobs = read_scene(pixels, allowed.kinds)
    if claims is None or len(claims.objects) != len(blobs):
        same = {"number": claims is not None and len(claims.objects) == len(blobs), "colours": False, "shapes": False, "relation": False}
        return same | {"all": False}

    def size_of(blob):
        return "" if allowed.sizes == ("",) else "large" if blob.width > 0.21 else "small"

    def related(a, b):
        dx, dy = RELATIONS[claims.relation]
        across, along = abs((a.x - b.x) * dy) + abs((a.y - b.y) * dx), (a.x - b.x) * dx + (a.y - b.y) * dy
        return along > across

    def compare(order):
        """How one assignment of blobs to the claimed objects fares: names right, places right."""
        names = sum((b.colour == colour) + ((size_of(b), b.kind) == (size, kind)) for b, (size, colour, kind, _) in zip(order, claims.objects))
        placed = related(*order) if claims.relation else all(place_of(b, allowed.cells) == place for b, (*_, place) in zip(order, claims.objects))
        return names, placed and claims.background in ("", background)

    names, placed = max(compare(order) for order in itertools.permutations(blobs))
    return {
        "all": names == 2 * len(blobs) and placed,
        "number": True,
        "colours": sorted(b.colour for b in blobs) == sorted(colour for _, colour, _, _ in claims.objects),
        "shapes": sorted((size_of(b), b.kind) for b in blobs) == sorted((size, kind) for size, _, kind, _ in claims.objects),
        "relation": placed,
    }


def judge_change(before, after, pixels_before, pixels, grammar):
    """Has a picture changed as its scene did, from the Scene `before` to `after`? -> {"all", "scene", "changed", "kept": bool}.

    scene: the new picture shows `after`, as `judge` sees it; changed: what was asked is done; kept: all else is as the picture
    before has it, right or wrong: the background, the number of objects, their colours, shapes, centres (a moved object's: moved by
    what was asked), which may be 1/32 of the side off, and widths, which may be 2/32 off; all: the three together.
    """
    (old,), (new,) = ([s for s in a.shapes if s not in b.shapes] or [None] for a, b in ((before, after), (after, before)))
    (ground, was), (ground_now, now) = (read_places(p, grammar) for p in (pixels_before, pixels))

    def as_wide(a, b):
        return abs(a.width - b.width) < 2.01 / 32

    def same(a, b, colour=True, dx=0.0, dy=0.0):
        """Is b the object a, moved by (dx, dy)?"""
        return a.kind == b.kind and (a.colour == b.colour or not colour) and max(abs(a.x + dx - b.x), abs(a.y + dy - b.y)) < 1.01 / 32 and as_wide(a, b)

    others, others_now = ({place: blob for place, blob in blobs.items() if place not in [s.place for s in (old, new) if s]} for blobs in (was, now))
    kept = ground == ground_now and others.keys() == others_now.keys() and all(same(blob, others_now[place]) for place, blob in others.items())
    left, taken = (now.get(s.place) if s else None for s in (old, new))  # what is now where the object was, and where it should be
    if not new:
        changed = not left
    elif not old:
        changed = bool(taken) and (taken.colour, taken.kind) == (new.colour, new.kind) and as_wide(taken, read_places(after.render(), grammar)[1][new.place])
    else:
        moved, blob, blob_now = old.place != new.place, was.get(old.place), taken or left
        changed = bool(taken) and (not left if moved else taken.colour == new.colour)
        way = (new.x - old.x, new.y - old.y) if taken else (0.0, 0.0)  # what was not moved is to be as it was
        kept = kept and bool(blob and blob_now) and same(blob, blob_now, moved, *way)
    scene = judge(after.caption, pixels, grammar)["all"]
    return {"all": scene and changed and kept, "scene": scene, "changed": changed, "kept": kept}


def read_places(pixels, grammar):
    """What a picture shows, place by place -> (background's name, {place: Blob}). Several objects in one place are one that is like none."""
    background, blobs = read_scene(pixels, GRAMMARS[grammar].kinds)
    found = {}
    for blob in blobs:
        place = place_of(blob, GRAMMARS[grammar].cells)
        found[place] = replace(blob, colour="?", kind="?") if place in found else blob
    return background, found


# ---- Scores ---------------------------------------------------------------------------------------------------------


def draw(trained, prompts, seed=0, progress=lambda x: x, **options):
    """A uint8 picture for each prompt: a caption, or a document of strings and PIL images that ends in text."""
    pictures = []
    for i in progress(range(0, len(prompts), 100)):
        chunk = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts[i : i + 100]]
        documents = generate(trained, chunk, range(seed + i, seed + i + len(chunk)), max_tokens=0, **options)
        pictures += [np.array(document[-1]) for document in documents]
    return pictures


def prompt_accuracy(trained, captions, grammar, seed=0, progress=lambda x: x, **options):
    """Draw each caption and judge the picture -> ({aspect: share}, pictures)."""
    pictures = draw(trained, captions, seed, progress, **options)
    verdicts = [judge(caption, picture, grammar) for caption, picture in zip(captions, pictures)]
    return {aspect: float(np.mean([v[aspect] for v in verdicts])) for aspect in ASPECTS}, pictures


def tell(trained, stories, seed=0):
    """Draw stories, (scenes, instructions) each as data.Stories makes them, picture by picture, after what the model drew before ->
    list of documents of strings and PIL images. A model of edits is given the first picture, others its caption."""
    edits = trained.config["data"]["documents"] == "edits"
    documents = [[Image.fromarray(scenes[0].render())] if edits else [] for scenes, _ in stories]
    texts = [instructions if edits else [scenes[0].caption, *instructions] for scenes, instructions in stories]
    for k, of_all in enumerate(zip(*texts)):
        documents = [[*document, text] for document, text in zip(documents, of_all)]
        pictures = draw(trained, documents, seed + k * len(stories))  # other noise for each picture of a story
        documents = [[*document, Image.fromarray(picture)] for document, picture in zip(documents, pictures)]
    return documents


def story_accuracy(trained, stories, grammar, seed=0):
    """Have stories drawn, their instructions given, and judge them -> {what: {aspect: share, "n": of how many}}. what: "edits"; or "stories",
    right if all of their pictures are, and "picture 1" and so on; then the changes once more, by the first word of their instruction."""
    whole, by_word = defaultdict(list), defaultdict(list)
    for (scenes, instructions), document in zip(stories, tell(trained, stories, seed)):
        pictures = [np.array(part) for part in document if not isinstance(part, str)]
        verdicts = [judge_change(*scenes[k : k + 2], *pictures[k : k + 2], grammar) for k in range(len(instructions))]
        for instruction, verdict in zip(instructions, verdicts):
            by_word[instruction.split()[0]].append(verdict)
        if isinstance(document[0], str):  # the first picture, too, was drawn
            verdicts = [{"all": judge(scenes[0].caption, pictures[0], grammar)["all"]}, *verdicts]
            whole["stories"].append({"all": all(verdict["all"] for verdict in verdicts)})
        for k, verdict in enumerate(verdicts, start=1):
            whole["edits" if len(verdicts) == 1 else f"picture {k}"].append(verdict)
    rows = whole | dict(sorted(by_word.items()))
    return {what: {aspect: float(np.mean([v[aspect] for v in found])) for aspect in found[0]} | {"n": len(found)} for what, found in rows.items()}


def own_story_accuracy(trained, scenes, source, seed=0):
    """As `story_accuracy`, but only the first scene's caption is given: the model, which goes on as sample.py lets it, writes the
    instructions itself. source: the data.Stories whose grammar it is to follow. "own words": the share of instructions that the scene
    allows; "own stories": of stories in which all are such and all pictures right."""
    number, grammar = 1 + source.changes, source.scenes.grammar
    documents = generate(trained, [[scene.caption] for scene in scenes], range(seed, seed + len(scenes)), max_images=number)
    told, right = [], []
    for scene, document in zip(scenes, documents):
        parts = [*document[1:], *[None] * 2 * number]  # picture, instruction, picture, ...
        verdicts = [isinstance(parts[0], Image.Image) and judge(scene.caption, np.array(parts[0]), grammar)["all"]]
        for last, text, picture in zip(parts[0::2], parts[1::2], parts[2 : 2 * number : 2]):
            before, scene = scene, source.following(scene).get(text.strip()) if scene and isinstance(text, str) else None
            told.append(scene is not None)
            drawn = all(isinstance(part, Image.Image) for part in (last, picture))
            verdicts.append(told[-1] and drawn and judge_change(before, scene, np.array(last), np.array(picture), grammar)["all"])
        right.append(all(verdicts))
    return {what: {"all": float(np.mean(found)), "n": len(found)} for what, found in (("own words", told), ("own stories", right))}


def write_captions(trained, pictures, progress=lambda x: x):
    """Greedy captions of uint8 pictures."""
    captions = []
    for i in progress(range(0, len(pictures), 100)):
        chunk = [[Image.fromarray(p)] for p in pictures[i : i + 100]]
        captions += [document[1] if len(document) > 1 else "" for document in generate(trained, chunk, temperature=0.0, max_images=0, max_tokens=64)]
    return captions


@torch.no_grad()
def perplexity(trained, texts):
    """Of texts alone (<BOS> text, each token from those before it) -> (per token, per byte). Texts longer than the training's
    rows are cut into pieces of that length, each with a <BOS> of its own. Raises ValueError if there is nothing to read."""
    tokenizer, device, max_length = trained.tokenizer, next(trained.model.parameters()).device, trained.config["data"]["seq_len"] - 1
    pieces = [ids[i : i + max_length] for ids in map(tokenizer.encode, texts) for i in range(0, len(ids), max_length)]
    if not pieces:
        raise ValueError("there is no text to measure the perplexity of")
    longest, total, tokens = 1 + max(map(len, pieces)), 0.0, 0
    rows = max(1, 4096 // longest)  # the logits of 4096 positions fit into memory
    for i in range(0, len(pieces), rows):
        batch = collate([[[piece]] for piece in pieces[i : i + rows]], tokenizer, longest, 0).to(device)
        targets = batch.targets.masked_fill(batch.targets == tokenizer.eos, NO_LOSS)  # what follows a text is no text
        no_images = torch.zeros(0, trained.model.config.latent_channels, *2 * [trained.model.config.latent_size], device=device)
        mask = transfusion_mask(batch.image_id, batch.doc_id)
        logits, _ = trained.model(batch.tokens, batch.image_id, batch.positions, mask, no_images, no_images[:, 0, 0, 0])
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_LOSS, reduction="sum").item()
        tokens += int((targets != NO_LOSS).sum())
    return math.exp(total / tokens), math.exp(total / sum(len(text.encode()) for text in texts))


def evaluate(trained, judged=300, seed=1, progress=lambda x: x, inception="", clip=""):
    """Score a model on `judged` pictures of each split -> nested dict, as `format_scores` prints and --json writes it.

    On the built-in scenes: prompts and captions, judged exactly. On your own data: captions by CIDEr-D, and by the share that
    is the picture's own word for word; drawn pictures by the Frechet distance of their latents. On either, FID and CLIP
    score if the files that they need are given. Edits and stories: each picture, judged exactly by `judge_change`.
    Raises ValueError if those cannot be used.
    """
    data, device = replace(DataConfig(**trained.config["data"]), latents=""), next(trained.model.parameters()).device
    if data.documents != "pairs" and (inception or clip):
        raise ValueError(f"--inception and --clip score what is drawn from captions, but this model was trained on {data.documents}; leave them out")
    splits = Pairs.SPLITS[1:] if data.data else Scenes.SPLITS[1:]
    features, clip_score = inception and inception_features(inception, device), clip and clip_scorer(clip, device)
    scores = {"judged": judged, "seed": seed, "splits": {}}
    for split in progress(splits):
        pairs = open_pairs(data, split, seed)
        if data.documents != "pairs":
            stories = [pairs.example(i) for i in range(judged)]
            changes = story_accuracy(trained, stories, data.grammar, seed)
            if data.documents == "stories":
                begin = map(Scenes(data.grammar, data.image_size, split, seed).example, itertools.count())  # all of the split, as stories' first scenes are not
                begin = itertools.islice((scene for scene in begin if not scene.relation), judged)
                changes |= own_story_accuracy(trained, list(begin), pairs, seed)
            scores["splits"][split] = {"n": judged, "changes": changes}
            continue
        numbers = fitting(pairs, judged, trained.tokenizer, data.seq_len, trained.model.config.n_patches)
        n = len(numbers)
        numbers, pictures = zip(*readable(pairs, itertools.cycle(numbers), n))  # in the place of a broken picture, one of them comes again
        references = [pairs.captions(i) for i in numbers]
        captions = [reference[0] for reference in references]
        written, found = write_captions(trained, pictures), {}
        if data.data:
            found["captions"] = {"all": float(np.mean([text in reference for text, reference in zip(written, references)]))}
            found["cider"] = cider([words(text) for text in written], [[words(text) for text in reference] for reference in references])
            drawn = draw(trained, captions, seed)
            found["latent_frechet_distance"] = frechet_distance(*(latent_features(trained.vae, x, device) for x in (pictures, drawn)))
        else:
            found["prompts"], drawn = prompt_accuracy(trained, captions, data.grammar, seed)
            verdicts = [judge(text, picture, data.grammar) for text, picture in zip(written, pictures)]
            found["captions"] = {aspect: float(np.mean([v[aspect] for v in verdicts])) for aspect in ASPECTS}
        if features:
            found["fid"] = frechet_distance(features(pictures), features(drawn))
        if clip_score:
            found["clip_score"] = clip_score(drawn, captions)
        found["perplexity_per_token"], found["perplexity_per_byte"] = perplexity(trained, captions)
        scores["splits"][split] = {"n": n} | found
    return scores


def format_scores(scores):
    """The scores as a table to print."""
    rows, aspects = {}, ASPECTS  # rows: {(split, what): {aspect: share}}
    for split, found in scores["splits"].items():
        rows |= {(split, what): found[what] for what in ("prompts", "captions") if what in found}
        if "changes" in found:
            rows, aspects = rows | {(split, what): shares for what, shares in found["changes"].items()}, CHANGE_ASPECTS
    lines = [f"{'':24}{'right':>8}" + "".join(f"{aspect:>10}" for aspect in aspects[1:]) + "     (% of those judged)"]
    for (split, what), shares in rows.items():
        cells = "".join(f"{100 * shares[aspect]:{8 if aspect == 'all' else 10}.1f}" for aspect in aspects if aspect in shares)
        lines.append(f"{split.replace('_', ' ') + ', ' + what:24}{cells}     n = {shares.get('n', scores['splits'][split]['n'])}")
    names = {"cider": "CIDEr-D of the captions", "fid": "FID", "clip_score": "CLIP score", "latent_frechet_distance": "Frechet distance of latents (not FID)"}
    for split, found in scores["splits"].items():
        split = split.replace("_", " ")
        if "perplexity_per_token" in found:
            lines.append(f"{split:24}text perplexity {found['perplexity_per_token']:.3f} per token, {found['perplexity_per_byte']:.3f} per byte")
        lines += [f"{split:24}{name} {found[key]:.3f}     n = {found['n']}" for key, name in names.items() if key in found]
    found = list(scores["splits"].values())[-1]
    lines += [f"no {names[key]}: {how}" for key, how in HOW_TO_GET.items() if "cider" in found and key not in found]
    if "text" in scores:
        per_token, per_byte = scores["text"]["perplexity_per_token"], scores["text"]["perplexity_per_byte"]
        lines.append(f"{scores['text']['path']}: text perplexity {per_token:.3f} per token, {per_byte:.3f} per byte")
    return "\n".join(lines)


# ---- Scores on real data (section 4.2) ------------------------------------------------------------------------------

HOW_TO_GET = {
    "fid": "give --inception FILE, FID's own network (weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0), "
           "and pip install torch-fidelity",
    "clip_score": "give --clip FOLDER, a CLIP as transformers or open_clip saves it (such as openai/clip-vit-base-patch32), and pip install that package",
}  # fmt: skip


def words(text):
    """A caption as CIDEr-D compares it, like the Penn Treebank's tokeniser that coco-caption runs (Stanford's, in Java): lower case, without
    punctuation; `dog's`, `don't` and `I'm` are two words, `t-shirt` and `3.5` one. That one also cuts `cannot` and `gonna` in two, and keeps
    `o'clock`, abbreviations with dots (`u.s.`) and symbols (`$`, `&`) as words, which here fall apart or away."""
    return re.findall(r"\w+(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b|\w+(?:-\w+|(?<=\d)[.,]\d+)*", text.lower().replace("\u2019", "'"))


def cider(candidates, references, n=4, sigma=6.0):
    """CIDEr-D (Vedantam et al. 2015) as coco-caption computes it, from 0 to 10: one caption per picture, as a list of words,
    and for each picture the list of its references, likewise. Papers print it times 100."""

    def counts(caption):
        return [Counter(zip(*(caption[i:] for i in range(size)))) for size in range(1, n + 1)]  # by length of the n-gram

    references = [[counts(caption) for caption in of_picture] for of_picture in references]
    # In how many pictures' references an n-gram occurs.
    frequency = Counter(ngram for of_picture in references for ngram in {ngram for caption in of_picture for grams in caption for ngram in grams})

    def weigh(caption):
        """tf-idf by length of n-gram, their norms, and the caption's length (counted in pairs of words, as coco-caption does)."""
        vectors = [{ngram: k * math.log(len(references) / max(1, frequency[ngram])) for ngram, k in grams.items()} for grams in caption]
        return vectors, [math.hypot(*vector.values()) for vector in vectors], sum(caption[1].values())

    def similarity(candidate, reference):
        (a, a_norms, a_length), (b, b_norms, b_length) = candidate, reference
        cosines = [sum(min(x, w[ngram]) * w[ngram] for ngram, x in v.items() if ngram in w) / ((p * q) or 1) for v, w, p, q in zip(a, b, a_norms, b_norms)]
        return sum(cosines) / n * math.exp(-((a_length - b_length) ** 2) / (2 * sigma**2))

    scores = []
    for caption, of_picture in zip(candidates, references, strict=True):
        candidate = weigh(counts(caption))
        scores.append(10 * sum(similarity(candidate, weigh(reference)) for reference in of_picture) / len(of_picture))
    return sum(scores) / len(scores)


def frechet_distance(a, b):
    """Between the Gaussians that have the mean and covariance of two sets of features (N, D) (Heusel et al. 2017; on
    Inception's features, FID): |m - n|^2 + tr(S + T - 2 (S T)^(1/2)). Biased upwards where N is not many times D."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    (m, s), (n, t) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False, ddof=min(1, len(x) - 1)))) for x in (a, b))
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # S T has the eigenvalues of S^(1/2) T S^(1/2), which is symmetric and so gives no complex ones.
    mixed = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * mixed)


@torch.no_grad()
def latent_features(vae, pictures, device="cpu"):
    """What the Frechet distance of latents compares: the VAE's standardised latents, averaged over a grid of 4 x 4 -> (N, 16 C)."""
    chunks = [to_pixels(np.stack(pictures[i : i + 32])).to(device) for i in range(0, len(pictures), 32)]
    return torch.cat([F.adaptive_avg_pool2d(vae.encode(chunk), 4).flatten(1) for chunk in chunks]).double().cpu().numpy()


def inception_features(path, device="cpu"):
    """The network that FID is defined by -> function: uint8 pictures (H, W, 3) -> features (N, 2048). path: its weights.
    Raises ValueError if they, or the package, cannot be used."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    except ImportError:
        raise ValueError(f"--inception: no FID; {HOW_TO_GET['fid']}") from None
    if not Path(path).is_file():
        raise ValueError(f"--inception {path}: no such file; {HOW_TO_GET['fid']}")
    load_checkpoint(path)  # it must hold tensors and nothing else: the package does not ask
    try:
        network = Inception("inception", ["2048"], feature_extractor_weights_path=str(path)).to(device)
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"--inception {path}: is another network; {HOW_TO_GET['fid']}") from None

    def features(pictures):
        chunks = [torch.from_numpy(np.stack(pictures[i : i + 32])).movedim(-1, 1).to(device) for i in range(0, len(pictures), 32)]
        return torch.cat([network(chunk)[0] for chunk in chunks]).double().cpu().numpy()

    return features


def clip_scorer(path, device="cpu"):
    """A CLIP in a folder -> function: uint8 pictures, captions -> the CLIP score (Hessel et al. 2021), 100 times the mean cosine
    of their embeddings, those below 0 as 0. Raises ValueError if it, or its package, cannot be used."""
    try:
        if (Path(path) / "open_clip_config.json").exists():
            import open_clip

            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
            tokenize = open_clip.get_tokenizer(f"local-dir:{path}")

            def embed(pictures, texts):
                return model.encode_image(torch.stack([preprocess(p) for p in pictures]).to(device)), model.encode_text(tokenize(texts).to(device))
        elif (Path(path) / "config.json").exists():
            from transformers import CLIPModel, CLIPProcessor

            model, processor = (kind.from_pretrained(path, local_files_only=True) for kind in (CLIPModel, CLIPProcessor))

            def embed(pictures, texts):
                found = model(**processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True).to(device))
                return found.image_embeds, found.text_embeds
        else:
            raise ValueError("there is no config.json and no open_clip_config.json")
        model.to(device).eval()
    except Exception as error:  # the packages raise many kinds
        raise ValueError(f"--clip {path}: no CLIP score ({' '.join(str(error).split())[:200]}); {HOW_TO_GET['clip_score']}") from None

    @torch.no_grad()
    def score(pictures, captions):
        cosines = []
        for i in range(0, len(pictures), 32):
            image, text = embed([Image.fromarray(p) for p in pictures[i : i + 32]], list(captions[i : i + 32]))
            cosines.append(F.cosine_similarity(image, text).clamp(min=0))
        return 100 * torch.cat(cosines).mean().item()

    return score


def read_texts(path):
    """The texts of a .txt or .jsonl file. Raises ValueError, naming the file."""
    if not Path(path).is_file():
        raise ValueError(f"--text {path}: no such file")
    found = Found("texts")
    texts = [text for _, text in (read_jsonl(Path(path), found) if Path(path).suffix in (".jsonl", ".json") else read_txt(Path(path)))]
    if not any(texts):
        raise ValueError(f"--text {path}: holds no text; it must be UTF-8, or JSON lines with a \"text\" on each")
    return texts


def main(argv=None):
    """The command line."""
    parser = Parser(description="Score a checkpoint.", allow_abbrev=False)
    parser.add_argument("ckpt", nargs="?", help="checkpoint or a run's folder (default: the newest under out/)")
    parser.add_argument("--judged", type=int, default=300, help="pictures per split (default 300)")
    parser.add_argument("--seed", type=int, default=1, help="which pictures and noise (default 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="(default: the preset's)")
    parser.add_argument("--guidance_scale", type=float, help="1 = none (default: the preset's)")
    parser.add_argument("--code_temperature", type=float, help="of a discrete model's images, 0 = the likeliest codes (default: the preset's)")
    parser.add_argument("--code_top_p", type=float, help="of a discrete model's images (default: the preset's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--text", metavar="FILE", help="also measure the perplexity of this held-out text, .txt or .jsonl")
    parser.add_argument("--inception", metavar="FILE", default="", help="weights of FID's network: also measure FID")
    parser.add_argument("--clip", metavar="FOLDER", default="", help="a CLIP of transformers or open_clip: also measure the CLIP score")
    parser.add_argument("--json", metavar="FILE", help="also write the scores there")
    args = parser.parse_args(argv)
    if args.judged < 1:
        raise ValueError(f"--judged is {args.judged}; it must be at least 1")
    if args.text:
        read_texts(args.text)  # whatever is wrong with it, say so before the long work
    if args.json:
        check_folder(Path(args.json).parent, f"--json {args.json}")
        if Path(args.json).is_dir():
            raise ValueError(f"--json {args.json}: is a folder; name a file")
    trained = load(args.ckpt or newest_checkpoint(), pick_device(args.device))
    discrete, of_diffusion, of_codes = trained.model.config.images == "discrete", ("steps", "sampler"), ("code_temperature", "code_top_p")
    given = {name: getattr(args, name) for name in (*of_diffusion, *of_codes, "guidance_scale") if getattr(args, name) is not None}
    for name in of_diffusion if discrete else of_codes:
        if name in given:
            raise ValueError(f"--{name}: this model's images are {'discrete' if discrete else 'continuous'}; leave it out")
    trained.config.update(given)
    scores = evaluate(trained, args.judged, args.seed, lambda splits: tqdm(splits, desc="evaluate"), args.inception, args.clip)
    if args.text:
        scores["text"] = {"path": args.text} | dict(zip(("perplexity_per_token", "perplexity_per_byte"), perplexity(trained, read_texts(args.text))))
    print(format_scores(scores))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(scores, indent=1))


if __name__ == "__main__":
    report_errors(main)
