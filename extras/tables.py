"""Files of data: found in one walk, read through once, counted, and kept as a table on disk."""

import contextlib
import os
import re
import shutil
import stat
import struct
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np

from extras.sources import bar, mix, say, shuffled


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
            raise ValueError(f"{source}: holds {self.what} of no kind that can be used: {note or 'nothing'}")
        if self.bad > max_broken * (self.good + self.bad):
            share = f"{self.bad:,} of {self.good + self.bad:,} {self.what} cannot be used"
            raise ValueError(f"{source}: {share}, more than --max_broken {max_broken:g} allows: {note}")
        return f"{self.good:,} {self.what}" + (f"; left out: {note}" if note else "")


def weighted(item):
    """A path and its weight, as in a:2 -> (str, float). What is there by the whole name has weight 1."""
    found = None if os.path.exists(item) else re.fullmatch(r"(.*):([0-9]*\.?[0-9]+)", item)
    return (found[1], float(found[2])) if found else (item, 1.0)


def listed(option, paths):
    """The paths in an option's value, with commas between; a name that is there may have commas, too.

    Raises ValueError if one is empty.
    """
    items, parts = [], paths.split(",")
    while parts:
        longest_first = (",".join(parts[:n]) for n in range(len(parts), 0, -1))
        items.append(next((item for item in longest_first if os.path.exists(weighted(item)[0])), parts[0]))
        del parts[: items[-1].count(",") + 1]
    if not all(weighted(item)[0] for item in items):
        raise ValueError(f"--{option} {paths}: names an empty path; wants paths with commas between them")
    return items


def stamp(path):
    """What tells a file's present content from that of another time; None if it is no regular file."""
    with contextlib.suppress(OSError, ValueError):
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
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in [os.path.join(place, name) for name in names if not name.startswith(".")]:
            files[file[start:]] = stamp(file)
            if not files[file[start:]]:
                found.skip("links to nothing, and special files", file, lost=0)
    return {name: files[name] for name in sorted(files) if files[name]}


def side(name):
    """The number below 2^63 that decides on which side a name falls: held out if 10 divides it."""
    return int(sha256(name.encode(errors="surrogateescape")).hexdigest(), 16) % (10 * 2**59)


def held_out(sides):
    """Which of these are the tenth that is never trained on: as bool (N,). What has one name has one side."""
    n, out = len(sides), sides % 10 == 0
    if abs(out.sum() - n / 10) > 2 * n**0.5:  # never by chance: many share a name
        out = sides <= np.sort(sides)[(n - 1) // 10]
    if not out.any() or out.all():  # a handful: the first is the held-out one
        out = sides == sides[0]
    return np.arange(n) == 0 if out.all() else out


class Table:
    """Records, each of bytes and four numbers, in two files that are mapped into memory.

    `blob` is their bytes end to end. `rows` has five int64 a record: where its bytes end, and its numbers,
    the last of which is its `side`. records: the generator that reads them. It is started where there is no
    whole table yet, or `key`, which tells what it reads, has changed. The table is kept in the folder
    `cache`, or beside the source in .transfusion, or in out/cache. Length and `at` are those of a split.
    fingerprint: how many they are, and a hash of their names, wherever they lie.
    """

    def __init__(self, source, key, records, found, split, seed, max_broken, cache):
        source, self.seed = Path(source), seed
        rules = 2  # of what a table keeps: to be counted up when they change
        name = f"{source.stem}-{sha256(repr((rules, found.what, key, max_broken)).encode()).hexdigest()[:16]}"
        beside = source if source.is_dir() else source.parent
        places = [Path(cache)] if cache else [beside / ".transfusion", Path("out/cache")]
        if not any(self._open(place / name) for place in places):
            self._open(self._make(source, places, name, records, found, max_broken))
        if len(self.rows) < 2:
            needed = "at least two are needed, one of them to be held out"
            raise ValueError(f"{source}: holds only one of {found.what}; {needed}")
        out = held_out(self.rows[:, 4])
        self.members = np.flatnonzero(out == (split == "held_out"))
        sizes = f"records to train on: {len(out) - out.sum():,}, held out: {out.sum():,}"
        say(f"{source}: reading it once found {self.note}; {sizes}", known=True)
        self.fingerprint = f"{len(out):,} {found.what} ({sha256(self.rows[:, 4].tobytes()).hexdigest()[:8]})"

    def _open(self, folder):
        """Map the table in a folder -> is it there, and whole?"""
        if not all(stamp(folder / name) for name in ("blob", "rows", "note")):
            return False
        with contextlib.suppress(OSError, ValueError):
            self.blob = np.memmap(folder / "blob", np.uint8, "r")
            self.rows = np.memmap(folder / "rows", np.int64, "r").reshape(-1, 5)
            self.note = (folder / "note").read_text(encoding="utf-8")
            in_order = self.rows.min() >= 0 and (np.diff(self.rows[:, 0]) >= 0).all()
            return bool(in_order and self.rows[-1, 0] == len(self.blob))

    def _make(self, source, places, name, records, found, max_broken):
        """Read the records -> the folder of the table. Several processes may do so at the same time."""
        for place in places:
            with contextlib.suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                unfinished = tempfile.TemporaryDirectory(dir=place)
                break
        else:
            raise ValueError(f"--cache {place}: cannot be written to; name another folder with --cache")
        shutil.rmtree(place / name, ignore_errors=True)  # one that is broken
        say(f"{source}: reading it once; what is found is kept in {place}", known=True)
        with unfinished as made:
            made, end = Path(made) / "table", 0
            made.mkdir()
            with open(made / "blob", "wb") as blob, open(made / "rows", "wb") as rows:
                for data, *numbers in bar(records, "reading"):
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
