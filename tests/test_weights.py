"""A model out as one file of safetensors, and in again; training that starts from other people's weights or from our own."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, flags, run_here, tiny_model
from PIL import Image
from test_pretrained import fixture, llama_folder

from data import DataConfig
from diffusion import DDPM, SamplingConfig
from extras import Choices
from extras.exports import export, read_safetensors, write_safetensors
from extras.runs import opening, save_checkpoint, written
from extras.tokenizers import BPETokenizer, JSONTokenizer
from sample import Trained, generate, load
from train import parse, save, set_up
from vae import VAE, VAEConfig

SMALL_VAE = dict(channels=16, channel_multiples=(1, 2), n_res=0, latent_channels=3, mid_attention=False)


@pytest.fixture
def trained():
    """A tiny model with a tokenizer of some merges, to be exported."""
    tokenizer = BPETokenizer([(97, 98), (256, 99)])
    model = tiny_model(scale=8.0, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, rope_scaling=(8, 1, 4, 64))
    vae = VAE(VAEConfig(**SMALL_VAE)).eval()
    vae.latent_mean += 0.5
    data, sampling = DataConfig(image_size=16, seq_len=160), SamplingConfig(steps=3, guidance_scale=1.0)
    return Trained(model, vae, DDPM(), tokenizer, data, sampling, Choices())


@pytest.mark.parametrize("of_tokenizer", ["merges", "json"])
def test_what_is_exported_is_read_back(of_tokenizer, trained, tmp_path):
    if of_tokenizer == "json":
        tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "abc": 1, "b": 2}, unk_token="[UNK]"))
        trained.tokenizer = JSONTokenizer(model.to_str())
    path = tmp_path / "a" / "model.safetensors"
    export(trained, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    again = load(path)
    assert again.model.config == trained.model.config and again.vae.config == trained.vae.config and not again.model.training
    assert again.tokenizer.state() == trained.tokenizer.state() and again.tokenizer.encode("abc b") == trained.tokenizer.encode("abc b")
    for ours, theirs in ((trained.model, again.model), (trained.vae, again.vae)):
        theirs = theirs.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    if of_tokenizer == "merges":
        answers = [generate(t, [["abc"]], max_tokens=4) for t in (trained, again)]
        assert answers[0][0][0] == "abc" and answers[0][0][1].tobytes() == answers[1][0][1].tobytes()
    export(again, tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_half_precision_halves_the_matrices_alone(trained, tmp_path):
    export(trained, tmp_path / "a.safetensors")
    export(trained, tmp_path / "b.safetensors", half=True)
    whole, half = (read_safetensors(tmp_path / name)[0] for name in ("a.safetensors", "b.safetensors"))
    for name, value in whole.items():
        assert torch.equal(half[name], value.half() if value.ndim > 1 else value)
    assert (tmp_path / "b.safetensors").stat().st_size < 0.6 * (tmp_path / "a.safetensors").stat().st_size
    assert load(tmp_path / "b.safetensors").model.head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="ends in .safetensors"):
        export(trained, tmp_path / "c")


def test_the_package_reads_an_export(trained, tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    export(trained, tmp_path / "a.safetensors", half=True)
    found, ours = package.load_file(tmp_path / "a.safetensors"), read_safetensors(tmp_path / "a.safetensors")[0]
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)


def changed(path, a, b):
    """Put b in the place of a in the configuration of an export."""
    tensors, texts = read_safetensors(path)
    write_safetensors(path, tensors, {name: text.replace(a, b) for name, text in texts.items()})


@pytest.mark.parametrize("broken, message", [
    (lambda f: write_safetensors(f, {}), "is not a model that sample.py --export wrote"),
    (lambda f: write_safetensors(f, {}, {"transfusion": "{}"}), "is not a checkpoint of train.py"),
    (lambda f: write_safetensors(f, {}, {"transfusion": "{"}), "is not a model that sample.py --export wrote"),
    (lambda f: changed(f, '"n_layers": 2', '"n_layers": 3'), "do not have the sizes"),
    (lambda f: changed(f, '"n_layers": 2', '"layers": 2'), "has an unknown layers"),
    (lambda f: f.unlink(), "x.safetensors: no such file"),
    (lambda f: f.write_bytes(f.read_bytes()[:-9]), "x.safetensors: .*truncated"),
])  # fmt: skip
def test_a_broken_export_is_refused(broken, message, trained, tmp_path):
    path = tmp_path / "x.safetensors"
    export(trained, path)
    broken(path)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="x.safetensors: could not be saved"):
        write_safetensors(tmp_path / "file" / "x.safetensors", {})
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    (tmp_path / "x.safetensors.partial").mkdir()
    with pytest.raises(OSError, match="x.safetensors: could not be saved"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})


@pytest.mark.parametrize("error, message", [
    (FileNotFoundError(2, "No such file"), "x.tar: no such file$"), (NotADirectoryError(20, "Not a directory"), "x.tar: no such file$"),
    (PermissionError(13, "Permission denied"), r"x.tar: cannot be read \(Permission denied\)$"), (EOFError(), r"x.tar: is not a tar \(EOFError\)$"),
    (KeyError("a\nb"), "x.tar: is not a tar .*KeyError"), (ValueError("two\nlines " + "x" * 1000), r"x.tar: is not a tar \(ValueError: two lines x+\)$"),
    (ValueError("x.tar: holds nothing"), "^x.tar: holds nothing$"),
])  # fmt: skip
def test_what_goes_wrong_with_a_file_is_one_sentence(error, message):
    with pytest.raises(ValueError, match=message) as caught, opening("x.tar", "a tar"):
        raise error
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150
    with pytest.raises(KeyboardInterrupt), opening("x.tar", "a tar"):
        raise KeyboardInterrupt


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with written(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(OSError, match="b.txt: could not be saved .*7.*is intact"), written(path) as file:
        file.write(b"half of the new")
        raise RuntimeError(7)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_script_exports(small_run, tmp_path):
    checkpoint = small_run[0] / "out/small/checkpoint.pt"
    code, out, err = run_here("sample.py", "--ckpt", checkpoint, "--export", tmp_path / "model.safetensors", "--device", "cpu")
    assert code == 0 and "to use it: --ckpt" in out, err
    prompt = ("--prompt", "a red circle", "--num", "1", "--device", "cpu", "--out")
    for name, ckpt in (("a", checkpoint), ("b", tmp_path / "model.safetensors")):
        assert run_here("sample.py", "--ckpt", ckpt, *prompt, tmp_path / name)[0] == 0
    assert json.loads(read_safetensors(tmp_path / "model.safetensors")[1]["transfusion"])["config"]["model"]["dim"] == 128
    a, b = (Image.open(tmp_path / name / "000.png").tobytes() for name in "ab")
    assert a == b and len(set(a)) > 1


# ---- Training that starts from weights ------------------------------------------------------------------------------


def cut(**options):
    """`train.py --config small`, cut to two steps, with these options, but for what would do nothing beside them, as flags."""
    idle = ["dim", "n_layers", "n_heads"] if "init_from" in options else []
    idle += ["vae_channels", "vae_steps"] if "vae" in options else []
    idle += ["merges"] if "tokenizer" in options else []
    return flags(**{name: value for name, value in (TINY | dict(max_steps=2, device="cpu") | options).items() if name not in idle})


def train(tmp_path, name, *more, **options):
    """It run -> (exit code, stdout, stderr)."""
    return run_here("train.py", *cut(**dict(out=tmp_path / name) | options), *more)


def last(tmp_path, name):
    return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)


def byte_llama(path, **change):
    """A tiny random Llama of the fixture's sizes, whose vocabulary is the 256 bytes."""
    _, config, weights = fixture("llamas.npz", "llama 3.1")
    draw = torch.Generator().manual_seed(0)
    weights |= {name: 0.3 * torch.randn(256, 32, generator=draw) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 256} | change))
    write_safetensors(path / "model.safetensors", weights)
    return weights


