"""Where the host waits for the device: on meta tensors, which have no values, every wait is an operation that can be counted.

A copy from the CPU's memory waits unless that memory is pinned, as `parallel.sent` does on CUDA; a number that is asked of the device
waits, too. What this cannot show, and a GPU does: that the pinned copies are in fact as quick.
"""

from collections import Counter, deque
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, flags, tiny_model, tiny_trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

from data import Stream
from extras import engine, machine, open_documents, open_pairs, open_tokenizer, parallel
from extras.loader import BatchDataset, Loader
from train import parse
from vae import VAE, VAEConfig

META = torch.device("meta")
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts the copies between CPU and device, and the numbers that are asked of the device (which all are 1)."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device == META:
            self.found["number"] += 1
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten._to_copy.default and args[0].device == META and torch.device(kwargs.get("device", META)).type == "cpu":
            self.found["to the host"] += 1
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if func in (aten.nonzero.default, aten.masked_select.default):
            self.found["boolean index"] += 1
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], out)
            self.found["to the device"] += source.device.type == "cpu" and target.device == META
        return out


def sent(tensor, device):
    """As parallel.sent on CUDA: a copy that nobody waits for, and that is not counted."""
    return torch.empty_like(tensor, device=device) if device == META else tensor.to(device)


@pytest.mark.parametrize("sampler, waits", [("ddpm", 0), ("ddim", 0), ("dpm++", 1)])
def test_a_denoising_step_waits_for_nothing(sampler, waits, monkeypatch):
    """Two images after prompts of unequal length, with guidance. (DPM-Solver++ asks once whether it has an estimate before.)"""
    monkeypatch.setattr(engine, "sent", sent)
    trained = tiny_trained(tiny_model().to(META), steps=4)
    trained.ddpm.to(META)
    options = SimpleNamespace(**engine.OPTIONS | engine.Engine.defaults(trained) | dict(sampler=sampler, guidance_scale=3.0, max_tokens=0))
    with torch.no_grad():
        work = engine.Engine(trained, 2, 60, 2, options)
        work.admit(deque(engine.to_sequence(n, [text], n, trained, options) for n, text in enumerate(["a", "a red dot"])))
        for _ in range(3):
            with Waits() as watch:
                work.image_step()
            assert len(work.in_mode(drawing=True)) == 2 and watch.found["number"] <= waits
            assert set(+watch.found) <= {"number"}


def test_waits_are_seen():
    """Or the test above could not fail."""
    x = torch.ones(3, device=META)
    with Waits() as watch:
        torch.ones(3).to(META) + x
        float(x[0])
        x.cpu()
        torch.empty(3, device=META).copy_(torch.ones(3))
    assert watch.found == {"to the device": 2, "number": 1, "to the host": 1}


def test_sums_wait_once(monkeypatch):
    """Numbers of the host and of the device together."""
    monkeypatch.setattr(parallel, "sent", sent)
    values = [torch.ones((), device=META), 3, torch.ones((), device=META), 2.5]
    with Waits() as watch:
        assert parallel.summed(values, META).shape == (4,)
    assert not +watch.found
    assert parallel.total([torch.tensor(0.1), 3, 2.5], torch.device("cpu")) == [float(torch.tensor(0.1)), 3.0, 2.5]


def test_bfloat16_that_is_emulated_is_not_taken(monkeypatch):
    """On T4 and V100 torch says that it is there, and multiplies in float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not machine.has_bf16(torch.device("cuda")) and not engine.draws_in_bf16(torch.device("cuda"))
    assert not machine.has_bf16(torch.device("mps"))


def test_the_sampled_copy_is_cast_once():
    """Matrices and convolutions in bfloat16, all else shared; under autocast it gives the very same numbers."""
    model = tiny_model(scale=4.0, patch_encoder="unet")
    copied = engine.bf16_copy(model)
    for name, layer in model.named_modules():
        for (which, p), q in zip(layer.named_parameters(recurse=False), copied.get_submodule(name).parameters(recurse=False)):
            cast = isinstance(layer, (nn.Linear, nn.Conv2d))
            assert (q.dtype == torch.bfloat16) == cast and (q is p) != cast, (name, which)
    inputs = model.embedding(torch.arange(6)[None]), torch.arange(6)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.trunk(*inputs), copied.trunk(*inputs))
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 900])
        assert torch.equal(model.patches.encode(x, t)[0], copied.patches.encode(x, t)[0])


def test_captions_have_no_guidance_branch(monkeypatch):
    """Nothing is drawn, so nothing is guided: half the cache, and half the batch."""
    made, original = [], engine.KVCache
    monkeypatch.setattr(engine, "KVCache", lambda *args: made.append(args) or original(*args))
    trained = tiny_trained(tiny_model(), guidance_scale=3.0)
    engine.generate(trained, [["a"], ["b"]], draw=False, max_images=0, max_tokens=3)
    engine.generate(trained, [["a"], ["b"]], max_tokens=0)
    assert [args[1:3] for args in made] == [(2, 2 + 16), (4, 3 + 16 + 2)]  # rows, and slots: at least <BOS> <BOI> and an image


def test_places_are_as_many_as_fit(monkeypatch):
    """Half of what is free, what torch keeps for itself included, is for the cache."""
    config = tiny_model().config  # two layers, two heads, 32 wide: 256 bytes a slot in bfloat16, keys and values of both layers
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700_000, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 400_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100_000)
    cuda = torch.device("cuda")
    assert engine.places_that_fit(config, 100, 2, cuda) == 1_000_000 // 2 // (256 * 100 * 2)
    assert engine.places_that_fit(config, 10**6, 2, cuda) == 1 and engine.places_that_fit(config, 100, 2, META) > 10**9


def test_batches_that_are_fetched_ahead_are_the_same():
    """And the state is that of the batches handed out, so that what was fetched and not used is fetched again after --resume."""
    config, _ = parse(flags(**TINY))
    tokenizer, n_patches = open_tokenizer(config, open_pairs(config)), config.model.n_patches
    documents = open_documents(config, tokenizer, n_patches)
    plain, ahead = (Loader(Stream(documents, config.data.seq_len, config.rows, n_patches), tokenizer, 0, 1) for _ in range(2))
    for _ in range(3):
        ahead.fetch()
    for n in range(6):
        a, b = next(plain), next(ahead)
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)) and plain.state == ahead.state
        ahead.fetch()


def test_batches_can_be_pinned(monkeypatch):
    """torch pins what is in lists, tuples and dicts; a Batch it would hand over as it is."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor)
    dataset = BatchDataset(lambda i: [[1, 2]], SimpleNamespace(bos=5, eos=6, boi=7, eoi=8, pad=9), 8, 4, True)
    pin_memory(dataset[[[0], [1]]])
    assert len(pinned) == 7


def test_the_middle_of_the_vae_has_four_dimensions(monkeypatch):
    """Fused attention takes no other; on a GPU a VAE's weights lie as cuDNN wants them, whether it trains or not."""
    shapes, attention = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *qkv: shapes.append(qkv[0].shape) or attention(*qkv))
    config = VAEConfig(channels=8, channel_multiples=(1, 2), n_res=1)
    vae = VAE(config)
    vae.decode(vae.encode(torch.zeros(2, 3, 8, 8)))
    assert shapes == [(2, 1, 16, 16)] * 2 and vae.encoder[1].weight.is_contiguous()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vae = VAE(config)
    vae.load_state_dict(VAE(config).state_dict())
    assert vae.encoder[1].weight.is_contiguous(memory_format=torch.channels_last)
