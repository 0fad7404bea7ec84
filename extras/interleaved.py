"""Documents of texts and images in any order, as JSON lines: --data FILE.jsonl.

A line is {"parts": [{"text": "..."}, {"image": "a.png"}, ...]}, or a conversation as LLaVA has them, or an
edit {"input", "instruction", "output"}. `Interleaved` is the source, `InterleavedDocuments` makes documents
of it, and `score` has a model draw held-out images again.
"""

import gzip
import io
import json
import os
import tarfile
from functools import cache, lru_cache, partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from data import ImageSegment, PairDocuments, clean_text
from extras.pairs import LARGEST, load_image, read_part, tar_parts
from extras.runs import opening
from extras.sources import mix, say, shuffled
from extras.tables import Found, Table, side, stamp

LONGEST = 2**24  # bytes of a line


# ---- What a line says ----------------------------------------------------------------------------


def conversation(line):
    """The parts of a conversation. What the model says ("gpt") is learned, and all else is given."""
    names, parts = line.get("image", []), []
    names = list(names) if isinstance(names, list) else [names]
    for turn in line["conversations"]:
        loss = turn["from"] in ("gpt", "assistant")
        for k, text in enumerate(turn["value"].split("<image>")):
            parts += [{"image": names.pop(0), "loss": loss}] if k else []
            parts.append({"text": text, "loss": loss})
    if names:
        raise LookupError("there are more images than <image>")
    return parts


def edit(line):
    """The parts of an edit. Its input is clean."""
    before, after = {"image": line["input"], "loss": False}, {"image": line["output"]}
    return [before, {"text": line["instruction"]}, after]


def checked(part):
    """A part -> [text, is it learned?], or [None, max_t or None, the image's name]. Raises ValueError."""
    found = [part[kind] for kind in ("text", "image") if isinstance(part, dict) and kind in part]
    if len(found) != 1 or not isinstance(found[0], str):
        raise ValueError("documents with a part that is not one text or one image")
    is_image, loss, max_t = "image" in part, part.get("loss", True), part.get("max_t")
    if odd := part.keys() - {"text", "image", "loss", "max_t" if is_image else ""}:
        raise ValueError(f"documents with a part that has an unknown {min(odd)!r}")
    if not isinstance(loss, bool):
        raise ValueError("documents with a loss that is neither true nor false")
    if max_t is not None and (type(max_t) is not int or max_t < 0):
        raise ValueError("documents with a max_t that is no whole number from 0")
    return [None, max_t if loss else 0, found[0]] if is_image else [clean_text(found[0]), loss]


def read_line(text):
    """The parts of a line, as `checked` has them. Raises ValueError, with the kind of lines that it is of."""
    try:
        line = json.loads(text)
        form = conversation if "conversations" in line else edit if "instruction" in line else None
        parts = list(form(line) if form else line["parts"])
    except (ValueError, RecursionError):
        raise ValueError("lines that are no JSON") from None
    except (TypeError, LookupError, AttributeError):
        raise ValueError('lines without "parts", and no whole conversation or edit') from None
    parts = [part for part in map(checked, parts) if part[0] != ""]
    if not parts:
        raise ValueError("empty documents")
    if not any(target is None or target for _, target, *_ in parts):
        raise ValueError("documents of which nothing is learned")
    return parts


def members(tars):
    """The images in some tars -> {name: (tar, offset, size)}."""
    found = {}
    for tar in tars:
        try:
            parts = tar_parts(tar, Found("members"))
            found |= {name: (os.path.basename(tar), *where) for name, (_, *where) in parts.items()}
        except tarfile.ReadError as error:
            say(f"skipped: {tar}: is not an uncompressed tar, or is broken ({error})")
    return found


# ---- The source, and its documents ---------------------------------------------------------------


