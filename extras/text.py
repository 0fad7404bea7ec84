"""Your own text beside the images: .txt files and JSON lines, tokenised once."""

import json
from hashlib import sha256
from itertools import count
from pathlib import Path

import numpy as np

from data import Cut
from extras.runs import opening
from extras.tables import Found, Table, files_below, held_out, listed

LINES = (".jsonl", ".json")
STRETCH = 2**20  # characters of a .txt file that are read at once


def read_text(path, found):
    """The texts of a file -> (where, text) of each: a .txt in stretches of whole lines, or JSON lines.

    Raises ValueError, naming it, if it cannot be read as text.
    """
    with opening(path, "UTF-8 text; convert it, e.g. with iconv"):
        if path.suffix.lower() not in LINES:
            with open(path, encoding="utf-8-sig", newline="") as file:
                for number in count():
                    if not (text := file.read(STRETCH) + file.readline(STRETCH)):
                        return
                    yield number, text
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


def read_texts(path):
    """The texts of one file. Raises ValueError, naming it, if there are none."""
    texts = [text for _, text in read_text(Path(path), Found("texts"))]
    if not texts:
        raise ValueError(f'{path}: holds no text; it must be UTF-8, or JSON lines with a "text" on each')
    return texts


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
                        yield piece.tobytes(), more, 0, 0, held_out(f"{file.name}:{where}:{start}")

        state = sha256(repr(tokenizer.state()).encode()).hexdigest()
        key = [(file.name, stamp) for file, stamp in files.items()], length, state
        broken, cache = config.data.max_broken, config.extra.cache
        self.table = Table(paths[0], key, records(), found, split, seed, broken, cache)

    def __len__(self):
        return len(self.table)

    def __reduce__(self):
        return TextFiles, self.options

    def ids(self, index):
        """Piece number `index`, a list of tokens, or a Cut if its text goes on. Index runs on over epochs."""
        row, _ = self.table.at(index)
        kind = Cut if self.table.rows[row, 1] else list
        return kind(self.table.data(row).view(self.dtype).tolist())
