"""Captioned images as tokens, documents and batches (paper, section 3, "Data representation", and 4.1).

    Tokenizer      bytes, then <BOS>, <EOS>, <BOI>, <EOI> and padding
    ImageSegment   an image inside a document; the other segments of a document are lists of tokens
    Batch          one training batch, laid out by `collate`; every other file uses its field names
    PairDocuments  [caption, image] or [image, caption]; `collate` adds special tokens, <EOS> as a target
    Stream         documents packed into rows of a fixed length

Every document is a function of (seed, number). The processes that load images ahead are in extras/loader.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from unicodedata import normalize

import numpy as np
import torch

from attention_mask import PADDING, TEXT

NO_LOSS = -100  # a target that cross-entropy ignores


@dataclass
class DataConfig:
    """How documents are made of pairs, and rows of documents."""

    image_size: int = 256  # pixels a side
    seq_len: int = 4096  # positions (tokens and patches) a row; documents are packed into it
    caption_first: float = 0.8  # share of pairs whose caption precedes the image (section 4.1)
    drop_caption: float = 0.1  # share of those without the caption: guidance's unconditional branch
    image_first_max_t: int = 1000  # noise limit where the image comes first; 500 in an ablation (4.3)
    text_fraction: float = 0.5  # share of all positions that lie in text-only documents (section 4.1)
    max_broken: float = 0.05  # training stops if more than this share of the data cannot be used
    workers: int = 4  # processes that decode images, for each rank; 0 = the training process itself


# ---- Text as tokens ------------------------------------------------------------------------------


# Controls become spaces. Soft hyphens, zero-width spaces, marks of direction and of byte order go.
MARKS = 0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF
UNSEEN = dict.fromkeys([*range(32), *range(127, 160)], " ") | dict.fromkeys(MARKS)


def clean_text(text):
    """A caption or a prompt as the model sees it: one line that can be encoded; "" if nothing is in it."""
    text = text.encode(errors="replace").decode() if isinstance(text, str) else ""
    text = " ".join(normalize("NFC", text.translate(UNSEEN)).split())
    return text if any(c.isprintable() and c != " " for c in text) else ""


class Tokenizer:
    """Bytes as tokens: ids 0..255, then the five special tokens. Subclasses have other pieces of text."""

    style = None  # how the captions of training are written, if that is known (extras/text.py)

    def __init__(self, pieces=tuple(bytes([i]) for i in range(256))):
        self.pieces = list(pieces)
        self.bos, self.eos, self.boi, self.eoi, self.pad = range(len(pieces), len(pieces) + 5)
        self.vocab_size = len(pieces) + 5

    def encode(self, text):
        """str -> list of ids, without special tokens. Any text can be encoded, and decodes to itself."""
        return list(text.encode())

    def decode(self, ids):
        """Ids -> str; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids if i < len(self.pieces)).decode(errors="replace")

    def state(self):
        """What a checkpoint keeps of it: plain values."""
        return {"style": self.style}


# ---- The batch -----------------------------------------------------------------------------------


@dataclass
class ImageSegment:
    """An image inside a document, loaded only when its batch is made."""

    load: Callable  # () -> uint8 (H, W, 3); raises ValueError if that cannot be done
    max_t: int  # the largest timestep it may be noised to; 0: shown clean, as conditioning, without a loss


class Cut(list):
    """The tokens of a text that goes on in another document: <EOS> is no target at its end."""


def document_length(document, n_patches):
    """Positions that a document takes: <BOS>, its tokens, and <BOI> patches <EOI> for each image."""
    return 1 + sum(n_patches + 2 if isinstance(s, ImageSegment) else len(s) for s in document)


