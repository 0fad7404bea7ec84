"""Makes fixtures/*.npz, the values of other people's code that the tests compare with. Needed only to make them again:

    pip install torch diffusers transformers pycocoevalcap torchmetrics scipy
    python tests/make_fixtures.py

diffusers.npz  the cosine schedule, and single DDPM and DDIM steps on a small random tensor (made with diffusers 0.42)
samplers.npz   whole trajectories of DDPM, DDIM and DPM-Solver++(2M) with a fixed function in the place of a network (diffusers 0.42)
llama.npz      a tiny LlamaForCausalLM: random weights in float16, tokens, and its logits for them (transformers 5.23)
llamas.npz     config.json, names of weights, and the logits of four kinds of LlamaForCausalLM; weights by conftest.drawn_weights
chameleon.npz  names of weights, and the hidden states of a tiny ChameleonModel with Swin's norm placement, for random tokens (transformers 5.23).
               Its queries and keys are normed by its own RMSNorm, in the place of a LayerNorm for each head
vaes.npz       the same of four AutoencoderKLs (diffusers 0.42): a picture, its latents' mean and log-variance, and what is decoded
               from the mean; also the names of one VAE's weights in latent diffusion's layout, which diffusers converts
unet.npz       one of DDPM's residual blocks with a timestep (diffusers' ResnetBlock2D, 0.42): names of weights, input and output
metrics.json   CIDEr-D of invented captions (pycocoevalcap 1.2); Frechet distances of random features (torchmetrics; scipy's sqrtm)
"""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import drawn_weights, frechet_features
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.resnet import ResnetBlock2D
from pycocoevalcap.cider.cider_scorer import CiderScorer
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid
from transformers import ChameleonConfig, ChameleonModel, LlamaConfig, LlamaForCausalLM
from transformers.models.chameleon.modeling_chameleon import ChameleonRMSNorm

HERE = Path(__file__).parent / "fixtures"
SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def exact(scheduler):
    """The scheduler with its table in float64: in float32, 1 - alphas_cumprod has lost most of its digits at small t."""
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    return scheduler


def diffusers_steps():
    """Steps from t to s. Our t = 1..T is diffusers' 0..T-1, and our s = 0 is diffusers' -1."""
    draw = np.random.default_rng(0)
    found = {"alphas_cumprod": DDPMScheduler(**SCHEDULE).alphas_cumprod.numpy()}
    found["x_t"], found["output"] = draw.standard_normal((2, 3, 4)).astype(np.float32)
    x_t, output = torch.tensor(found["x_t"]).double(), torch.tensor(found["output"]).double()
    found["noise"] = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().numpy()
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    found["ddpm_t_s"] = np.array([(1000, 999), (1000, 960), (501, 500), (500, 250), (250, 249), (40, 3), (2, 1), (40, 0), (1, 0)])
    for ours, theirs in PREDICTIONS.items():
        scheduler = exact(DDPMScheduler(**SCHEDULE, variance_type="fixed_small", prediction_type=theirs))
        steps = []
        for t, s in found["ddpm_t_s"]:
            scheduler.set_timesteps(timesteps=[t - 1, s - 1] if s else [t - 1])
            steps.append(scheduler.step(output, t - 1, x_t, generator=torch.Generator().manual_seed(0)).prev_sample)
        found[f"ddpm_{ours}"] = torch.stack(steps).float().numpy()

    found["ddim_t_s"] = np.array([(1000, 980), (740, 720), (500, 480), (40, 20), (20, 0)])  # 50 steps
    found["ddim_eta"] = np.array([0.0, 0.3, 1.0])
    for ours, theirs in PREDICTIONS.items():
        scheduler = exact(DDIMScheduler(**SCHEDULE, prediction_type=theirs))
        scheduler.set_timesteps(50)
        steps = [
            [scheduler.step(output, int(t) - 1, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample for t, _ in found["ddim_t_s"]]
            for eta in found["ddim_eta"].tolist()
        ]
        found[f"ddim_{ours}"] = torch.stack([torch.stack(row) for row in steps]).float().numpy()
    np.savez_compressed(HERE / "diffusers.npz", **found)


def diffusers_trajectories():
    """From x_T to x_0 through the timesteps that are saved with each result, noise from one generator, step by step. The lists
    are evenly spaced (33 and 83 apart) because diffusers' DDIM takes every step to be T // steps long."""

    def network(x, t):
        return 0.7 * x + 0.3 * torch.sin(3 * x + t / 150)

    visited = {"eps": np.arange(990, -1, -33), "v": np.arange(996, -1, -83)}
    found = {"visited_eps": visited["eps"], "visited_v": visited["v"]}
    found["x_T"] = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    schedule = {name: value for name, value in SCHEDULE.items() if name != "clip_sample"}
    for ours, theirs in PREDICTIONS.items():
        times = visited[ours].tolist()
        for name in ("ddpm", "ddim", "ddim_eta", "dpm++"):
            if name == "ddpm":
                scheduler = exact(DDPMScheduler(**SCHEDULE, variance_type="fixed_small", prediction_type=theirs))
                scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
            elif name == "dpm++":
                scheduler = exact(DPMSolverMultistepScheduler(**schedule, algorithm_type="dpmsolver++", final_sigmas_type="zero", prediction_type=theirs))
                scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
                abar = scheduler.alphas_cumprod[scheduler.timesteps]
                scheduler.sigmas = torch.cat([((1 - abar) / abar) ** 0.5, torch.zeros(1)])  # its own have been rounded to float32
            else:
                scheduler = exact(DDIMScheduler(**SCHEDULE, prediction_type=theirs))
                scheduler.num_inference_steps = len(times) - 1
            options = {"dpm++": {}, "ddim": dict(eta=0.0), "ddim_eta": dict(eta=0.6), "ddpm": {}}[name]
            x, generator = torch.tensor(found["x_T"]).double(), torch.Generator().manual_seed(0)
            for t in times[:-1]:
                x = scheduler.step(network(x, t), t - 1, x, generator=generator, **options).prev_sample.double()
            found[f"{name}_{ours}"] = x.float().numpy()
    np.savez_compressed(HERE / "samplers.npz", **found)


def llama():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="eager")  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # large enough that every part of the block matters; rounded to what the file holds
            p.copy_((torch.randn(p.shape) * (0.4 if p.ndim > 1 else 0.2) + (p.ndim == 1)).half().float())
        tokens = torch.randint(32, (2, 24))
        logits = model(tokens).logits
    weights = {name: p.detach().half().numpy() for name, p in model.named_parameters()}
    np.savez_compressed(HERE / "llama.npz", tokens=tokens.numpy(), logits=logits.numpy(), **weights)


