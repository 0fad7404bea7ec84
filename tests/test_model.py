"""model.py: patches, RoPE, the Llama block against transformers' values, sizes, and what enters and leaves."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import FIXTURES, divide, drawn_weights, run_here, tiny_model
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attention_mask import transfusion_mask
from extras import Choices, cli, new_model
from extras.chameleon import Chameleon
from extras.costs import encoding_memory, training_flops, training_memory
from extras.engine import KVCache
from extras.unet import NORMS, LayerNorm, UNetBlock, UNetPatches, unet_transfusion
from model import SIZES, Transfusion, TransfusionConfig, patchify, rope_table, rotate, unpatchify
from vae import VAE, VAEConfig


@pytest.mark.parametrize("channels, side, patch_size", [(8, 8, 2), (3, 6, 3), (4, 4, 1), (5, 8, 8)])
def test_unpatchify_is_the_inverse(channels, side, patch_size):
    x = torch.randn(3, channels, side, side)
    patches = patchify(x, patch_size)
    assert patches.shape == (3, (side // patch_size) ** 2, patch_size**2 * channels)
    assert torch.equal(unpatchify(patches, patch_size, side), x)


def test_patches_run_row_by_row():
    """Patch number 1 is to the right of number 0, and each holds exactly its own window."""
    x = torch.arange(4 * 6.0).view(1, 1, 4, 6)
    patches = patchify(x, 2)[0]
    for n, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        assert torch.equal(patches[n], x[0, 0, row : row + 2, column : column + 2].flatten())


def rope_scores(q_positions, k_positions, head_dim=16):
    q, k = torch.randn(2, 1, 2, 5, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = rotate(q, rope_table(q_positions[None], head_dim, 10000.0))
    k = rotate(k, rope_table(k_positions[None], head_dim, 10000.0))
    return q @ k.transpose(-1, -2)


def test_rope_is_relative():
    positions = torch.tensor([0, 1, 5, 30, 31])
    scores = rope_scores(positions, positions)
    torch.testing.assert_close(rope_scores(positions + 100, positions + 100), scores, rtol=0, atol=1e-4)  # angles are float32
    assert (rope_scores(positions + 1, positions) - scores).abs().max() > 0.1


def test_rope_keeps_lengths_and_leaves_position_0():
    x = torch.randn(1, 2, 4, 8)
    turned = rotate(x, rope_table(torch.tensor([[0, 1, 2, 3]]), 8, 10000.0))
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and not torch.allclose(turned[:, :, 1], x[:, :, 1])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_a_document_does_not_depend_on_where_it_starts():
    model = tiny_model(scale=8.0)
    tokens, image_id = torch.arange(10)[None], torch.full((1, 10), -1)
    nothing = torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long)
    run = lambda positions: model(tokens, image_id, positions, transfusion_mask(image_id), *nothing)[0]
    torch.testing.assert_close(run(torch.arange(10)[None]), run(torch.arange(50, 60)[None]), rtol=0, atol=1e-3)
    assert not torch.allclose(run(torch.arange(10)[None]), run(3 * torch.arange(10)[None]), rtol=0, atol=1e-1)


def test_text_logits_equal_transformers_llama():
    """The trunk is Llama: same weights, same logits (values made by make_fixtures.py)."""
    llama = {name: torch.from_numpy(value) for name, value in np.load(FIXTURES / "llama.npz").items()}
    model = Transfusion(TransfusionConfig(dim=16, n_layers=2, n_heads=2, mlp_multiple=16, vocab_size=32, latent_channels=3, latent_size=4))
    weights = {"embedding.weight": llama["model.embed_tokens.weight"], "norm.weight": llama["model.norm.weight"], "head.weight": llama["lm_head.weight"]}
    for n in range(2):
        there, here = lambda name: llama[f"model.layers.{n}.{name}.weight"], f"blocks.{n}."
        weights[here + "attention_norm.weight"] = there("input_layernorm")
        weights[here + "attention.qkv.weight"] = torch.cat([there(f"self_attn.{p}_proj") for p in "qkv"])
        weights[here + "attention.out.weight"] = there("self_attn.o_proj")
        weights[here + "mlp_norm.weight"] = there("post_attention_layernorm")
        weights[here + "mlp.gate_up.weight"] = torch.cat([there("mlp.gate_proj"), there("mlp.up_proj")])
        weights[here + "mlp.down.weight"] = there("mlp.down_proj")
    missing, unexpected = model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
    assert not unexpected and all(name.startswith("patches.") for name in missing)

    tokens = llama["tokens"]
    image_id, positions = torch.full_like(tokens, -1), torch.arange(tokens.shape[1]).expand_as(tokens)
    logits, prediction = model(tokens, image_id, positions, transfusion_mask(image_id), torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(logits, llama["logits"], rtol=0, atol=1e-4)
    assert prediction.shape == (0, 3, 4, 4)


def test_post_norm_and_qk_norm_equal_transformers_chameleon():
    """Swin v2's norm placement, and queries and keys normed before they are rotated: same weights, same hidden states."""
    fixture = np.load(FIXTURES / "chameleon.npz")
    theirs, tokens = drawn_weights(json.loads(fixture["shapes"][()]), scale=2.0), torch.from_numpy(fixture["tokens"])
    model = Chameleon(TransfusionConfig(dim=32, n_layers=2, n_heads=4, mlp_width=96, vocab_size=24, qk_norm=True))
    weights = {"embedding.weight": theirs["embed_tokens.weight"], "norm.weight": theirs["norm.weight"]}
    for n in range(2):
        there, here = lambda name: theirs[f"layers.{n}.{name}.weight"], f"blocks.{n}."
        weights |= {f"{here}attention.{name}.weight": there(f"self_attn.{name}") for name in ("q_norm", "k_norm")}
        weights[here + "attention_norm.weight"], weights[here + "mlp_norm.weight"] = there("input_layernorm"), there("post_attention_layernorm")
        weights[here + "attention.qkv.weight"] = torch.cat([there(f"self_attn.{p}_proj") for p in "qkv"])
        weights[here + "attention.out.weight"], weights[here + "mlp.down.weight"] = there("self_attn.o_proj"), there("mlp.down_proj")
        weights[here + "mlp.gate_up.weight"] = torch.cat([there("mlp.gate_proj"), there("mlp.up_proj")])
    assert model.load_state_dict(weights, strict=False) == (["head.weight"], [])
    length = tokens.shape[1]
    hidden = model.trunk(model.embedding(tokens), torch.arange(length)[None], torch.ones(length, length, dtype=torch.bool).tril())
    torch.testing.assert_close(hidden, torch.from_numpy(fixture["hidden"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, billions", [("0.16b", 0.162), ("0.37b", 0.374), ("0.76b", 0.778), ("1.4b", 1.364), ("7b", 6.74)])
def test_parameters_of_the_papers_sizes(name, billions):
    with torch.device("meta"):  # shapes without storage
        model = Transfusion(TransfusionConfig(**SIZES[name]))
    assert model.config.vocab_size == 32000 and model.config.n_patches == 256
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.002 if billions < 5 else 0.005)


def test_llama_has_no_biases_and_an_untied_head():
    model = tiny_model()
    assert not [name for name, _ in model.named_parameters() if "bias" in name and not name.startswith("patches.")]
    assert model.head.weight is not model.embedding.weight


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
def test_images_go_to_their_places_and_come_back_in_order(patch_encoder):
    """Of a batch whose rows hold 2, 0 and 1 images, each prediction is that of its own image, in reading order."""
    model = tiny_model(scale=8.0, side=4, patch_encoder=patch_encoder)
    x_t, t = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 400, 900])
    image_id = torch.full((3, 14), -1)
    image_id[0, 2:6], image_id[0, 8:12], image_id[2, 1:5] = 0, 1, 2
    positions = torch.arange(14).expand(3, -1)
    inputs = [torch.full_like(image_id, 7), image_id, positions, transfusion_mask(image_id)]
    with torch.no_grad():
        logits, prediction = model(*inputs, x_t, t)
        assert logits.shape == (3, 14, model.config.vocab_size) and prediction.shape == (3, 3, 4, 4)
        for n, row in enumerate([0, 0, 2]):
            shown = [0, 1] if row == 0 else [2]
            alone = model(*(i[row : row + 1] for i in inputs), x_t[shown], t[shown])[1]
            torch.testing.assert_close(prediction[n], alone[shown.index(n)], rtol=1e-4, atol=1e-5)


