"""What sources of documents have in common: order without a table, mixtures, and what is left out.

A source of pairs has `pair(i)` -> (caption, load), `captions(i)`, `name(i)`, and a length if it ends; a
source of text has `ids(i)`. Everything is a function of (seed, index).
"""

import math
import os
import sys
from functools import lru_cache, partialmethod
from multiprocessing import parent_process

import numpy as np
from tqdm import tqdm

from data import document_length


def mix(*numbers):
    """Integers to 64 well-mixed bits (splitmix64, Steele et al. 2014)."""
    x, word = 0, 2**64 - 1
    for n in numbers:
        x = ((x ^ n) + 0x9E3779B97F4A7C15) & word
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & word
        x ^= x >> 31
    return x


def shuffled(i, n, key):
    """Where number i comes in the shuffle of 0..n-1 that the integer `key` picks, without a table.

    A Feistel network permutes the numbers below the next power of 4. It is applied again to what falls
    outside (Black & Rogaway 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & ((1 << half) - 1))
        i = left << half | right
        if i < n:
            return i


def interleave(index, weights, seed):
    """Which of several sources number `index` comes from, and its number there.

    Each source is used in proportion to its weight, at irregular intervals, in order but for a shuffle of
    neighbours.
    """
    if len(weights) == 1:
        return 0, index
    block, i = divmod(index, 1024)
    index = 1024 * block + shuffled(i, 1024, mix(seed, 9, block))
    for which in range(len(weights) - 1):
        share = round(weights[which] / sum(weights[which:]) * 2**32)  # of what those before have left
        before = index * share >> 32
        if (index + 1) * share >> 32 > before:
            return which, before
        index -= before
    return len(weights) - 1, index


class Mixture:
    """Several sources of pairs as one, each drawn from in proportion to its weight, in its own epochs."""

    def __init__(self, sources, weights, seed=0):
        self.sources, self.weights, self.seed = sources, weights, seed
        self.fingerprint = ", ".join(source.fingerprint for source in sources)

    def __len__(self):
        return sum(map(len, self.sources))

    def _ask(self, method, index):
        which, number = interleave(index, self.weights, self.seed)
        return getattr(self.sources[which], method)(number)

    pair = partialmethod(_ask, "pair")  # (caption, load) of pair number `index`
    parts = partialmethod(_ask, "parts")  # of documents that are no pairs (extras/interleaved.py)
    captions = partialmethod(_ask, "captions")  # all that is written about its image
    name = partialmethod(_ask, "name")  # what messages call it


class WithText:
    """Documents with images, and between them text alone, so that it makes `text_fraction` of all positions.

    illustrated: makes the former, as data.PairDocuments does. text: a source of text.
    """

    def __init__(self, illustrated, text, text_fraction, n_patches, seed=0):
        self.options = illustrated, text, text_fraction, n_patches, seed
        self.kinds, self.text, self.seed = (illustrated, self._text), text, seed
        self.pairs, self.n_pairs = illustrated.pairs, illustrated.n_pairs
        # The mean lengths decide how many of each make the share of positions.
        lengths = [np.mean([document_length(make(i), n_patches) for i in range(500)]) for make in self.kinds]
        self.weights = [(1 - text_fraction) / lengths[0], text_fraction / lengths[1]]

    def __reduce__(self):  # how it travels to worker processes that are not forked
        return WithText, self.options

    def _text(self, number):
        return [self.text.ids(number)]

    def __call__(self, index, *attempt):
        """Document `index`: a list of segments. attempt: as data.PairDocuments takes it."""
        which, number = interleave(index, self.weights, self.seed)
        return self.kinds[which](number, *attempt)

    def name(self, index):
        """What messages call document `index`."""
        is_text, number = interleave(index, self.weights, self.seed)
        return f"text {number}" if is_text else self.kinds[0].name(number)


# ---- What is left out ----------------------------------------------------------------------------


# Of torchrun's processes, and of those that they start, one says what all of them know.
FIRST = os.environ.get("RANK", "0") == "0" and parent_process() is None


@lru_cache(maxsize=None)
def say(message, known=False):
    """Print on stderr what somebody should know, once, whatever odd characters a file's name brings."""
    if FIRST or not known:
        print("".join(c if c.isprintable() else "?" for c in message), file=sys.stderr, flush=True)


def bar(work, name, **more):
    """A progress bar over some work, if it takes long."""
    return tqdm(work, name, unit="", delay=2, leave=False, disable=not FIRST, **more)


class Skipped:
    """Counts what is left out, each thing once, and names it on stderr. what: the plural of what is counted.

    Raises ValueError when it is more than a share `max_broken` of what was seen, or of 100.
    """

    def __init__(self, what, max_broken):
        self.what, self.max_broken = what, max_broken
        self.seen, self.named, self.too_long = 0, set(), {}

    @property
    def skipped(self):
        """How many different things were left out."""
        return len(self.named)

    def count_document(self, documents, number, length, seq_len):
        """A document of `length` positions; left out, once for all epochs, if it is longer than a row."""
        name = documents.name(number)
        if length <= seq_len:
            self.count(1)
        elif name not in self.too_long:
            self.too_long[name] = length
            advice = f"give --seq_len {max(self.too_long.values())}, or shorten its caption"
            message = f"{name} takes {length} positions and seq_len is {seq_len}; {advice}"
            if len(self.too_long) == documents.n_pairs:
                raise ValueError(f"all {documents.n_pairs} pairs of a split are too long: {message}")
            self.count(1, [message])

    def count(self, seen, messages=()):
        """`seen` more things, of which those that `messages` name were left out."""
        self.seen += seen
        self.named |= set(messages)
        for message in messages:
            say(f"skipped: {message}")
        if messages and self.skipped > self.max_broken * max(self.seen, 100):
            share = f"{self.skipped} of {self.seen} {self.what} had to be left out, more than --max_broken"
            raise ValueError(f"{share} {self.max_broken:g} allows; the last: {messages[-1]}")


def fitting(pairs, n, tokenizer, seq_len, n_patches):
    """Numbers of the first n pairs of an epoch whose first caption fits a row beside the image.

    A longer one is not trained on, and cannot be drawn. Raises ValueError if there is none.
    """
    numbers = range(len(pairs) if hasattr(pairs, "__len__") else 10 * n + 1000)
    found, shortest = [], math.inf
    for i in numbers:
        length = len(tokenizer.encode(pairs.captions(i)[0])) + n_patches + 3  # <BOS>, <BOI>, <EOI>
        shortest = min(shortest, length)
        found += [i] * (length <= seq_len)
        if len(found) == n:
            break
    if not found:
        needed = f"give --seq_len {shortest} or more"
        raise ValueError(f"no caption with its image fits into seq_len {seq_len}; {needed}")
    return found


def readable(pairs, numbers, n, skipped):
    """The first n of these pairs' numbers whose images can be read -> list of (number, uint8 pixels).

    skipped: counts the others, and stops if they are too many. Raises ValueError if n + 100 cannot be read.
    """
    found, errors, numbers = [], [], iter(numbers)
    while len(found) < n and (number := next(numbers, None)) is not None:
        try:
            found.append((number, pairs.pair(number)[1]()))
        except ValueError as error:
            errors.append(str(error))
            if len(errors) >= n + 100:
                raise
    skipped.count(len(found) + len(errors), errors)
    return found
