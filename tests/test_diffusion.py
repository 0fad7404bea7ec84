"""diffusion.py: schedule and steps against diffusers' values, the loss, and sampling where the answer is known."""

import numpy as np
import pytest
import torch
from conftest import FIXTURES, run_here

from diffusion import DDPM, DiffusionConfig, guide
from extras import cli

DIFFUSERS = np.load(FIXTURES / "diffusers.npz")  # see make_fixtures.py
SAMPLED = np.load(FIXTURES / "samplers.npz")
X_T, OUTPUT, NOISE = (torch.tensor(DIFFUSERS[name]) for name in ("x_t", "output", "noise"))


def test_schedule_equals_diffusers():
    np.testing.assert_allclose(DDPM().alphas_cumprod[1:], DIFFUSERS["alphas_cumprod"], rtol=0, atol=1e-6)


def test_alpha_and_sigma_start_at_the_clean_image():
    ddpm = DDPM()
    assert (ddpm.alpha[0], ddpm.sigma[0]) == (1, 0)
    torch.testing.assert_close(ddpm.alpha.square(), ddpm.alphas_cumprod.float())
    torch.testing.assert_close(ddpm.alpha.square() + ddpm.sigma.square(), torch.ones(1001))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("n", range(len(DIFFUSERS["ddpm_t_s"])), ids=lambda n: "{}to{}".format(*DIFFUSERS["ddpm_t_s"][n]))