LLAMAS = {
    "llama 2": dict(),
    "grouped, untied": dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "llama 3.1": dict(num_key_value_heads=2, rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "llama 3.2, tied": dict(num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="llama3", rope_theta=10000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)),
}  # fmt: skip


def shapes_of(weights):
    return {name: list(w.shape) for name, w in weights.items()}


def llamas():
    tokens = torch.randint(24, (1, 40), generator=torch.Generator().manual_seed(0))
    found = {"tokens": tokens.numpy()}
    for kind, options in LLAMAS.items():
        config = LlamaConfig(vocab_size=24, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, rms_norm_eps=1e-5,
                             attn_implementation="eager", **options)  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        shapes = shapes_of({name: p for name, p in model.named_parameters()})  # without the head where it is tied
        missing, unexpected = model.load_state_dict(drawn_weights(shapes, scale=2.0), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        with torch.no_grad():
            found[f"{kind}: logits"] = model(tokens).logits.numpy()
        found[f"{kind}: config"], found[f"{kind}: shapes"] = config.to_json_string(use_diff=False), json.dumps(shapes)
    np.savez_compressed(HERE / "llamas.npz", **found)


def chameleon():
    config = ChameleonConfig(vocab_size=24, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, swin_norm=True,
                             rms_norm_eps=1e-5, vocabulary_map={"<image>": 0}, vq_config=dict(base_channels=32, channel_multiplier=[1], num_res_blocks=1), attn_implementation="eager")  # fmt: skip
    model = ChameleonModel(config).eval()
    for layer in model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = ChameleonRMSNorm(8, 1e-5), ChameleonRMSNorm(8, 1e-5)
    shapes = shapes_of({name: p for name, p in model.named_parameters() if not name.startswith("vqmodel.")})
    model.load_state_dict(drawn_weights(shapes, scale=2.0), strict=False)
    tokens = torch.randint(1, 24, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(tokens).last_hidden_state
    np.savez_compressed(HERE / "chameleon.npz", tokens=tokens.numpy(), hidden=hidden.numpy(), shapes=json.dumps(shapes))


VAES = {
    "stable diffusion": dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8),
    "without quant": dict(block_out_channels=(32, 32, 64), layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
                          scaling_factor=0.3611, shift_factor=0.1159),
    "by channel": dict(block_out_channels=(16, 48), layers_per_block=1, latent_channels=8, norm_num_groups=4, mid_block_add_attention=False, scaling_factor=0.5,
                       latents_mean=[0.1 * n for n in range(8)], latents_std=[0.5 + 0.1 * n for n in range(8)]),
    "latent diffusion": dict(block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4),
}  # fmt: skip


def ldm_shapes(ch=32, multiples=(1, 2, 2), n_res=1, z=4):
    """The weights of latent diffusion's Encoder and Decoder (ldm/modules/diffusionmodules/model.py), under first_stage_model."""
    shapes = {}

    def conv(name, i, o, k=3):
        shapes[f"first_stage_model.{name}.weight"], shapes[f"first_stage_model.{name}.bias"] = [o, i, k, k], [o]

    def norm(name, n):
        shapes[f"first_stage_model.{name}.weight"], shapes[f"first_stage_model.{name}.bias"] = [n], [n]

    def res(name, i, o):
        norm(f"{name}.norm1", i), conv(f"{name}.conv1", i, o), norm(f"{name}.norm2", o), conv(f"{name}.conv2", o, o)
        if i != o:
            conv(f"{name}.nin_shortcut", i, o, 1)

    def middle(part, n):
        res(f"{part}.mid.block_1", n, n), res(f"{part}.mid.block_2", n, n), norm(f"{part}.mid.attn_1.norm", n)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{part}.mid.attn_1.{name}", n, n, 1)

    widths = [ch * m for m in multiples]
    conv("encoder.conv_in", 3, ch), middle("encoder", widths[-1]), norm("encoder.norm_out", widths[-1]), conv("encoder.conv_out", widths[-1], 2 * z)
    for level, (i, o) in enumerate(zip([ch, *widths], widths)):
        for n in range(n_res):
            res(f"encoder.down.{level}.block.{n}", o if n else i, o)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", o, o)
    conv("decoder.conv_in", z, widths[-1]), middle("decoder", widths[-1]), norm("decoder.norm_out", ch), conv("decoder.conv_out", ch, 3)
    for level, (i, o) in enumerate(zip([*widths[1:], widths[-1]], widths)):
        for n in range(n_res + 1):
            res(f"decoder.up.{level}.block.{n}", o if n else i, o)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", o, o)
    conv("quant_conv", 2 * z, 2 * z, 1), conv("post_quant_conv", z, z, 1)
    return shapes


def vaes():
    x = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1).half().float()
    found = {"x": x.numpy()}
    for kind, options in VAES.items():
        levels = len(options["block_out_channels"])
        model = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **options).eval()
        if kind == "latent diffusion":
            shapes = ldm_shapes()
            weights = convert_ldm_vae_checkpoint(drawn_weights(shapes), model.config)
        else:
            shapes = shapes_of(model.state_dict())
            weights = drawn_weights(shapes)
        model.load_state_dict(weights)
        with torch.no_grad():
            posterior = model.encode(x).latent_dist
            scaled = posterior.mean * model.config.scaling_factor
            found |= {f"{kind}: mean": posterior.mean.numpy(), f"{kind}: log_var": posterior.logvar.numpy(), f"{kind}: decoded": model.decode(posterior.mean).sample.numpy()}
        if model.config.latents_mean:
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
            scaled = (posterior.mean - mean) * model.config.scaling_factor / std  # as in diffusers' image-to-image pipelines
        elif model.config.shift_factor:
            scaled = (posterior.mean - model.config.shift_factor) * model.config.scaling_factor
        found |= {f"{kind}: latents": scaled.numpy(), f"{kind}: config": model.to_json_string(), f"{kind}: shapes": json.dumps(shapes)}
    np.savez_compressed(HERE / "vaes.npz", **found)


