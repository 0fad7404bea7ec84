"""Your own text beside the images, tokenised once; and how the captions of training are written."""

import json
from functools import partial
from itertools import chain, count
from pathlib import Path

import numpy as np

from data import Cut, clean_text
from extras.runs import opening
from extras.sources import say
from extras.tables import Found, Table, files_below, listed, side

STRETCH = 2**20  # characters of a text that are tokenised at once
LONGEST = 2**28  # bytes of a JSON line


# ---- Prompts as the captions are -----------------------------------------------------------------


def style_of(captions, tokenizer):
    """How some captions are written: plain values, which a checkpoint keeps beside the tokenizer.

    tokens: all that occur, where the second half of the captions has none that the first half lacks.
    """
    half = captions[: len(captions) // 2]
    known, every = (set(chain(*map(tokenizer.encode, set(part)))) for part in (half, captions))
    capitals = any(caption != caption.lower() for caption in captions)
    stops = any(caption.endswith(".") for caption in captions)
    return {"capitals": capitals, "stops": stops, "tokens": sorted(known) if known == every else None}


def like_training(text, style, tokenizer):
    """A prompt, clean already, as the captions of training are written -> (text, notes on what that changes).

    style: what `style_of` found in them. Capitals and a closing full stop go where no caption has any. A note
    names the words with tokens that no caption has.
    """
    given, notes = text, []
    if not style["capitals"]:
        text = text.lower()
    if not style["stops"]:
        text = text.rstrip(". ") or text
    if text != given:
        notes.append(f'"{given}" is read as "{text}", as the captions of training are written')
    if style["tokens"]:
        ids, known = tokenizer.encode(text), set(style["tokens"])
        # A space belongs to the word after it; "x" stands for what is still to come of that word.
        new = {len(f"{tokenizer.decode(ids[: n + 1])}x".split()) for n, i in enumerate(ids) if i not in known}
        words = dict.fromkeys(word for n, word in enumerate(text.split(), 1) if n in new)
        if words:
            notes.append(f"no caption of training had such words as {', '.join([*words][:5])}")
    return text, notes


def read_prompt(text, tokenizer):
    """A prompt as the model is given it, "" if nothing is in it; what that changes is said.

    tokenizer.style: what `style_of` found in the captions of training; None = it is not known.
    """
    text, notes = clean_text(text), []
    if text and getattr(tokenizer, "style", None):
        text, notes = like_training(text, tokenizer.style, tokenizer)
    for note in notes:
        say(note)
    return text


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
    order each epoch. What cannot be read is left out and counted. ValueError if that is too much.
    """

    def __init__(self, config, tokenizer, split="train", seed=0):
        self.options = config, tokenizer, split, seed
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        paths, found, files = listed("text", config.extra.text), Found("texts"), {}
        for path in map(Path, paths):
            here = files_below(path, found)
            wanted = [name for name in here if path.is_file() or name.lower().endswith((".txt", ".jsonl"))]
            root = path if path.is_dir() else path.parent
            files |= {root / name: here[name] for name in wanted}
            if not wanted:
                reason = "no .txt or .jsonl files here" if path.is_dir() else "no such file or folder"
                raise ValueError(f"--text {path}: {reason}")
        length = config.data.seq_len - 1

        def texts():
            for file in files:
                try:
                    for where, text in read_text(file, found):
                        yield f"{file.name}:{where}", text
                except ValueError as error:
                    found.skip("files that cannot be read", error)

        def records():
            for where, text in texts():
                found.good += 1
                ids = np.array(tokenizer.encode(text), self.dtype)
                for start in range(0, len(ids), length):
                    piece, more = ids[start : start + length], start + length < len(ids)
                    yield piece.tobytes(), more, 0, 0, side(f"{where}:{start}")

        state = tokenizer.state() | {"style": None}  # which changes no tokens
        key = [(file.name, stamp) for file, stamp in files.items()], length, repr(state)
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
