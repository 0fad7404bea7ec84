"""Images with captions: a folder of them, tars, or COCO's captions JSON; and from an image file to pixels."""

import contextlib
import io
import json
import os
import re
import tarfile
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from data import clean_text
from extras.latents import Latents
from extras.runs import opening
from extras.sources import Mixture
from extras.tables import Found, Table, files_below, listed, side, stamp, weighted

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTIONS = (".txt", ".json")
LONGEST = 2**20  # bytes of a file with a caption
LARGEST = 2**30  # bytes of an image in a tar
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no others: Pillow runs a program for EPS
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**30  # beside the pixels


# ---- From an image file to pixels ----------------------------------------------------------------

# Pixels of these depths come from Pillow as 8 bits, times so much; a transparent colour comes as it was.
SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


@lru_cache(maxsize=16)
def to_srgb(profile, mode):
    """What converts pixels with this ICC profile to sRGB; None if it is no profile of such pixels."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        return ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")


def to_eight_bits(image):
    """An image of larger numbers, which Pillow would clip, in 8 bits; its transparent colour is white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are floating-point numbers or beyond 16 bits; save it with 8 or 16 bits")
    white = values == image.info.get("transparency", -1)
    step = 1 if image.mode == "I" and values.max() < 256 else 257
    return Image.fromarray(np.where(white, 255, values // step).astype(np.uint8))


def fit_image(image, image_size):
    """A PIL image as uint8 (image_size, image_size, 3): upright, sRGB on white, cropped to its centre.

    Raises ValueError if it has no pixels, or some that cannot be shown so.
    """
    if 0 in image.size or image.mode == "LAB":
        raise ValueError("an image has no pixels" if 0 in image.size else "its colours are LAB, not RGB")
    mode = "CMYK" if image.mode == "CMYK" else Image.getmodebase(image.mode)  # the latter is L or RGB
    convert = to_srgb(image.info["icc_profile"], mode) if image.info.get("icc_profile") else None
    depth = str(image.tile[0][3]) if getattr(image, "tile", None) else ""  # while it is not read yet
    image = image.copy()
    with contextlib.suppress(Exception):  # whatever is wrong with its metadata
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "FI":
        image = to_eight_bits(image)
    if "transparency" in image.info and depth in SCALES:
        colour = np.multiply(image.info["transparency"], SCALES[depth]).astype(int).tolist()
        image.info["transparency"] = tuple(colour) if isinstance(colour, list) else colour
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode if convert else "RGB")
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.array(ImageCms.applyTransform(image, convert) if convert else image)


def pixels_alone(content):
    """The bytes of a PNG or JPEG without what its pixels do not need: text, profiles, thumbnails."""
    if content.startswith(b"\x89PNG"):
        kept, at = [content[:8]], 8
        while at < len(content):
            size = 12 + int.from_bytes(content[at : at + 4], "big")
            if content[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(content[at : at + size])
            at += size
        return b"".join(kept)
    kept, at = [content[:2]], 2
    while (marker := content[at + 1]) != 0xDA:  # after which pixels come
        size = 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if not 0xE0 <= marker <= 0xEF or marker == 0xEE and size >= 14:  # Adobe's tells how colours are meant
            kept.append(content[at : at + size])
        at += size
    return b"".join(kept) + content[at:]


def decode(file, image_size):
    """What Pillow reads in a path or a binary file, as `fit_image` makes it. Raises many kinds of errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            image.draft(None, (2 * image_size, 2 * image_size))  # a JPEG may be decoded at 1/2, 1/4, 1/8
            return fit_image(image, image_size)


def load_image(file, image_size, name=None):
    """An image file (a path, or a BytesIO with its name) as `fit_image` makes it; of several, the first.

    Raises ValueError, naming it, if that cannot be done, or it has more pixels than Pillow's limit.
    """
    try:
        return decode(file, image_size)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except Exception as error:
        with contextlib.suppress(Exception):  # if its metadata are what is wrong with it
            content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
            return decode(io.BytesIO(pixels_alone(content)), image_size)
        unknown = "it is in none of the formats " + ", ".join(FORMATS)
        reason = unknown if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name or file}: cannot be read as an image ({reason})") from None


# ---- Pairs of files ------------------------------------------------------------------------------


def is_image(name):
    """Is a file called as an image is?"""
    return name.lower().endswith(IMAGES)


def leads_out(name):
    """Does a path lead out of the place that it is relative to?"""
    return name.startswith(("/", "\\")) or os.path.isabs(name) or ".." in re.split(r"[/\\]", name)


def read_part(path, offset, size):
    """So many bytes of a file."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def read_captions(path, offset, size, is_json):
    """The captions in a text, or a JSON with a "caption" -> (captions, what is wrong if there are none)."""
    try:
        content = read_part(path, offset, min(size, LONGEST + 1))
        if len(content) > LONGEST:
            return [], "with a caption longer than a megabyte"
        text = content.decode("utf-8-sig")
        captions = json.loads(text)["caption"] if is_json else text
    except OSError:
        return [], "with a caption that cannot be read"
    except UnicodeDecodeError:
        return [], "with a caption that is not UTF-8"
    except (ValueError, TypeError, KeyError, RecursionError):
        return [], 'with a .json that is no JSON object with a "caption"'
    captions = captions if isinstance(captions, list) else [captions]
    return list(filter(None, map(clean_text, captions))), "with an empty caption"


def join(parts, where, found):
    """The pairs among these files, {name: (path, offset, size)} -> (image's name, captions) of each.

    Files with the same name but for the suffix are a pair. Those without a partner join what has the same
    name up to the first dot, as in WebDataset. where: what messages put before a name.
    """
    samples = {}
    for name in parts:
        samples.setdefault(os.path.splitext(name)[0], []).append(name)
    for stem in list(samples):
        key = re.sub(r"\.[^/\\]*$", "", stem)
        if key != stem and len(set(map(is_image, samples[stem]))) == 1:
            samples.setdefault(key, []).extend(samples.pop(stem))
    for files in samples.values():
        images, captions, reason = list(filter(is_image, files)), [], "without a caption"
        for suffix in CAPTIONS:
            for name in files:
                if not captions and name.lower().endswith(suffix):
                    captions, reason = read_captions(*parts[name], suffix == ".json")
        if not images:
            found.skip("captions without a picture", where + files[-1], lost=0)
        elif captions:
            found.good += 1
            yield images.pop(0), captions
            reason = "pictures too many for one caption"
        for _ in images:
            found.skip(reason, where + files[-1], lost=not captions)


def tar_parts(path, found):
    """The images and captions in a tar -> {name: (path, offset, size)}. Raises ReadError if it is no tar.

    A name is no more than a label, and a link is never followed.
    """
    parts, end, whole = {}, os.path.getsize(path), False
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it would keep every one
                name = "".join(c if c.isprintable() else "?" for c in member.name).removeprefix("./")
                where, lost = f"{path}: {name}", is_image(name)
                if member.size < 0:
                    raise tarfile.ReadError(f"{name} is of size {member.size}")
                if member.isdir() or not name.lower().endswith(IMAGES + CAPTIONS):
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    found.skip("links and special files", where, lost=0)
                elif leads_out(name):
                    found.skip("names that lead out of the tar", where, lost)
                elif member.offset_data + member.size > end:
                    found.skip("cut short", where, lost)
                elif "/." not in "/" + name:  # not hidden
                    if name in parts:
                        found.skip("names that come twice (the last one counts)", where, lost=0)
                    parts[name] = path, member.offset_data, member.size
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(512) == bytes(512)  # a tar ends with zeros
    except tarfile.ReadError:
        if not parts:
            raise
    if not whole:
        found.skip("tars cut short or damaged", path, lost=0)
    return parts


def records(places, parts_of, found):
    """The pairs in a folder, or in some tars: (image's name, captions, number of its place, offset, size).

    Nothing is unpacked. offset: 0 = a file of its own. parts_of(place): what `join` takes. A broken tar
    counts as lost pairs, as many as another holds.
    """
    broken = []
    for number, place in enumerate(places):
        try:
            parts = parts_of(place)
            for name, captions in join(parts, f"{place}: " if place.is_file() else "", found):
                yield name, captions, number, *parts[name][1:]
        except tarfile.ReadError as error:
            broken.append(f"{place}: is not an uncompressed tar, or is broken from the start ({error})")
    for reason in broken:
        found.skip("broken tars", reason, lost=1 + found.good // len(places))


def coco_folders(path):
    """Where the images of a COCO captions file may be."""
    part = path.stem.removeprefix("captions_")
    names = (".", "images", part, f"images/{part}")
    return [parent / name for parent in (path.parent, path.parent.parent) for name in names]


def entries(content, *keys):
    """The values of these keys in each of some JSON objects that has them, and plain ones."""
    for entry in content:
        with contextlib.suppress(TypeError, LookupError):
            values = [entry[key] for key in keys]
            hash(tuple(values))
            yield values


def coco_records(path, found):
    """The images of a COCO captions file, with all their captions, from the folder that has most of them."""
    captions, folders = {}, coco_folders(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {
            key: name for key, name in entries(content["images"], "id", "file_name") if type(name) is str
        }
        for key, caption in entries(content["annotations"], "image_id", "caption"):
            captions.setdefault(key, []).append(clean_text(caption))
        first = list(names.values())[0]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        shape = '{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: is not COCO captions ({reason}); expected {shape}") from None
    likely = [name for name in names.values() if not leads_out(name)][:100]
    there = [sum(os.path.isfile(folder / name) for name in likely) for folder in folders]
    root = folders[there.index(max(there))]
    if not any(there):
        looked = ", ".join(map(str, folders))
        raise ValueError(f"{path}: its pictures ({first}, ...) are not there; looked in {looked}")
    for _ in range(len(content["images"]) - len(names)):
        found.skip("images with an id that was there before, or without a name", path, lost=0)
    for key, name in names.items():
        texts = list(filter(None, captions.pop(key, [])))
        if leads_out(name):
            found.skip("names that lead out of the folder", name)
        elif not texts:
            found.skip("without a caption", name)
        elif not stamp(root / name):
            found.skip("without the picture", root / name)
        else:
            found.good += 1
            yield name, texts, folders.index(root), 0, 0
    for key in captions:
        found.skip("captions of unknown images", f"image_id {key}", lost=0)


# ---- Sources of pairs ----------------------------------------------------------------------------


def find(path, found):
    """What --data names -> (the places that images are in, what changes when they do, the records)."""
    files = files_below(path, found)
    tars = [name for name in files if name.lower().endswith(".tar")]
    images, texts = list(filter(is_image, files)), [name for name in files if name.lower().endswith(CAPTIONS)]
    parts = {name: (path / name, 0, LARGEST) for name in images + texts}
    key = [(name, files[name]) for name in tars or parts]
    if tars and images:
        both = f"{len(tars):,} tars and {len(images):,} pictures"
        raise ValueError(f"{path}: holds {both}; name the tars, or a folder of the pictures alone")
    if tars:
        places = [path / name for name in tars] if path.is_dir() else [path]
        return places, key, records(places, lambda place: tar_parts(place, found), found)
    if images and path.is_dir():
        return [path], key, records([path], lambda _: parts, found)
    if files and path.suffix.lower() == ".json":
        folders = coco_folders(path)
        counts = [sum(map(is_image, os.listdir(f))) if f.is_dir() else 0 for f in folders]
        return folders, key + counts, coco_records(path, found)
    reason = "no pictures here" if path.is_dir() else "is no folder, .tar or .json"
    if ".tar" in path.suffixes:
        reason += "; a .tar must not be compressed"
    wanted = "a folder of pictures with same-named .txt captions, tars of them, or COCO captions in a .json"
    reason = reason if path.exists() else "no such file or folder"
    raise ValueError(f"{path}: {reason}; --data wants {wanted}")


class Pairs:
    """Images with captions. path: one of three things.

    A folder of images with captions in .txt or .json files of the same name. A tar, or a folder of tars, as
    img2dataset and WebDataset write them, with files named so. COCO's captions JSON, the images in a folder
    near it; each epoch takes another one of an image's captions.

    A tenth, by a hash of the name (by_folder: of the name's folder), is the "held_out" split; the rest is
    "train", in a new order each epoch; "seen" is a part of it. What cannot be used is left out and counted.
    ValueError if that is too much.
    """

    SPLITS = ("train", "seen", "held_out")
    find = staticmethod(find)

    def __init__(
        self, path, image_size, split="train", seed=0, max_broken=0.05, cache="", latents="", by_folder=False
    ):
        self.options = path, image_size, split, seed, max_broken, cache, latents, by_folder
        self.image_size, found = image_size, Found("pictures with captions")
        self.places, key, records = self.find(Path(path), found)

        def rows():
            for name, captions, *where in records:
                content = "\0".join([name, *captions]).encode(errors="surrogateescape")
                shared = os.path.dirname(name) if by_folder else ""
                yield content, *where, side(shared or os.path.splitext(name)[0])

        self.table = Table(path, (key, by_folder), rows(), found, split, seed, max_broken, cache)
        self.fingerprint = self.table.fingerprint
        load = Latents(latents, self.table, image_size) if latents else self.read
        self._load = lru_cache(maxsize=2**26 // (3 * image_size**2))(load)  # at most 64 MB of pixels

    def __len__(self):
        return len(self.table)

    def __reduce__(self):
        return type(self), self.options

    def _texts(self, row):
        """Name and captions of a row of the table."""
        return self.table.data(row).tobytes().decode(errors="surrogateescape").split("\0")

    def _where(self, row):
        """Where the image of a row is: (what messages call it, its file or tar, offset in a tar, size)."""
        name, (_, place, offset, size, _) = self._texts(row)[0], self.table.rows[row]
        place = self.places[place % len(self.places)]  # the table may have come with the data
        return f"{place}{': ' if offset else os.sep}{name}", place if offset else place / name, offset, size

    def read(self, row):
        """The image in a row of the table, train and held out alike. Raises ValueError if it is broken."""
        name, file, offset, size = self._where(row)
        if leads_out(self._texts(row)[0]) or not stamp(file) or size > LARGEST:
            raise ValueError(f"{name}: is not there, or lies outside of the data")
        if not offset:
            return load_image(file, self.image_size)
        with opening(file, "a tar"):
            content = io.BytesIO(read_part(file, offset, size))
        return load_image(content, self.image_size, name)

    def pair(self, index):
        """(caption, function that loads the image or raises ValueError); index runs on over the epochs."""
        row, epoch = self.table.at(index)
        _, *captions = self._texts(row)
        return captions[(row + epoch) % len(captions)], lambda: self._load(row)

    def captions(self, index):
        """All that is written about the image of pair number `index`."""
        return self._texts(self.table.at(index)[0])[1:]

    def name(self, index):
        """The file that pair number `index` is in."""
        return self._where(self.table.at(index)[0])[0]


def open_sources(config, split="train", seed=0, kind_of=lambda path: Pairs):
    """The source that --data names, of one path or of several with weights. kind_of(path): its class."""
    data, extra, sources, weights = config.data, config.extra, [], []
    for number, item in enumerate(listed("data", extra.data)):
        path, weight = weighted(item)
        if not weight:
            raise ValueError(f"--data {item}: its weight must be above 0, as in a:2,b.tar")
        latents = str(Path(extra.latents) / str(number)) if extra.latents else ""
        more = dict(max_broken=data.max_broken, cache=extra.cache, latents=latents)
        more |= dict(by_folder=extra.by_folder)
        sources.append(kind_of(path)(path, data.image_size, split, seed, **more))
        weights.append(weight)
    return Mixture(sources, weights, seed) if len(sources) > 1 else sources[0]
