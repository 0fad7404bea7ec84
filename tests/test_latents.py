"""vae.py --encode and train.py --latents: pictures encoded once, and read in their place."""

import json
import shutil
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import TINY, flags, run_here, run_script
from PIL import Image
from test_pretrained import fixture

from data import to_pixels
from extras import load_vae
from extras.latents import check_latents, write_latents
from extras.pairs import Pairs
from extras.runs import save_checkpoint
from extras.exports import write_safetensors
from train import parse, set_up, train_step
from vae import VAE


@pytest.fixture
def pictures(tmp_path):
    """A folder of forty pictures with captions, one of them broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(40):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{n:02d}.png")
        (folder / f"{n:02d}.txt").write_text(f"number {n}")
    (folder / "07.png").write_bytes(b"broken")
    return folder


def test_training_on_latents_encoded_once_equals_encoding_on_the_fly(pictures, trained_vae, tmp_path):
    """Up to the rounding to float16; each epoch draws anew from the posterior, with the same noise either way."""
    code, out, err = run_here("vae.py", "--config", "small", "--data", pictures, "--vae", trained_vae, "--encode", tmp_path / "latents")
    assert code == 0 and "1 pictures could not be read" in out and "07.png" in err, err
    options = TINY | dict(data=pictures, vae=trained_vae, rows=4)
    plain = set_up(parse(flags(**options, out=tmp_path / "a"))[0])
    cached = set_up(parse(flags(**options, out=tmp_path / "b", latents=tmp_path / "latents"))[0])
    for _ in range(3):
        a, b = train_step(plain), train_step(cached)
        assert a["lm"] == pytest.approx(b["lm"], abs=2e-3) and a["ddpm"] == pytest.approx(b["ddpm"], abs=2e-3)
    (x_0, _, _), (y_0, _, _) = (run.objective.latents_and_noise(next(run.loader), range(4), [9])[1:] for run in (plain, cached))
    assert len(x_0) and torch.allclose(x_0, y_0, atol=2e-2) and not torch.equal(x_0, y_0)


def test_encoding_goes_on_where_it_was_stopped(pictures, trained_vae, tmp_path):
    vae, pairs = load_vae(trained_vae), Pairs(pictures, 32)
    assert write_latents(vae, [pairs], tmp_path, shard=16) == 1
    before = [np.load(file) for file in sorted((tmp_path / "0").glob("*.npy"))]
    assert [len(part) for part in before] == [16, 16, 8] and np.isnan(before[0][7]).all()
    (tmp_path / "0/00001.npy").unlink()
    with pytest.raises(ValueError, match="only 24 of 40 pictures are encoded"):
        Pairs(pictures, 32, latents=str(tmp_path / "0"))
    write_latents(vae, [pairs], tmp_path, shard=16)
    after = [np.load(file) for file in sorted((tmp_path / "0").glob("*.npy"))]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True))
    mean, log_var = vae.posterior(to_pixels(pairs.read(20))[None])
    torch.testing.assert_close(torch.from_numpy(after[1][4]).float(), torch.cat([mean, log_var], 1)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_no_numbers_are_refused_by_their_file(value, pictures, trained_vae, tmp_path):
    """When they are read, as broken pictures are: one that could not be read, or one that the VAE made nothing of."""
    write_latents(load_vae(trained_vae), [Pairs(pictures, 32)], tmp_path, shard=16)
    latents = np.load(tmp_path / "0/00001.npy")
    latents[4, 3, 2, 1] = value
    np.save(tmp_path / "0/00001.npy", latents)
    source = Pairs(pictures, 32, latents=str(tmp_path / "0"))
    for row, file in ((20, "00001.npy"), (7, "00000.npy")):
        with pytest.raises(ValueError, match=f"picture {row} in .*/0/{file}: its latents are no numbers"):
            source._load(row)
    assert source._load(19).shape == latents[3].shape


def test_latents_that_do_not_fit(pictures, trained_vae, tmp_path):
    write_latents(load_vae(trained_vae), [Pairs(pictures, 32)], tmp_path / "latents")
    rescaled = load_vae(trained_vae)
    rescaled.latent_mean += 1.0
    check_latents(tmp_path / "latents", rescaled)  # the same VAE, measured anew
    (pictures / "39.png").rename(pictures / "40.png"), (pictures / "39.txt").rename(pictures / "40.txt")
    with pytest.raises(ValueError, match=r"are of 40 pictures with captions \(.* of 32 pixels, not of 40 pictures"):
        Pairs(pictures, 32, latents=str(tmp_path / "latents/0"))
    (pictures / "40.png").rename(pictures / "39.png"), (pictures / "40.txt").rename(pictures / "39.txt")
    other = VAE(load_vae(trained_vae).config)
    with pytest.raises(ValueError, match="of another VAE; name an empty folder"):
        write_latents(other, [Pairs(pictures, 32)], tmp_path / "latents")
    save_checkpoint(tmp_path / "other.pt", {"vae_config": asdict(other.config), "vae": other.state_dict() | {"latent_mean": torch.ones_like(other.latent_mean)}})
    for change, said in ((dict(vae=tmp_path / "other.pt"), "made by another VAE"), (dict(vae=trained_vae, latents=tmp_path / "none"), "vae.py --encode"), ({}, "give --vae")):
        options = TINY | dict(data=pictures, latents=tmp_path / "latents", out=tmp_path / "out") | change
        with pytest.raises(ValueError, match=said):
            set_up(parse(flags(**options))[0])
    with pytest.raises(SystemExit, match="--encode needs --data"):
        raise SystemExit(run_here("vae.py", "--config", "small", "--encode", tmp_path)[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_the_readmes_chain(kind, pictures, tmp_path):
    """From pictures and a VAE in diffusers' layout to a sample, each command in a process of its own."""
    _, settings, weights = fixture("vaes.npz", "stable diffusion")
    write_safetensors(tmp_path / "sd/vae/diffusion_pytorch_model.safetensors", weights)
    (tmp_path / "sd/vae/config.json").write_text(json.dumps(settings))
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": f"sentence number {i} " * (i % 20 + 1)}) + "\n" for i in range(60)))
    if kind == "tars":
        (pictures / "07.png").write_bytes((pictures / "08.png").read_bytes())
        for n, tens in enumerate("0123"):
            with tarfile.open(tmp_path / f"{n:05d}.tar", "w") as tar:
                for file in sorted(pictures.glob(f"{tens}?.*")):
                    tar.add(file, file.name)
        shutil.rmtree(pictures)
        pictures.mkdir()
        for tar in tmp_path.glob("*.tar"):
            tar.rename(pictures / tar.name)
    of_data = ["--data", "pictures", "--vae", "sd/vae"]
    for script, *args in (
        ("vae.py", "--config", "small", *of_data, "--encode", "latents"),
        ("train.py", *flags(**TINY | dict(vae="sd/vae")), "--data", "pictures", "--latents", "latents", "--text", "wiki.jsonl", "--text_fraction", 0.5, "--out", "out/mine"),
        ("sample.py", "--ckpt", "out/mine", "--prompt", "number 3", "--num", 2),
    ):  # fmt: skip
        code, out, err = run_script(script, *args, cwd=tmp_path)
        assert code == 0 and "Traceback" not in err, err
    with Image.open(tmp_path / "out/samples/001.png") as picture:
        assert picture.size == (32, 32) and picture.info["prompt"] == "number 3"