def test_timestep_reaches_every_patch_and_only_its_image():
    """Added to the patch vectors before the linear layer (footnote 6)."""
    patches = tiny_model(scale=8.0).patches
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        (a, _), (b, _) = patches.encode(x, torch.tensor([100, 100])), patches.encode(x, torch.tensor([100, 101]))
    assert torch.equal(a[0], b[0]) and ((a[1] - b[1]).abs().amax(-1) > 1e-4).all()
    same = (a[1] - b[1]) - (a[1] - b[1])[0]  # the same vector at every patch
    assert same.abs().max() < 1e-4


# ---- The U-Net ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [3, 0])
def test_patches_of_every_size(patch_encoder, patch_size, n):
    """In and out, for some images and for none: then every weight still has a gradient, which several processes average."""
    model = tiny_model(patch_size=patch_size, patch_encoder=patch_encoder, unet_channels=16 * patch_size)
    x, t = torch.randn(n, 3, 8, 8), torch.arange(n)
    patches, skips = model.patches.encode(x, t)
    prediction = model.patches.decode(patches, skips)
    assert patches.shape == (n, (8 // patch_size) ** 2, 32) and prediction.shape == x.shape
    prediction.square().sum().backward()
    assert all(p.grad is not None and (p.grad.abs().sum() > 0) == (n > 0) for p in model.patches.parameters())


@pytest.mark.parametrize("name, patch_size, billions", [("0.16b", 2, 0.265), ("7b", 1, 0.215), ("7b", 2, 0.272), ("7b", 4, 0.287), ("7b", 8, 0.291)])
def test_parameters_of_the_unet(name, patch_size, billions):
    """The paper's has 0.27B at 7B."""
    with torch.device("meta"):
        unet = UNetPatches(TransfusionConfig(**SIZES[name], patch_size=patch_size), Choices().unet_channels, Choices().unet_blocks)
    assert len(unet.down) == len(unet.up) == patch_size.bit_length()  # one halving for every factor of 2
    assert sum(p.numel() for p in unet.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)


def test_norms_of_the_unet():
    """Layer norm is that of torch over the channels of each pixel; the small presets have group norms instead."""
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(NORMS["layer"](8)(x), torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2))
    kinds = {name: {type(m) for m in tiny_model(patch_encoder="unet", unet_norm=name).patches.modules()} for name in NORMS}
    assert torch.nn.GroupNorm not in kinds["layer"] and torch.nn.GroupNorm in kinds["group"] and LayerNorm not in kinds["group"]


def test_unet_block_equals_diffusers():
    values = np.load(FIXTURES / "unet.npz")
    theirs = drawn_weights(json.loads(str(values["shapes"])))
    block = UNetBlock(16, 32, 24)
    block.load_state_dict({name.replace("time_emb_proj", "timestep").replace("conv_shortcut", "skip"): w for name, w in theirs.items()})
    x, t, y = (torch.from_numpy(values[name]).float() for name in "xty")
    torch.testing.assert_close(block(x, torch.nn.functional.silu(t)), y, rtol=0, atol=1e-5)


def test_unet_sees_its_timestep_and_its_skips():
    """Way in and way out: with another timestep, or with the skip connections of another image, all that follows differs."""
    patches = tiny_model(scale=8.0, patch_encoder="unet", patch_size=4, unet_channels=64, unet_blocks=2).patches
    x, h = torch.randn(2, 3, 8, 8), torch.randn(1, 4, 32)
    with torch.no_grad():
        (a, skips_a), (b, _), (_, skips_c) = (patches.encode(x[n : n + 1], torch.tensor([t])) for n, t in ((0, 100), (0, 900), (1, 100)))
        assert ((a - b).abs().amax(-1) > 1e-2).all()
        (outputs, t), expected = skips_a, patches.decode(h, skips_a)
        changed = [patches.decode(h, (outputs, t + 1))] + [patches.decode(h, (outputs[:n] + [skips_c[0][n]] + outputs[n + 1 :], t)) for n in range(len(outputs))]
    assert len(outputs) == 3 * 2 and all((expected - other).abs().max() > 1e-2 for other in changed)


def test_what_the_trunk_says_reaches_a_fresh_unets_output():
    """Beside the skip connections; a U-Net that hardly listens at first learns late what the text asks for."""
    torch.manual_seed(0)
    sizes = dict(dim=128, n_layers=1, n_heads=4, mlp_multiple=32, vocab_size=10, latent_channels=4, latent_size=8)
    unet = unet_transfusion(TransfusionConfig(**sizes), 64, 1, "group").patches
    x, t = torch.randn(2, 8, 4, 8, 8), torch.full((8,), 1000)
    with torch.no_grad():
        h, skips = unet.encode(x[0], t)
        first, second = (unet.decode(torch.randn_like(h), skips) for _ in range(2))
        other = unet.decode(torch.randn_like(h), unet.encode(x[1], t)[1])
    assert (first - second).std() > 0.53 * (first - other).std()  # 0.58; 0.47 with the decoder drawn as other linear layers are


def test_a_unet_learns():
    torch.manual_seed(0)
    unet = UNetPatches(TransfusionConfig(dim=32, n_heads=2, latent_channels=3, latent_size=8), 32, 1)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([1, 10, 100, 1000])
    optimizer, found = torch.optim.AdamW(unet.parameters(), lr=1e-2), []
    for _ in range(60):
        prediction = unet.decode(*unet.encode(x, t))
        found.append((prediction - x).square().mean().item())
        optimizer.zero_grad()
        (prediction - x).square().mean().backward()
        optimizer.step()
    assert found[0] > 0.5 and found[-1] < 0.1


# ---- Groups of heads, and the cache ----------------------------------------------------------------------------------


def test_grouped_heads_equal_repeated_ones():
    """Grouped-query attention is multi-head attention whose groups have the same keys and values."""
    grouped, plain = tiny_model(scale=8.0, n_heads=4, n_kv_heads=2), tiny_model(scale=8.0, n_heads=4)
    weights = grouped.state_dict()
    for n in range(2):
        q, k, v = weights[f"blocks.{n}.attention.qkv.weight"].unflatten(0, (-1, 8)).split([4, 2, 2])
        weights[f"blocks.{n}.attention.qkv.weight"] = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]).flatten(0, 1)
    plain.load_state_dict(weights)
    h, positions = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)), torch.arange(7).expand(2, -1)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(grouped.trunk(h, positions, causal), plain.trunk(h, positions, causal), rtol=1e-4, atol=1e-4)
    assert KVCache(grouped.config, rows=1, length=4).layers[1][0].shape == (1, 2, 4, 8)


