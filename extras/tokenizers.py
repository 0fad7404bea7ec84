"""Tokenizers beside data.py's bytes: merges learned from captions, and other people's tokenizer.json."""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data import Tokenizer, clean_text
from extras.runs import opening
from extras.sources import bar, say
from extras.tables import Found

WORD = re.compile(r"\s{0,64}\S{1,64}|\s{1,64}")  # a word with the space before it
LEARNED = 2**19  # characters that merges are learned from, at most: a share of each text


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
        texts = [text[: LEARNED // len(texts)] for text in texts]
        words = [word for text in texts for word in WORD.findall(text)]
        learned, shown = [], bar(None, "learning the tokenizer", total=merges)
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
                shown.update()
                merged = Counter()
                for ids, n in sequences.items():
                    merged[ids.replace(a + b, chr(255 + len(learned)))] += n
                sequences = merged
        shown.close()
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
        return super().state() | {"merges": self.merges}

    def __reduce__(self):  # how it travels to worker processes
        return BPETokenizer, (self.merges,)


class JSONTokenizer(Tokenizer):
    """A tokenizer.json, given its text, with the special tokens after its vocabulary. where: for errors.

    It neither cuts, pads nor drops anything, and a special token in a text is text, whatever the file says.
    """

    def __init__(self, text, where="the tokenizer"):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            needed = "a tokenizer.json needs the package tokenizers: pip install tokenizers"
            raise ValueError(needed) from None
        self.where = where
        with opening(where, "a tokenizer.json of the package tokenizers"):
            self.inner = Library.from_str(text)
            self.inner.no_truncation()
            self.inner.no_padding()
            self.inner.encode_special_tokens = True
            if hasattr(self.inner.model, "dropout"):
                self.inner.model.dropout = None
            size = 1 + max(self.inner.get_vocab(with_added_tokens=True).values())
            if size > 2**24:
                raise ValueError(f"its ids go up to {size - 1:,}")
        super().__init__([self.inner.id_to_token(i) for i in range(size)])

    def encode(self, text):
        """str -> list of ids, without special tokens. Raises ValueError if it cannot encode this text."""
        with opening(self.where, "able to encode every text"):
            return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> str; special tokens are left out."""
        with opening(self.where, "able to decode all that it encodes"):
            return self.inner.decode([i for i in ids if i < len(self.pieces)])

    def state(self):
        """What a checkpoint keeps of it: the whole text."""
        return super().state() | {"json": self.inner.to_str()}

    def __reduce__(self):
        return JSONTokenizer, (self.inner.to_str(), self.where)


def read_tokenizer(path, captions=(), max_broken=1.0):
    """The JSONTokenizer in a file. Raises ValueError, naming the file.

    Captions that do not come back as they were are counted like broken ones: not too many may be so.
    """
    where, found = f"--tokenizer {path}", Found("captions")
    with opening(where, "UTF-8 text"):
        text = Path(path).read_text(encoding="utf-8-sig")
    tokenizer = JSONTokenizer(text, where)
    for caption in captions:
        again = clean_text(tokenizer.decode(tokenizer.encode(caption)))
        if again == caption:
            found.good += 1
        else:
            found.skip("that it changes", f"{caption!r} becomes {again!r}")
    if found.bad:
        say(f"{where}: {found.report(where, max_broken)}", known=True)
    return tokenizer
