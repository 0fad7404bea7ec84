"""extras/one_page.py states the paper a second time, and the core is held to it; the page keeps its promises, and draws and describes what it never saw."""

import ast
import importlib.util
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, PixelVAE
from PIL import Image

from attention_mask import transfusion_mask
from data import DataConfig, ImageSegment, Tokenizer, collate
from diffusion import DDPM, SamplingConfig
from extras import Choices
from model import Transfusion, TransfusionConfig
from sample import Trained, generate_one
from train import losses

PAGE = ROOT / "extras/one_page.py"
PREDICTION = "v"
TIGHT = dict(rtol=1e-9, atol=1e-9)


def load_page():
    """A fresh copy of the page, for its constants may be changed."""
    spec = importlib.util.spec_from_file_location("one_page", PAGE)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


@pytest.fixture
def page(monkeypatch):
    """The page; and it and the core in double precision: what they call float32 is float64 until the test ends."""
    single = torch.float32
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield load_page()
    torch.set_default_dtype(single)


# ---- The core and the page state the same method --------------------------------------------------------------------

RENAMED = {r"\.(qkv|out|q_norm|k_norm)\.": r".attention.\1.", r"\.(gate_up|down)\.": r".mlp.\1.", r"^(encoder|decoder)\.": r"patches.\1.",
           r"^timestep\.": "patches.timestep.mlp."}  # fmt: skip


def core_name(name):
    """What model.py calls a weight of the page."""
    for there, here in RENAMED.items():
        name = re.sub(there, here, name)
    return name


def core_value(page, name, value):
    """The page's weight, or gradient, in the core's order. Inside a patch the page counts "c p q" (F.unfold's), the core "p q c"."""
    shape = 3, page.PATCH, page.PATCH
    if name == "encoder.weight":
        return value.unflatten(1, shape).permute(0, 2, 3, 1).flatten(1)
    if name.startswith(("decoder.", "timestep.2.")):
        return value.unflatten(0, shape).movedim(0, 2).flatten(0, 2)
    return value


def both_models(page, seed=0, scale=4.0):
    """The page's network with large random weights, and model.Transfusion with the same."""
    torch.manual_seed(seed)
    theirs = page.Transfusion()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape) if "norm" in name else scale * torch.randn(p.shape) / p.shape[-1] ** 0.5)
        theirs.embedding.weight.copy_(torch.randn(theirs.embedding.weight.shape))
        # Component 0 of every position is held at a constant, so that column 0 of the head is a bias on each token.
        theirs.embedding.weight[:, 0] = theirs.encoder.bias[0] = 20.0
        theirs.head.weight[:, 0] = 0.0
    config = TransfusionConfig(dim=page.DIM, n_layers=page.N_LAYERS, n_heads=page.N_HEADS, mlp_width=page.MLP_DIM, rope_theta=page.THETA, qk_norm=True, patch_size=page.PATCH,
                               vocab_size=len(page.VOCABULARY), latent_channels=3, latent_size=page.SIDE)  # fmt: skip
    ours = Transfusion(config)
    ours.load_state_dict({core_name(name): core_value(page, name, weight) for name, weight in theirs.state_dict().items()})
    return ours, theirs


class Words(Tokenizer):
    """The page's tokens as the core takes them. Remembers what it decoded, without special tokens."""

    def __init__(self, page):
        self.page, self.style, self.decoded = page, None, []
        self.bos, self.eos, self.boi, self.eoi, self.pad = page.BOS, page.EOS, page.BOI, page.EOI, page.PAD
        self.vocab_size = len(page.VOCABULARY)

    def encode(self, text):
        return [self.page.VOCABULARY.index(word) for word in text.split()]

    def decode(self, ids):
        words = [i for i in ids if i not in (self.boi, self.eoi)]
        self.decoded += [words] if words else []
        return " ".join(self.page.VOCABULARY[i] for i in words)


