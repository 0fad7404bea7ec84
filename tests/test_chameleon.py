"""extras/chameleon.py, the discrete model (`--images discrete`): its batch written out, its sampling against plain recomputation, its training."""

import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flags, generated, image, picture, run_here, same, tiny_model, tiny_trained
from PIL import Image

import sample
from attention_mask import transfusion_mask
from data import NO_LOSS, Tokenizer, collate
from extras import vae_kind
from extras.chameleon import Objective, fill_codes
from extras.exports import export
from model import Block
from sample import generate, load
from train import parse, set_up, validate

T = Tokenizer()
V, CODES, SIDE = T.vocab_size, 12, 3  # codes are ids V..V+11, nine of them an image
TINY_VQ = {name: value for name, value in TINY.items() if name != "steps"} | dict(config="chameleon", codebook=32)


# ---- The batch ------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_written_out():
    """Captions before and after, an image that only conditions, padding: what is read, and what is predicted where."""
    a, b, n, pad = ord("a"), ord("b"), NO_LOSS, T.pad
    rows = [[[[a], picture(1)]], [[picture(2, max_t=500), [b]], [[a]]], [[picture(3, max_t=0), [a], picture(4)]]]
    batch = fill_codes(collate(rows, T, 17, 4), torch.arange(V, V + 16).view(4, 4))
    v = lambda k: [V + 4 * k + i for i in range(4)]
    tokens = [[T.bos, a, T.boi, *v(0), T.eoi], [T.bos, T.boi, *v(1), T.eoi, b, T.bos, a], [T.bos, T.boi, *v(2), T.eoi, a, T.boi, *v(3), T.eoi]]
    targets = [[a, T.boi, *v(0), T.eoi, T.eos], [T.boi, *v(1), T.eoi, b, T.eos, a, T.eos], [T.boi, n, n, n, n, n, a, T.boi, *v(3), T.eoi, T.eos]]
    for row in range(3):
        assert batch.tokens[row].tolist() == tokens[row] + [pad] * (17 - len(tokens[row]))
        assert batch.targets[row].tolist() == targets[row] + [n] * (17 - len(targets[row]))
    assert len(batch.images) == len(batch.max_t) == 0  # nothing is left to diffuse


def test_a_batch_of_text_stays_as_it_is():
    batch = collate([[[[1, 2]]], [[[3]]]], T, 8, 4)
    filled = fill_codes(batch, torch.zeros(0, 4, dtype=torch.long))
    assert torch.equal(filled.tokens, batch.tokens) and torch.equal(filled.targets, batch.targets)


def test_codes_are_read_causally():
    """Nothing depends on what comes later, inside an image either; and everything on what came before."""
    model = discrete_model()
    assert model.patches is None and model.config.n_patches == SIDE**2 and model.config.image_attention == "causal"
    batch = fill_codes(collate([[[[65], picture(1), [66]]]], T, 14, 9), torch.arange(V, V + 9)[None])
    mask = transfusion_mask(batch.image_id, batch.doc_id, causal=True)
    for change in range(14):
        tokens = batch.tokens.clone()
        tokens[0, change] = 70
        with torch.no_grad():
            before, after = (model(t, batch.image_id, batch.positions, mask)[0][0] for t in (batch.tokens, tokens))
        differs = (before - after).abs().amax(-1) > 1e-4
        assert differs.tolist() == [p >= change for p in range(14)]


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_of_a_mixed_batch(z_loss):
    """Cross-entropy (and z-loss) of text and codes alike at every target, nothing elsewhere."""
    model = discrete_model()
    batch = fill_codes(collate([[[[65], picture(1)]], [[picture(2), [66]]]], T, 16, 9), V + torch.randint(CODES, (2, 9)))
    config = SimpleNamespace(extra=SimpleNamespace(z_loss=z_loss))
    objective = Objective(config, None, None, T, partial(transfusion_mask, causal=True), "cpu", nullcontext)
    lm = objective.token_losses(model, batch, z_loss)
    assert [part.item() for part in objective.loss_sums(model, batch, range(2), (0,))] == [lm.sum().item(), 0.0]
    with torch.no_grad():
        logits, _ = model(batch.tokens, batch.image_id, batch.positions, transfusion_mask(batch.image_id, batch.doc_id, causal=True))
    for b, p in np.ndindex(2, 16):
        expected = 0.0
        if (target := batch.targets[b, p].item()) != NO_LOSS:
            log_z = logits[b, p].double().exp().sum().log()
            expected = float(log_z - logits[b, p, target] + z_loss * log_z**2)
        assert lm[b, p].item() == pytest.approx(expected, abs=1e-4)
    assert (batch.targets >= 0).sum() == 26 and len(batch.max_t) == 0  # <BOS> a <BOI> and nine codes, and <EOI>, twice


# ---- Sampling -------------------------------------------------------------------------------------------------------


