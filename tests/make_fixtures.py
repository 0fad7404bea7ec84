"""Makes fixtures/*.npz, the values of other people's code that the tests compare with. Needed only to make them again:

    pip install torch diffusers transformers
    python tests/make_fixtures.py

diffusers.npz  the cosine schedule, and single DDPM and DDIM steps on a small random tensor (made with diffusers 0.42)
samplers.npz   whole trajectories of DDPM, DDIM and DPM-Solver++(2M) with a fixed function in the place of a network (diffusers 0.42)
llama.npz      a tiny LlamaForCausalLM: random weights in float16, tokens, and its logits for them (transformers 5.23)
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from transformers import LlamaConfig, LlamaForCausalLM

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


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    diffusers_steps()
    diffusers_trajectories()
    llama()
    print({p.name: f"{p.stat().st_size / 1000:.1f} kB" for p in sorted(HERE.iterdir())})
