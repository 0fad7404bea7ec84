"""A model out as safetensors and JSON, and in again; training that starts from other people's weights or from our own."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, flags, picture, run_here, tiny_model
from PIL import Image
from test_pretrained import fixture, llama_folder, write

from data import DataConfig, Tokenizer
from diffusion import DDPM
from sample import Trained, export, generate, load
from train import Config
from vae import VAE, VAEConfig, load_vae, write_safetensors

SMALL_VAE = dict(channels=16, channel_multiples=(1, 2), n_res=0, latent_channels=3, mid_attention=False)


@pytest.fixture
def trained():
    """A tiny model with a tokenizer of some merges."""
    tokenizer = Tokenizer([(97, 98), (256, 99)])
    model = tiny_model(scale=8.0, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, rope_scaling=(8, 1, 4, 64))
    config = Config(model=model.config, data=DataConfig(image_size=16, seq_len=160), steps=3, guidance_scale=1.0)
    vae = VAE(VAEConfig(**SMALL_VAE)).eval()
    vae.latent_mean += 0.5
    return Trained(model, vae, DDPM(), tokenizer, asdict(config))


@pytest.mark.parametrize("of_tokenizer", ["merges", "json"])
def test_what_is_exported_is_read_back(of_tokenizer, trained, tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    if of_tokenizer == "json":
        tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
        from data import JSONTokenizer

        model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "abc": 1, "b": 2}, unk_token="[UNK]"))
        trained.tokenizer = JSONTokenizer(model.to_str())
    export(trained, tmp_path / "a" / "model")
    assert sorted(path.name for path in (tmp_path / "a" / "model").iterdir()) == ["config.json", "model.safetensors", "vae.safetensors"]
    again = load(tmp_path / "a" / "model")
    assert again.model.config == trained.model.config and again.vae.config == trained.vae.config and not again.model.training
    assert again.tokenizer.state() == trained.tokenizer.state() and again.tokenizer.encode("abc b") == trained.tokenizer.encode("abc b")
    for ours, theirs in ((trained.model, again.model), (trained.vae, again.vae)):
        theirs = theirs.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    if of_tokenizer == "merges":
        answers = [generate(t, [["abc"]], max_tokens=4) for t in (trained, again)]
        assert answers[0][0][0] == "abc" and answers[0][0][1].tobytes() == answers[1][0][1].tobytes()
    export(again, tmp_path / "b")
    for name in ("config.json", "model.safetensors", "vae.safetensors"):
        assert (tmp_path / "a" / "model" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("broken, message", [
    (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "'llama'"),
    (lambda f: (f / "config.json").write_text('{"model_type": "transfusion"}'), "not of this version"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"n_layers": 2', '"n_layers": 3')), "do not have the sizes"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"n_layers": 2', '"layers": 2')), "not of this version.*layers"),
    (lambda f: (f / "config.json").unlink(), "checkpoint.pt: no such checkpoint"),
    (lambda f: (f / "vae.safetensors").unlink(), "vae.safetensors: no such file"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "model.safetensors: .*truncated"),
])  # fmt: skip
def test_a_broken_export_is_refused(broken, message, trained, tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    export(trained, tmp_path)
    broken(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="x.safetensors: could not be saved"):
        write_safetensors(tmp_path / "file" / "x.safetensors", {})
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    (tmp_path / "x.safetensors.partial").mkdir()
    with pytest.raises(OSError, match="x.safetensors: could not be saved"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})


def test_script_exports(small_run, tmp_path):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    checkpoint = small_run[0] / "out/small/checkpoint.pt"
    code, out, err = run_here("sample.py", "--ckpt", checkpoint, "--export", tmp_path / "model", "--device", "cpu")
    assert code == 0 and "vae.safetensors" in out, err
    prompt = ("--prompt", "a red circle", "--num", "1", "--device", "cpu", "--out")
    for name, ckpt in (("a", checkpoint), ("b", tmp_path / "model")):
        assert run_here("sample.py", "--ckpt", ckpt, *prompt, tmp_path / name)[0] == 0
    assert json.loads((tmp_path / "model/config.json").read_text())["config"]["model"]["dim"] == 128
    a, b = (Image.open(tmp_path / name / "000.png").tobytes() for name in "ab")
    assert a == b and len(set(a)) > 1
