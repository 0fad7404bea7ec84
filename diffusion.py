"""Denoising diffusion, DDPM (paper, section 2; Ho et al. 2020; Nichol & Dhariwal 2021).

    q_sample (eq. 2)   x_t = alpha_t x_0 + sigma_t eps,   alpha_t = sqrt(abar_t),   sigma_t = sqrt(1 - abar_t)
    loss     (eq. 3)   || eps - eps_theta(x_t, t, c) ||^2

(alpha_t here is not Ho's 1 - beta_t; `alphas_cumprod` holds abar.) Time runs as in the paper: t = 1..T is
noisy, t = 0 is the clean image (abar_0 = 1). An image that only conditions what follows is shown at t = 0.

Exports `DDPM`, which holds the schedule and does the arithmetic that involves it; `DiffusionConfig` and
`SamplingConfig`; SAMPLERS, the ways back from noise; `guide`, classifier-free guidance.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

SAMPLERS = ("ddpm", "ddim", "dpm++")  # ancestral (the paper's), DDIM, and DPM-Solver++(2M) for few steps


@dataclass
class DiffusionConfig:
    """The schedule's length and what the network learns on it."""

    timesteps: int = 1000  # T
    prediction: Literal["eps", "v"] = "eps"  # what is predicted: the paper's eps, or v (Salimans & Ho 2022)
    t_draw: Literal["uniform", "logit_normal"] = "uniform"  # training timesteps; the paper's are uniform
    t_mean: float = 0.0  # of logit_normal (Esser et al. 2024): above 0 leans towards high noise
    t_std: float = 1.0  # of logit_normal


@dataclass
class SamplingConfig:
    """How images are sampled unless somebody asks otherwise."""

    steps: int = 250  # denoising steps
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"  # ancestral (the paper's), DDIM or DPM-Solver++(2M)
    guidance_scale: float = 3.0  # classifier-free guidance; 1 = none


def guide(conditional, unconditional, guidance_scale):
    """Classifier-free guidance (Ho & Salimans 2022): 1 = conditional, 0 = unconditional."""
    return unconditional + guidance_scale * (conditional - unconditional)


