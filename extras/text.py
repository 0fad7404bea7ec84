"""Your own text beside the images, tokenised once; and how the captions of training are written."""

import json
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path

import numpy as np

from data import Cut
from extras.runs import opening
from extras.tables import Found, Table, files_below, listed, side

STRETCH = 2**20  # characters of a text that are tokenised at once
LONGEST = 2**28  # bytes of a JSON line


# ---- Prompts as the captions are -----------------------------------------------------------------


def style_of(captions, tokenizer):
    """How some captions are written: plain values, which a checkpoint keeps beside the tokenizer."""
    capitals = any(caption != caption.lower() for caption in captions)
    stops = any(caption.endswith(".") for caption in captions)
    tokens = {i for caption in set(captions) for i in tokenizer.encode(caption)}
    return {"capitals": capitals, "stops": stops, "tokens": sorted(tokens)}


def like_training(text, style, tokenizer):
    """A prompt, clean already, as the captions of training are written -> (text, notes on what that changes).

    style: what `style_of` found in them. Capitals and a closing full stop go where no caption has any. A note
    names the words with tokens that no caption has.
    """
    given, known, notes = text, set(style["tokens"]), []
    if not style["capitals"]:
        text = text.lower()
    if not style["stops"]:
        text = text.rstrip(". ") or text
    if text != given:
        notes.append(f'"{given}" is read as "{text}", as the captions of training are written')
    ids, words = tokenizer.encode(text), text.split()
    new = {len(tokenizer.decode(ids[: n + 1]).split()) for n, i in enumerate(ids) if i not in known}
    if new := ", ".join(word for n, word in enumerate(words, 1) if n in new):
        notes.append(f'"{text}": no caption of training was seen to have such words as {new}')
    return text, notes


# ---- Texts ---------------------------------------------------------------------------------------


def read_text(path, found):
    """The texts of a file, or JSON lines -> (where, text) of each; a long one in stretches.

    Raises ValueError, naming it, if it cannot be read as text.
    """
    with opening(path, "UTF-8 text; convert it, e.g. with iconv"):
        if path.suffix.lower() not in (".jsonl", ".json"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                for number in count():
                    if not (text := file.read(STRETCH) + file.readline(STRETCH)):  # of whole lines
                        return
                    yield number, text
        with open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
                try:
                    text = json.loads(line)["text"].encode(errors="replace").decode()
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    if line.strip():
                        found.skip('lines that are no JSON object with a "text"', f"{path}:{number}")
                    continue
                for start in range(0, len(text), STRETCH):
                    yield f"{number}+{start}" if start else number, text[start : start + STRETCH]


def read_texts(path):
    """The texts of one file. Raises ValueError, naming it, if there are none."""
    if texts := [text for _, text in read_text(Path(path), Found("texts"))]:
        return texts
    raise ValueError(f'{path}: holds no text; it must be UTF-8, or JSON lines with a "text" on each')


class TextFiles:
    """The texts of --text, cut into pieces that fit a row, as a source of text.

    A tenth of the pieces, by a hash of where they are, is the "held_out" split; the rest is "train", in a new
    order each epoch. Raises ValueError, naming the file, if one cannot be read.
    """

    def __init__(self, config, tokenizer, split="train", seed=0):
        self.options = config, tokenizer, split, seed
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        paths, found, files = listed(config.extra.text), Found("texts"), {}
        for path in map(Path, paths):
            here = files_below(path, found)
            wanted = [name for name in here if path.is_file() or name.lower().endswith((".txt", ".jsonl"))]
            root = path if path.is_dir() else path.parent
            files |= {root / name: here[name] for name in wanted}
            if not wanted:
                reason = "no .txt or .jsonl files here" if path.is_dir() else "no such file or folder"
                raise ValueError(f"--text {path}: {reason}")
        length = config.data.seq_len - 1

        def records():
            for file in files:
                for where, text in read_text(file, found):
                    found.good += 1
                    ids = np.array(tokenizer.encode(text), self.dtype)
                    for start in range(0, len(ids), length):
                        piece, more = ids[start : start + length], start + length < len(ids)
                        yield piece.tobytes(), more, 0, 0, side(f"{file.name}:{where}:{start}")

        state = sha256(repr(tokenizer.state()).encode()).hexdigest()
        key = [(file.name, stamp) for file, stamp in files.items()], length, state
        broken, cache = config.data.max_broken, config.extra.cache
        self.table = Table(paths[0], key, records(), found, split, seed, broken, cache)
        self.fingerprint = self.table.fingerprint

    def __len__(self):
        return len(self.table)

    def __reduce__(self):
        return TextFiles, self.options

    def ids(self, index):
        """Piece number `index`, a list of tokens, or a Cut if its text goes on. Index runs on over epochs."""
        row, _ = self.table.at(index)
        kind = Cut if self.table.rows[row, 1] else list
        return kind(self.table.data(row).view(self.dtype).tolist())
