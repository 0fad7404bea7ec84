"""Files of data: found in one walk, read through once, counted, and kept as a table on disk."""

import contextlib
import os
import stat
import struct
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extras.sources import mix, say, shuffled


class Found:
    """The count of what reading a source found: the good ones, and others by kind. what: a name for them."""

    def __init__(self, what):
        self.what, self.good, self.bad = what, 0, 0
        self.kinds, self.first = Counter(), {}

    def skip(self, kind, name, lost=1):
        """Leave `name` out, because it is of this kind. lost: how many good ones it could have been."""
        self.bad += lost
        self.kinds[kind] += 1
        self.first.setdefault(kind, str(name)[-200:])

    def report(self, source, max_broken):
        """All that was found, in words. Raises ValueError if nothing is good, or too much is not."""
        note = ", ".join(f"{n:,} {kind} (first: {self.first[kind]})" for kind, n in self.kinds.items())
        if not self.good:
            nothing = f"{source}: holds {self.what} of no kind that can be used"
            raise ValueError(f"{nothing}: {note}" if note else nothing)
        if self.bad > max_broken * (self.good + self.bad):
            share = f"{self.bad:,} of {self.good + self.bad:,} {self.what} cannot be used"
            raise ValueError(f"{source}: {share}, more than --max_broken {max_broken:g} allows: {note}")
        return f"{self.good:,} {self.what}" + (f"; left out: {note}" if note else "")


def listed(paths):
    """The paths in an option's value, with commas between. One that is there as it stands is one path."""
    return [paths] if Path(paths).exists() else paths.split(",")


def stamp(path):
    """What tells a file's present content from that of another time; None if it is no regular file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def files_below(path, found):
    """The visible files in a folder and below, or the one file, in order -> {relative name: stamp}.

    Links are followed, but no folder is entered twice.
    """
    files, entered, start = {}, set(), len(os.path.join(path, ""))
    if os.path.isfile(path):
        return {os.path.basename(path): stamp(path)}
    unread = lambda error: found.skip("folders that cannot be read", error.filename)
    for place, folders, names in os.walk(path, followlinks=True, onerror=unread):
        real = os.path.realpath(place)
        folders[:] = [name for name in sorted(folders) if real not in entered and not name.startswith(".")]
        names = [name for name in names if real not in entered and not name.startswith(".")]
        entered.add(real)
        for file in [os.path.join(place, name) for name in names]:
            if when := stamp(file):
                files[file[start:]] = when
            else:
                found.skip("links to nothing, and special files", file, lost=0)
    return dict(sorted(files.items()))


def held_out(name):
    """Is what is called so one of the tenth that is never trained on?"""
    return int(sha256(name.encode(errors="surrogateescape")).hexdigest(), 16) % 10 == 0


class Table:
    """Records, each of bytes and three numbers, in two files that are mapped into memory.

    `blob` is their bytes end to end. `rows` has five int64 a record: where its bytes end, the numbers, and 1
    if it is held out. records: the generator that reads them. It is started where there is no table yet, or
    `key`, which tells what it reads, has changed. The table is kept in the folder `cache`, or beside the
    source in .transfusion, or in out/cache. Length and `at` are those of a split.
    """

    def __init__(self, source, key, records, found, split, seed, max_broken, cache):
        source, self.seed = Path(source), seed
        name = f"{source.stem}-{sha256(repr((found.what, key, max_broken)).encode()).hexdigest()[:16]}"
        beside = source if source.is_dir() else source.parent
        places = [Path(cache)] if cache else [beside / ".transfusion", Path("out/cache")]
        made = [place / name for place in places if (place / name).is_dir()]
        folder = made[0] if made else self._make(source, places, name, records, found, max_broken)
        self.blob = np.memmap(folder / "blob", np.uint8, "r")
        self.rows = np.memmap(folder / "rows", np.int64, "r").reshape(-1, 5)
        if len(self.rows) < 2:
            needed = "at least two are needed, one of them to be held out"
            raise ValueError(f"{source}: holds only one of {found.what}; {needed}")
        out = self.rows[:, 4] > 0
        if not 0 < out.sum() < len(out):  # a handful: the first is the held-out one
            out = np.arange(len(out)) == 0
        self.members = np.flatnonzero(out == (split == "held_out"))
        note, n = (folder / "note").read_text(encoding="utf-8"), out.sum()
        say(f"{source}: reading it once found {note}; records to train on: {len(out) - n:,}, held out: {n:,}")

    def _make(self, source, places, name, records, found, max_broken):
        """Read the records -> the folder of the table. Several processes may do so at the same time."""
        for place in places:
            with contextlib.suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                unfinished = tempfile.TemporaryDirectory(dir=place)
                break
        else:
            raise ValueError(f"--cache {place}: cannot be written to; name another folder with --cache")
        say(f"{source}: reading it once; what is found is kept in {place}")
        with unfinished as made:
            made, end = Path(made) / "table", 0
            made.mkdir()
            with open(made / "blob", "wb") as blob, open(made / "rows", "wb") as rows:
                for data, *numbers in tqdm(records, "reading", unit="", delay=2, leave=False):
                    end += len(data)
                    blob.write(data)
                    rows.write(struct.pack("=5q", end, *numbers))
            note = found.report(source, max_broken)
            (made / "note").write_text(note, encoding="utf-8", errors="backslashreplace")
            with contextlib.suppress(OSError):  # another process was faster
                made.rename(place / name)
        return place / name

    def __len__(self):
        return len(self.members)

    def at(self, index):
        """Number `index` of the split, in a new order each epoch -> (row, epoch)."""
        epoch, k = divmod(index, len(self))
        return int(self.members[shuffled(k, len(self), mix(self.seed, epoch))]), epoch

    def data(self, row):
        """The bytes of a row, as an array."""
        return self.blob[self.rows[row - 1, 0] if row else 0 : self.rows[row, 0]]