@pytest.mark.parametrize("freeze", [False, True])
def test_training_starts_from_a_llama(freeze, trained_vae, tmp_path):
    weights = byte_llama(tmp_path / "llama")
    options = dict(init_from=tmp_path / "llama", merges=0, seq_len=250, vae=trained_vae, freeze_text=freeze, lr=1e-3, warmup=1)
    code, out, err = train(tmp_path, "a", **options)
    assert code == 0 and ("are trained: those of patches" in out) == freeze, err
    state = last(tmp_path, "a")
    model, c = state["model"], state["config"]["model"]
    assert (c["dim"], c["n_kv_heads"], c["mlp_width"], c["vocab_size"], c["qk_norm"], c["rope_scaling"]) == (32, 2, 40, 261, False, (8.0, 1.0, 4.0, 16))
    for ours, theirs in (("embedding.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight"), ("norm.weight", "model.norm.weight"),
                         ("blocks.1.mlp.down.weight", "model.layers.1.mlp.down_proj.weight")):  # fmt: skip
        moved = (model[ours][:256] - weights[theirs]).abs().max()
        assert moved == 0 if freeze else 0 < moved < 0.02, ours
        assert torch.equal(model[ours][:256], state["ema"][ours][:256]) == freeze
    assert (model["patches.decoder.bias"] != 0).any()
    code, out, err = train(tmp_path, "a", "--resume", **options | dict(max_steps=4))
    assert code == 0 and ("are trained: those of patches" in out) == freeze, err
    again = last(tmp_path, "a")
    assert again["step"] == 4 and torch.equal(again["model"]["norm.weight"], weights["model.norm.weight"]) == freeze
    assert not torch.equal(again["model"]["patches.decoder.bias"], model["patches.decoder.bias"])
    assert load(tmp_path / "a").model.config.kv_heads == 2


