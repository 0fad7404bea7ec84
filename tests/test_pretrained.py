"""Other people's weights: the autoencoders of diffusers and latent diffusion, Llama folders, and what is wrong with them."""

import json
import math
import re
import struct
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FIXTURES, drawn_weights
from torch import nn

from attention_mask import transfusion_mask
from extras import Choices, load_vae, new_model
from extras.exports import read_safetensors, write_safetensors
from extras.runs import save_checkpoint
from extras.weights import check_vocabulary, freeze_text, from_latent_diffusion, load_llama, load_pretrained
from model import Transfusion, TransfusionConfig
from vae import VAE, VAEConfig

VAES = ["stable diffusion", "without quant", "by channel", "latent diffusion"]
LLAMAS = ["llama 2", "grouped, untied", "llama 3.1", "llama 3.2, tied"]


def fixture(file, kind):
    """One of the models in fixtures/vaes.npz or llamas.npz -> (its values, its config.json as a dict, its weights)."""
    values = {name.split(": ")[-1]: value for name, value in np.load(FIXTURES / file).items() if ": " not in name or name.startswith(f"{kind}: ")}
    config, shapes = json.loads(str(values.pop("config"))), json.loads(str(values.pop("shapes")))
    return {name: torch.from_numpy(value) for name, value in values.items()}, config, drawn_weights(shapes, scale=2.0 if file == "llamas.npz" else 1.0)


# ---- Autoencoders ---------------------------------------------------------------------------------------------------


