"""Other people's weights: Stable Diffusion's autoencoders, and Llamas."""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from extras import cli
from extras.exports import read_safetensors
from extras.runs import load_checkpoint, opening, read_json
from model import Block, Transfusion, TransfusionConfig
from vae import VAE, VAEConfig


def read_weights(path, keep):
    """The tensors of a file, .safetensors or of torch, whose names pass `keep`, on the CPU -> dict."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, keep)[0]
    with opening(path, "a checkpoint of weights by their names"):
        state = load_checkpoint(path)
        return {name: weight for name, weight in state.get("state_dict", state).items() if keep(name)}


def weight_files(folder, stem):
    """The files of weights in a folder of Hugging Face's: one, or the shards that an index names.

    safetensors come before .bin, full precision before .fp16. Raises ValueError if a file is missing.
    """
    pattern = re.compile(rf"(pytorch_)?{stem}(\.\w+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?")
    order = lambda name: (".bin" in name, "16" in name, ".index" not in name, name)
    names = sorted(filter(pattern.fullmatch, os.listdir(folder)), key=order)
    first = Path(folder) / next(iter(names), f"{stem}.safetensors")
    if first.suffix != ".json":
        require(first, first.exists(), "no such file")
        return [first]
    with opening(first, "an index, whose weight_map names a file for every weight"):
        files = [first.with_name(name) for name in sorted({*read_json(first)["weight_map"].values()})]
    for file in files:
        require(file, file.exists(), f"no such file, but {first.name} names it")
    return files


def require(where, holds, sentence):
    """Raises ValueError with this sentence about `where` if it does not hold."""
    if not holds:
        raise ValueError(f"{where}: {sentence}")


@torch.no_grad()
def fill(places, found, where, what):
    """Copy weights, pairs of (name, tensor), to their places, {name: tensor}; `what` needs all of these.

    Raises ValueError if one is quantised or not finite, or where names or shapes do not match.
    """
    for name, weight in found:
        plain = weight.is_floating_point() and weight.element_size() > 1
        require(where, plain, f"{name} is quantised, to {weight.dtype}; give the floats that it was made of")
        require(where, name in places, f"{name} has no place in {what}")
        place, shape = places.pop(name), tuple(weight.shape)
        fits = weight.squeeze().shape == place.squeeze().shape  # linear layers may stand for 1x1 convolutions
        require(where, fits, f"{name} is of shape {shape}, not {tuple(place.shape)} as in {what}")
        require(where, weight.isfinite().all(), f"{name} has values that are not finite")
        place.copy_(weight.view_as(place))
    first = next(iter(places), "")
    require(where, not places, f"{len(places)} weights are missing, such as {first}, of {what}")


# ---- Autoencoders --------------------------------------------------------------------------------

VAE_NAME = re.compile(r"(?:first_stage_model\.)?((?:(?:en|de)coder|(?:post_)?quant_conv)\..*)")
LEVEL = re.compile(r"encoder\.down\.\d+\.block\.0\.conv1\.bias")  # one on each level
FROM_DIFFUSERS = {  # its names, and those before 0.18 -> latent diffusion's
    r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)": r"\1.\2.block.\3",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0": r"\1.\2.\3sample",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"group_norm": "norm",
    r"\bto_([qkv])\.": r"\1.",
    r"\b([qkv])(uery|ey|alue)\.": r"\1.",
    r"to_out\.0|proj_attn": "proj_out",
}


def load_pretrained(path):
    """A KL autoencoder of the Stable Diffusion family -> VAE in eval mode.

    path: a folder of diffusers' AutoencoderKL; or a file, .safetensors or of torch, with its weights or those
    of latent diffusion (Rombach et al. 2022), alone or within the whole model's checkpoint. A file does not
    say how the latents are standardised: they stay as they are until `measure_statistics`.
    """
    path, settings, files = Path(path), {}, [Path(path)]
    if path.is_dir():
        require(path, (path / "config.json").exists(), "is a folder without config.json, so not of diffusers")
        settings = read_json(path / "config.json")
        kind = settings.get("_class_name", "AutoencoderKL")
        require(path, kind == "AutoencoderKL", f"is a {kind} of diffusers; it must be an AutoencoderKL")
        activation = settings.get("act_fn", "silu")
        require(path, activation in ("silu", "swish"), f"act_fn is {activation!r}; it must be 'silu'")
        files = weight_files(path, "diffusion_pytorch_model")
    state = {name: weight for file in files for name, weight in read_weights(file, VAE_NAME.match).items()}
    return from_latent_diffusion(state, path, settings)


def from_latent_diffusion(state, path, settings=None):
    """Weights by their names, and what diffusers' config.json says -> VAE, its sizes read off the weights."""
    settings, what = settings or {}, "a KL autoencoder of diffusers or latent diffusion"
    with opening(path, what):
        state = state if isinstance(state, dict) else {}
        found = latent_diffusion_names(state.get("state_dict", state))
        known = {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= found.keys()
        require(path, known, f"holds no VAE; it must be a checkpoint of vae.py or train.py, or {what}")
        channels, n = len(found["encoder.conv_in.weight"]), found["decoder.conv_in.weight"].shape[1]
        said, groups = settings.get("latent_channels", n), settings.get("norm_num_groups", 32)
        require(path, said == n, f"its latents have {n} channels, but {said} in its config.json")
        require(
            path, type(groups) is int and groups > 0, f"norm_num_groups is {groups!r}, in its config.json"
        )
        widths = [len(found[name]) for name in sorted(found) if LEVEL.fullmatch(name)]
        for width in widths:
            narrow = f"has {width} channels at one resolution, which is no multiple of {channels}"
            require(path, width % channels == 0, narrow)
        multiples = [width // channels for width in widths]
        config = VAEConfig(channels, multiples, latent_channels=n, norm_groups=groups)
        config.n_res = len({name.split(".")[4] for name in found if name.startswith("encoder.down.0.block.")})
        config.mid_attention = "encoder.mid.attn_1.q.weight" in found
        config.quant_convs = "quant_conv.weight" in found
        vae = VAE(config)
        fill(vae_places(vae), found.items(), path, what)
    with opening(path, f"a VAE whose scaling of the latents, in its config.json, is one number or {n}"):
        # What diffusers diffuses is (z - shift) * scaling, or by channel (z - mean) / std * scaling.
        usual = dict(shift_factor=0.0, scaling_factor=1.0, latents_std=1.0)
        said = usual | {name: value for name, value in settings.items() if value is not None}
        vae.latent_mean.copy_(torch.tensor(said.get("latents_mean", said["shift_factor"])))
        vae.latent_std.copy_(torch.tensor(said["latents_std"]) / torch.tensor(said["scaling_factor"]))
        usable = vae.latent_mean.isfinite() & vae.latent_std.isfinite() & (vae.latent_std > 0)
        require(path, usable.all(), "shift and scaling of its latents must be finite, the latter above 0")
    return vae.eval()


def latent_diffusion_names(state):
    """Those of the weights that are an autoencoder's, by latent diffusion's names."""
    found = {match[1]: state[name] for name in state if (match := VAE_NAME.match(name))}
    if not any("_blocks." in name for name in found):
        return found
    for pattern, name in FROM_DIFFUSERS.items():
        found = {re.sub(pattern, name, key): weight for key, weight in found.items()}
    # diffusers counts the decoder's levels from the lowest resolution, latent diffusion from the highest.
    last = sum(LEVEL.fullmatch(name) is not None for name in found) - 1
    turn = lambda match: f"decoder.up.{last - int(match[1])}"
    return {re.sub(r"decoder\.up\.(\d+)", turn, name): weight for name, weight in found.items()}


def vae_places(vae):
    """The weights of an autoencoder of ours by latent diffusion's names."""
    c, down, up = vae.config, [], []
    for i in range(len(c.channel_multiples)):
        down += [f"down.{i - 1}.downsample.conv"] * (i > 0) + [f"down.{i}.block.{j}" for j in range(c.n_res)]
        up = [f"up.{i}.block.{j}" for j in range(c.n_res + 1)] + [f"up.{i}.upsample.conv"] * (i > 0) + up
    middle = ["mid.block_1", *["mid.attn_1"] * c.mid_attention, "mid.block_2"]
    names = [f"encoder.{name}" for name in ("conv_in", *down, *middle, "norm_out", "conv_out")]
    names += ["quant_conv", "post_quant_conv"] * c.quant_convs
    names += [f"decoder.{name}" for name in ("conv_in", *middle, *up, "norm_out", "conv_out")]
    layers = [layer.state_dict() for layer in (*vae.encoder, *vae.decoder)]
    places = {}
    for name, layer in zip(names, filter(None, layers), strict=True):
        for key, place in layer.items():
            key = key.replace("skip.", "nin_shortcut.").replace("out.", "proj_out.")
            places[f"{name}.{key}"] = place
    return places


# ---- Llama ---------------------------------------------------------------------------------------

# Our fields -> those of config.json, of which STRETCH are RoPE's; then what is meant where nothing is said.
SIZES = dict(dim="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads")
SIZES |= dict(n_kv_heads="num_key_value_heads", mlp_width="intermediate_size", vocab_size="vocab_size")
SIZES |= dict(norm_eps="rms_norm_eps", rope_theta="rope_theta")
STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
USUAL = dict(num_key_value_heads=0, rms_norm_eps=1e-6, rope_theta=10000.0, rope_type="default")
USUAL |= dict(hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
FIXED = dict(model_type=["llama"], hidden_act=["silu"], attention_bias=[False], mlp_bias=[False])
FIXED |= dict(rope_type=["default", "llama3"])
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYER += ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def is_llama(path):
    """Is it a folder to be read by load_llama, rather than a checkpoint or an export of ours?"""
    return (Path(path) / "config.json").exists()


def inspect_llama(folder, config):
    """A Llama's folder -> (the config with its sizes, is its head its embedding?, its files of weights).

    Raises ValueError if a file is missing, or it is no Llama or one whose block is not ours.
    """
    path = Path(folder) / "config.json"
    said = USUAL | {name: value for name, value in read_json(path).items() if value is not None}
    for name in ("rope_scaling", "rope_parameters"):  # the latter by transformers 5, the former before it
        rope = said.get(name, {})
        require(path, isinstance(rope, dict), f"{name} is {rope!r}; it must be an object")
        said |= {"rope_type": rope.get("type", said["rope_type"])} | rope
    plain = "quantization_config" not in said
    require(path, plain, "is of quantised weights; give the floats that they were made of")
    for name, allowed in FIXED.items():
        wanted = "it must be a Llama without biases, with RoPE as it is or as in Llama 3"
        require(path, said.get(name) in allowed, f"{name} is {said.get(name)!r}; {wanted}")
    stretch = STRETCH if said["rope_type"] == "llama3" else ()
    for name in (*SIZES.values(), *stretch):
        require(path, name in said, f"lacks {name!r}")
    sizes = {ours: said[theirs] for ours, theirs in SIZES.items()}
    sizes |= dict(qk_norm=False, rope_scaling=[said[name] for name in stretch])
    config = cli.make(TransfusionConfig, asdict(config) | sizes, path)
    width = said.get("head_dim", config.head_dim)
    require(path, width == config.head_dim, f"head_dim is {width}, not hidden_size / num_attention_heads")
    files = weight_files(folder, "model")
    least, there = config.n_layers * config.dim**2, sum(file.stat().st_size for file in files)
    require(path, least < there, f"asks for {least:,} weights or more; its files have {there:,} bytes")
    return config, said["tie_word_embeddings"], files


def check_vocabulary(path, tokenizer):
    """Raises ValueError unless the tokenizer has as many tokens as the Llama, but for padding."""
    known, n = inspect_llama(path, TransfusionConfig())[0].vocab_size, tokenizer.bos
    padded = known % 64 == 0 and n < known < n + 128
    wrong = f"knows {known} tokens, but the tokenizer {n}; give --tokenizer {path}/tokenizer.json"
    require(f"--init_from {path}", known == n or padded, wrong)


@torch.no_grad()
def load_llama(path, config, new_tokens=0, make=Transfusion):
    """A Llama 2 or 3 in Hugging Face's format -> a model whose text logits are its own.

    path: folder with config.json and weights, as `weight_files` finds them
    config: TransfusionConfig of what Llama has no say in: patches, latents and, where the Llama's vocabulary
        is padded beyond the tokenizer's, `vocab_size`, new tokens included: the padding gives way to these
    new_tokens: rows appended to the vocabulary, <BOS> and <EOS> among them, for the Llama's own stay unused
    make: makes a model of its config. What the Llama lacks stays as drawn; a tied head becomes a copy.
    """
    n = config.vocab_size - new_tokens
    config, tied, files = inspect_llama(path, config)
    n = min(n, config.vocab_size)  # rows in use
    model = make(replace(config, vocab_size=n + new_tokens))
    norms_first = all(type(block) is Block for block in model.blocks)
    require(path, norms_first, "has its norms before attention and MLP, and this model after them")
    places = {"model.embed_tokens": model.embedding.weight[:n], "model.norm": model.norm.weight}
    if not tied:
        places["lm_head"] = model.head.weight[:n]
    for number, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        qkv = attention.qkv.weight.split([heads * attention.head_dim for heads in attention.heads])
        weights = [block.attention_norm.weight, *qkv, attention.out.weight]
        weights += [block.mlp_norm.weight, *mlp.gate_up.weight.chunk(2), mlp.down.weight]
        places |= {f"model.layers.{number}.{name}": weight for name, weight in zip(LAYER, weights)}
    places = {f"{name}.weight": place for name, place in places.items()}
    # Some hold a table that we compute, or the embedding once more as a head.
    keep = lambda name: "rotary_emb" not in name and not (tied and name == "lm_head.weight")
    found = (item for file in files for item in read_weights(file, keep).items())
    is_padded = lambda name, weight: name in VOCABULARY and len(weight) == config.vocab_size
    found = ((name, weight[:n] if is_padded(name, weight) else weight) for name, weight in found)
    fill(places, found, path, "a Llama of the sizes in its config.json")
    if tied:
        model.head.weight[:n] = model.embedding.weight[:n]
    return model


def freeze_text(model, new_tokens):
    """Train what a Llama lacks alone: the ways of patches, and the last `new_tokens` rows of the vocabulary.

    -> (weights that the optimiser must not decay, for that moves frozen rows; a sentence about it).
    """
    n_trained = 2 * new_tokens * model.config.dim
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("patches."))
        n_trained += parameter.numel() * parameter.requires_grad
    partly = (model.embedding.weight, model.head.weight)
    for weight in partly if new_tokens else ():
        frozen = torch.arange(len(weight), device=weight.device)[:, None] < len(weight) - new_tokens
        weight.requires_grad_(True)
        weight.register_hook(lambda gradient, frozen=frozen: gradient.masked_fill(frozen, 0))
    told = f"of {sum(p.numel() for p in model.parameters()):,} parameters, {n_trained:,} are trained"
    return partly, f"{told}: those of patches, and the rows of the {new_tokens} special tokens"
