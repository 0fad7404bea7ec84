"""Images with captions in Parquet files, as the Hugging Face hub stores them: --data FILE.parquet.

A folder of such files is one source. It needs the package pyarrow. What is read at random is a row group:
files with small ones are fast.
"""

import io
from functools import lru_cache

from data import clean_text
from extras.pairs import Pairs, load_image
from extras.runs import opening
from extras.tables import files_below

TEXTS = ("text", "caption", "captions")  # columns: of str, or of lists of them


def reader():
    """pyarrow's class. Raises ValueError if it is not installed."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("--data of Parquet files needs the package pyarrow: pip install pyarrow") from None
    return ParquetFile


@lru_cache(maxsize=64)
def opened(path):
    """A file, mapped into memory: so processes can share it."""
    return reader()(path, memory_map=True)


@lru_cache(maxsize=2)
def images(path, group):
    """The images of a row group."""
    return opened(path).read_row_group(group, ["image"], use_threads=False).column(0)


def rows(place, number, found):
    """The rows of file `number` as `Pairs` takes them: name, captions, number, 1 + row group, row in it."""
    file, first = opened(place), 0
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    text = next((name for name in TEXTS if name in kinds), None)
    if not text or "binary" not in kinds.get("image", ""):
        wanted = "an image, of {bytes, path} or of bytes, and a text, caption or captions"
        raise ValueError(f"{place}: has the columns {', '.join(kinds)}; --data wants {wanted}")
    with_path = ["image.path"] if "path: string" in kinds["image"] else []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, [text, *with_path], use_threads=False).to_pydict()
        names = [image and image["path"] for image in table.get("image", [])]
        if None in names or len(set(names)) < len(names) or not names:
            names = [f"{place.stem}-{first + k}" for k in range(len(table[text]))]
        first += len(names)
        for k, (name, texts) in enumerate(zip(names, table[text])):
            captions = list(filter(None, map(clean_text, texts if isinstance(texts, list) else [texts])))
            if captions:
                found.good += 1
                yield name, captions, number, 1 + group, k
            else:
                found.skip("without a caption", f"{place}: {name}")


def records(places, found):
    """The rows of some files. One that cannot be read counts as lost rows, as many as another holds."""
    for number, place in enumerate(places):
        try:
            with opening(place, "a whole parquet file"):
                yield from rows(place, number, found)
        except ValueError as error:
            found.skip("files that cannot be read", error, lost=1 + found.good // len(places))


class Parquet(Pairs):
    """A source of pairs, as Pairs is: of a Parquet file, or of all in a folder."""

    @staticmethod
    def find(path, found):
        """The files, what changes when they do, and their rows."""
        files = {name: at for name, at in files_below(path, found).items() if name.endswith(".parquet")}
        places = [path / name for name in files] if path.is_dir() else [path]
        reader()  # if it is missing, no file is to blame
        return places, list(files.items()), records(places, found)

    def read(self, row):
        """The image in a row of the table. Raises ValueError if it is broken."""
        (name, *_), (_, place, group, k, _) = self._texts(row), self.table.rows[row]
        place = self.places[place % len(self.places)]
        with opening(place, "a whole parquet file"):
            image = images(place, group - 1)[k].as_py()
            content = io.BytesIO(image["bytes"] if isinstance(image, dict) else image)
        return load_image(content, self.image_size, f"{place}: {name}")