def expect_vae(vae, values):
    """Encoding and decoding agree with diffusers' values, and the VAE is fit to be used."""
    assert not vae.training
    with torch.no_grad():
        mean, log_var = vae.posterior(values["x"])
        for found, expected in ((mean, "mean"), (log_var, "log_var"), (vae.decoder(values["mean"]), "decoded")):
            torch.testing.assert_close(found, values[expected], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", VAES)
def test_encoding_and_decoding_equal_diffusers(kind):
    values, config, weights = fixture("vaes.npz", kind)
    vae = from_latent_diffusion(weights, "weights", config)
    expect_vae(vae, values)
    assert vae.config.latent_channels == values["mean"].shape[1] and vae.config.factor == 16 // values["mean"].shape[2]
    torch.testing.assert_close(vae.encode(values["x"]), values["latents"], rtol=0, atol=1e-4)  # as diffusers scales and shifts them
    torch.testing.assert_close(vae.decode(values["latents"]), values["decoded"].clamp(-1, 1), rtol=0, atol=1e-4)


def test_fixtures_could_fail():
    """Pictures and latents are not so small that anything would pass, and a wrong layer shows."""
    for kind in VAES:
        values, config, weights = fixture("vaes.npz", kind)
        assert all(values[name].std() > 0.1 for name in ("x", "mean", "log_var", "decoded"))
        name = next(n for n in weights if re.search(r"decoder.*(resnets.1.conv1|block.1.conv1).weight", n))
        with pytest.raises(AssertionError):
            expect_vae(from_latent_diffusion(weights | {name: weights[name].flip(0)}, "weights", config), values)


@pytest.mark.parametrize("kind", VAES)
def test_a_folder_of_diffusers_is_read(kind, tmp_path):
    values, config, weights = fixture("vaes.npz", kind)
    write_safetensors(tmp_path / "sd" / "diffusion_pytorch_model.safetensors", {name: w.half() for name, w in weights.items()})  # half precision, as many are
    (tmp_path / "sd" / "config.json").write_text(json.dumps(config))
    vae = load_pretrained(tmp_path / "sd")
    assert vae.encoder[1].weight.dtype == torch.float32 and vae.latent_std[0] == pytest.approx(config["scaling_factor"] ** -1 * (config["latents_std"] or [1])[0])
    torch.testing.assert_close(vae.posterior(values["x"])[0], values["mean"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_folders_of_diffusers_have_many_forms(suffix, shards, tmp_path):
    values, config, weights = fixture("vaes.npz", "stable diffusion")
    stem, names = "diffusion_pytorch_model", sorted(weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = {name: f"{stem}{suffix}" if shards == 1 else f"{stem}-{n % 2}{suffix}" for n, name in enumerate(names)}
    for file in set(where.values()):
        some = {name: weights[name] for name in names if where[name] == file}
        write_safetensors(tmp_path / file, some) if "safetensors" in suffix else torch.save(some, tmp_path / file)
    if shards == 2:  # diffusers puts the variant last in an index's name
        index = stem + suffix.replace(".fp16", "") + ".index" + ".fp16" * ("fp16" in suffix) + ".json"
        (tmp_path / index).write_text(json.dumps({"weight_map": where}))
    expect_vae(load_pretrained(tmp_path), values)


def test_the_folder_of_a_run_is_taken_for_its_vae(tmp_path):
    vae = VAE(VAEConfig(channels=16, n_res=0, latent_channels=3))
    state = {"vae_config": asdict(vae.config), "vae": vae.state_dict(), "done": True}
    save_checkpoint(tmp_path / "vae.pt", state)
    again = load_vae(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())
    state["vae"]["encoder.1.weight"][0] = torch.nan
    save_checkpoint(tmp_path / "vae.pt", state)
    with pytest.raises(ValueError, match="vae.pt: encoder.1.weight has values that are not finite"):
        load_vae(tmp_path)


def test_full_precision_is_preferred(tmp_path):
    values, config, weights = fixture("vaes.npz", "stable diffusion")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for suffix in (".fp16.safetensors", ".bin"):
        (tmp_path / f"diffusion_pytorch_model{suffix}").write_bytes(b"broken")
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", weights)
    expect_vae(load_pretrained(tmp_path), values)


def test_files_of_latent_diffusion_are_read(tmp_path):
    """Alone and within a whole model's checkpoint, as .ckpt and as .safetensors; where nothing says how to scale, nothing is scaled."""
    values, _, weights = fixture("vaes.npz", "latent diffusion")
    bare = {name.removeprefix("first_stage_model."): w for name, w in weights.items()}
    junk = {"model.diffusion_model.out.0.weight": torch.zeros(4), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": weights | junk, "epoch": 3}, tmp_path / "whole.ckpt")
    torch.save(bare, tmp_path / "bare.pt")
    for name in ("whole.ckpt", "bare.pt"):
        vae = load_vae(tmp_path / name)
        expect_vae(vae, values)
        assert not vae.latent_mean.any() and (vae.latent_std == 1).all()
    for name, state in (("whole.safetensors", weights | junk), ("bare.safetensors", bare)):
        write_safetensors(tmp_path / name, state)
        expect_vae(load_vae(tmp_path / name), values)


def test_a_file_of_diffusers_is_read_without_its_config():
    """The sizes are read off the weights; 32 groups, as everywhere but in toys."""
    values, _, weights = fixture("vaes.npz", "without quant")
    expect_vae(from_latent_diffusion(weights, "weights"), values)


def test_old_names_of_diffusers_attention_are_read():
    values, config, weights = fixture("vaes.npz", "stable diffusion")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {re.sub(r"to_[qkv]|to_out\.0", lambda m: old[m[0]], name): w for name, w in weights.items()}
    assert any("proj_attn" in name for name in weights)
    expect_vae(from_latent_diffusion(weights, "weights", config), values)


def test_a_pretrained_vae_survives_a_checkpoint(tmp_path):
    values, config, weights = fixture("vaes.npz", "stable diffusion")
    vae = from_latent_diffusion(weights, "weights", config)
    save_checkpoint(tmp_path / "vae.pt", {"vae_config": asdict(vae.config), "vae": vae.state_dict()})
    again = load_vae(tmp_path / "vae.pt")
    expect_vae(again, values)
    assert torch.equal(again.latent_std, vae.latent_std)


def test_unscaled_latents_can_be_measured():
    values, _, weights = fixture("vaes.npz", "latent diffusion")
    vae = from_latent_diffusion(weights, "weights")
    pictures = lambda first, n: torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(first)) * 2 - 1
    vae.measure_statistics(pictures, 256)
    x = pictures(0, 256)
    z = vae.encode(x, torch.randn(256, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.05


def without(weights, *parts):
    return {name: w for name, w in weights.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize("change, message", [
    (lambda w, c: (without(w, "mid_block.resnets.1"), c), "weights are missing, such as encoder.mid.block_2"),
    (lambda w, c: (without(w, "decoder.conv_in"), c), "holds no VAE"),
    (lambda w, c: ({}, c), "holds no VAE"),
    (lambda w, c: (w | {"encoder.down_blocks.1.attentions.0.to_q.weight": torch.zeros(4, 4)}, c), "down_blocks.1.attentions.* has no place"),
    (lambda w, c: (w | {"decoder.conv_out.weight": torch.zeros(4, 32, 3, 3)}, c), r"decoder.conv_out.weight is of shape \(4, 32, 3, 3\), not \(3, 32, 3, 3\)"),
    (lambda w, c: (w, c | {"latent_channels": 16}), "4 channels, but 16 in its config.json"),
    (lambda w, c: (w, c | {"norm_num_groups": 7}), "norm_groups is 7"),
    (lambda w, c: (w, c | {"norm_num_groups": "x"}), "norm_num_groups is 'x'"),
    (lambda w, c: (w | {"encoder.down_blocks.1.resnets.0.conv1.bias": torch.zeros(16)}, c), "16 channels at one resolution.*multiple of 32"),
    (lambda w, c: (w, c | {"scaling_factor": "big"}), "scaling of the latents"),
    (lambda w, c: (w, c | {"latents_mean": [0.0, 1.0]}), "scaling of the latents"),
    (lambda w, c: (w, c | {"scaling_factor": 0}), "must be finite, the latter above 0"),
    (lambda w, c: (w, c | {"scaling_factor": math.nan}), "must be finite"),
    (lambda w, c: (w, c | {"shift_factor": math.nan}), "must be finite"),
    (lambda w, c: (w, c | {"latents_std": [1.0, 1.0, 1.0, 0.0]}), "above 0"),
    (lambda w, c: (w | {"decoder.conv_out.bias": torch.tensor([0.0, math.nan, 0.0])}, c), "decoder.conv_out.bias has values that are not finite"),
    (lambda w, c: (w | {"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int8)}, c), "decoder.conv_out.bias is quantised, to torch.int8"),
    (lambda w, c: (w | {"decoder.conv_out.bias": torch.zeros(3).to(torch.float8_e4m3fn)}, c), "is quantised, to torch.float8_e4m3fn"),
], ids=["a layer is missing", "no decoder", "nothing", "attention elsewhere", "four colours", "other latents", "groups", "odd groups", "narrower", "scaling", "means",
        "no scaling", "NaN scaling", "NaN shift", "no std", "NaN weight", "int8", "fp8"])  # fmt: skip
def test_what_is_no_such_vae_is_refused(change, message):
    _, config, weights = fixture("vaes.npz", "stable diffusion")
    with pytest.raises(ValueError, match=message) as error:
        weights, config = change(weights, config)
        from_latent_diffusion(weights, "weights", config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("broken, message", [
    (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
    (lambda folder: (folder / "config.json").write_text("[1]"), "config.json: must hold a JSON object"),
    (lambda folder: (folder / "config.json").write_text('{"_class_name": "VQModel"}'), "is a VQModel"),
    (lambda folder: (folder / "config.json").write_text('{"act_fn": "relu"}'), "act_fn is 'relu'; it must be 'silu'"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"x": "y.bin"}}'), "y.bin: no such file, but .*index.json names it"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"x": "../y"}}'), "index.json: is not an index"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "model.safetensors: no such file"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"hello"), "truncated"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes()[:-100]), "truncated"),
], ids=["no config", "half a config", "a list", "another class", "activation", "a shard missing", "a shard elsewhere", "no weights", "text", "cut off"])  # fmt: skip
def test_a_broken_folder_is_refused_by_name(broken, message, tmp_path):
    _, config, weights = fixture("vaes.npz", "stable diffusion")
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    broken(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_vae(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ---- The file format ------------------------------------------------------------------------------------------------

TENSORS = {"a": torch.arange(3, dtype=torch.uint8), "b.weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4),
           "half": torch.tensor([0.1]).half(), "bf": torch.tensor([[0.1, 3.0]]).bfloat16(), "n": torch.tensor([2**40]), "yes": torch.tensor([True, False]),
           "turned": torch.arange(6.0).view(2, 3).T}  # fmt: skip


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape and torch.equal(found[name], value), name


def test_tensors_are_written_and_read(tmp_path):
    write_safetensors(tmp_path / "deep" / "x.safetensors", TENSORS)
    assert_equal(read_safetensors(tmp_path / "deep" / "x.safetensors")[0], TENSORS)
    assert_equal(read_safetensors(tmp_path / "deep" / "x.safetensors", lambda name: name == "half")[0], {"half": TENSORS["half"]})
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.safetensors"]
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    assert_equal(read_safetensors(tmp_path / "y.safetensors")[0], {"x": torch.tensor([1.5, -2.0])})


def test_the_package_reads_what_is_written_and_writes_what_is_read(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    write_safetensors(tmp_path / "ours", TENSORS)
    assert_equal(package.load_file(tmp_path / "ours"), TENSORS)
    package.save_file({name: value.contiguous() for name, value in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    assert_equal(read_safetensors(tmp_path / "theirs")[0], TENSORS)


@pytest.mark.parametrize("header, size", [
    ("{", None), ("[]", None), ('{"x": 3}', None), ('{"x": {"dtype": "F32", "shape": [2]}}', None), ('{"x": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}', None),
    ('{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', None), ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}', None),
    ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', None), ("{}", 2**62), ("[" * 100_000, None),
])  # fmt: skip
def test_broken_files_are_refused_by_name(header, size, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", size or len(header)) + header.encode() + bytes(8))
    with pytest.raises(ValueError, match="x.safetensors: is not a safetensors file, or is truncated") as error:
        read_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


# ---- Llama ----------------------------------------------------------------------------------------------------------

PATCHES = TransfusionConfig(dim=8, n_heads=2, latent_channels=3, latent_size=4)  # its dim and heads give way to the Llama's


def llama_folder(path, kind, shards=1, **change):
    """The fixture as transformers would write it -> what it should answer."""
    values, config, weights = fixture("llamas.npz", kind)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config | change))
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)] if shards > 1 else ["model.safetensors"]
    where = {name: names[n % shards] for n, name in enumerate(sorted(weights))}
    for file in names:
        write_safetensors(path / file, {name: w for name, w in weights.items() if where[name] == file})
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return values


def text_logits(model, tokens):
    image_id, positions = torch.full_like(tokens, -1), torch.arange(tokens.shape[1]).expand_as(tokens)
    c = model.config
    images = torch.zeros(0, c.latent_channels, c.latent_size, c.latent_size)
    with torch.no_grad():
        return model(tokens, image_id, positions, transfusion_mask(image_id), images, torch.zeros(0, dtype=torch.long))[0]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", LLAMAS)
def test_text_logits_equal_transformers(kind, shards, tmp_path):
    values = llama_folder(tmp_path, kind, shards)
    model = load_llama(tmp_path, PATCHES, new_tokens=5)
    logits = text_logits(model, values["tokens"])
    assert logits.shape[-1] == 24 + 5 and model.config.latent_channels == 3 and values["logits"].std() > 0.5
    torch.testing.assert_close(logits[..., :24], values["logits"], rtol=0, atol=1e-4)


def test_rope_of_llama_3_matters(tmp_path):
    """Were the stretching left out, the fixtures would show it."""
    values = llama_folder(tmp_path, "llama 3.1")
    model = load_llama(tmp_path, PATCHES)
    model.config.rope_scaling = ()
    assert (text_logits(model, values["tokens"]) - values["logits"]).abs().max() > 0.05


def test_config_of_older_transformers(tmp_path):
    """rope_theta and rope_scaling, with `type` for `rope_type`, where transformers 5 has rope_parameters; and half precision."""
    values = llama_folder(tmp_path, "llama 3.1")
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(text_logits(load_llama(tmp_path, PATCHES), values["tokens"]), values["logits"], rtol=0, atol=1e-4)
    _, _, weights = fixture("llamas.npz", "llama 3.1")
    write_safetensors(tmp_path / "model.safetensors", {name: w.bfloat16() for name, w in weights.items()} | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    model = load_llama(tmp_path, PATCHES)
    assert model.head.weight.dtype == torch.float32
    assert (text_logits(model, values["tokens"]) - values["logits"]).norm() < 0.05 * values["logits"].norm()


def test_the_new_parts_start_fresh(tmp_path):
    llama_folder(tmp_path, "llama 3.2, tied")
    torch.manual_seed(0)
    model = load_llama(tmp_path, PATCHES, new_tokens=200)
    for weight in (model.embedding.weight[24:], model.head.weight[24:], model.patches.encoder.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patches.timestep.mlp[0].bias.eq(0).all()
    assert torch.equal(model.head.weight[:24], model.embedding.weight[:24]) and not torch.equal(model.head.weight[24:], model.embedding.weight[24:])
    assert Transfusion(TransfusionConfig(**vars(model.config))).load_state_dict(model.state_dict())  # a checkpoint can hold it


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
def test_only_the_new_parts_are_trained(patch_encoder, tmp_path):
    """After steps with momentum everything of the Llama is bit for bit what it was, and every new part has moved."""
    llama_folder(tmp_path, "llama 3.1")
    make = partial(new_model, choices=Choices(patch_encoder=patch_encoder, unet_channels=32, unet_blocks=1))
    model = load_llama(tmp_path, PATCHES, 5, make)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    undecayed, told = freeze_text(model, 5)
    n = sum(p.numel() for p in model.patches.parameters()) + 2 * 5 * 32
    assert f" {n:,} are trained" in told and {id(p) for p in undecayed} == {id(model.embedding.weight), id(model.head.weight)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    tokens, image_id = torch.arange(29)[None], torch.full((1, 29), -1)
    image_id[0, 10:14] = 0
    for step in range(5):
        logits, prediction = model(tokens, image_id, torch.arange(29)[None], transfusion_mask(image_id), torch.randn(1, 3, 4, 4), torch.tensor([500]))
        optimizer.zero_grad()
        (nn.functional.cross_entropy(logits[0], tokens[0]) + (prediction - 1).square().mean()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name in ("embedding.weight", "head.weight"):
            assert torch.equal(p[:24], before[name][:24]) and ((p - before[name])[24:].abs().amax(1) > 0).all()
        else:
            assert torch.equal(p, before[name]) != name.startswith("patches."), name


def test_rows_that_pad_a_vocabulary_are_left_out(tmp_path):
    """The Llama has 24 rows and the tokenizer 20 tokens: the special tokens follow these, as the tokenizer counts them."""
    values = llama_folder(tmp_path, "grouped, untied")
    model = load_llama(tmp_path, replace(PATCHES, vocab_size=20 + 5), new_tokens=5)
    tokens = values["tokens"] % 20
    logits, expected = text_logits(model, tokens), text_logits(load_llama(tmp_path, PATCHES), tokens)
    assert logits.shape[-1] == 25 and model.embedding.weight.shape == (25, 32)
    torch.testing.assert_close(logits[..., :20], expected[..., :20])


@pytest.mark.parametrize("n, fits", [(128, True), (97, True), (129, False), (0, False)])
def test_a_padded_vocabulary_is_the_tokenizers(n, fits, tmp_path):
    llama_folder(tmp_path, "llama 3.1", vocab_size=128)
    with nullcontext() if fits else pytest.raises(ValueError, match=f"knows 128 tokens, but the tokenizer {n};"):
        check_vocabulary(tmp_path, SimpleNamespace(bos=n))


def change_weight(change):
    """Change one weight of the third shard."""

    def change_it(folder):
        weights = read_safetensors(file := folder / "model-00003-of-00003.safetensors")[0]
        name = next(name for name in weights if "mlp" in name)
        write_safetensors(file, weights | {name: change(weights[name])})

    return change_it


def edit(**change):
    """Change config.json; None removes a field."""

    def change_it(folder):
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return change_it


def cut(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def forget(folder):
    """One weight is in none of the shards."""
    _, _, weights = fixture("llamas.npz", "llama 3.1")
    write_safetensors(folder / "model-00003-of-00003.safetensors", {"model.norm.weight": weights["model.norm.weight"]})


@pytest.mark.parametrize("broken, message", [
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors: no such file, but .*index.json names it"),
    (lambda folder: (folder / "model.safetensors.index.json").unlink(), "model.safetensors: no such file"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("nothing"), "index.json: is not JSON"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'), "index.json: .*weight_map"),
    (cut, "model-00002-of-00003.safetensors: .*truncated"),
    (forget, "weights are missing, such as"),
    (change_weight(lambda w: w / 0), "mlp.* has values that are not finite"),
    (change_weight(lambda w: w.to(torch.int8)), "mlp.* is quantised, to torch.int8"),
    (change_weight(lambda w: w.to(torch.float8_e4m3fn)), "mlp.* is quantised, to torch.float8_e4m3fn"),
    (edit(quantization_config={"load_in_8bit": True}), "is of quantised weights"),
    (edit(model_type="mistral"), "model_type is 'mistral'"),
    (edit(model_type=None), "model_type is None"),
    (edit(attention_bias=True), "attention_bias is True"),
    (edit(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}), "'yarn'"),
    (edit(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0}), "lacks 'low_freq_factor'"),
    (edit(hidden_size=None), "lacks 'hidden_size'"),
    (edit(hidden_size="big"), "dim is 'big'"),
    (edit(hidden_size=64, head_dim=None), "is of shape .*, not .* of the sizes in its config.json"),
    (edit(intermediate_size=44), "is of shape .*, not .* of the sizes in its config.json"),
    (edit(vocab_size=32), "is of shape .*, not .* of the sizes in its config.json"),
    (edit(num_hidden_layers=1), "no place in a Llama"),
    (edit(num_hidden_layers=3), "9 weights are missing"),
    (edit(num_hidden_layers=10**30), "config.json: asks for [0-9,]+ weights or more; its files have"),
    (edit(hidden_size=10**8, head_dim=None), "config.json: asks for [0-9,]+ weights or more; its files have"),
    (edit(head_dim=16), "head_dim is 16"),
    (edit(num_key_value_heads=3), "n_kv_heads is 3"),
    (edit(num_key_value_heads="two"), "n_kv_heads is 'two'"),
    (edit(num_key_value_heads=-2), "n_kv_heads is -2"),
    (edit(hidden_size=True), "dim is True"),
    (edit(rope_parameters="x"), "rope_parameters is 'x'"),
    (edit(rope_parameters={"rope_theta": "x"}), "rope_theta is 'x'"),
    (edit(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": "x", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}),
     "rope_scaling is .*'x'"),
    (edit(rms_norm_eps="a"), "norm_eps is 'a'"),
])  # fmt: skip
def test_a_broken_llama_folder_is_refused(broken, message, tmp_path):
    llama_folder(tmp_path, "llama 3.1", shards=3)
    broken(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_llama(tmp_path, PATCHES)
    assert "\n" not in str(error.value)


def test_a_vae_with_odd_groups_is_refused():
    with pytest.raises(ValueError, match="norm_groups is 7"):
        VAE(VAEConfig(channels=16, n_res=0, norm_groups=7))
