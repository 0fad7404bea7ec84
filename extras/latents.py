"""Images encoded once by the VAE, and read in their place: the posterior's means and log-variances."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import to_pixels
from extras.runs import read_json, written
from extras.sources import say


class Latents:
    """What write_latents wrote of a Table; latents(row): float16 (2 C, h, w), mean and log-variance."""

    def __init__(self, folder, table, image_size):
        where, self.files = f"--latents {folder}", sorted(Path(folder).glob("*.npy"))
        try:
            index = read_json(Path(folder) / "index.json")
            self.shards = [np.load(file, mmap_mode="r") for file in self.files]
            data, side, self.shard = index["data"], index["image_size"], index["shard"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{where}: cannot be read ({error}); write them with vae.py --encode") from None
        if (data, side) != (table.fingerprint, image_size):
            wanted = f"not of {table.fingerprint} of {image_size}"
            raise ValueError(f"{where}: are of {data} of {side} pixels, {wanted}")
        if (done := sum(map(len, self.shards))) != len(table.rows):
            missing = f"only {done:,} of {len(table.rows):,} pictures are encoded"
            raise ValueError(f"{where}: {missing}; start vae.py --encode again, it goes on")

    def __call__(self, row):
        number, place = divmod(row, self.shard)
        latents = np.array(self.shards[number][place])
        if not np.isfinite(latents).all():
            unread = "its latents are no numbers, as of a picture that could not be read when it was encoded"
            raise ValueError(f"picture {row} in {self.files[number]}: {unread}")
        return latents


def fingerprint(vae):
    """A short text that tells this VAE's weights from any other's, however its latents are scaled."""
    weights = {name: value for name, value in vae.state_dict().items() if not name.startswith("latent_")}
    content = [value.detach().cpu().contiguous().numpy().tobytes() for value in weights.values()]
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


@torch.no_grad()
def encode(vae, pairs, rows, batch):
    """The latents of rows of some Pairs: float16 (rows, 2 C, h, w), NaN where an image cannot be read."""
    side = pairs.image_size // vae.config.factor
    latents = np.full((len(rows), 2 * vae.config.latent_channels, side, side), np.nan, np.float16)
    for start in range(0, len(rows), batch):
        images = {}
        for place, row in enumerate(rows[start : start + batch], start):
            try:
                images[place] = pairs.read(row)
            except ValueError as error:
                say(f"skipped: {error}")
        if images:
            x = to_pixels(np.stack(list(images.values()))).to(vae.latent_mean.device)
            z = torch.cat(vae.posterior(x), dim=1).clamp(-6e4, 6e4)  # float16 ends at 65504
            latents[list(images)] = z.cpu().numpy()
    return latents


def write_latents(vae, sources, folder, shard=4096, batch=32):
    """Encode every image of some Pairs once, into folder/0/00000.npy and so on -> how many cannot be read.

    A file that is there already is kept, so an interrupted run goes on.
    """
    broken = 0
    for number, pairs in enumerate(sources):
        place, rows, data = Path(folder) / str(number), range(len(pairs.table.rows)), pairs.table.fingerprint
        index = {"data": data, "shard": shard, "image_size": pairs.image_size, "vae": fingerprint(vae)}
        if (place / "index.json").exists() and read_json(place / "index.json") != index:
            others = "holds latents of other pictures or of another VAE"
            raise ValueError(f"{place}: {others}; name an empty folder")
        with written(place / "index.json") as file:
            file.write(json.dumps(index).encode())
        for first in tqdm(rows[::shard], desc=f"encode {number}"):
            path = place / f"{first // shard:05d}.npy"
            if not path.exists():
                with written(path) as file:
                    np.save(file, encode(vae, pairs, rows[first : first + shard], batch))
            broken += int(np.isnan(np.load(path, mmap_mode="r")[:, 0, 0, 0]).sum())
    return broken


def check_latents(folder, vae):
    """Raises ValueError unless --latents were made by this VAE."""
    for index in Path(folder).glob("*/index.json"):
        if read_json(index).get("vae") != fingerprint(vae):
            advice = "give the one that made them with --vae, or encode again"
            raise ValueError(f"--latents {folder}: were made by another VAE; {advice}")