@pytest.mark.parametrize("options", [dict(), dict(qk_norm=True), dict(n_heads=4, n_kv_heads=2), dict(images="discrete")], ids=["plain", "qk_norm", "grouped", "post_norm"])
def test_cache_equals_the_whole_sequence(options):
    """Rows of different lengths, decoded a piece at a time, rows and pieces in any order."""
    model, n = tiny_model(scale=8.0, **options), 9
    tokens = torch.randint(200, (3, n), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    with torch.no_grad():
        h = model.embedding(tokens)
        whole = model.trunk(h, torch.arange(n).expand(3, -1), causal)
        cache, found = KVCache(model.config, rows=3, length=12), torch.zeros_like(whole)
        for rows, starts, size in [([0, 1, 2], [0, 0, 0], 3), ([2], [3], 4), ([0, 2], [3, 7], 2), ([1], [3], 6), ([0], [5], 4)]:
            positions = torch.tensor(starts)[:, None] + torch.arange(size)
            visible = int(positions.max()) + 1
            mask = torch.arange(visible) <= positions[:, None, :, None]
            index = torch.tensor(rows)[:, None], positions
            found[index] = model.trunk(h[index], positions, mask, cache.at(rows, torch.tensor(rows), positions, visible).update)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_writing_a_cache_slot_again_replaces_it():
    model = tiny_model(scale=8.0)
    first, second = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0))
    run = lambda h, cache: model.trunk(h, torch.arange(4)[None], None, cache.at([0], torch.tensor([0]), torch.arange(4)[None], 4).update)
    with torch.no_grad():
        used, fresh = (KVCache(model.config, rows=1, length=4) for _ in range(2))
        run(first, used)
        assert torch.equal(run(second, used), run(second, fresh))


