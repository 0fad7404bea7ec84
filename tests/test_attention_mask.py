"""attention_mask.py: the rule, against its definition in plain loops, and what it does to a model's outputs."""

import copy
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, picture, run_here, tiny_model
from torch.nn.attention.flex_attention import flex_attention

from attention_mask import flex_mask, mask_rule, transfusion_mask
from data import Tokenizer, collate


def random_rows(seed, batch=4, length=40):
    """Packed rows of text and images with padding behind them -> image_id, doc_id (B, S)."""
    rng = random.Random(seed)
    image_id, doc_id = [[-1] * length for _ in range(batch)], [[-1] * length for _ in range(batch)]
    for b in range(batch):
        at, image, document, end = 0, 0, 0, rng.randint(length // 2, length)
        while at < end:
            for _ in range(rng.randint(1, 4)):  # segments of one document
                n, is_image = rng.randint(1, 6), rng.random() < 0.5
                for p in range(at, min(at + n, end)):
                    doc_id[b][p] = document
                    image_id[b][p] = image if is_image else -1
                at, image = at + n, image + is_image
            document += 1
    return torch.tensor(image_id), torch.tensor(doc_id)


def may_attend(image_id, doc_id, q, k, causal=False):
    """The paper's rule for one row: itself; anything earlier in the document; anything in the own image, unless images are causal, too."""
    if q == k:
        return True
    if doc_id[q] == -1 or doc_id[q] != doc_id[k]:
        return False
    return k < q or (not causal and image_id[q] != -1 and image_id[q] == image_id[k])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_mask_equals_its_definition(seed, causal):
    image_id, doc_id = random_rows(seed)
    mask = transfusion_mask(image_id, doc_id, causal)
    batch, length = image_id.shape
    assert mask.shape == (batch, 1, length, length) and mask.dtype == torch.bool
    expected = [[[may_attend(i, d, q, k, causal) for k in range(length)] for q in range(length)] for i, d in zip(image_id.tolist(), doc_id.tolist())]
    assert torch.equal(mask[:, 0], torch.tensor(expected))


def test_without_documents_a_row_is_one_document():
    image_id = torch.tensor([[-1, 0, 0, 0, -1, 1, 1]])
    assert torch.equal(transfusion_mask(image_id), transfusion_mask(image_id, torch.zeros_like(image_id)))
    assert transfusion_mask(image_id)[0, 0, -1].all()


def test_mask_written_out():
    """a BOI # # EOI: the two patches see each other, neither BOI nor EOI belongs to their block, padding sees itself only."""
    mask = transfusion_mask(torch.tensor([[-1, -1, 0, 0, -1, -1]]), torch.tensor([[0, 0, 0, 0, 0, -1]]))
    expected = ["#.....", "##....", "####..", "####..", "#####.", ".....#"]
    assert ["".join("#" if m else "." for m in row) for row in mask[0, 0]] == expected


def test_rule_works_index_by_index():
    """FlexAttention asks for one (b, h, q, k) at a time."""
    image_id, doc_id = random_rows(9, batch=2, length=16)
    rule, mask = mask_rule(image_id, doc_id), transfusion_mask(image_id, doc_id)
    for b in range(2):
        for q in range(16):
            for k in range(16):
                assert bool(rule(b, 0, torch.tensor(q), torch.tensor(k))) == bool(mask[b, 0, q, k])


# ---- What a model's outputs depend on -------------------------------------------------------------------------------

# Two documents in one row, images of 4 patches: "a b BOI #### EOI c BOI #### EOI d" and "BOI #### EOI e f", then padding.
TEXT, IMAGES = slice(0, 2), [slice(3, 7), slice(10, 14), slice(17, 21)]
SECOND, PADDING = 16, 24
LENGTH = 26


@pytest.fixture(scope="module", params=["linear", "unet"])
def outputs(request):
    """A function from what may be perturbed to (logits (S, vocab), predictions (3, 4 patches, values)) of that row."""
    model = tiny_model(scale=8.0, side=4, patch_encoder=request.param)
    image_id, doc_id = torch.full((1, LENGTH), -1), torch.zeros(1, LENGTH, dtype=torch.long)
    for n, where in enumerate(IMAGES):
        image_id[0, where] = n
    doc_id[0, SECOND:], doc_id[0, PADDING:] = 1, -1
    positions = torch.cat([torch.arange(SECOND), torch.arange(LENGTH - SECOND)])[None]
    draw = torch.Generator().manual_seed(0)
    tokens, x_t = torch.randint(256, (1, LENGTH), generator=draw), torch.randn(3, 3, 4, 4, generator=draw)

    @torch.no_grad()
    def run(token=None, image=None, pixel=(0, 0), t=None):
        new_tokens, new_x, times = tokens.clone(), x_t.clone(), torch.tensor([10, 500, 990])
        if token is not None:
            new_tokens[0, token] = (new_tokens[0, token] + 1) % 256
        if image is not None:
            new_x[image, :, pixel[0], pixel[1]] += 1.0
        if t is not None:
            times[t] = 250
        logits, prediction = model(new_tokens, image_id, positions, transfusion_mask(image_id, doc_id), new_x, times)
        patches = prediction.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return logits[0], patches

    return run


def changed(before, after):
    """Which positions, and which patches of which images, differ."""
    differs = [(a - b).abs().amax(-1) for a, b in zip(before, after)]
    for d in differs:  # either untouched, up to rounding, or clearly different
        assert ((d < 1e-6) | (d > 1e-4)).all(), d
    return [d > 1e-4 for d in differs]


def whole(n):
    return torch.arange(3)[:, None].expand(3, 4) >= n  # every patch of image n and of those after it


def test_a_later_token_changes_nothing_earlier(outputs):
    text, patches = changed(outputs(), outputs(token=8))  # the c after the first image
    assert text.tolist() == [8 <= p < SECOND for p in range(LENGTH)]
    assert torch.equal(patches, whole(1) & ~whole(2))


@pytest.mark.parametrize("change", [dict(image=1, pixel=(3, 3)), dict(image=1, pixel=(0, 1)), dict(t=1)])
def test_one_patch_changes_its_whole_image_and_what_follows_it_only(outputs, change):
    text, patches = changed(outputs(), outputs(**change))
    assert text.tolist() == [IMAGES[1].start <= p < SECOND for p in range(LENGTH)]  # hidden states of its first patch, too; not BOI
    assert torch.equal(patches, whole(1) & ~whole(2))  # neither the earlier image nor the other document's


@pytest.mark.parametrize("change, seen_by", [
    (dict(token=0), range(SECOND)), (dict(token=SECOND), range(SECOND, PADDING)), (dict(image=2), range(17, PADDING)),
    (dict(token=PADDING), [PADDING]), (dict(token=PADDING + 1), [PADDING + 1]),
])  # fmt: skip
def test_documents_and_padding_do_not_see_each_other(outputs, change, seen_by):
    text, patches = changed(outputs(), outputs(**change))
    assert text.nonzero().flatten().tolist() == list(seen_by)
    images = [n for n, where in enumerate(IMAGES) if where.start in seen_by]
    assert patches.any(1).nonzero().flatten().tolist() == images and patches[images].all()


def test_script_prints_and_draws_the_mask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_here("attention_mask.py")
    assert code == 0 and "BOI" in out and "■" in out
    assert (tmp_path / "attention_mask.png").exists()


# ---- FlexAttention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_flex_mask_is_the_same_rule(causal):
    """The block mask says, block by block, what the dense mask says; flex_attention with it gives what SDPA gives without."""
    image_id, doc_id = random_rows(1, batch=2, length=512)
    dense, blocks = transfusion_mask(image_id, doc_id, causal), flex_mask(image_id, doc_id, causal)
    by_block = dense.view(2, 1, 4, 128, 4, 128).any(5).any(3)
    assert torch.equal(blocks.to_dense().bool(), by_block) and not by_block.all()
    q, k, v = torch.randn(3, 2, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), F.scaled_dot_product_attention(q, k, v, attn_mask=dense), rtol=0, atol=1e-5)