@pytest.mark.parametrize("n_rows", [24, 64])
def test_a_llama_brings_its_tokenizer(n_rows, trained_vae, tmp_path):
    """As its folder does; the special tokens come after its 24, and rows that pad its vocabulary are left out."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    llama_folder(tmp_path / "llama", "llama 3.2, tied", vocab_size=n_rows)
    _, _, weights = fixture("llamas.npz", "llama 3.2, tied")
    embedding = weights["model.embed_tokens.weight"]
    padded = torch.cat([embedding, torch.ones(n_rows - 24, embedding.shape[1])])
    write_safetensors(tmp_path / "llama/model.safetensors", weights | {"model.embed_tokens.weight": padded})
    known = ["[UNK]", "a", "red", "green", "blue", "yellow", "purple", "cyan", "circle", "square", "triangle", "at", "the", "top", "bottom", "left", "right"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(known + [f"[{n}]" for n in range(7)])}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "llama/tokenizer.json"))
    code, _, err = train(tmp_path, "a", init_from=tmp_path / "llama", tokenizer=tmp_path / "llama/tokenizer.json", vae=trained_vae, lr=1e-9, max_broken=1)
    assert code == 0, err
    trained = load(tmp_path / "a")
    assert trained.model.config.vocab_size == 29 and trained.tokenizer.encode("a red circle") == [1, 2, 8]
    torch.testing.assert_close(trained.model.head.weight[:24].detach(), embedding, rtol=0, atol=1e-6)


def test_training_starts_from_our_own(small_run, tmp_path):
    """Tokenizer and VAE are the checkpoint's too; pictures may have another size."""
    checkpoint = small_run[0] / "out/small/checkpoint.pt"
    start = load(checkpoint)
    code, _, err = train(tmp_path, "a", init_from=checkpoint, lr=1e-9, image_size=64, seq_len=300)
    assert code == 0, err
    state = last(tmp_path, "a")
    assert state["config"]["model"]["dim"] == 128 and state["tokenizer"] == start.tokenizer.state() and state["config"]["model"]["latent_size"] == 16
    torch.testing.assert_close(state["model"]["head.weight"], start.model.head.weight.detach(), rtol=0, atol=1e-6)
    assert all(torch.equal(value, state["vae"][name]) for name, value in start.vae.state_dict().items())


