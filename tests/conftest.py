"""What several test files share: the tiny model whose latents are the pixels themselves, and the scripts run as a user would."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import zlib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in train.py, and before torch is imported: waiting threads give way to other programs

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(ROOT))

import extras  # noqa: E402
from data import DataConfig, ImageSegment, Tokenizer  # noqa: E402
from diffusion import DDPM, SamplingConfig  # noqa: E402
from extras import Choices, engine, generate  # noqa: E402
from model import TransfusionConfig  # noqa: E402
from sample import Trained  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: several processes or whole commands, for minutes; left out unless asked for with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
    # A shell that runs the tests in the background has them ignore Ctrl-C, and so would the programs that they start and press it for.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- A tiny model ---------------------------------------------------------------------------------------------------

SIDE = 8  # of the tiny model's pictures, which are its latents: 16 patches of 2 x 2 x 3


class PixelVAE:
    """Stands in for the VAE where it plays no part: a picture's latents are its pixels. Remembers what it decoded."""

    def __init__(self):
        self.decoded = []

    def encode(self, pixels, noise=None):
        return pixels

    def decode(self, latents):
        self.decoded += list(latents)
        return latents.clamp(-1, 1)


class LevelVQ(PixelVAE):
    """The same for a discrete model: the code of a pixel is how bright it is, in 12 levels."""

    codebook = SimpleNamespace(counts=torch.tensor([0.0, 1.0] + [0.0] * 10))

    def codes(self, pixels):
        return ((pixels.mean(1) + 1) * 5.5).round().long()

    def decode_codes(self, codes):
        return (codes[:, None] / 5.5 - 1).expand(-1, 3, -1, -1)


def divide(options, *kinds):
    """Options by their names -> for each dataclass a dict of those that are its fields."""
    return [{f.name: options[f.name] for f in fields(kind) if f.name in options} for kind in kinds]


def tiny_model(seed=0, scale=1.0, side=SIDE, vocab_size=Tokenizer().vocab_size, **more):
    """A small model with random weights. scale: multiplies matrices; at 1 a fresh model is close to constant. The U-Net's
    convolutions are drawn larger than in a fresh model, too."""
    torch.manual_seed(seed)
    sizes = dict(dim=32, n_layers=2, n_heads=2, mlp_multiple=32, vocab_size=vocab_size, latent_channels=3, latent_size=side, unet_channels=32, unet_blocks=1)
    sizes |= {"patch_size": 1} if more.get("images") == "discrete" else {}
    config, choices = divide(sizes | more, TransfusionConfig, Choices)
    model = extras.new_model(TransfusionConfig(**config), Choices(**choices)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 4:
                torch.nn.init.xavier_normal_(p)
            elif p.ndim > 1:
                p.mul_(scale)
    return model


def tiny_trained(model, tokenizer=None, prediction="v", seq_len=160, **more):
    """A model as sample.generate takes it, with a PixelVAE or LevelVQ."""
    sampling, choices = divide({"steps": 3, "guidance_scale": 1.0} | more, SamplingConfig, Choices)
    vae, images = (PixelVAE(), "continuous") if model.patches else (LevelVQ(), "discrete")
    data = DataConfig(image_size=model.config.latent_size, seq_len=seq_len)
    return Trained(model, vae, DDPM(prediction=prediction), tokenizer or Tokenizer(), data, SamplingConfig(**sampling),
                   Choices(**{"images": images} | choices))  # fmt: skip


def picture(seed, side=SIDE, max_t=1000):
    """A document's picture of random pixels."""
    pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).numpy()
    return ImageSegment(lambda: pixels, max_t)


def image(seed, side=SIDE):
    """The same as generate takes it."""
    return Image.fromarray(picture(seed, side).load())


def generated(trained, documents, seeds, **options):
    """generate's new parts, before they become text and pictures: a list of ids and latents, or codes, for each document."""
    kept = {}
    original = engine.to_document
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "to_document", lambda items, *more: [kept.setdefault(len(kept), items)] and original(items, *more))
        generate(trained, documents, seeds, **options)
    return list(kept.values())


def same(found, expected):
    """Tokens and codes exactly, latents up to rounding."""
    assert [i for i in found if isinstance(i, int)] == [i for i in expected if isinstance(i, int)]
    assert [isinstance(i, int) for i in found] == [isinstance(i, int) for i in expected]
    for a, b in zip(found, expected):
        if not isinstance(a, int):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def drawn_weights(shapes, scale=1.0):
    """{name: shape} -> {name: float32 tensor}, random but a function of each name and shape alone: so fixtures of other
    people's models need not hold their weights. Matrices keep the variance of what goes in; norms are near one."""
    weights = {}
    for name, shape in shapes.items():
        w = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        w = scale * w / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else ("norm" in name and name.endswith("weight")) + 0.2 * w
        weights[name] = torch.tensor(w, dtype=torch.float32)
    return weights


def frechet_features(n, dim, shift):
    """Two sets of correlated features (n, dim), the second shifted and stretched."""
    draw = np.random.default_rng(n + dim)
    a, b = draw.standard_normal((2, n, dim))
    mix = draw.standard_normal((dim, dim))
    return a @ mix, b @ (mix * (1 + shift)) + shift


# ---- The scripts, as a user runs them -------------------------------------------------------------------------------


def run_here(script, *args):
    """`python script args` inside this process, which has torch already -> (exit code, stdout, stderr). Any exception but
    SystemExit goes through: a user would see its traceback."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    code = 0
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):  # sys.exit("sentence") prints it and exits with 1
            code, _ = 1, err.write(code + "\n")
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def run_script(script, *args, cwd):
    """`python script args` in a process of its own -> (exit code, stdout, stderr)."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


TINY = dict(config="small", dim=32, n_layers=1, n_heads=2, rows=2, merges=64, eval_documents=8, judged=2, steps=2, max_steps=4,
            vae_channels=8, vae_steps=3, vae_batch=4)  # fmt: skip


def flags(**values):
    """Options as the command line takes them, without those that would do nothing beside the others."""
    if values.get("vae"):
        values = {name: value for name, value in values.items() if not name.startswith("vae_")}
    if values.get("config") == "chameleon":
        values = {name: value for name, value in values.items() if name != "steps"}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """`train.py --config small`, cut to a few steps, in a process of its own -> (folder, exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("small")
    found = run_script("train.py", *flags(config="small", max_steps=4, vae_steps=4, judged=4, eval_documents=8, steps=2), cwd=folder)
    return folder, *found


@pytest.fixture(scope="session")
def trained_vae(small_run):
    """The (bad) VAE of that run, to save other tests from training one."""
    return small_run[0] / "out/small/vae.pt"