def packed(seed, rows=2, length=128):
    """A batch of documents of random lengths, with more or fewer images."""
    rng = random.Random(seed)
    documents = [[[[rng.randrange(256)] * rng.randint(1, 30), *[picture(seed)] * rng.randint(0, 1)] for _ in range(2)] for _ in range(rows)]
    return collate(documents, Tokenizer(), length, 16)


@pytest.mark.parametrize("mask", [transfusion_mask, pytest.param(flex_mask, marks=pytest.mark.slow)])
def test_one_compilation_serves_every_batch(mask):
    """Other documents, other numbers of images, and every layer: the same graph. The compiler itself raises if it has to
    compile again; its backend "eager" then runs the graph as it stands, which a CPU can do with FlexAttention's, too."""
    model = tiny_model(scale=4.0, latent_channels=3)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True)
    images = set()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for seed in range(4):
            batch = packed(seed)
            images.add(len(batch.images))
            x_0, t = torch.randn(len(batch.images), 3, 8, 8), torch.full((len(batch.images),), 500)
            inputs = batch.tokens, batch.image_id, batch.positions
            found, _ = compiled(*inputs, mask(batch.image_id, batch.doc_id), x_0, t)
            expected, _ = model(*inputs, transfusion_mask(batch.image_id, batch.doc_id), x_0, t)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert len(images) > 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_the_compiler_is_not_loaded_before_it_is_needed():
    """It takes as long to load as all the rest."""
    code = "import sys, train; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA only")
def test_flex_attention_trains_as_sdpa_does():
    """Compiled, forward and backward: gradients of the model with the block mask = with the dense mask."""
    model = tiny_model(scale=4.0, dim=128, latent_channels=3).cuda().train()
    batch = packed(0, length=256).to("cuda")
    noise = torch.randn(len(batch.images), 3, 8, 8, device="cuda")
    gradients = []
    for mask, compiled in ((transfusion_mask, False), (flex_mask, True)):
        copied = copy.deepcopy(model)
        if compiled:
            for block in copied.blocks:
                block.compile(fullgraph=True)
        logits, prediction = copied(batch.tokens, batch.image_id, batch.positions, mask(batch.image_id, batch.doc_id), noise, torch.full((len(noise),), 500, device="cuda"))
        (logits.square().mean() + prediction.square().mean()).backward()
        gradients.append({name: p.grad for name, p in copied.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-2 * expected.norm() + 1e-6, name