KINDS = TransfusionConfig, Choices


@pytest.mark.parametrize("wrong, message", [
    (dict(dim=100, n_heads=3), "multiple of 6"), (dict(patch_size=3), "must divide"),
    (dict(patch_encoder="conv"), "must be one of linear, unet"), (dict(patch_encoder="unet", patch_size=3, latent_size=33), "power of two"),
    (dict(patch_encoder="unet", unet_channels=100), "unet_channels is 100; .* multiple of 8"), (dict(patch_encoder="unet", unet_blocks=0), "unet_blocks is 0"),
    (dict(images="pixels"), "continuous, discrete"), (dict(image_attention="both"), "bidirectional, causal"),
    (dict(n_heads=6, n_kv_heads=4), "n_kv_heads is 4"), (dict(rope_scaling=(8, 1)), "four numbers")])  # fmt: skip
def test_impossible_sizes_are_refused(wrong, message):
    """By the options, or when the model is made."""
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        config, choices = (cli.make(kind, asdict(kind()) | values, "options") for kind, values in zip(KINDS, divide(wrong, *KINDS)))
        new_model(config, choices)


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
def test_bfloat16_on_cpu_stays_close(patch_encoder):
    """Training runs the matrix products in bfloat16; norms, RoPE and (on CPU) attention stay in float32."""
    model = tiny_model(scale=4.0, patch_encoder=patch_encoder)
    image_id = torch.full((1, 20), -1)
    image_id[0, 2:18] = 0
    inputs = torch.arange(20)[None], image_id, torch.arange(20)[None], transfusion_mask(image_id), torch.randn(1, 3, 8, 8), torch.tensor([300])
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(*inputs)
    for a, b in zip(exact, rough):
        assert (a - b).norm() / a.norm() < 0.05