def test_ancestral_step_equals_diffusers(prediction, n):
    t, s = DIFFUSERS["ddpm_t_s"][n].tolist()
    x_s, _ = DDPM(prediction=prediction).step("ddpm", OUTPUT, X_T, t, s, NOISE)
    torch.testing.assert_close(x_s, torch.tensor(DIFFUSERS[f"ddpm_{prediction}"][n]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("e", range(3), ids=lambda e: f"eta{DIFFUSERS['ddim_eta'][e]}")
@pytest.mark.parametrize("n", range(len(DIFFUSERS["ddim_t_s"])), ids=lambda n: "{}to{}".format(*DIFFUSERS["ddim_t_s"][n]))
def test_ddim_step_equals_diffusers(prediction, e, n):
    (t, s), eta = DIFFUSERS["ddim_t_s"][n].tolist(), DIFFUSERS["ddim_eta"][e]
    x_s, _ = DDPM(prediction=prediction).step("ddim", OUTPUT, X_T, t, s, NOISE if eta else None, eta)
    torch.testing.assert_close(x_s, torch.tensor(DIFFUSERS[f"ddim_{prediction}"][e, n]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 250, 1000])
def test_ancestral_ddim_is_the_ddpm_step(steps):
    """eta = 1, at every step of every respacing: finite, and the same as ddpm_step."""
    ddpm = DDPM(prediction="v")
    times = ddpm.sampling_timesteps(steps)
    for t, s in zip(times, times[1:]):
        ancestral, ddim = ddpm.step("ddpm", OUTPUT, X_T, t, s, NOISE), ddpm.step("ddim", OUTPUT, X_T, t, s, NOISE, eta=1.0)
        torch.testing.assert_close(ddim, ancestral, rtol=1e-3, atol=1e-3)


def network(x, t):
    """The function that make_fixtures.py puts in the place of a network."""
    return 0.7 * x + 0.3 * torch.sin(3 * x + t / 150)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim_eta", "dpm++"])
def test_trajectory_equals_diffusers(name, prediction, monkeypatch):
    """From noise to the end, through the same timesteps with the same noise."""
    ddpm, generator = DDPM(prediction=prediction), torch.Generator().manual_seed(0)
    monkeypatch.setattr(ddpm, "sampling_timesteps", lambda steps: SAMPLED[f"visited_{prediction}"].tolist())
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).float()
    x_0 = ddpm.sample(network, torch.tensor(SAMPLED["x_T"]), 1, name.removesuffix("_eta"), 0.6 if "eta" in name else 0.0, noise)
    torch.testing.assert_close(x_0, torch.tensor(SAMPLED[f"{name}_{prediction}"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm++", 0.0)])
def test_images_at_different_steps_do_not_mix(sampler, eta, prediction):
    """A step of four images, each from its own t to its own s, is four steps of one image."""
    ddpm, draw = DDPM(prediction=prediction), torch.Generator().manual_seed(0)
    x_t, output, noise, x_0_before = torch.randn(4, 4, 2, 3, 3, generator=draw)
    t, s, t_before = torch.tensor([990, 40, 500, 2]), torch.tensor([800, 0, 499, 1]), torch.tensor([0, 80, 501, 700])
    together = ddpm.step(sampler, output, x_t, t, s, noise, eta, t_before, x_0_before)
    for i in range(4):
        one = [z[i : i + 1] for z in (output, x_t, noise, x_0_before)]
        alone = ddpm.step(sampler, one[0], one[1], int(t[i]), int(s[i]), one[2], eta, int(t_before[i]), one[3] if t_before[i] else None)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[i], b[0])


@pytest.mark.parametrize("prediction, first, steps", [(p, f, n) for p, f in (("eps", 990), ("v", 1000)) for n in (1, 7, 25, 250, f - 1, f)])
def test_visited_timesteps_fall_evenly_to_zero(steps, prediction, first):
    visited = DDPM(prediction=prediction).sampling_timesteps(steps)
    gaps = -np.diff(visited)
    assert visited[0] == first and visited[-1] == 0 and len(visited) == steps + 1
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("prediction, first", [("eps", 990), ("v", 1000)])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps_is_refused(steps, prediction, first):
    with pytest.raises(ValueError, match=f"between 1 and {first}"):
        DDPM(prediction=prediction).sampling_timesteps(steps)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="eps, v"):
        cli.make(DiffusionConfig, vars(DiffusionConfig()) | {"prediction": "x_0"})  # where configurations come in
    with pytest.raises(ValueError, match="ddpm, ddim, dpm"):
        DDPM().sample(lambda x, t: x, X_T, 2, sampler="euler")
    with pytest.raises(ValueError, match="eta is 1.5"):
        DDPM().sample(lambda x, t: x, X_T, 2, sampler="ddim", eta=1.5)


# ---- Training -------------------------------------------------------------------------------------------------------


def noised(prediction, n=2000):
    """Unit-variance latents (n, 2, 4, 4), noised -> ddpm, x_0, t, eps, x_t."""
    draw = torch.Generator().manual_seed(1)
    ddpm = DDPM(prediction=prediction)
    x_0, eps = torch.randn(2, n, 2, 4, 4, generator=draw)
    t = torch.randint(1, 1001, (n,), generator=draw)
    return ddpm, x_0, t, eps, ddpm.q_sample(x_0, t, eps)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_perfect_predictor_has_no_loss(prediction):
    """And what it predicts reads back as the noise and the clean latents."""
    ddpm, x_0, t, eps, x_t = noised(prediction, n=50)
    abar = ddpm.alphas_cumprod.float()[t][:, None, None, None]
    perfect = eps if prediction == "eps" else abar.sqrt() * eps - (1 - abar).sqrt() * x_0
    assert ddpm.loss(perfect, x_0, t, eps).shape == (50,)
    assert ddpm.loss(perfect, x_0, t, eps).max() < 1e-8
    read_eps, read_x_0 = ddpm.eps_and_x_0(perfect, x_t, t)
    torch.testing.assert_close(read_eps, eps, rtol=1e-3, atol=1e-4)
    early = t < 900  # at eps prediction x_0 is eps / alpha away: late, it drowns in rounding
    torch.testing.assert_close(read_x_0[early], x_0[early], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_zero_predictor_has_loss_one(prediction):
    ddpm, x_0, t, eps, _ = noised(prediction)
    loss = ddpm.loss(torch.zeros_like(x_0), x_0, t, eps)
    assert abs(loss.mean() - 1) < 4 * (2 / x_0.numel()) ** 0.5  # a squared normal has variance 2; four standard errors


def test_q_sample_keeps_the_variance_and_t_0_is_clean():
    ddpm, x_0, t, eps, x_t = noised("eps")
    assert abs(x_t.var() - 1) < 0.03
    assert torch.equal(ddpm.q_sample(x_0, torch.zeros_like(t), eps), x_0)
    assert (ddpm.q_sample(x_0, torch.full_like(t, 1000), eps) - eps).abs().max() < 1e-3


@pytest.mark.parametrize("t_draw", ["uniform", "logit_normal"])
def test_timesteps_stay_within_their_limits(t_draw):
    max_t = torch.tensor([1000, 500, 1, 0]).repeat(5000)
    t = DDPM(t_draw=t_draw, t_mean=2.0, t_std=3.0).draw_timesteps(max_t, torch.Generator().manual_seed(0)).view(-1, 4)
    assert t.dtype == torch.int64
    assert (t[:, 0].min(), t[:, 1].min()) == (1, 1) and t[:, 0].max() > 990 and 490 < t[:, 1].max() <= 500
    assert (t[:, 2] == 1).all() and (t[:, 3] == 0).all()


@pytest.mark.parametrize("limit", [1000, 500, 7])
def test_uniform_timesteps_are_uniform(limit):
    """Pearson's chi-squared over every value (or 100 bins): its mean is the degrees of freedom, its variance twice that."""
    n, bins = 100_000, min(limit, 100)
    t = DDPM().draw_timesteps(torch.full((n,), limit), torch.Generator().manual_seed(0))
    counts = torch.bincount((t - 1) * bins // limit, minlength=bins).double()
    chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum()
    assert abs(chi2 - (bins - 1)) < 4 * (2 * (bins - 1)) ** 0.5


def test_logit_normal_leans_to_its_mean_and_can_be_overridden():
    ddpm, limit = DDPM(t_draw="logit_normal", t_mean=1.0), torch.full((20_000,), 1000)
    median = ddpm.draw_timesteps(limit, torch.Generator().manual_seed(0)).double().median() / 1000
    assert abs(median - torch.sigmoid(torch.tensor(1.0))) < 0.01
    uniform = ddpm.draw_timesteps(limit, torch.Generator().manual_seed(0), t_draw="uniform").double().mean() / 1000
    assert abs(uniform - 0.5) < 0.01


# ---- Sampling -------------------------------------------------------------------------------------------------------


def test_guidance():
    conditional, unconditional = torch.randn(2, 5)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


MEAN, STD = 1.5, 0.4  # of data whose best predictor is known in closed form


def best_predictor(ddpm):
    """What a perfect network would answer where the data are N(MEAN, STD^2)."""
    abar = ddpm.alphas_cumprod

    def best(x, t):
        alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
        eps = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return eps if ddpm.config.prediction == "eps" else alpha * eps - sigma * x_0

    return best


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler, eta, steps", [("ddpm", 0.0, 990), ("ddpm", 0.0, 250), ("ddim", 0.0, 250), ("ddim", 1.0, 250), ("dpm++", 0.0, 20)])
def test_sampling_recovers_a_known_gaussian(prediction, sampler, eta, steps):
    """With the best predictor, sampling gives the data back."""
    n, ddpm, draw = 20_000, DDPM(prediction=prediction), torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, generator=draw)
    x_0 = ddpm.sample(best_predictor(ddpm), noise(torch.empty(n, 1)), steps, sampler, eta, noise)
    assert abs(x_0.mean() - MEAN) < 4 * STD / n**0.5 + 0.005
    assert abs(x_0.std() / STD - 1) < 0.04  # the ancestral step's variance is a little small when steps are skipped


def test_dpm_solver_needs_fewer_steps_than_ddim():
    """Its order shows: with 20 steps it is at least five times nearer to where 1000 DDIM steps lead from the same noise."""
    ddpm = DDPM(prediction="v")
    x_T = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    error = lambda sampler: (ddpm.sample(best_predictor(ddpm), x_T, 20, sampler) - ddpm.sample(best_predictor(ddpm), x_T, 1000, "ddim")).abs().mean()
    assert error("dpm++") < error("ddim") / 5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("steps", [10, 25, 250])
def test_few_steps_survive_an_imperfect_eps(sampler, steps):
    """An error of 2 % in eps, as any network makes it: at t = T, x_0 = (x_t - sigma eps) / alpha would be off by 400."""
    ddpm, draw = DDPM(), torch.Generator().manual_seed(0)
    best, noise = best_predictor(ddpm), lambda x: torch.randn(x.shape, generator=draw)
    x_0 = ddpm.sample(lambda x, t: best(x, t) + 0.028 * torch.sin(5 * x + t), noise(torch.empty(5000, 1)), steps, sampler, 0.0, noise)
    assert abs(x_0.mean() - MEAN) < 0.1 and abs(x_0.std() / STD - 1) < 0.3  # 10 steps are that coarse


def test_script_prints_and_draws_the_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_here("diffusion.py")
    assert code == 0 and "abar_t" in out and (tmp_path / "diffusion.png").exists()
