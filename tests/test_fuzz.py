"""Seeded mutations of what comes in from outside: each ends in a result, or in one sentence that names what is wrong."""

import io
import json
import random
import tarfile

import numpy as np
import pytest
from conftest import TINY, flags, tiny_trained, tiny_model
from PIL import Image

from data import Tokenizer, clean_text
from extras import cli, load_vae, open_pairs
from extras.pairs import load_image
from extras.text import read_prompt, style_of
from extras.exports import export, read_safetensors, write_safetensors
from sample import generate, load
from train import Config, parse, save, set_up

pytestmark = pytest.mark.slow
ODD = ["", "0", "-1", "1e999", "nan", "inf", "-0.5", "2.5", "true", "x", "1,2", "9" * 30, "é", " ", "\0", "../..", "None", "1e-45"]


def sentence(work, allowed=(ValueError, OSError, FloatingPointError)):
    """Does it end well? A sentence has one line."""
    try:
        work()
    except allowed as error:
        assert "\n" not in str(error).strip() and str(error).strip(), repr(error)


def mutate(content, rng):
    """Bytes with some of them changed, dropped, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(content)) if content else 0
        kind = rng.randrange(4)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at : at + rng.choice([1, 7, 300])]
        elif kind == 2:
            content[at:at] = content[at : at + rng.choice([1, 7, 300])]
        else:
            del content[rng.randrange(len(content) + 1) :]
        if not content:
            break
    return bytes(content)


def test_options(monkeypatch):
    monkeypatch.setattr(cli, "comments", lambda cls: dict.fromkeys((f for f in cls.__dataclass_fields__), ""))
    rng, names = random.Random(0), list(cli.options(Config))
    for _ in range(300):
        words = [word for name in rng.sample(names, rng.choice([1, 2, 3])) for word in (f"--{name}", rng.choice(ODD))]
        sentence(lambda: parse(["--config", rng.choice(["small", "chameleon", "small_edit", "7b"]), *words]))


@pytest.fixture(scope="module")
def run_folder(trained_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    save(set_up(parse(flags(**TINY | dict(vae=trained_vae, out=folder)))[0]))
    return folder


def test_checkpoints_and_exports(run_folder, tmp_path):
    rng = random.Random(1)
    good = (run_folder / "checkpoint.pt").read_bytes()
    for n in range(40):
        (tmp_path / "checkpoint.pt").write_bytes(mutate(good, rng))
        sentence(lambda: load(tmp_path / "checkpoint.pt"))
        sentence(lambda: load_vae(tmp_path / "checkpoint.pt"))
    path = tmp_path / "x.safetensors"
    export(load(run_folder), path)
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    for n in range(90):  # half of them in the header
        changed = mutate(good[: 8 + header], rng) + good[8 + header :] if n % 2 else mutate(good, rng)
        path.write_bytes(changed)
        sentence(lambda: load(path))
    path.write_bytes(good)
    load(path)


def test_configurations_in_exports(run_folder, tmp_path):
    """Any value in the place of any other."""
    rng = random.Random(2)
    path = tmp_path / "x.safetensors"
    export(load(run_folder), path)
    tensors, texts = read_safetensors(path)
    good = json.loads(texts["transfusion"])
    values = [None, -1, 0, 1e999, "x", [], {}, True, [1, 2], 37, "../../x"]
    for n in range(80):
        state = json.loads(json.dumps(good))
        at = state
        while isinstance(at, dict) and at:
            key = rng.choice(list(at))
            if not isinstance(at[key], dict) or rng.random() < 0.2:
                break
            at = at[key]
        if isinstance(at, dict) and at:
            at[key] = rng.choice(values)
        write_safetensors(path, tensors, {"transfusion": json.dumps(state)})
        sentence(lambda: load(path))


def test_pictures(tmp_path):
    rng = random.Random(3)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    for suffix, mode in (("png", "RGBA"), ("jpg", "RGB"), ("gif", "P"), ("bmp", "RGB"), ("webp", "RGBA"), ("tif", "RGB")):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        for n in range(60):
            path = tmp_path / f"x.{suffix}"
            path.write_bytes(mutate(file.getvalue(), rng))
            sentence(lambda: load_image(path, 16))


def test_tars(tmp_path):
    rng, file = random.Random(5), io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n in range(8):
            picture = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 20 * n, np.uint8)).save(picture, "PNG")
            for name, content in ((f"{n:03d}.png", picture.getvalue()), (f"{n:03d}.txt", f"number {n}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    for n in range(60):
        path = tmp_path / f"{n}.tar"
        path.write_bytes(mutate(file.getvalue(), rng))
        config = parse(["--config", "small", "--data", str(path), "--cache", str(tmp_path / "cache"), "--max_broken", "1"])[0]
        sentence(lambda: [load() for _, load in map(open_pairs(config, "seen").pair, range(4))])


def test_tokenizers():
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    from extras.tokenizers import JSONTokenizer

    rng, words = random.Random(6), {"[UNK]": 0, "a": 1, "red": 2, "circle": 3}
    good = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")).to_str().encode()
    for n in range(150):
        text = mutate(good, rng).decode(errors="replace")
        sentence(lambda: JSONTokenizer(text).encode("a red circle"))


def test_prompts():
    rng, tokenizer = random.Random(4), Tokenizer()
    tokenizer.style = style_of(["a red circle", "a blue square"] * 5, tokenizer)
    model = tiny_trained(tiny_model(), steps=1)
    for n in range(200):
        text = "".join(chr(rng.choice([rng.randrange(32), rng.randrange(32, 127), rng.randrange(0xD000, 0x11000), rng.randrange(0x110000)])) for _ in range(rng.randrange(12)))
        clean = clean_text(text)
        assert clean_text(clean) == clean and "\n" not in clean
        clean.encode()
        assert read_prompt(text, tokenizer) == read_prompt(f" {text}\r\n", tokenizer)
        if n < 10:
            sentence(lambda: generate(model, [[text]], seeds=[n], max_tokens=2))
