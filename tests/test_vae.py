"""vae.py: shapes, the loss and its parts, training at a tiny size, and checkpoints that survive what can go wrong."""

import errno
import os
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_here
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vae as vae_module
from data import to_pixels
from extras import load_vae, lpips
from extras.chameleon import VQVAE, Codebook, VQConfig, codebook_usage
from extras.runs import load_checkpoint, save_checkpoint
from extras.scenes import Scenes
from vae import VAE, PatchDiscriminator, VAEConfig, adaptive_weight, reconstruction_loss

TINY = dict(channels=16, channel_multiples=(1, 2), n_res=0, latent_channels=8, unshuffle=2, mid_attention=False, kl_weight=0.001,
            perceptual_weight=0.0, disc_weight=0.0, steps=150, batch=16, lr=3e-3, warmup=5)  # fmt: skip
SCENES = to_pixels(np.stack([Scenes().example(i).render() for i in range(320)]))


def pictures(first, n):
    """Scenes number first..first+n-1, of the first 256 of them over and over."""
    return SCENES[torch.arange(first, first + n) % 256]


def train_vae(config, pictures, path, seed=0, resume=False, **more):
    """A VAE, or a VQ-VAE if the config is one's, its checkpoints in a file."""
    state = load_checkpoint(path) if resume else None
    torch.manual_seed(seed)
    vae = (VQVAE if isinstance(config, VQConfig) else VAE)(config)
    return vae_module.train_vae(vae, pictures, partial(save_checkpoint, path), state, seed, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny VAE after a few steps, and its checkpoint."""
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    return train_vae(VAEConfig(**TINY), pictures, path), path


# ---- The network ----------------------------------------------------------------------------------------------------


def test_papers_size_on_the_meta_device():
    """256x256x3 -> 32x32x8 and back; the paper says 86M parameters."""
    with torch.device("meta"):
        vae, x = VAE(VAEConfig()), torch.empty(2, 3, 256, 256)
        latents = vae.encode(x)
        assert latents.shape == (2, 8, 32, 32) and vae.decode(latents).shape == x.shape
    assert vae.config.factor == 8
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(83.7, abs=0.1)


@pytest.mark.parametrize("change, side", [
    (dict(), 8), (dict(n_res=1, mid_attention=True), 8), (dict(unshuffle=4, channel_multiples=(1, 2)), 4), (dict(unshuffle=1, channel_multiples=(1, 1)), 16),
])  # fmt: skip
def test_shapes_of_small_ones(change, side):
    vae = VAE(VAEConfig(**TINY | change)).eval()
    x = pictures(0, 2)
    mean, log_var = vae.posterior(x)
    assert mean.shape == log_var.shape == (2, 8, side, side) and 32 // vae.config.factor == side
    assert vae.decode(vae.encode(x)).shape == x.shape
    assert vae.decode(100 * vae.encode(x)).abs().max() <= 1


def test_encode_standardises_the_posterior():
    """Mean without noise, a draw with it; decode undoes the standardisation."""
    vae = VAE(VAEConfig(**TINY)).eval()
    x, noise = pictures(0, 2), torch.randn(2, 8, 8, 8)
    vae.latent_mean[:], vae.latent_std[:] = torch.arange(8.0), torch.linspace(0.5, 4.0, 8)
    with torch.no_grad():
        mean, log_var = vae.posterior(x)
        centre, scale = vae.latent_mean.view(8, 1, 1), vae.latent_std.view(8, 1, 1)
        torch.testing.assert_close(vae.encode(x), (mean - centre) / scale)
        torch.testing.assert_close(vae.encode(x, noise), (mean + (log_var / 2).exp() * noise - centre) / scale)
        torch.testing.assert_close(vae.decode(vae.encode(x)), vae.decoder(mean).clamp(-1, 1), rtol=1e-4, atol=1e-5)


# ---- The loss -------------------------------------------------------------------------------------------------------


def test_kl_equals_torch_distributions():
    mean, log_var = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    z, kl = VAE.draw_latents(SimpleNamespace(posterior=lambda pixels: (mean, log_var)), None, torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl, expected.sum() / 5)  # summed over a picture, averaged over the batch
    torch.testing.assert_close(z, mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)))


def test_l1_is_summed_over_a_picture_and_perceptual_counts_at_every_element():
    x, y = torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 0.5)
    assert reconstruction_loss(x, y, VAEConfig()) == 0.5 * 192
    rec = reconstruction_loss(x, y, VAEConfig(perceptual_weight=2.0), lambda a, b: torch.full((4, 1, 1, 1), 0.25))
    assert rec == (0.5 + 2 * 0.25) * 192


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    reconstruction, adversarial = 0.5 * weight.square().sum(), weight.sum() * 2  # gradients (3, 4) and (2, 2): norms 5 and 8 ** 0.5
    found = adaptive_weight(reconstruction, adversarial, weight)
    assert found.item() == pytest.approx(5 / (8**0.5 + 1e-4)) and not found.requires_grad
    assert adaptive_weight(reconstruction * 1e9, adversarial, weight) == 1e4  # bounded
    reconstruction.backward()  # the graph is still there


def test_discriminator_judges_patches():
    assert PatchDiscriminator()(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert PatchDiscriminator()(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2)


# ---- The codebook ---------------------------------------------------------------------------------------------------

VQ = TINY | dict(codebook=20)


def codebook_of(vectors, counts=None):
    """A Codebook that holds these vectors."""
    codebook = Codebook(*vectors.shape)
    codebook.vectors.copy_(vectors)
    codebook.counts.copy_(torch.ones(len(vectors)) if counts is None else counts)
    return codebook


def test_codes_are_those_of_the_nearest_vectors():
    """By brute force; in their places, and decoded from there."""
    torch.manual_seed(0)
    vae = VQVAE(VQConfig(**VQ)).eval()
    vae.codebook.vectors.normal_(std=0.2)
    x = pictures(0, 3)
    z, codes = vae.encoder(x).detach(), vae.codes(x)
    assert z.shape == (3, 8, 8, 8) and codes.shape == (3, 8, 8) and codes.dtype == torch.int64 and len(codes.unique()) > 3
    for n, i, j in np.ndindex(3, 8, 8):
        distances = [(z[n, :, i, j] - vector).norm().item() for vector in vae.codebook.vectors]
        assert distances[codes[n, i, j]] == pytest.approx(min(distances), abs=1e-5)
        assert torch.equal(vae.codebook.look_up(codes)[n, :, i, j], vae.codebook.vectors[codes[n, i, j]])
    torch.testing.assert_close(vae.decode_codes(codes), vae.decode(vae.encode(x, torch.randn(3, 8, 8, 8))))  # no draw changes a code


def test_distances_are_one_matrix():
    """With the paper's 16,384 vectors it is the largest tensor of a step."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **kwargs or {})
            made.extend(t for t in [found] if torch.is_tensor(t) and t.shape == (50, 30))
            return found

    codebook, z = codebook_of(torch.randn(30, 4)), torch.randn(50, 4)
    with Watch():
        codes = codebook.nearest(z)
    assert len(made) == 1 and torch.equal(codes, torch.cdist(z.double(), codebook.vectors.double()).argmin(1))


def test_the_gradient_goes_straight_through():
    """What the decoder asks of the quantised latents reaches the encoder's as it is; the commitment loss pulls these to their vectors."""
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    stand_in = SimpleNamespace(encoder=lambda pixels: z, codebook=codebook_of(torch.randn(6, 4, generator=torch.Generator().manual_seed(1))).eval())
    quantised, commitment = VQVAE.draw_latents(stand_in, None)
    nearest, _ = stand_in.codebook(z)
    torch.testing.assert_close(quantised, nearest)
    direction = torch.randn(quantised.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.autograd.grad(quantised, z, direction, retain_graph=True)[0], direction)
    assert commitment.item() == pytest.approx(((z - nearest) ** 2).sum().item() / 2)  # summed over a picture, averaged over the batch
    torch.testing.assert_close(torch.autograd.grad(commitment, z)[0], 2 * (z - nearest) / 2)


def test_vectors_move_to_the_mean_of_their_latents():
    """A moving average of sums over one of counts; what is nobody's nearest stays where it is."""
    codebook, z = codebook_of(torch.tensor([[0.0, 0.0], [10.0, 0.0], [50.0, 50.0]]), torch.tensor([4.0, 1.0, 2.0])), torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 0.0]])
    codebook(z.T.reshape(1, 2, 3, 1))
    torch.testing.assert_close(codebook.counts, torch.tensor([0.99 * 4 + 0.02, 0.99 + 0.01, 0.99 * 2]))
    torch.testing.assert_close(codebook.vectors, torch.tensor([[0.01 / 3.98, 0.02 / 3.98], [0.99 * 10 + 0.09, 0.0], [50.0, 50.0]]))
    before = codebook.vectors.clone()
    codebook.eval()(z.T.reshape(1, 2, 3, 1))
    assert torch.equal(codebook.vectors, before)