@pytest.mark.parametrize("options", [
    dict(), dict(patch_encoder="unet", unet_blocks=2), dict(patch_encoder="unet", patch_size=1), dict(patch_encoder="unet", patch_size=4, unet_channels=64),
    dict(images="discrete", vocab_size=300),
], ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))  # fmt: skip
def test_training_flops_equal_the_counters(options):
    """Against torch's own counter of operations, which counts every query with every key: context = S, no block skipped."""
    model = tiny_model(dim=64, n_heads=2, n_layers=3, mlp_multiple=64, **options).train()
    rows, length, n, per_image = 2, 128, 3, model.config.n_patches
    positions, image_id = torch.arange(length).expand(rows, -1), torch.full((rows, length), -1)
    for number, (row, start) in enumerate([(0, 2), (1, 0), (1, 64)]):
        image_id[row, start : start + per_image] = number
    x_t, t = torch.randn(n, 3, 8, 8, requires_grad=True), torch.tensor([1, 500, 900])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits, prediction = model(torch.zeros_like(image_id), image_id, positions, transfusion_mask(image_id), x_t, t)
        (logits.sum() + prediction.sum()).backward()
    no_gradient = 2 * n * model.patches.timestep.mlp[0].weight.numel() if model.patches else 0  # for the sinusoids of t, which are not learned
    assert counter.get_total_flops() == training_flops(model, length, n / (rows * length)) * rows * length - no_gradient