@dataclass
class Batch:
    """B rows of S positions and the N images in them, in reading order."""

    tokens: torch.Tensor  # (B, S) int64: the input; at a patch or padding the padding id, which nothing reads
    targets: torch.Tensor  # (B, S) int64: the next token, NO_LOSS where the language model has none
    image_id: torch.Tensor  # (B, S) int64: which of `images` a patch belongs to, -1 for text
    doc_id: torch.Tensor  # (B, S) int64: which document of its row a position belongs to, -1 for padding
    positions: torch.Tensor  # (B, S) int64: place within the document, for RoPE
    images: torch.Tensor  # (N, 3, H, W) float32 in -1..1; or cached (N, 2 C, h, w): mean, log-variance
    max_t: torch.Tensor  # (N,) int64: the largest timestep of each image, 0 = clean, without a loss

    def to(self, device):
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def to_pixels(images):
    """uint8 images (..., H, W, 3) -> float32 (..., 3, H, W) in -1..1, as the VAE takes them."""
    return torch.as_tensor(np.asarray(images)).movedim(-1, -3).float() / 127.5 - 1


def collate(rows, tokenizer, seq_len, n_patches):
    """Lay rows of documents out as a Batch.

    A position's target is the next token of its document, <EOS> after the last. There is none where the
    input is <BOI> (footnote 8) or a patch. So <BOI> is a target; <EOI> is not, for it is inserted, never
    sampled; and <EOI> as input predicts the text after it. A piece of a longer text (`Cut`) has none at
    its end. A tuple of tokens is given: they are no targets. Raises ValueError if an image cannot be read.
    """
    shape = len(rows), seq_len
    tokens, targets = np.full(shape, tokenizer.pad), np.full(shape, NO_LOSS)
    image_id, doc_id, positions = np.full(shape, TEXT), np.full(shape, PADDING), np.zeros(shape, int)
    images, max_t = [], []
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            ids, image_of, given = [tokenizer.bos], [TEXT], []
            for segment in document:
                if isinstance(segment, ImageSegment):
                    ids += [tokenizer.boi] + [tokenizer.pad] * n_patches + [tokenizer.eoi]
                    image_of += [TEXT] + [len(images)] * n_patches + [TEXT]
                    images.append(segment.load())
                    max_t.append(segment.max_t)
                else:
                    given += range(len(ids), len(ids) + len(segment)) if isinstance(segment, tuple) else ()
                    ids += segment
                    image_of += [TEXT] * len(segment)
            span = slice(start, start + len(ids))
            start += len(ids)
            ids, image_of = np.array(ids), np.array(image_of)
            last_target = NO_LOSS if document and isinstance(document[-1], Cut) else tokenizer.eos
            has_loss = (ids != tokenizer.boi) & (image_of == TEXT)
            has_loss[np.array(given, int) - 1] = False
            tokens[b, span], image_id[b, span], doc_id[b, span] = ids, image_of, d
            targets[b, span] = np.where(has_loss, np.append(ids[1:], last_target), NO_LOSS)
            positions[b, span] = np.arange(len(ids))
    images = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
    # Pixels, or means and log-variances that were encoded ahead.
    images = to_pixels(images) if images.dtype == np.uint8 else torch.from_numpy(images).float()
    text = map(torch.from_numpy, (tokens, targets, image_id, doc_id, positions))
    return Batch(*text, images, torch.tensor(max_t, dtype=torch.long))


# ---- Documents -----------------------------------------------------------------------------------


class PairDocuments:
    """Captioned images as documents, in the paper's two orders (section 4.1): number -> list of segments.

    pairs: a source; `pair(i)` -> (caption, load), `name(i)` for messages, and a length if it ends.
    """

    def __init__(self, pairs, tokenizer, config, timesteps=1000, seed=0):
        self.pairs, self.tokenizer, self.config = pairs, tokenizer, config
        self.timesteps, self.seed = timesteps, seed
        self.n_pairs = len(pairs) if hasattr(pairs, "__len__") else None  # None: without end

    def __call__(self, number, attempt=0):
        """Document `number`. attempt: 1, 2, ... take another pair, in the same order, for a broken image."""
        caption, load = self.pairs.pair(number + attempt)
        ids = self.tokenizer.encode(caption)
        u_order, u_drop = np.random.default_rng([self.seed, 7, number]).random(2)  # 7: a stream of its own
        if u_order >= self.config.caption_first:
            return [ImageSegment(load, min(self.config.image_first_max_t, self.timesteps)), ids]
        return [[] if u_drop < self.config.drop_caption else ids, ImageSegment(load, self.timesteps)]

    def name(self, number):
        """What messages call it."""
        return self.pairs.name(number)


