"""Tokenizers beside data.py's bytes: merges learned from captions, and other people's tokenizer.json."""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data import Tokenizer
from extras.runs import opening

WORD = re.compile(r"\s{0,64}\S{1,64}|\s{1,64}")  # a word with the space before it


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016): bytes, then one id a merge, then the special tokens.

    merges: pairs of ids in the order of merging. While it goes on, ids are the characters of a string.
    """

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.merged = {}  # pair -> id, earlier merges first
        pieces = [bytes([i]) for i in range(256)]
        for a, b in self.merges:
            self.merged[chr(a) + chr(b)] = chr(len(pieces))
            pieces.append(pieces[a] + pieces[b])
        super().__init__(pieces)
        self._word = lru_cache(maxsize=100_000)(lambda word: self._merge(word.encode().decode("latin-1")))

    @classmethod
    def learn(cls, texts, merges):
        """The tokenizer of at most so many merges that a list of texts suggests.

        The most frequent neighbours are merged: first inside words, then across them (Liu et al. 2025). There
        a pair must be in a quarter of the texts, or in a tenth if one part never occurs without the other. So
        "at the top left" is one token, and a place one decision. "red circle" must not be one: it would share
        nothing with a red square.
        """
        words = [word for text in texts for word in WORD.findall(text)]
        learned = []
        for parts, often, inseparable in ((words, 2, 2), (texts, len(texts) / 4, len(texts) / 10)):
            sequences = Counter(map(cls(learned).spell, parts))
            while len(learned) < merges:
                pairs, single = Counter(), Counter()
                for ids, n in sequences.items():
                    for i in ids:
                        single[i] += n
                    for pair in zip(ids, ids[1:]):
                        pairs[pair] += n
                found = []
                for (a, b), n in pairs.items():
                    if n >= max(2, inseparable if n == min(single[a], single[b]) else often):
                        found.append((n, a, b))
                if not found:
                    break
                _, a, b = max(found)
                learned.append((ord(a), ord(b)))
                merged = Counter()
                for ids, n in sequences.items():
                    merged[ids.replace(a + b, chr(255 + len(learned)))] += n
                sequences = merged
        return cls(learned)

    def _merge(self, ids):
        while found := [a + b for a, b in zip(ids, ids[1:]) if a + b in self.merged]:
            first = min(found, key=self.merged.get)
            ids = ids.replace(first, self.merged[first])
        return ids

    def spell(self, text):
        """The ids of a text, as the characters of a string."""
        words = [self._word(word) for word in WORD.findall(text)]
        starts = range(0, len(words), 32)  # merging takes quadratic time, so it stays within 32 words
        return "".join(self._merge("".join(words[i : i + 32])) for i in starts)

    def encode(self, text):
        """str -> list of ids, without special tokens. Any text can be encoded, and decodes to itself."""
        return [ord(i) for i in self.spell(text)]

    def state(self):
        """What a checkpoint keeps of it: plain values."""
        return {"merges": self.merges}

    def __reduce__(self):  # how it travels to worker processes
        return BPETokenizer, (self.merges,)


class JSONTokenizer(Tokenizer):
    """A tokenizer.json, given its text, with the special tokens after its vocabulary. where: for errors."""

    def __init__(self, text, where="the tokenizer"):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            needed = "a tokenizer.json needs the package tokenizers: pip install tokenizers"
            raise ValueError(needed) from None
        with opening(where, "a tokenizer.json of the package tokenizers"):
            self.inner = Library.from_str(text)
            size = 1 + max(self.inner.get_vocab(with_added_tokens=True).values())
        super().__init__([self.inner.id_to_token(i) for i in range(size)])

    def encode(self, text):
        """str -> list of ids, without special tokens."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> str; special tokens are left out."""
        return self.inner.decode([i for i in ids if i < len(self.pieces)])

    def state(self):
        """What a checkpoint keeps of it: the whole text."""
        return {"json": self.inner.to_str()}

    def __reduce__(self):
        return JSONTokenizer, (self.inner.to_str(),)


def read_tokenizer(path):
    """The JSONTokenizer in a file. Raises ValueError, naming the file."""
    where = f"--tokenizer {path}"
    with opening(where, "UTF-8 text"):
        text = Path(path).read_text(encoding="utf-8")
    return JSONTokenizer(text, where)