def mixed_rows(page, seed, n=6):
    """n random documents of words and pictures in any order -> a Batch of the core's, and the page's sequences."""
    draw = np.random.default_rng(seed)
    documents = [[], ["text"], ["picture"]] + [list(draw.choice(["text", "picture"], draw.integers(1, 5))) for _ in range(n - 3)]
    for document in documents:
        for i, kind in enumerate(document):
            pixels = draw.integers(256, size=(page.SIDE, page.SIDE, 3), dtype=np.uint8)
            words = draw.integers(5, len(page.VOCABULARY), size=draw.integers(1, 6)).tolist()
            document[i] = words if kind == "text" else ImageSegment(lambda pixels=pixels: pixels, 1000)
    length = max(1 + sum(page.N_PATCHES + 2 if isinstance(part, ImageSegment) else len(part) for part in document) for document in documents)
    batch = collate([[document] for document in documents], Words(page), length, page.N_PATCHES)
    images, sequences = iter(batch.images), []
    for document in documents:
        parts = [[page.BOI, next(images)[None], page.EOI] if isinstance(part, ImageSegment) else part for part in document]
        sequences.append([page.BOS, *sum(parts, []), page.EOS])
    return batch, sequences


@pytest.mark.parametrize("seed", range(4))
def test_batch_mask_outputs_losses_and_gradients_are_the_same(page, seed):
    ours, theirs = both_models(page, seed)
    batch, sequences = mixed_rows(page, seed)
    tokens, image_id, images = page.lay_out(sequences)
    is_real = batch.doc_id >= 0  # (B, S); what padding sees and answers does not matter
    assert torch.equal(tokens[:, :-1][is_real], batch.tokens[is_real]) and torch.equal(images, batch.images)
    assert torch.equal(image_id[:, :-1] != page.TEXT, batch.image_id >= 0)
    mask = transfusion_mask(batch.image_id, batch.doc_id)
    assert torch.equal(page.attention_mask(image_id[:, :-1])[:, 0][is_real], mask[:, 0][is_real])

    t, eps = torch.randint(0, 1001, (len(images),)), torch.randn(images.shape)
    ddpm = DDPM(prediction=PREDICTION)
    x_t = ddpm.q_sample(images, t, eps)
    torch.testing.assert_close(page.q_sample(images, t, eps), x_t, **TIGHT)
    logits, prediction = ours(batch.tokens, batch.image_id, batch.positions, mask, x_t, t)
    page_logits, page_prediction = theirs(tokens[:, :-1], image_id[:, :-1], x_t, t)
    torch.testing.assert_close(page_logits[is_real], logits[is_real], **TIGHT)
    torch.testing.assert_close(page_prediction, prediction, **TIGHT)
    assert logits[is_real].std() > 1 and prediction.std() > 1  # not all the same

    lm, image = losses(ours, ddpm, batch, batch.images, t, eps)
    ours_both = lm.sum() / (batch.targets >= 0).sum(), image.mean()
    page_both = page.losses(theirs, tokens, image_id, images, t, eps)
    torch.testing.assert_close(page_both, ours_both, **TIGHT)
    (ours_both[0] + 5 * ours_both[1]).backward()
    (page_both[0] + 5 * page_both[1]).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert len(gradients) == len(list(theirs.parameters()))
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(core_value(page, name, p.grad), gradients[core_name(name)], **TIGHT, msg=name)