def test_dead_codes_are_revived_from_the_batch():
    """At first all; later those, and only those, that get hardly any latents, though not at once after a revival."""
    z = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    latents = {tuple(v.tolist()) for v in z.flatten(2)[0].T}
    codebook = Codebook(6, 4)
    codebook.revive(z.flatten(2)[0].T, torch.Generator().manual_seed(1))
    assert all(tuple(v.tolist()) in latents for v in codebook.vectors)
    codebook.vectors[2], codebook.counts[2], codebook.counts[4] = 99.0, 0.05, 0.08  # of 40 / 6 = 6.7 each, dead below 0.067
    before = codebook.vectors.clone()
    codebook.revive(z.flatten(2)[0].T, torch.Generator().manual_seed(2))
    assert (codebook.vectors != before).any(1).tolist() == [False, False, True, False, False, False] and tuple(codebook.vectors[2].tolist()) in latents
    again = codebook.vectors.clone()
    codebook.revive(z.flatten(2)[0].T, torch.Generator().manual_seed(3))
    assert torch.equal(codebook.vectors, again)


def test_a_code_that_stays_dead_is_tried_elsewhere_soon():
    codebook, draw = Codebook(2, 1), torch.Generator().manual_seed(0)
    codebook(torch.zeros(100, 1, 1, 1), draw)
    codebook.vectors.copy_(torch.tensor([[0.0], [9.0]]))
    steps = 0
    while codebook.vectors[1, 0] > 8.0:
        codebook(torch.zeros(100, 1, 1, 1), draw)
        steps += 1
    assert 100 < steps < 200