def needs_noise(sampler, eta=0.0):
    """Does this sampler add noise on the way? Raises ValueError on an unknown one, or an eta outside 0..1."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie between 0 (no noise) and 1 (ancestral)")
    return sampler == "ddpm" or (sampler == "ddim" and eta > 0)


def times(factor, x):
    """x (N, ...) times one float64 factor, or one for each of the N, in the precision of x."""
    return factor.to(x.dtype).to(x.device).view(-1, *[1] * (x.ndim - 1)) * x


class DDPM(nn.Module):
    """The noise schedule and what follows from it; no parameters. options: the fields of DiffusionConfig."""

    def __init__(self, **options):
        super().__init__()
        self.config = DiffusionConfig(**options)
        self.timesteps = timesteps = self.config.timesteps
        t = np.arange(timesteps + 1, dtype=np.float64)
        f = np.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2  # Nichol & Dhariwal, eq. 17
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        # abar_t, (T + 1,). It stays in float64: in float32, 1 - abar_t / abar_s cancels at either end.
        self.alphas_cumprod = torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - betas)]))
        self.register_buffer("alpha", self.alphas_cumprod.sqrt().float(), persistent=False)  # (T + 1,)
        self.register_buffer("sigma", (1 - self.alphas_cumprod).sqrt().float(), persistent=False)  # (T + 1,)

    def alpha_sigma(self, t, like):
        """alpha_t and sigma_t, shaped to multiply `like`: t (N,) or int -> two of (N or 1, 1, 1, ...)."""
        shape = -1, *[1] * (like.ndim - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    # ---- training --------------------------------------------------------------------------------

    def draw_timesteps(self, max_t, generator=None, t_draw=None):
        """One t for each image: max_t (N,) int64 -> t (N,), in 1..max_t; 0 (clean) where max_t is 0.

        t_draw: the distribution, instead of the configuration's; validation always draws uniformly.
        """
        if (t_draw or self.config.t_draw) == "uniform":
            u = torch.rand(max_t.shape, generator=generator, device=max_t.device)
        else:
            normal = torch.randn(max_t.shape, generator=generator, device=max_t.device)
            u = torch.sigmoid(self.config.t_mean + self.config.t_std * normal)
        return torch.minimum((u * max_t).long() + 1, max_t)

    def q_sample(self, x_0, t, eps):
        """Noise clean latents to step t (eq. 2): x_0 (N, ...), t (N,), eps like x_0 -> x_t."""
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    def loss(self, prediction, x_0, t, eps):
        """The mean squared error over the elements of each image (eq. 3): (N, ...) -> (N,).

        It is 0 for a perfect prediction, and 1 in expectation for a network that always answers 0.
        """
        target = eps
        if self.config.prediction == "v":
            alpha, sigma = self.alpha_sigma(t, x_0)
            target = alpha * eps - sigma * x_0
        return (prediction.float() - target).square().flatten(1).mean(1)

    # ---- sampling: t and s are one int for all N images, or an int64 tensor (N,) on the CPU --------

    def eps_and_x_0(self, prediction, x_t, t):
        """The network's output -> (estimate of the noise, estimate of the clean latents)."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.config.prediction == "eps":
            return prediction, (x_t - sigma * prediction) / alpha
        return alpha * prediction + sigma * x_t, alpha * x_t - sigma * prediction

    def sampling_timesteps(self, steps):
        """The timesteps that `steps` denoising steps visit, evenly spaced: t_0 > ... > t_steps = 0.

        The first is T. With eps-prediction it is the last t whose alpha_t is at least 0.015, which is 990
        of 1000: the estimate of x_0 divides the network's error by alpha_t, and one step at T would spoil
        a whole image. Raises ValueError unless 1 <= steps <= first.
        """
        first = self.timesteps
        if self.config.prediction == "eps":
            first = int((self.alphas_cumprod >= 0.015**2).sum()) - 1
        if not 1 <= steps <= first:
            raise ValueError(f"{steps} denoising steps; it must be between 1 and {first}")
        return torch.linspace(first, 0, steps + 1, dtype=torch.float64).round().long().tolist()

    def between(self, t, s):
        """alpha_t, sigma_t, alpha_s, sigma_s, beta = 1 - abar_t / abar_s, in float64: differences cancel."""
        abar_t, abar_s = self.alphas_cumprod[t], self.alphas_cumprod[s]
        return abar_t.sqrt(), (1 - abar_t).sqrt(), abar_s.sqrt(), (1 - abar_s).sqrt(), 1 - abar_t / abar_s

    def ddpm_step(self, x_0, x_t, t, s, noise):
        """One ancestral step: a draw from q(x_s | x_t, x_0) (Ho et al. 2020, eq. 6-7) at the estimated x_0.

        beta is taken between t and s, so that any subset of the T steps can be visited.
        """
        alpha_t, sigma_t, alpha_s, sigma_s, beta = self.between(t, s)
        of_x_0, of_x_t = alpha_s * beta / sigma_t**2, alpha_t / alpha_s * sigma_s**2 / sigma_t**2
        mean = times(of_x_0, x_0) + times(of_x_t, x_t)
        return mean + times(sigma_s / sigma_t * beta.sqrt(), noise)

    def ddim_step(self, eps, x_0, t, s, noise, eta):
        """One DDIM step (Song et al. 2021, eq. 12 and 16). eta: 0 = no noise (None); 1 = ancestral."""
        _, sigma_t, alpha_s, sigma_s, beta = self.between(t, s)
        spread = eta * sigma_s / sigma_t * beta.sqrt()
        x_s = times(alpha_s, x_0) + times((sigma_s**2 - spread**2).sqrt(), eps)
        return x_s if noise is None else x_s + times(spread, noise)

    def dpm_step(self, x_0, x_t, t, s, t_before, x_0_before):
        """One step of DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2).

        x_0 is extrapolated from this step's estimate and the one before, at t_before > t. The first step
        (t_before = 0) and the last use their own estimate.
        """
        alpha_t, sigma_t, alpha_s, sigma_s, _ = self.between(t, s)
        second_order = (torch.as_tensor(t_before) > 0) & (torch.as_tensor(s) > 0)
        if x_0_before is not None:
            # Twice their lambda; h / h_before is the same.
            log_snr = self.alphas_cumprod.log() - (1 - self.alphas_cumprod).clamp(min=1e-300).log()
            h, h_before = log_snr[s] - log_snr[t], log_snr[t] - log_snr[t_before]
            x_0 = x_0 + times(torch.where(second_order, h / (2 * h_before), 0.0), x_0 - x_0_before)
        return times(sigma_s / sigma_t, x_t) + times(alpha_s - alpha_t * sigma_s / sigma_t, x_0)

    def step(self, sampler, prediction, x_t, t, s, noise=None, eta=0.0, t_before=0, x_0_before=None):
        """One step of one of SAMPLERS from t to s < t -> x_s and the estimate of x_0, both (N, ...).

        noise: like x_t, for a sampler that `needs_noise`. t_before, x_0_before: of the step before, if any.
        """
        eps, x_0 = self.eps_and_x_0(prediction, x_t, t)
        if sampler == "ddpm":
            return self.ddpm_step(x_0, x_t, t, s, noise), x_0
        if sampler == "ddim":
            return self.ddim_step(eps, x_0, t, s, noise, eta), x_0
        return self.dpm_step(x_0, x_t, t, s, t_before, x_0_before), x_0

    def sample(self, predict, x_T, steps, sampler="ddpm", eta=0.0, noise=torch.randn_like):
        """Denoise x_T (N, ...) ~ N(0, 1) to x_0 in `steps` calls of `predict(x_t, t)`, t an int.

        noise(x): Gaussian noise like x, to be added on the way. Raises ValueError on an unknown sampler.
        """
        x, x_0, t_before = x_T, None, 0
        noisy = needs_noise(sampler, eta)
        visited = self.sampling_timesteps(steps)
        for t, s in zip(visited, visited[1:]):
            prediction = predict(x, t).float()
            added = noise(x) if noisy else None
            x, x_0 = self.step(sampler, prediction, x, t, s, added, eta, t_before, x_0_before=x_0)
            t_before = t
        return x


if __name__ == "__main__":
    from PIL import Image

    from extras.scenes import Scenes  # an image to noise

    ddpm = DDPM()
    print("   t   abar_t   alpha_t  sigma_t   log10 SNR")
    shown = torch.tensor([0, 1, 50, *range(100, 1001, 100)])
    for t in shown.tolist():
        abar, alpha, sigma = ddpm.alphas_cumprod[t], ddpm.alpha[t], ddpm.sigma[t]
        print(f"{t:4d}  {abar:.5f}   {alpha:.5f}  {sigma:.5f}  {2 * (alpha / sigma).log10():9.2f}")
    pixels = torch.from_numpy(Scenes("places", 32).example(0).render()).float() / 127.5 - 1  # (H, W, 3)
    x_t = ddpm.q_sample(pixels.expand(len(shown), -1, -1, -1), shown, torch.randn(pixels.shape))
    strip = torch.cat([*((x_t.clamp(-1, 1) + 1) * 127.5).byte()], dim=1)  # (H, 13 W, 3)
    Image.fromarray(strip.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()).save("diffusion.png")
    print("wrote diffusion.png: one image at these t, left to right")