def unet_block():
    block = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=24, groups=4, groups_out=8)
    shapes = shapes_of(block.state_dict())
    block.load_state_dict(drawn_weights(shapes))
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 16, 8, 8, generator=draw).half().float(), torch.randn(2, 24, generator=draw)
    with torch.no_grad():
        np.savez_compressed(HERE / "unet.npz", x=x.half().numpy(), t=t.numpy(), y=block(x, t).numpy(), shapes=json.dumps(shapes))


def metrics():
    draw = np.random.default_rng(0)
    vocabulary = "a the dog cat man woman rides sits on under near red big bench bicycle street 's".split()
    sentence = lambda: " ".join(draw.choice(vocabulary, draw.integers(1, 12)))
    references = [[sentence() for _ in range(draw.integers(1, 6))] for _ in range(12)]
    candidates = [of_picture[0] if n % 3 == 0 else sentence() if n % 3 == 1 else of_picture[-1] + " " + sentence() for n, of_picture in enumerate(references)]
    candidates[-1] = ""
    scorer = CiderScorer(n=4, sigma=6.0)
    for candidate, of_picture in zip(candidates, references):
        scorer += (candidate, of_picture)
    score, each = scorer.compute_score()
    found = {"candidates": candidates, "references": references, "cider": float(score), "each": each.tolist(), "frechet": []}
    for n, dim, shift in ((500, 8, 0.0), (500, 8, 0.5), (20, 30, 0.3)):  # the last: fewer samples than features, so singular
        a, b = frechet_features(n, dim, shift)
        (m, s), (k, t) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
        by_torchmetrics = _compute_fid(*(torch.from_numpy(z) for z in (m, s, k, t))).item()
        by_scipy = float(((m - k) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))
        found["frechet"].append([n, dim, shift, by_torchmetrics, by_scipy])
    (HERE / "metrics.json").write_text(json.dumps(found))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    diffusers_steps()
    diffusers_trajectories()
    llama()
    llamas()
    chameleon()
    vaes()
    unet_block()
    metrics()
    print({p.name: f"{p.stat().st_size / 1000:.1f} kB" for p in sorted(HERE.iterdir())})