def test_the_schedule_is_the_same(page):
    torch.testing.assert_close(page.alphas_cumprod, DDPM().alphas_cumprod, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("seed, end", [(1, 1.0), (3, 2.0)])
def test_decoding_is_the_same(page, seed, end):
    """Words and pictures, in the order that the models like, from the same noise."""
    ours, theirs = both_models(page, seed, scale=2.0)
    for head in (ours.head, theirs.head):
        with torch.no_grad():
            head.weight[[page.BOI, page.EOS], 0] = torch.tensor([1.0, end])  # likelier than a word
    page.DENOISING_STEPS, tokenizer, vae = 2, Words(page), PixelVAE()
    sampling = SamplingConfig(steps=2, sampler="ddpm", guidance_scale=page.GUIDANCE)
    trained = Trained(ours.eval(), vae, DDPM(prediction=PREDICTION), tokenizer, DataConfig(image_size=page.SIDE, seq_len=1000), sampling, Choices())
    pixels = np.random.default_rng(0).integers(256, size=(page.SIDE, page.SIDE, 3), dtype=np.uint8)
    shown = torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1
    kinds = ""
    for number, document in enumerate([[], [Image.fromarray(pixels)], *([page.CAPTIONS[n]] for n in range(2)), [page.CAPTIONS[9], Image.fromarray(pixels)]]):
        tokenizer.decoded, vae.decoded = [], []
        found = generate_one(trained, document, number, draw=False, temperature=0.0, max_tokens=32, max_images=32)
        texts, latents, core = iter(tokenizer.decoded), iter(vae.decoded), []
        for part in found[len(document) :]:
            core += next(texts) if isinstance(part, str) else [next(latents)[None]]

        sequence = [page.BOS]
        for part in document:
            sequence += tokenizer.encode(part) if isinstance(part, str) else [page.BOI, shown, page.EOI]
        torch.manual_seed(number)
        written = page.generate(theirs, sequence)[len(sequence) :]
        new = [item for item in written if torch.is_tensor(item) or item not in (page.BOI, page.EOI, page.EOS)]
        assert len(core) == len(new) if written[-1] == page.EOS else len(core) >= len(new)  # the page stops sooner
        for a, b in zip(new, core):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        kinds += "".join("I" if torch.is_tensor(item) else "w" for item in new) + "." * (written[-1] == page.EOS)
    assert "w." in kinds if end > 1 else "Iw" in kinds and "wI" in kinds


# ---- The page keeps its promises ------------------------------------------------------------------------------------


def test_the_page_is_a_page():
    lines = PAGE.read_text().splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 100
    nodes = list(ast.walk(ast.parse(PAGE.read_text())))
    found = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert found - {"torch", "PIL"} <= sys.stdlib_module_names


def test_what_is_held_out_is_never_trained_on():
    page = load_page()
    held_out, seen = set(page.HELD_OUT), set(page.SEEN)
    assert not held_out & seen and len(held_out | seen) == len(page.SCENES) and len(held_out) >= len(page.SCENES) / 7
    for parts in ((0, 1), (0, 2), (1, 2)):  # but every pair of words is
        assert len({tuple(page.SCENES[n][i] for i in parts) for n in seen}) == len({tuple(scene[i] for i in parts) for scene in page.SCENES})
    random.seed(0)
    for _ in range(300):
        sequence, max_t = page.training_sequence()
        words = [token for token in sequence if not torch.is_tensor(token) and token > page.EOI]
        (image,) = filter(torch.is_tensor, sequence)
        scene = page.read(image)
        assert scene in seen and words in ([], page.TOKENS[scene])
        assert max_t == (500 if words and sequence[1] == page.BOI else 1000)


def test_the_judge_reads_pictures_right_and_wrong_ones_wrong():
    page = load_page()
    noise = torch.Generator().manual_seed(0)
    for n in range(0, len(page.SCENES), 5):
        for picture in page.PICTURES[n]:
            assert page.read(picture + 0.3 * torch.randn(picture.shape, generator=noise)) == n
            for m in (n - 1, (n + 9) % len(page.SCENES), (n + 36) % len(page.SCENES)):  # another place, shape or colour
                assert page.read(page.PICTURES[m, 0]) != n
            assert page.read(picture + torch.randn(picture.shape, generator=noise)) is None
    assert page.read(torch.zeros(3, page.SIDE, page.SIDE)) is None


def test_training_lowers_both_losses(capsys):
    page = load_page()
    page.STEPS, page.ROWS = 101, 4
    random.seed(0), torch.manual_seed(0)
    page.train(page.Transfusion())
    (first, last) = (list(map(float, re.findall(r"[0-9]\.[0-9]+", line))) for line in capsys.readouterr().out.splitlines())
    assert last[0] < 0.5 * first[0] and last[1] < 0.9 * first[1]


@pytest.mark.slow
def test_the_page_draws_and_describes_what_it_never_saw(tmp_path):
    done = subprocess.run([sys.executable, str(PAGE)], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    drawings, captions = map(int, re.search(r"right, of 124: (\d+) drawings, (\d+) captions", done.stdout).groups())
    assert min(drawings, captions) >= 0.9 * 124
    assert Image.open(tmp_path / "out/one_page.png").size == (960, 1120)