def test_usage():
    assert codebook_usage(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx((0.8, 4.0))
    assert codebook_usage(torch.tensor([7, 0])) == pytest.approx((0.5, 1.0))


def test_the_perplexity_that_is_shown_is_that_of_the_codes_in_use():
    """The moving average that finds the dead credits them with some latents; what is shown does not."""
    torch.manual_seed(0)
    vae = VQVAE(VQConfig(**VQ | dict(codebook=512)))
    kinds = torch.randn(4, 8)
    latents = lambda n: (kinds[torch.randint(4, (n, 16))] + 0.01 * torch.randn(n, 16, 8)).mT[..., None]  # (n, C, 16, 1)
    for _ in range(20):
        vae.codebook(latents(4))
    shown = float(vae.progress(torch.zeros(())).split()[-1])
    codes = vae.codebook.eval()(latents(500))[1]
    truth = codebook_usage(codes.flatten().bincount(minlength=512))[1]
    assert truth / 1.5 < shown < 1.5 * truth and abs(shown - truth) < abs(codebook_usage(vae.codebook.counts)[1] - truth)
    assert "codebook.seen" not in vae.state_dict()


def test_a_vq_vae_learns_and_says_how_many_codes_it_uses(tmp_path, capsys):
    vae, x = train_vae(VQConfig(**VQ), pictures, tmp_path / "vae.pt"), SCENES[256:]
    constant = (x - SCENES.median(0).values).abs().mean()
    assert (x - vae.decode_codes(vae.codes(x))).abs().mean() < 0.8 * constant
    state = load_checkpoint(tmp_path / "vae.pt")
    share, perplexity = codebook_usage(torch.bincount(torch.cat([vae.codes(pictures(n, 256)) for n in range(0, 2048, 256)]).flatten(), minlength=20))
    assert state["vae"]["usage"].tolist() == pytest.approx((share, perplexity)) and share > 0.5
    assert f"of 20 codes {share:.1%} are used; perplexity {perplexity:.1f}" in capsys.readouterr().out
    assert torch.equal(load_vae(tmp_path / "vae.pt").codes(x), vae.codes(x))


# ---- Training -------------------------------------------------------------------------------------------------------


def test_training_learns(trained):
    """On new pictures, clearly better than the best picture that is always the same: something comes through the latents."""
    vae, _ = trained
    x = SCENES[256:]
    constant = (x - SCENES.median(0).values).abs().mean()
    assert not vae.training and (x - vae.decode(vae.encode(x))).abs().mean() < 0.8 * constant


def test_latents_are_standardised(trained):
    """Over draws of the posteriors, each channel by itself."""
    vae, _ = trained
    x = pictures(0, 256)
    z = vae.encode(x, torch.randn(256, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert (vae.latent_std - 1).abs().max() > 0.1  # measured, not the initial ones


def test_checkpoint_holds_the_vae(trained):
    vae, path = trained
    again, x = load_vae(path), pictures(0, 2)
    assert again.config == vae.config and not again.training
    torch.testing.assert_close(again.encode(x), vae.encode(x), rtol=1e-4, atol=1e-4)
    state = load_checkpoint(path)
    assert state["done"] and state["step"] == TINY["steps"] and "disc" not in state


def test_same_seed_same_vae(tmp_path):
    config = VAEConfig(**TINY | dict(steps=3))
    a, b, c = (train_vae(config, pictures, tmp_path / f"{n}.pt", seed).state_dict() for n, seed in enumerate((5, 5, 6)))
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)


def test_a_learning_rate_far_too_high_is_named(tmp_path):
    """Its last step leaves weights that no later loss of the VAE would show."""
    with pytest.raises(FloatingPointError, match="lower --vae_lr"):
        train_vae(VAEConfig(**TINY | dict(lr=1e30, steps=1, warmup=1)), pictures, tmp_path / "vae.pt")


@pytest.mark.parametrize("change", [dict(), dict(disc_weight=0.5, disc_start=2), dict(codebook=50)], ids=["plain", "with discriminator", "VQ"])
def test_interrupted_and_resumed_equals_straight(change, tmp_path):
    config = (VQConfig if "codebook" in change else VAEConfig)(**TINY | dict(steps=8) | change)
    straight = train_vae(config, pictures, tmp_path / "straight.pt").state_dict()
    asked = iter([False, False, False, True])
    with pytest.raises(KeyboardInterrupt):
        train_vae(config, pictures, tmp_path / "vae.pt", interrupted=lambda: next(asked))
    state = load_checkpoint(tmp_path / "vae.pt")
    assert state["step"] == 4 and not state.get("done")
    with pytest.raises(ValueError, match="vae.pt: its training was stopped at step 4 of 8; finish it first: .* --resume"):
        load_vae(tmp_path / "vae.pt")
    resumed = train_vae(config, pictures, tmp_path / "vae.pt", resume=True).state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert load_vae(tmp_path / "vae.pt").config == config


def test_discriminator_plays_from_disc_start(tmp_path):
    """From the first step on when disc_start = 0; it learns, and it changes what the VAE learns."""
    config = dict(TINY, steps=3)
    plain = train_vae(VAEConfig(**config), pictures, tmp_path / "plain.pt").state_dict()
    late = train_vae(VAEConfig(**config | dict(disc_weight=0.5, disc_start=3)), pictures, tmp_path / "late.pt")
    played = train_vae(VAEConfig(**config | dict(disc_weight=0.5, disc_start=0)), pictures, tmp_path / "played.pt").state_dict()
    weight = "decoder.0.weight"
    assert torch.equal(late.state_dict()[weight], plain[weight]) and not torch.equal(played[weight], plain[weight])
    assert all(value.isfinite().all() for value in played.values())
    assert load_checkpoint(tmp_path / "played.pt")["disc"]["0.weight"].isfinite().all()
    assert len(load_checkpoint(tmp_path / "played.pt")["disc_optimizer"]["state"]) > 0


def test_loss_that_is_not_finite_stops_and_says_what_to_lower(tmp_path):
    with pytest.raises(FloatingPointError, match="--vae_lr"):
        train_vae(VAEConfig(**TINY | dict(steps=2)), lambda first, n: torch.full((n, 3, 32, 32), torch.nan), tmp_path / "vae.pt")
    assert not (tmp_path / "vae.pt").exists()


def test_a_broken_vae_never_replaces_a_good_checkpoint(tmp_path, monkeypatch):
    """Training breaks between two looks at the loss, and a checkpoint is due: what is on disk stays finite."""
    monkeypatch.setattr(vae_module, "SAVE_EVERY", 2)
    poisoned = lambda first, n: pictures(first, n) * (torch.nan if first >= 3 * TINY["batch"] else 1)
    with pytest.raises(FloatingPointError):
        train_vae(VAEConfig(**TINY), poisoned, tmp_path / "vae.pt")
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "vae.pt")["vae"].values())