@pytest.mark.parametrize("options, message", [
    (dict(freeze_text=True), "there is nothing to freeze: give --init_from too"),
    (dict(init_from="nowhere"), "nowhere: no such checkpoint"),
    (dict(init_from="llama"), r"llama: knows 24 tokens, but the tokenizer 256; give --tokenizer .*llama/tokenizer.json"),
    (dict(init_from="shardless"), "shardless/model.safetensors: no such file"),
    (dict(init_from="ours", patch_size=1), "trained with patch_size 4; give --patch_size 4"),
    (dict(init_from="ours", patch_encoder="unet"), "trained with patch_encoder linear; give --patch_encoder linear"),
    (dict(init_from="ours", image_attention="causal"), "trained with image_attention bidirectional; give --image_attention bidirectional"),
    (dict(init_from="ours", prediction="eps"), "trained with prediction v; give --prediction v"),
    (dict(init_from="ours", vae="other.pt"), "--vae .*other.pt: has latents of 3 channels, 2 pixels apart, .*but the checkpoint was trained on latents of 4 channels, 4 pixels apart"),
    (dict(vae="broken.safetensors"), "broken.safetensors: is not a safetensors file"),
])  # fmt: skip
def test_what_cannot_be_started_from_is_refused(options, message, small_run, tmp_path):
    llama_folder(tmp_path / "llama", "llama 3.1")
    llama_folder(tmp_path / "shardless", "llama 3.1")
    (tmp_path / "shardless/model.safetensors").unlink()
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    save_checkpoint(tmp_path / "other.pt", {"vae_config": asdict(VAEConfig(**SMALL_VAE)), "vae": VAE(VAEConfig(**SMALL_VAE)).state_dict()})
    places = {"ours": small_run[0] / "out/small/checkpoint.pt"}
    options = {name: places.get(value, tmp_path / value) if name in ("init_from", "vae") else value for name, value in options.items()}
    code, _, err = train(tmp_path, "a", merges=0, **options)
    assert code == 1 and re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("theirs, ours", [("causal", "bidirectional"), ("bidirectional", "causal")])
def test_the_mask_is_that_of_the_model_that_is_trained(theirs, ours, trained_vae, tmp_path):
    """And so of the stored configuration: with --init_from and with --resume, whatever stands on the command line."""
    config = lambda name, **options: parse(cut(**dict(vae=trained_vae, out=tmp_path / name) | options))[0]
    save(set_up(config("first", image_attention=theirs)))
    options = dict(init_from=tmp_path / "first/checkpoint.pt")
    with pytest.raises(ValueError, match=f"was trained with image_attention {theirs}; give --image_attention {theirs}"):
        set_up(config("second", image_attention=ours, **options))
    for attention, resume in ((theirs, False), (ours, True)):
        run = set_up(config("second", image_attention=attention, **options), resume)
        assert run.config.model.image_attention == run.model.config.image_attention == theirs
        assert torch.equal(run.objective.make_mask(torch.zeros(1, 2, dtype=torch.long))[0, 0], torch.tensor([[True, theirs == "bidirectional"], [True, True]]))
        save(run)


def test_another_vae_is_refused_when_training_goes_on(small_run, tmp_path):
    """Its latents are not those that the checkpoint knows."""
    save_checkpoint(tmp_path / "other.pt", {"vae_config": asdict(VAEConfig(**SMALL_VAE)), "vae": VAE(VAEConfig(**SMALL_VAE)).state_dict()})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/checkpoint.pt").symlink_to(small_run[0] / "out/small/checkpoint.pt")
    code, _, err = run_here("train.py", "--config", "small", "--device", "cpu", "--out", tmp_path / "a", "--vae", tmp_path / "other.pt", "--resume")
    assert code == 1 and "has latents of 3 channels" in err and err.count("\n") == 1


def test_a_pretrained_vae_is_measured_before_it_is_used(tmp_path, monkeypatch):
    """A file of latent diffusion does not say how its latents are scaled. Here four pictures must do."""
    measure = VAE.measure_statistics
    monkeypatch.setattr(VAE, "measure_statistics", lambda vae, pictures, batch: measure(vae, lambda first, n: pictures(first, 4), 2048))
    _, _, weights = fixture("vaes.npz", "latent diffusion")
    torch.save({"state_dict": weights}, tmp_path / "sd.ckpt")
    code, out, err = train(tmp_path, "a", vae=tmp_path / "sd.ckpt")
    assert code == 0 and "measuring them" in out, err
    state = last(tmp_path, "a")
    assert (state["vae"]["latent_std"] != 1).all() and state["config"]["model"]["latent_channels"] == 4