def discrete_model(seed=0, **more):
    return tiny_model(seed, scale=8.0, side=SIDE, vocab_size=V + CODES, images="discrete", qk_norm=True, **more)


@pytest.fixture(scope="module")
def talker():
    """Large random weights and, as in test_sample.py, component 0 as a bias: letters, now and then <BOI> or <EOS>; codes likely everywhere."""
    model = discrete_model()
    with torch.no_grad():
        model.embedding.weight[:, 0] = 6.0
        model.head.weight.mul_(0.4)
        model.head.weight[:, 0] = -6.0
        model.head.weight[list(b"abcdefgh"), 0] = 1.0
        model.head.weight[V:, 0] = 2.0
        model.head.weight[[T.boi, T.eos], 0] = torch.tensor([1.4, 0.4])
    return model


def draw_token(logits, temperature, generator):
    """Inverse transform sampling, in float64."""
    up_to = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return int((up_to >= 1 - torch.rand((), generator=generator)).nonzero()[0])


@torch.no_grad()
def recompute(trained, document, seed, *, draw=True, guidance_scale=1.0, temperature=1.0, code_temperature=1.0, max_tokens=12, max_images=2):
    """What generate says it does, for one document: the whole sequence through `model.forward` for every token, no cache, no batch."""
    model, generator, new, ids = trained.model, torch.Generator().manual_seed(seed), [], [T.bos]
    forward = lambda ids: model(torch.tensor([ids]), torch.full((1, len(ids)), -1), torch.arange(len(ids))[None], torch.ones(len(ids), len(ids)).tril().bool())[0][0, -1]
    for part in document:
        if isinstance(part, str):
            ids += T.encode(part)
        else:
            codes = trained.vae.codes(torch.from_numpy(np.array(part)).permute(2, 0, 1)[None] / 127.5 - 1)
            ids += [T.boi, *(V + codes.flatten()).tolist(), T.eoi]
    drawing = draw and document and isinstance(document[-1], str)
    while True:
        if not drawing:
            logits = forward(ids)
            logits[[T.bos, T.eoi, T.pad, *range(V, V + CODES)] + [T.boi] * (max_images == 0)] = -torch.inf
            token = draw_token(logits, temperature, generator) if temperature else int(logits.argmax())
            if token == T.eos:
                return new
            if token != T.boi:
                new.append(token)
                ids.append(token)
                max_tokens -= 1
                if max_tokens == 0:
                    return new
                continue
        drawing, max_images, codes = False, max_images - 1, []
        for _ in range(SIDE**2):
            logits = forward([*ids, T.boi, *codes])[V:]
            if guidance_scale != 1.0:
                alone = forward([T.bos, T.boi, *codes])[V:]
                logits = alone + guidance_scale * (logits - alone)
            codes.append(V + (draw_token(logits, code_temperature, generator) if code_temperature else int(logits.argmax())))
            if code_temperature == 0:
                torch.rand((), generator=generator)
        new.append(torch.tensor(codes) - V)
        ids += [T.boi, *codes, T.eoi]
        if max_tokens == 0:
            return new


def mixture(seed, n):
    """n random documents of random lengths: nothing, texts, pictures, and both in any order."""
    draw = np.random.default_rng(seed)
    part = lambda: image(int(draw.integers(100)), SIDE) if draw.random() < 0.3 else "abcdefgh tuvwxyz "[: draw.integers(1, 17)]
    return [[part() for _ in range(draw.integers(0, 4))] for _ in range(n)]


@pytest.mark.parametrize("options", [
    dict(max_batch=3), dict(guidance_scale=3.0, max_batch=4), dict(guidance_scale=2.0, draw=False, code_temperature=0.5, max_batch=10),
    dict(temperature=0.0, code_temperature=0.0, guidance_scale=0.0, max_batch=2),
], ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))  # fmt: skip
def test_cached_batch_equals_recomputation(talker, options):
    """Sequences in both modes at once, more documents than places, prompts with pictures; so none depends on its neighbours, either."""
    trained, documents, options = tiny_trained(talker), mixture(len(options), 10), dict(temperature=1.0) | options
    found = generated(trained, documents, range(10), max_tokens=12, max_images=2, **options)
    del options["max_batch"]
    kinds = ["".join("t" if isinstance(i, int) else "I" for i in row) for row in found]
    assert any("It" in row for row in kinds) and any("I" in row for row in kinds)
    for seed, (document, row) in enumerate(zip(documents, found)):
        same(row, recompute(trained, document, seed, **options))