@pytest.mark.parametrize("backend, elsewhere", [(None, 8 + 6), ("aot_eager_decomp_partition", 6)])
def test_training_memory_counts_what_autograd_keeps(backend, elsewhere):
    """Against the tensors that the forward pass saves, each storage once. elsewhere: bytes per position and width that a CPU keeps besides:
    q, k, v and attention's sum in float32 (6); uncompiled, what a GPU's fused norm does not keep (8)."""
    model = tiny_model(dim=128, n_heads=4, n_layers=3, mlp_multiple=128).train()
    rows, length, kept = 2, 256, {}
    h, positions = torch.randn(rows, length, 128, requires_grad=True), torch.arange(length).expand(rows, -1)
    rope = rope_table(positions, 32, 10000.0)
    not_counted = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *rope)}
    copies = 2 * sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in not_counted:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for block in model.blocks if backend else ():
        block.compile(backend=backend)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = h
        for block in model.blocks:
            out = block(out, rope, None)
    said = training_memory(model, 1, rows, length, compiled=bool(backend))["activations"] - rows * length * 12 * model.config.vocab_size
    said += rows * length * 128 * model.config.n_layers * elsewhere + copies
    assert out.shape == h.shape and said == pytest.approx(sum(kept.values()), rel=0.01), said / sum(kept.values())


def test_training_memory_by_parts():
    """What several GPUs share; and encoding counts where it takes more than the activations, which come after it."""
    model = tiny_model(dim=128, n_heads=4, n_layers=4, mlp_multiple=128)
    rows, length = 2, 256
    one, eight, n = *(training_memory(model, gpus, rows, length) for gpus in (1, 8)), sum(p.numel() for p in model.parameters())
    assert eight["weights"] * 8 == 4 * n and one["gradients"] == eight["gradients"] == 4 * n  # accumulated, they are whole
    assert training_memory(model, 1, rows, length, encoding=10**9)["activations"] == 10**9 and training_memory(model, 1, rows, length, encoding=10) == one
    assert one["copies"] == 2 * (n - model.embedding.weight.numel()) and eight["copies"] == 2 * (n - 2 * sum(p.numel() for p in model.blocks[0].parameters()))


@pytest.mark.parametrize("unshuffle", [1, 2])
def test_encoding_memory_equals_the_trackers(unshuffle):
    """Of torch's own tracker, which has the pixels and their latents, too."""
    config = VAEConfig(channels=32, channel_multiples=(1, 2), unshuffle=unshuffle, mid_attention=False)
    vae, tracker = VAE(config).eval(), MemTracker()
    tracker.track_external(vae)
    with tracker, torch.no_grad():
        vae.posterior(torch.zeros(2, 3, 64, 64))
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    weights = sum(p.nbytes for p in vae.parameters())
    assert encoding_memory(config, 2, 64, bf16=False) == pytest.approx(peak["Total"] - weights, rel=0.1)


def test_script_prints_the_sizes():
    for script in ("model.py", "extras/costs.py"):
        code, out, _ = run_here(script)
        assert code == 0 and all(size in out for size in SIZES)