class Interleaved:
    """Documents in JSON lines, gzipped or not, with their images beside them: files, or members of tars.

    A tenth, by a hash of the first image's name or of a text alone, is the "held_out" split; the rest is
    "train", in a new order each epoch; "seen" is a part of it. What cannot be used is left out and counted.
    ValueError if that is too much. The lines are read through once, and never held in memory.
    """

    SPLITS = ("train", "seen", "held_out")

    def __init__(self, path, image_size, split="train", seed=0, max_broken=0.05, cache="", **_):
        self.options = path, image_size, split, seed, max_broken, cache
        self.path, self.image_size, self.seed = Path(path), image_size, seed
        self.root = os.path.realpath(self.path.parent)
        if not stamp(path) or not str(path).endswith((".jsonl", ".jsonl.gz")):
            reason = "is no .jsonl or .jsonl.gz, as the others are" if self.path.exists() else "no such file"
            raise ValueError(f"--data {path}: {reason}")
        found, tars = Found("documents"), map(str, sorted(Path(self.root).glob("*.tar")))
        tars = list(filter(self._inside, tars))
        key = [(os.path.basename(file), stamp(file)) for file in (path, *tars)]
        self.table = Table(path, key, self._records(tars, found), found, split, seed, max_broken, cache)
        rows, chosen = self.table.rows, self.table.members
        self.fingerprint = f"{len(rows):,} documents ({sha256(rows[:, 3].tobytes()).hexdigest()[:8]})"
        with_images = (chosen[rows[chosen, 1] > 0], np.flatnonzero(rows[:, 1]))  # of the split, or of all
        self.illustrated = next((some for some in with_images if len(some)), None)
        if self.illustrated is None:
            raise ValueError(f"{path}: none of its documents has an image; text alone goes to --text")
        self._load = lru_cache(maxsize=2**26 // (3 * image_size**2))(self.read)  # at most 64 MB of pixels

    def __len__(self):
        return len(self.table)

    def __reduce__(self):  # how it travels to worker processes that are not forked
        return Interleaved, self.options

    def _inside(self, name):
        """Is this a file in the folder, wherever links lead?"""
        file = os.path.join(self.root, name)
        return bool(stamp(file)) and os.path.realpath(file).startswith(self.root + os.sep)

    def _records(self, tars, found):
        """The usable lines, as Table takes them: parts, number of images, line, hash of the content, side."""
        in_tars = cache(lambda: members(tars))
        opened = gzip.open if self.path.suffix == ".gz" else open
        with opening(self.path, "whole JSON lines"), opened(self.path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
                if not line.strip():
                    continue
                try:
                    parts = read_line(line)
                    content = json.dumps(parts)
                    for part in parts:
                        part += self._where(part[2], in_tars) if part[0] is None else []
                except ValueError as error:
                    found.skip(str(error), f"{self.path}:{number}")
                    continue
                found.good += 1
                names = [part[2] for part in parts if part[0] is None]
                on = side(names[0] if names else content)
                yield json.dumps(parts).encode(), len(names), number, side(content), on

    def _where(self, name, in_tars):
        """The file that an image is in, its offset there, and its size: both 0 in a file of its own."""
        if self._inside(name):
            return name, 0, 0
        if name.removeprefix("./") not in in_tars():
            raise ValueError("documents with an image that is not in the folder")
        return in_tars()[name.removeprefix("./")]

    def read(self, name, file, offset, size):
        """An image. Raises ValueError if it is broken."""
        path = os.path.join(self.root, file)
        if not self._inside(file) or size > LARGEST:  # the table may have come with the data
            raise ValueError(f"{path}: is not there, or lies outside of the folder")
        if not offset:
            return load_image(path, self.image_size)
        with opening(path, "a tar"):
            content = io.BytesIO(read_part(path, offset, size))
        return load_image(content, self.image_size, f"{path}: {name}")

    def _parts(self, row):
        """The parts in a row of the table."""
        stored = json.loads(self.table.data(row).tobytes())
        loads = (partial(self._load, *image) if image else text for text, _, *image in stored)
        return [(part, target) for part, (_, target, *_) in zip(loads, stored)]

    def parts(self, index):
        """Document `index`: (text, is it learned?) or (function that loads the image, max_t or None) each."""
        return self._parts(self.table.at(index)[0])

    def pair(self, index):
        """An image and the text nearest before it, or else after it: what VAE and tokenizer are made of."""
        epoch, k = divmod(index, len(self.illustrated))
        row = self.illustrated[shuffled(k, len(self.illustrated), mix(self.seed, epoch))]
        parts = [part for part, _ in self._parts(row)]
        places = [k for k, part in enumerate(parts) if not isinstance(part, str)]
        k = places[epoch % len(places)]
        texts = [part for part in [*parts[:k][::-1], *parts[k:]] if isinstance(part, str)]
        return (texts or [""])[0], parts[k]

    def name(self, index):
        """The line of document `index`."""
        return f"{self.path}:{self.table.rows[self.table.at(index)[0], 2]}"


class InterleavedDocuments(PairDocuments):
    """Documents of `pairs`, which are Interleaved, or a Mixture of such."""

    def __call__(self, number, attempt=0):
        """Document `number`: lists of tokens, tuples of those that are only given, and ImageSegments.

        An image without a max_t of its own has the paper's: `image_first_max_t` where it comes first and text
        follows. A text that comes first and is followed by an image is sometimes dropped, as captions are.
        After an attempt whose image was broken: another document, cut to no more images.
        """
        parts, document = self.pairs.parts(number + attempt), []
        is_text = [isinstance(part, str) for part, _ in parts]
        for k, (part, target) in enumerate(parts):
            if is_text[k]:
                ids = self.tokenizer.encode(" " * (k > 0 and is_text[k - 1]) + part)
                document.append(ids if target else tuple(ids))
            else:
                first = any(is_text) and not any(is_text[:k])
                most = self.config.image_first_max_t if first else self.timesteps
                document.append(ImageSegment(part, min(most if target is None else target, self.timesteps)))
        u_drop = np.random.default_rng([self.seed, 7, number]).random()
        if is_text[:2] == [True, False] and u_drop < self.config.drop_caption:
            document[0] = []
        while attempt and count_images(document) > count_images(self(number)):
            document.pop()
        return document


def count_images(document):
    """How many images a document has."""
    return sum(isinstance(segment, ImageSegment) for segment in document)


# ---- Scores --------------------------------------------------------------------------------------


def draw_again(trained, pairs, n, generate, seed=0):
    """Have images of up to n documents drawn again: of each the last that follows a text.

    -> those documents up to there, lists of strings and PIL images, and the true pixels of these images.
    """
    prompts, true, n_patches = [], [], trained.model.config.n_patches
    is_text = lambda part: isinstance(part, str)
    for number in range(len(pairs)):
        parts = [part for part, _ in pairs.parts(number)]
        ends = [k for k in range(1, len(parts)) if is_text(parts[k - 1]) and not is_text(parts[k])]
        lengths = [len(trained.tokenizer.encode(part)) if is_text(part) else n_patches + 2 for part in parts]
        if not ends or 1 + sum(lengths[: ends[-1] + 1]) > trained.data.seq_len:
            continue
        try:
            prompt = []
            for texts, some in groupby(parts[: ends[-1]], is_text):
                prompt += [" ".join(some)] if texts else [Image.fromarray(load()) for load in some]
            true.append(parts[ends[-1]]())
            prompts.append(prompt)
        except ValueError as error:
            say(f"skipped: {error}")
        if len(true) == n:
            break
    return generate(trained, prompts, range(seed, seed + len(prompts)), max_tokens=0), true


def score(open_pairs, trained, split, judged, seed, generate):
    """How far images drawn again are off the true ones -> {"images": {what: mean difference, "n": number}}.

    distance: of a drawn image's values from the true ones, as a share of their range. copied: the same of the
    image before it in the document, which is what doing nothing gives.
    """
    documents, true = draw_again(trained, open_pairs(trained, split, seed), judged, generate, seed)
    off = lambda image, pixels: float(np.abs(np.asarray(image, np.float32) - pixels).mean() / 255)
    found = {"distance": [], "copied": []}
    for document, pixels in zip(documents, true):
        *before, drawn = [part for part in document if not isinstance(part, str)]
        found["distance"].append(off(drawn, pixels))
        found["copied"] += [off(before[-1], pixels)] if before else []
    means = {what: float(np.mean(values)) for what, values in found.items() if values}
    return {"images": means | {"n": len(true)}} if true else {}