def test_only_codes_in_images_and_none_in_text(talker):
    """However likely the others are: nothing but codes makes a picture, and a code is never text."""
    for bias in (50.0, -50.0):
        model = discrete_model()
        with torch.no_grad():
            model.load_state_dict(talker.state_dict())
            model.head.weight[V:, 0] = bias
        rows = generated(tiny_trained(model), [["a"], [], [image(1, SIDE)]] * 3, range(9), temperature=1.0, max_tokens=8)
        pictures = [item for row in rows for item in row if not isinstance(item, int)]
        assert pictures and all(item.shape == (SIDE**2,) and 0 <= item.min() and item.max() < CODES for item in pictures)
        assert all(item < T.bos for row in rows for item in row if isinstance(item, int))


def test_top_p_and_temperature_of_codes(talker):
    draw = lambda **options: torch.stack([row[0] for row in generated(tiny_trained(talker), [["a"]] * 20, range(20), max_tokens=0, **options)])
    greedy = draw(code_temperature=0.0)
    assert (greedy == greedy[0]).all() and torch.equal(draw(code_top_p=1e-6), greedy)
    assert (draw() != greedy).any() and (draw(code_temperature=0.3) == greedy).float().mean() > (draw(code_temperature=3.0) == greedy).float().mean()
    for wrong in (dict(code_temperature=-1.0), dict(code_top_p=0.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            draw(**wrong)


def test_an_image_may_have_more_codes_than_the_schedule_has_steps(tmp_path, monkeypatch, capsys):
    """As the paper's has, 1024; by the command line, whose bar counts them. There are no denoising steps to choose."""
    monkeypatch.setattr("extras.runs.Lines.write", lambda self, text: print(text, file=sys.stderr))  # as on a terminal
    model = tiny_model(side=32, vocab_size=V + CODES, images="discrete", n_layers=1)
    monkeypatch.setattr(sample, "load", lambda path, device: tiny_trained(model, seq_len=1032))
    command = ["--ckpt", "it", "--prompt", "a", "--num", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    sample.main(command)
    drawn = Image.open(tmp_path / "out/000.png")
    assert drawn.size == (32, 32) and "/1024 [" in capsys.readouterr().err and "steps" not in drawn.info["settings"]
    with pytest.raises(ValueError, match="steps is 5, but this model samples the codes .* has no denoising steps"):
        sample.main([*command, "--steps", "5"])


# ---- Training -------------------------------------------------------------------------------------------------------


def test_one_document_overfits_in_both_directions():
    """A tiny discrete model that has seen one pair draws that picture from the caption, and writes that caption from the picture."""
    model, shown, caption = tiny_model(dim=64, side=SIDE, vocab_size=V + CODES, images="discrete", qk_norm=True, post_norm=True).train(), image(7, SIDE), "a red circle"
    trained = tiny_trained(model)
    codes = trained.vae.codes(torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 127.5 - 1)
    rows = [[[T.encode(caption), picture(7, SIDE)]], [[picture(7, SIDE), T.encode(caption)]]]
    batch = fill_codes(collate(rows, T, 32, 9), (V + codes).expand(2, -1, -1))
    optimizer, mask = torch.optim.AdamW(model.parameters(), lr=3e-3), transfusion_mask(batch.image_id, batch.doc_id, causal=True)
    for _ in range(60):
        logits, _ = model(batch.tokens, batch.image_id, batch.positions, mask)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=NO_LOSS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(generated(trained, [[caption]], [0], max_tokens=0, code_temperature=0.0)[0][0], codes.flatten())
    assert generate(trained, [[shown]], max_images=0, max_tokens=40)[0][1:] == [caption]


@pytest.fixture(scope="module")
def chameleon_run(tmp_path_factory):
    """`train.py --config chameleon`, cut to a few steps -> (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("chameleon")
    code, out, err = run_here("train.py", *flags(**TINY_VQ | dict(max_steps=30, lr=3e-3, warmup=1, log_every=1), out=folder))
    assert code == 0, err
    return folder, out


def test_the_preset_trains_samples_and_is_evaluated(chameleon_run, tmp_path):
    folder, out = chameleon_run
    assert "% are used; perplexity" in out
    assert "held out: lm" in out and "  codes " in out and "ddpm" not in out and "held out, prompts" in out
    lm = [float(line.split(" lm ")[1].split()[0]) for line in out.splitlines() if line.startswith("iter")]
    assert sum(lm[-5:]) < 0.95 * sum(lm[:5])
    for args in (["--prompt", "a red circle", "--gif", "--num", 2, "--guidance_scale", 2, "--code_top_p", 0.9], ["--max_tokens", 20, "--max_images", 2, "--num", 3, "--gif"]):
        code, printed, err = run_here("sample.py", "--ckpt", folder, "--out", tmp_path / "out", *args)
        assert code == 0, err
    assert {"000.png", "001.png", "sheet.png", "film.gif"} <= {p.name for p in (tmp_path / "out").iterdir()}
    code, out, err = run_here("evaluate.py", folder, "--judged", 2)
    assert code == 0 and "held out, captions" in out, err


def test_exported_and_read_back(chameleon_run, tmp_path):
    trained = load(chameleon_run[0])
    export(trained, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert all(torch.equal(value, again.vae.state_dict()[name]) for name, value in trained.vae.state_dict().items())
    one, two = (generated(t, [["a red circle"]], [3], max_tokens=0)[0][0] for t in (trained, again))
    assert torch.equal(one, two)


def test_small_with_discrete_images(tmp_path):
    code, out, err = run_here("train.py", *flags(**TINY_VQ | dict(config="small", images="discrete", codebook=16, max_steps=2), out=tmp_path))
    assert code == 0 and "  codes " in out, err


def test_a_llama_learns_codes(chameleon_run, tmp_path):
    """Frozen but for the rows of the special tokens and the codes."""
    from test_weights import byte_llama

    weights = byte_llama(tmp_path / "llama")
    kept = {name: TINY_VQ[name] for name in ("config", "rows", "eval_documents", "judged")}  # the sizes are the Llama's
    options = kept | dict(vae=chameleon_run[0] / "vae.pt", init_from=tmp_path / "llama", merges=0, seq_len=250, freeze_text=True, lr=1e-2, warmup=1, max_steps=2)
    code, out, err = run_here("train.py", *flags(**options, out=tmp_path / "out"))
    assert code == 0, err
    model = load(tmp_path / "out").model
    theirs = torch.cat([weights["model.embed_tokens.weight"], torch.zeros(5 + 32, 32)])
    moved = (model.embedding.weight - theirs).abs().amax(1)
    assert len(moved) == 256 + 5 + 32 and (moved[:256] == 0).all() and all(type(block) is Block for block in model.blocks) and f"{2 * 37 * 32:,} are trained" in out


def test_images_that_condition_have_no_loss_and_no_noise_is_drawn(chameleon_run):
    run = set_up(parse(flags(**TINY_VQ, out=chameleon_run[0]))[0], resume=True)
    batch = next(run.loader)
    batch.max_t[0] = 0
    before = torch.get_rng_state()
    filled = run.objective.filled(batch)
    assert len(filled.images) == len(filled.max_t) == 0 and torch.equal(torch.get_rng_state(), before)
    inside = batch.image_id == 0
    assert (filled.targets[inside] == NO_LOSS).all() and torch.equal(filled.tokens[inside].view(4, 4) - run.tokenizer.vocab_size, run.vae.codes(batch.images[:1])[0])
    assert (filled.targets[batch.image_id > 0] >= 0).all()
    assert run.objective.counts(batch) == (int((filled.targets != NO_LOSS).sum()), len(batch.images) - 1)  # known before the pictures are encoded


def test_validation_tells_text_from_codes(chameleon_run):
    """lm is over the targets that a continuous model has too, codes over nine of ten others: <EOI> is neither."""
    run = set_up(parse(flags(**TINY_VQ, out=chameleon_run[0]))[0], resume=True)
    with torch.no_grad():
        run.model.head.weight.zero_()
        for average in run.average.weights:
            average.zero_()
    assert validate(run) == pytest.approx({"val_lm": np.log(run.config.model.vocab_size), "val_codes": np.log(run.config.model.vocab_size)}, rel=1e-5)


# ---- Wrong options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, expected", [
    (["--config", "small", "--images", "pixels"], "continuous, discrete"), (["--config", "small", "--image_attention", "none"], "bidirectional, causal"),
    (["--config", "small", "--codebook", "64"], "--images discrete"), (["--config", "chameleon", "--latents", "x", "--vae", "y"], "latents are of continuous"),
])  # fmt: skip
def test_wrong_options(args, expected, tmp_path):
    code, _, err = run_here("train.py", *args, "--out", tmp_path / "out")
    assert code == 1 and expected in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_vae_of_the_other_kind_is_refused(chameleon_run, tmp_path):
    vae = chameleon_run[0] / "vae.pt"
    code, _, err = run_here("train.py", *flags(**TINY, out=tmp_path / "out", vae=vae))
    assert code == 1 and "is a VQVAE" in err and "--images continuous needs a VAE" in err, err


def test_encoding_ahead_is_refused(tmp_path):
    code, _, err = run_here("vae.py", "--config", "chameleon", "--data", tmp_path, "--encode", tmp_path / "codes")
    assert code == 1 and "--images discrete" in err, err


@pytest.mark.parametrize("config", ["small", "0.16b"])
def test_images_discrete_on_any_config(config):
    c = parse(["--config", config, "--images", "discrete"])[0]
    assert (c.model.patch_size, c.model.image_attention, c.extra.codebook) == (1, "causal", 16384)
    network, settings = vae_kind(c)
    with torch.device("meta"):
        assert network(settings).eval().codes(torch.empty(2, 3, 64, 64)).shape == (2, 64 // settings.factor, 64 // settings.factor)