# ---- Packing documents into rows -----------------------------------------------------------------


class Stream:
    """Documents packed into rows of seq_len positions, R = `rows_per_step` rows a step.

    documents: makes them, as PairDocuments does. Row r takes only documents r, r + R, r + 2 R, ... So any
    division of the rows among processes gives the same rows. A row takes its oldest waiting document, then
    the longest waiting ones that still fit. Packing looks at lengths only; `collate` loads the images.
    state: {row: [number of the next document, numbers of the waiting ones]} of this process's rows. Merged,
    the states of all processes can be loaded by any number of them.
    skipped: counts the documents longer than a row (extras/sources.py); without it they raise ValueError.
    """

    LOOK_AHEAD = 16  # documents that wait for each row

    def __init__(self, documents, seq_len, rows_per_step, n_patches, my_rows=None, skipped=None):
        self.documents, self.seq_len, self.n_patches = documents, seq_len, n_patches
        self.rows_per_step = rows_per_step
        self.my_rows = list(range(rows_per_step) if my_rows is None else my_rows)
        self.document = lru_cache(maxsize=1024)(documents)  # asked for its length first, then for itself
        self.length = lru_cache(maxsize=1024)(lambda i: document_length(self.document(i), n_patches))
        self.state = {r: [r, []] for r in self.my_rows}
        self.skipped = skipped

    def load_state(self, state):
        """Go on from a state, of my rows and perhaps others. Raises ValueError if my rows are not in it."""
        if not set(self.my_rows) <= set(state):
            saved = f"the stream was saved with {len(state)} rows a step and now has {self.rows_per_step}"
            raise ValueError(f"{saved}; give the --rows that it was started with")
        self.state = {r: state[r] for r in self.my_rows}

    def _fits(self, i):
        """Is document i short enough for a row?"""
        length = self.length(i)
        if self.skipped:
            self.skipped.count_document(self.documents, i, length, self.seq_len)
        elif length > self.seq_len:
            taken = f"{self.documents.name(i)} takes {length} positions"
            raise ValueError(f"{taken} and seq_len is {self.seq_len}; raise --seq_len or shorten its caption")
        return length <= self.seq_len

    def pack_row(self, r):
        """Pack the next row r: the numbers of its documents, in order."""
        ahead, waiting = self.state[r]
        waiting = list(waiting)  # states that were handed out stay as they are
        row, free = [], self.seq_len
        while True:
            while len(waiting) < self.LOOK_AHEAD:
                if self._fits(ahead):
                    waiting.append(ahead)
                ahead += self.rows_per_step
            fitting = [i for i in waiting if self.length(i) <= free]
            if not fitting:
                self.state[r] = [ahead, waiting]
                return row
            i = max(fitting, key=self.length) if row else fitting[0]
            waiting.remove(i)
            row.append(i)
            free -= self.length(i)

    def __next__(self):
        """This process's rows of the next step: a list of lists of documents."""
        return [[self.document(i) for i in self.pack_row(r)] for r in self.my_rows]


if __name__ == "__main__":
    from extras.scenes import Scenes
    from extras.tokenizers import BPETokenizer

    scenes, config = Scenes(), DataConfig(image_size=32, seq_len=128)
    tokenizer = BPETokenizer.learn([scenes.pair(i)[0] for i in range(2000)], 512)
    documents = PairDocuments(scenes, tokenizer, config)
    rows = next(Stream(documents, config.seq_len, rows_per_step=8, n_patches=16))
    batch = collate(rows, tokenizer, config.seq_len, n_patches=16)
    print(f"vocabulary {tokenizer.vocab_size}; one batch: {len(batch.images)} images")
    names = {tokenizer.bos: "<BOS>", tokenizer.boi: "<BOI>", tokenizer.eoi: "<EOI>", tokenizer.pad: "#"}
    row = batch.tokens[(batch.image_id >= 0).sum(1).argmax()].tolist()
    print("the row with most images:", " ".join(names.get(i) or repr(tokenizer.decode([i])) for i in row))