def test_without_lpips_a_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # importing it raises ImportError
    assert lpips("cpu") is None
    assert "without LPIPS" in capsys.readouterr().out


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled by a careless loader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, protocol=2))], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(write, tmp_path):
    path, fuse = tmp_path / "evil.pt", tmp_path / "it ran"
    write({"ema": {}, "config": Bomb(fuse)}, path)
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(path)
    assert not fuse.exists()


def broken(kind, path):
    """A file at `path` that is no checkpoint."""
    if kind == "truncated":
        torch.save({"x": torch.zeros(5000)}, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"random bytes": bytes(range(256)) * 20, "empty": b"", "text": b"hello\n"}[kind])


@pytest.mark.parametrize("kind", ["missing", "folder", "truncated", "random bytes", "empty", "text"])
@pytest.mark.parametrize("load", [load_checkpoint, load_vae])
def test_what_is_no_checkpoint_is_refused_by_name(kind, load, tmp_path):
    broken(kind, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="broken.pt: ") as error:
        load(tmp_path / "broken.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [{"x": torch.zeros(3)}, [1, 2], torch.zeros(3)], ids=["other dict", "list", "tensor"])
def test_a_checkpoint_without_a_vae_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: .*no VAE"):
        load_vae(tmp_path / "other.pt")


@pytest.mark.parametrize("change", [dict(channels=32), dict(latent_channels=4), dict(n_res=2)])
def test_a_vae_of_other_sizes_than_it_says_is_refused(change, trained, tmp_path):
    state = load_checkpoint(trained[1])
    state["vae_config"] |= change
    save_checkpoint(tmp_path / "vae.pt", state)
    with pytest.raises(ValueError, match="vae.pt"):
        load_vae(tmp_path / "vae.pt")


def disk_full(state, file):
    """torch.save on a disk that fills up: some bytes, then no more."""
    file.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_in_torch(state, file):
    """As torch's own zip writer reports it."""
    file.write(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22")


@pytest.mark.parametrize("failure", [disk_full, disk_full_in_torch])
def test_a_full_disk_leaves_the_old_checkpoint(failure, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": 1})
    monkeypatch.setattr(torch, "save", failure)
    with pytest.raises(OSError, match="checkpoint.pt: could not be saved"):
        save_checkpoint(path, {"x": 2})
    assert load_checkpoint(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_really_full_disk(tmp_path, monkeypatch):
    """/dev/full takes no byte: the error that the system and torch really raise is understood."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": 1})
    (tmp_path / "checkpoint.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not be saved"):
        save_checkpoint(path, {"x": torch.zeros(100_000)})
    assert load_checkpoint(path) == {"x": 1}


def test_save_makes_its_folder_and_refuses_a_file_in_its_place(tmp_path):
    save_checkpoint(tmp_path / "a" / "b" / "x.pt", {"x": 1})
    assert load_checkpoint(tmp_path / "a" / "b" / "x.pt") == {"x": 1}
    with pytest.raises(OSError, match="x.pt"):
        save_checkpoint(tmp_path / "a" / "b" / "x.pt" / "y.pt", {"x": 1})


def test_script_trains_and_shows_reconstructions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_here("vae.py", "--config", "small", "--vae_steps", "3")
    assert code == 0 and "reconstructions" in out
    assert (tmp_path / "out/small/reconstructions.png").exists() and (tmp_path / "out/small/vae.pt").exists()
