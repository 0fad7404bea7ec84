"""sample.py and extras/engine.py: the cached, batched engine against plain recomputation, its rules, and what people see."""

import base64
import io
import math
import os
import re
import shutil
import warnings
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIDE, PixelVAE, generated, image, picture, run_here, same, tiny_model, tiny_trained
from PIL import Image

from data import Tokenizer, collate
from diffusion import DDPM
from extras import engine
from extras.engine import pick_tokens
from extras.runs import newest_checkpoint, save_checkpoint
from extras.show import contact_sheet, html_page
from sample import generate, generate_one
from train import losses
from vae import VAE, VAEConfig

T = Tokenizer()


def make_talker(**options):
    """A model with large random weights that writes a few letters, and now and then draws or stops.

    Component 0 of every embedding is held at a constant, so that column 0 of the head acts as a bias on each token.
    """
    model = tiny_model(scale=8.0, **options)
    with torch.no_grad():
        model.embedding.weight[:, 0] = model.patches.encoder.bias[0] = 6.0
        model.head.weight.mul_(0.4)
        model.head.weight[:, 0] = -6.0
        model.head.weight[list(b"abcdefgh"), 0] = 1.0
        model.head.weight[[T.boi, T.eos], 0] = torch.tensor([1.2, 0.4])
    return model


@pytest.fixture(scope="module")
def talker():
    return make_talker()


class Listening(Tokenizer):
    """Remembers what it decoded, without special tokens."""

    def __init__(self):
        super().__init__()
        self.decoded = []

    def decode(self, ids):
        text = [i for i in ids if i < self.bos]
        self.decoded += [text] if text else []
        return super().decode(ids)


def recompute(trained, document, seed, *, max_tokens=20, max_images=2, **options):
    """What generate says it does, for one document, by `generate_one` -> (new ids, new latents, in order)."""
    trained = replace(trained, vae=PixelVAE(), tokenizer=Listening())
    found = generate_one(trained, document, seed, max_tokens=max_tokens, max_images=max_images, **options)
    assert found[: len(document)] == document
    texts, latents, new = iter(trained.tokenizer.decoded), iter(trained.vae.decoded), []
    for part in found[len(document) :]:
        new += next(texts) if isinstance(part, str) else [next(latents)]
    return new


def test_what_surrounds_a_prompt_changes_nothing(talker):
    """A person types a line end, and pastes what has a zero byte or a lone surrogate in it."""
    trained = tiny_trained(talker)
    (expected,) = generated(trained, [["a red dot"]], [3], max_tokens=0)
    for prompt in (" a red dot", "a red dot\n", "a red dot\r\n", "a red dot\u00a0", "\ta red dot  "):
        assert torch.equal(generated(trained, [[prompt]], [3], max_tokens=0)[0][0], expected[0]), prompt
    assert torch.equal(*(generated(trained, [[prompt]], [3], max_tokens=0)[0][0] for prompt in ("a red\ndot", "a red dot")))
    generated(trained, [["a \ud800 dot"]], [3], max_tokens=0)


DOCUMENTS = [["a red dot"], [image(1)], [], ["ab", image(2), "make it abcdefghijklmnop"], ["x"], [image(3), image(4)], [image(5), "c"]]


@pytest.mark.parametrize("options", [
    dict(draw=True, temperature=1.0), dict(draw=True, temperature=1.0, guidance_scale=3.0), dict(draw=False, temperature=1.0, guidance_scale=2.0),
    dict(draw=False, temperature=0.0), dict(draw=True, temperature=0.7, sampler="ddim", guidance_scale=0.0),
], ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))  # fmt: skip
def test_cached_batch_equals_recomputation(talker, options):
    """Text and images, prompts of different lengths and kinds, sequences that draw at different times, with and without guidance."""
    assert_equals_recomputation(talker, options)


def test_cached_batch_equals_recomputation_with_a_unet():
    assert_equals_recomputation(make_talker(patch_encoder="unet"), dict(draw=True, temperature=1.0, guidance_scale=3.0))


def assert_equals_recomputation(talker, options):
    trained, seeds = tiny_trained(talker), range(10, 10 + len(DOCUMENTS))
    found = generated(trained, DOCUMENTS, seeds, max_tokens=20, max_images=2, **options)
    for document, seed, row in zip(DOCUMENTS, seeds, found):
        same(row, recompute(trained, document, seed, **options))


@pytest.mark.parametrize("options", [dict(guidance_scale=3.0), dict(draw=False), dict(guidance_scale=2.0, sampler="dpm++", max_batch=2)], ids=str)
def test_images_that_are_read_causally_too(talker, options):
    """--image_attention causal: a step needs a mask, for the sequences and their guidance branches."""
    model, options = tiny_model(image_attention="causal"), dict(temperature=1.0) | options
    model.load_state_dict(talker.state_dict())
    found = generated(tiny_trained(model), DOCUMENTS, range(10, 17), max_tokens=12, max_images=2, **options)
    options.pop("max_batch", None)
    for document, seed, row in zip(DOCUMENTS, range(10, 17), found):
        same(row, recompute(tiny_trained(model), document, seed, max_tokens=12, max_images=2, **options))
    first = lambda model: generated(tiny_trained(model), [["a red dot"]], [10], max_tokens=0)[0][0]
    assert (first(model) - first(talker)).abs().max() > 0.01


def test_the_comparison_above_covers_text_and_images_and_both_in_turn(talker):
    found = generated(tiny_trained(talker), DOCUMENTS, range(10, 17), temperature=1.0, max_tokens=20, max_images=2)
    kinds = ["".join("t" if isinstance(i, int) else "I" for i in row) for row in found]
    assert any("It" in row for row in kinds) and any("tI" in row for row in kinds) and any(row.count("I") == 2 for row in kinds)
    latents = torch.stack([i for row in found for i in row if not isinstance(i, int)])
    assert latents.isfinite().all() and latents.std(0).mean() > 0.1  # not all the same


def mixture(seed, n):
    """n random documents of random lengths: nothing, texts, pictures, and both in any order."""
    draw = np.random.default_rng(seed)
    part = lambda: image(int(draw.integers(100))) if draw.random() < 0.3 else "abcdefgh tuvwxyz "[: draw.integers(1, 17)]
    return [[part() for _ in range(draw.integers(0, 4))] for _ in range(n)]


@pytest.mark.parametrize("options", [
    dict(guidance_scale=3.0, max_batch=3), dict(guidance_scale=1.0, max_batch=4), dict(guidance_scale=2.0, sampler="dpm++", steps=4, max_batch=2),
    dict(sampler="ddim", eta=0.6, draw=False, max_batch=5), dict(sampler="dpm++", temperature=0.0, max_batch=10),
], ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))  # fmt: skip
def test_random_mixtures_equal_recomputation(talker, options):
    """More documents than places: freed ones are filled again, beside sequences that are in the middle of a text or picture."""
    options = dict(temperature=1.0) | options
    documents, trained = mixture(len(options), 10), tiny_trained(talker)
    found = generated(trained, documents, range(10), max_tokens=8, max_images=2, **options)
    del options["max_batch"]
    for seed, (document, row) in enumerate(zip(documents, found)):
        same(row, recompute(trained, document, seed, max_tokens=8, max_images=2, **options))


@pytest.mark.parametrize("guidance_scale, calls", [(1.0, 1), (3.0, 8), (3.0, 1000)])
def test_a_sequence_does_not_depend_on_its_neighbours(talker, monkeypatch, guidance_scale, calls):
    """Nor on how the calls are shared out between the modes."""
    documents, options = mixture(7, 8), dict(temperature=1.0, max_tokens=12, max_images=2, guidance_scale=guidance_scale, sampler="dpm++")
    monkeypatch.setattr(engine, "TEXT_CALLS", calls)
    together = generated(tiny_trained(talker), documents, range(8), max_batch=3, **options)
    monkeypatch.setattr(engine, "TEXT_CALLS", 3)
    for seed, (document, row) in enumerate(zip(documents, together)):
        same(generated(tiny_trained(talker), [document], [seed], **options)[0], row)


def test_seeds_decide(talker):
    trained, options = tiny_trained(talker), dict(temperature=1.0, max_tokens=12)
    one, again, other = (generate(trained, [["a red dot"], []], seeds, **options) for seeds in ([1, 2], [1, 2], [3, 4]))
    assert one == again and one != other
    assert generate(trained, [[], []], [5, 5], **options)[0] == generate(trained, [[], []], [5, 5], **options)[1]


@pytest.mark.parametrize("seeds", [np.arange(5, 7), torch.arange(5, 7), range(5, 7), (np.uint8(5), 6), [5 + 2**64, 6 - 2**70]], ids=str)
def test_any_whole_number_is_a_seed(talker, seeds):
    trained, options = tiny_trained(talker), dict(temperature=1.0, max_tokens=12, max_images=0)
    assert generate(trained, [[], []], seeds, **options) == generate(trained, [[], []], [5, 6], **options)
    assert generate(trained, [[]], [-1], **options) == [generate_one(trained, [], -1, **options)]


def test_guidance_scale_1_is_no_guidance_and_more_is_more(talker):
    draw = lambda scale: generated(tiny_trained(talker), [["a red dot"]], [0], max_tokens=0, guidance_scale=scale)[0][0]
    assert not torch.allclose(draw(3.0), draw(1.0), atol=0.01)
    torch.testing.assert_close(draw(1.0), draw(1.0 + 1e-7), rtol=1e-3, atol=1e-3)  # the two code paths meet


# ---- What it costs --------------------------------------------------------------------------------------------------


def trunk_calls(trained, monkeypatch, *args, **options):
    """The calls that `generate` makes of the trunk: (rows, new positions of each, mask), and the timesteps of its denoising."""
    calls, times, trunk, denoise = [], [], trained.model.trunk, engine.denoise

    def spy(h, positions, mask=None, update=None):
        calls.append((*h.shape[:2], mask))
        return trunk(h, positions, mask, update)

    with monkeypatch.context() as patch:
        patch.setattr(trained.model, "trunk", spy)
        patch.setattr(engine, "denoise", lambda model, cache, x, t, *rest: (times.append(t.tolist()), denoise(model, cache, x, t, *rest))[1])
        documents = generate(trained, *args, **options)
    return calls, times, documents


def test_a_denoising_step_runs_the_patches_alone(talker, monkeypatch):
    """Of two pictures after prompts of equal length: the prompts once, T' steps of the patches without a mask, and nothing else."""
    calls, times, _ = trunk_calls(tiny_trained(talker), monkeypatch, [["a red dot"], ["a red cat"]], max_tokens=0, steps=5)
    assert [call[:2] for call in calls] == [(2, 11)] + [(2, 16)] * 5
    assert all(mask is None for *_, mask in calls[1:])
    assert [t[0] for t in times] == [1000, 800, 600, 400, 200]


def test_guidance_shares_the_call_and_hides_unused_slots(talker, monkeypatch):
    """Sequences and their guidance branches in one call; where prefixes differ, a mask of (cache row, slot) alone."""
    calls, _, _ = trunk_calls(tiny_trained(talker), monkeypatch, [["a red dot"], ["a dot"]], max_tokens=0, steps=5, guidance_scale=3.0)
    assert [call[:2] for call in calls] == [(2, 2), (2, 11)] + [(4, 16)] * 5
    for *_, mask in calls[2:]:
        assert mask.shape == (4, 1, 1, 11 + 16) and mask[:, 0, 0].sum(-1).tolist() == [11 + 16, 2 + 16, 7 + 16, 2 + 16]


def test_a_finished_picture_is_run_once_more_clean(talker, monkeypatch):
    """At t = 0, without the guidance branch, and only if something follows; then <EOI>, and a call a token."""
    trained = tiny_trained(talker)
    with torch.no_grad():
        trained.model.head.weight[[T.eos, T.boi], 0] -= 100
        calls, times, _ = trunk_calls(trained, monkeypatch, [["a dot"]], max_tokens=4, steps=3, guidance_scale=2.0)
        trained.model.head.weight[[T.eos, T.boi], 0] += 100
    assert [call[:2] for call in calls] == [(1, 2), (1, 7)] + [(2, 16)] * 3 + [(1, 16)] + [(1, 1)] * 4  # the fourth token is not run
    assert times[-1] == [0] and 0 not in sum(times[:-1], [])


@pytest.mark.parametrize("calls", [1, 3])
def test_modes_advance_together(talker, monkeypatch, calls):
    """Pictures at different steps share a denoising call. Between two steps of a picture every other picture makes one step at
    most, and every text TEXT_CALLS tokens at most, and some do."""
    monkeypatch.setattr(engine, "TEXT_CALLS", calls)
    events, documents = [], [["a dot"], [image(1)], [], []] * 2
    _, times, _ = trunk_calls(tiny_trained(talker), monkeypatch, documents, draw=False, temperature=1.0, max_tokens=40, max_images=3, steps=12,
                              on_text=lambda row, _: events.append(("text", row)), on_step=lambda row, n, _: events.append((n, row)))  # fmt: skip
    assert any(len(set(t)) > 1 for t in times)
    between = set()
    for row in range(len(documents)):
        steps = [i for i, (kind, who) in enumerate(events) if who == row and kind != "text"]
        for i, j in zip(steps, steps[1:]):
            if events[j][0] > 1:  # not before a picture's first
                others = [("text" if kind == "text" else "step", who) for kind, who in events[i + 1 : j] if kind not in (0, 1)]
                between |= {(kind, others.count((kind, who))) for kind, who in others}
    assert max(n for kind, n in between if kind == "step") == 1 and max(n for kind, n in between if kind == "text") == calls


def test_places_are_as_many_as_asked_for(talker, monkeypatch):
    made, original = [], engine.KVCache
    monkeypatch.setattr(engine, "KVCache", lambda *args: made.append(args) or original(*args))
    documents = [["a"]] * 7
    few = generate(tiny_trained(talker), documents, max_tokens=0, max_batch=2, guidance_scale=2.0)
    many = generate(tiny_trained(talker), documents, max_tokens=0, max_batch=64, guidance_scale=1.0)
    assert [args[1] for args in made] == [2 * 2, 7] and len(few) == len(many) == 7
    assert all(args[2] == 1 + 1 + 1 + 16 + 2 for args in made)  # <BOS>, the letter, <BOI>, and room for a picture and its frame


def test_without_a_compiler_it_goes_on(talker, monkeypatch):
    def broken():
        raise RuntimeError("no compiler")

    trained, documents, options = tiny_trained(talker), [["a dot"], ["b"]], dict(max_tokens=0, guidance_scale=2.0)
    expected = generated(trained, documents, [0, 1], **options)
    monkeypatch.setattr(engine, "compiled_denoise", broken)
    monkeypatch.setitem(engine.COMPILE_FROM, "cpu", 0)
    with pytest.warns(UserWarning, match="without torch.compile"):
        for a, b in zip(generated(trained, documents, [0, 1], **options), expected):
            same(a, b)


def test_too_little_memory_is_not_a_missing_compiler(talker, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "compiled_denoise", full)
    monkeypatch.setitem(engine.COMPILE_FROM, "cpu", 0)
    with pytest.raises(torch.OutOfMemoryError):
        generated(tiny_trained(talker), [["a dot"]], [0], max_tokens=0)


WITH_A_COMPILER = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="it needs a C++ compiler")]


@pytest.mark.parametrize("backend, options", [("aot_eager", dict()), pytest.param("inductor", dict(n_heads=4, n_kv_heads=2), marks=WITH_A_COMPILER)])
def test_one_compilation_serves_all(options, backend, monkeypatch):
    """One row and several, with guidance and without, prefixes of any lengths, another copy of the model: one graph, which has no break.
    What is drawn is what the step draws uncompiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = engine.compiled_denoise.__wrapped__(backend=backend)
    for n, (batch, scale) in enumerate([(["a"], 1.0), (["ab"] * 2, 2.0), (["abcde", "a", "abc"], 1.0), (["abcdefgh"] * 5, 2.0)]):
        trained = tiny_trained(tiny_model(scale=8.0, **options), guidance_scale=scale, steps=2)
        draw = lambda: generated(trained, [[text] for text in batch], range(len(batch)), max_tokens=0)
        expected = draw()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.filterwarnings("error", "going on without")
            patch.setattr(engine, "compiled_denoise", lambda: compiled)
            patch.setitem(engine.COMPILE_FROM, "cpu", 0)
            for a, b in zip(draw(), expected):
                same(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]


# ---- The rules ------------------------------------------------------------------------------------------------------


def test_prompts_come_back_and_text_prompts_are_drawn(talker):
    prompt = ["a red dot", image(1), "again"]
    found = generate(tiny_trained(talker), [prompt], max_tokens=0)[0]
    assert found[:3] == prompt and len(found) == 4 and isinstance(found[3], Image.Image) and found[3].size == (SIDE, SIDE)


def test_limits_are_kept(talker):
    trained = tiny_trained(talker)
    for max_tokens, max_images in ((5, 0), (5, 1), (1, 3), (30, 2)):
        for row in generated(trained, [[]] * 8, range(8), draw=False, max_tokens=max_tokens, max_images=max_images):
            assert sum(isinstance(i, int) for i in row) <= max_tokens and sum(not isinstance(i, int) for i in row) <= max_images


def test_no_text_is_written_when_none_is_allowed(talker):
    assert generated(tiny_trained(talker), [[image(1)], []], [0, 1], draw=False, max_tokens=0, max_images=0, temperature=1.0) == [[], []]


def test_inserted_tokens_are_never_sampled(talker):
    """<BOS>, <EOI> and padding, however likely; <EOS> ends the document."""
    trained = tiny_trained(tiny_model())
    with torch.no_grad():
        trained.model.load_state_dict(talker.state_dict())
        trained.model.head.weight[[T.bos, T.eoi, T.pad], 0] = 50.0
        rows = generated(trained, [[]] * 4, range(4), draw=False, max_tokens=10, max_images=0)
        assert not {T.bos, T.eoi, T.pad, T.boi, T.eos} & {i for row in rows for i in row} and any(rows)
        trained.model.head.weight[T.eos, 0] = 100.0
        assert generate(trained, [[]] * 3, draw=False, max_tokens=10, max_images=1) == [[], [], []]


def test_top_k_1_is_greedy(talker):
    run = lambda **options: generate(tiny_trained(talker), [[], [image(1)]], draw=False, max_tokens=15, max_images=0, **options)
    assert run(top_k=1, temperature=5.0) == run(temperature=0.0) != run(temperature=5.0)


def test_pick_tokens_keeps_what_it_should():
    """Which tokens can be drawn, against a plain reading of the definitions; and none of probability 0, whatever u is."""
    draw = np.random.default_rng(0)
    u = torch.cat([torch.zeros(1), torch.linspace(0, 1, 4001)[:-1], torch.tensor([1 - 2**-24])])
    for top_k, top_p in [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.7), (1, 1.0), (0, 0.01), (50, 0.999)]:
        logits = torch.tensor(draw.normal(size=20) * 2, dtype=torch.float32)
        logits[[0, 7, 19]] = -torch.inf
        found = set(pick_tokens(logits.expand(len(u), -1), torch.full((len(u),), 1.5), u, top_k, top_p).tolist())
        p = np.exp(logits.double().numpy() / 1.5)
        order, kept, mass = np.argsort(-p)[: top_k or 17], set(), 0.0
        total = p[order].sum()
        for i in order:
            if mass < top_p and p[i] > 0:
                kept.add(int(i))
                mass += p[i] / total
        assert found <= kept and {i for i in kept if p[i] / total > 0.001} <= found


def test_pick_tokens_draws_from_the_softmax():
    """Pearson's chi-squared; greedy where the temperature is 0."""
    logits, n = torch.tensor([1.0, -1.0, 0.5, 2.0, -torch.inf]), 50_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(pick_tokens(logits.expand(n, -1), torch.full((n,), 0.7), u), minlength=5).double()
    expected = n * (logits.double() / 0.7).softmax(-1)
    chi2 = ((counts - expected) ** 2 / expected)[:4].sum()
    assert counts[4] == 0 and chi2 < 3 + 4 * 6**0.5
    assert pick_tokens(logits.expand(2, -1), torch.tensor([0.0, 1.0]), torch.tensor([0.999, 0.999]))[0] == 3


def test_a_document_ends_where_the_trained_sequences_do(talker):
    trained = tiny_trained(talker, seq_len=40)
    with torch.no_grad():
        trained.model.head.weight[T.eos, 0] -= 100
        rows = generated(trained, [[]] * 6, range(6), draw=False, max_tokens=1000, max_images=9)
        trained.model.head.weight[T.eos, 0] += 100
    lengths = [1 + sum(1 if isinstance(i, int) else 18 for i in row) for row in rows]
    assert all(39 <= n <= 42 for n in lengths) and any(not isinstance(i, int) for row in rows for i in row)  # the last token is not run, nor a last <EOI>


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1.0), dict(temperature=math.inf), dict(temperature=math.nan), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(max_batch=0),
    dict(sampler="euler"), dict(eta=2.0), dict(eta=math.nan), dict(steps=0), dict(guidance_scale=math.nan), dict(guidance_scale=math.inf), dict(max_tokens=-1),
    dict(max_images=-1), dict(max_images=0), dict(seeds=[]), dict(seeds=[1, 2]),
    dict(seeds=[1.5]), dict(seeds=["1"]), dict(seeds=[None]), dict(seeds=3), dict(seeds=[torch.tensor(0.5)]),
], ids=str)  # fmt: skip
def test_options_out_of_range_are_refused(talker, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "steps" not in wrong else "between 1 and 1000"):
        generate(tiny_trained(talker), [["a"]], **wrong)


@pytest.mark.parametrize("documents, message", [
    ("a red dot", "lists of strings and PIL images in a list"), (["a red dot"], "lists of strings"), ([("a red dot",)], "lists of strings"), (None, "lists of strings"),
    ([[np.zeros((8, 8, 3), np.uint8), "make it blue"]], "here has a ndarray; of an array, Image.fromarray"), ([[None]], "here has a NoneType"),
    ([[Image.new("RGB", (0, 8))]], "an image has no pixels"),
], ids=str)  # fmt: skip
def test_documents_of_another_kind_are_refused(talker, documents, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_trained(talker), documents)


def test_a_character_is_reported_whole():
    said = []
    options = SimpleNamespace(on_text=lambda number, piece: said.append(piece))
    stand_in = SimpleNamespace(tokenizer=T, options=options)
    sequence = engine.Sequence(0, [], None, 0.0, 0, 0, 0, None)
    for token in "né".encode():
        sequence.new.append(token)
        engine.Engine.say(stand_in, sequence)
    sequence.new.append(0xFF)
    engine.Engine.say(stand_in, sequence, everything=True)
    assert said == ["n", "é", "\ufffd"]


def test_text_is_reported_as_it_is_sampled(talker):
    heard = {0: "", 1: ""}
    found = generate(tiny_trained(talker), [[], [image(1)]], [1, 2], draw=False, temperature=1.0, max_tokens=10, max_images=0,
                     on_text=lambda row, text: heard.__setitem__(row, heard[row] + text))  # fmt: skip
    assert ["".join(part for part in document if isinstance(part, str)) for document in found] == list(heard.values()) and all(heard.values())


def test_nothing_asked_nothing_done(talker):
    assert generate(tiny_trained(talker), []) == []


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_empty_prompt_is_refused(talker, prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(tiny_trained(talker), [[prompt]])


def test_overlong_prompt_is_refused_and_the_longest_is_not(talker):
    trained, room = tiny_trained(talker), 160 - 1 - 16 - 2  # of seq_len: <BOS>, the patches, <BOI> and <EOI>
    assert len(generate(trained, [["a" * room]], max_tokens=0)[0]) == 2
    with pytest.raises(ValueError, match="160"):
        generate(trained, [["a" * (room + 1)]], max_tokens=0)


# ---- The whole thing, once ------------------------------------------------------------------------------------------


def test_one_document_overfits_in_both_directions():
    """A tiny model that has seen one pair draws that picture from the caption, and writes that caption from the picture."""
    caption, shown = "a red circle above", picture(7)
    model, ddpm = tiny_model(dim=64, qk_norm=True).train(), DDPM(prediction="v")
    documents = [[T.encode(caption), shown], [shown, T.encode(caption)]]
    batch = collate([[document] for document in documents * 4], T, 64, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(0)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 250)
        t, eps = ddpm.draw_timesteps(batch.max_t, draw), torch.randn(batch.images.shape, generator=draw)
        lm, per_image = losses(model, ddpm, batch, batch.images, t, eps)
        optimizer.zero_grad()
        (lm.sum() / (batch.targets >= 0).sum() + 5 * per_image.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    trained = tiny_trained(model.eval(), steps=25, sampler="ddim")
    target = Image.fromarray(shown.load())
    drawn = generate(trained, [[caption]], max_tokens=0)[0][1]
    assert np.abs(np.array(drawn, float) - np.array(target, float)).mean() < 10  # of 255; a random picture is 85 away
    assert generate(trained, [[target]], max_images=0, max_tokens=40)[0][1:] == [caption]


# ---- What people see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, shape", [(1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (4, (2, 2)), (5, (3, 2)), (8, (4, 2)), (12, (4, 3))])
def test_contact_sheet_leaves_few_places_empty(n, shape):
    sheet = contact_sheet([Image.new("RGB", (32, 32))] * n, ["a"] * n)
    assert ((sheet.width - 10) // 138, (sheet.height - 10) // (128 + 6 + 15 + 10)) == shape


@pytest.mark.parametrize("n, columns", [(1, None), (5, None), (12, 6), (7, 3)])
def test_contact_sheet_shows_every_picture(n, columns):
    """Each picture's own colour is on the sheet, once."""
    colours = [(20 * i, 255 - 20 * i, 77) for i in range(n)]
    captions = ["a word " * (i + 1) for i in range(n)]
    sheet = np.array(contact_sheet([Image.new("RGB", (32, 32), c) for c in colours], captions, columns=columns))
    for colour in colours:
        found = (sheet == colour).all(-1)
        assert found.sum() == 128 * 128
    if columns:
        assert sheet.shape[1] == 10 + columns * 138


def test_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest_checkpoint().parts[-2:] == ("assets", "small.safetensors") and newest_checkpoint().is_absolute()
    for n, name in enumerate(["b", "a", "c"]):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "checkpoint.pt").touch()
        os.utime(tmp_path / "out" / name / "checkpoint.pt", (n % 2, n % 2))
    assert newest_checkpoint().parent.name == "a"


def test_page_holds_everything_in_order():
    one, two = image(1), image(2)
    page = html_page([["a <b> & c", one, "then", two], [two]], [1, 0])
    assert "a &lt;b&gt; &amp; c" in page and "<b>" not in page and "http" not in page and "src=" in page
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert [np.array(i).tolist() for i in shown] == [np.array(i).tolist() for i in (one, two, two)]
    kinds = re.findall(r'<(p|img) class="(\w+)"|<(/article)>', page)
    assert [a + b + c for a, b, c in kinds] == ["pgiven", "imgnew", "pnew", "imgnew", "/article", "imgnew", "/article"]


@pytest.fixture(scope="module")
def checkpoint(talker, tmp_path_factory):
    """The talker in a checkpoint of its own, with a VAE of random weights."""
    vae = VAE(VAEConfig(channels=8, channel_multiples=(1,), n_res=0, unshuffle=1, latent_channels=3, mid_attention=False))
    trained = tiny_trained(talker, seq_len=100)
    trained.data.image_size = SIDE * vae.config.factor
    path = tmp_path_factory.mktemp("out") / "checkpoint.pt"
    parts = dict(model=talker.config, data=trained.data, diffusion=trained.ddpm.config, sampling=trained.sampling, extra=trained.extra)
    config = {name: asdict(part) for name, part in parts.items()}
    save_checkpoint(path, {"config": config, "ema": talker.state_dict(), "tokenizer": {}, "vae": vae.state_dict(), "vae_config": asdict(vae.config)})
    return path


def run_sample(checkpoint, out, *args):
    code, printed, err = run_here("sample.py", "--ckpt", checkpoint, "--out", out, *args)
    assert code == 0, err
    return printed, sorted(p.name for p in out.iterdir()) if out.exists() else []


def test_prompts_from_a_file_and_from_the_line_become_pictures(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dot\n\n  two dots: été 東\n", encoding="utf-8")
    printed, files = run_sample(checkpoint, tmp_path / "a", "--prompts", tmp_path / "prompts.txt", "--prompt", "no dot", "--num", 1, "--seed", 5, "--sampler", "dpm++",
                                "--steps", 4, "--guidance_scale", 2)  # fmt: skip
    assert files == ["000.png", "001.png", "002.png", "sheet.png"]
    notes = Image.open(tmp_path / "a" / "002.png").info
    assert notes["prompt"] == notes["text"] == "two dots: été 東" and str(checkpoint) in notes["settings"]
    for word in ("seed 5", "sampler dpm++", "steps 4", "guidance_scale 2.0", "temperature 0.0", "max_tokens 0", "max_images 1", "free False"):
        assert word in notes["settings"]
    run_sample(checkpoint, tmp_path / "b", "--prompt", "two dots: été 東", "--num", 1, "--seed", 5, "--sampler", "dpm++", "--steps", 4, "--guidance_scale", 2)
    a, b = (np.array(Image.open(tmp_path / f), int) for f in ("a/002.png", "b/000.png"))
    assert abs(a - b).max() <= 1  # what stands in the notes draws it again


def test_an_instruction_after_a_picture(checkpoint, tmp_path, monkeypatch):
    """The document is <BOI> picture <EOI> instruction <BOI>, and a picture follows."""
    image(3).save(tmp_path / "x.png")
    seen, original = [], Tokenizer.encode
    monkeypatch.setattr(engine, "collate", lambda rows, *args: seen.append(rows) or collate(rows, *args))
    printed, files = run_sample(checkpoint, tmp_path / "out", "--image", tmp_path / "x.png", "--prompt", "make it blue", "--num", 1)
    assert files == ["000.png", "page.html"] and (tmp_path / "out/page.html").read_text().count("<img") == 2
    assert "image x.png" in Image.open(tmp_path / "out/000.png").info["settings"]
    (prompt,) = seen[0][0]
    assert [type(part).__name__ for part in prompt] == ["ImageSegment", "list", "list"] and prompt[1:] == [original(T, "make it blue"), [T.boi]]


def test_left_alone_it_shows_something(checkpoint, tmp_path):
    """Texts and pictures as the model likes, on a sheet, a page and a film; the same again with the same seed."""
    found = [run_sample(checkpoint, tmp_path / name, "--max_images", 2, "--seed", 1, "--top_p", 0.95, "--top_k", 50, "--gif") for name in "ab"]
    printed, files = found[0]
    assert {"sheet.png", "page.html", "film.gif", "000.png"} < set(files) and files == found[1][1]
    assert (tmp_path / "a/page.html").read_text() == (tmp_path / "b/page.html").read_text() and printed.replace("/a/", "/b/") == found[1][0]
    with Image.open(tmp_path / "a/film.gif") as film, Image.open(tmp_path / "a/sheet.png") as sheet:
        assert film.n_frames == 4 and film.size == sheet.size  # noise, and three steps


def test_the_notes_tell_the_prompt_from_what_the_model_wrote(checkpoint, tmp_path):
    run_sample(checkpoint, tmp_path, "--max_images", 1, "--seed", 1)
    notes = [Image.open(path).info for path in tmp_path.glob("0*.png")]
    assert all(found["prompt"] == "" and "temperature 1.0" in found["settings"] for found in notes) and any(re.match("[a-h]", found["text"]) for found in notes)


def test_what_an_earlier_run_left_is_named(checkpoint, tmp_path):
    (tmp_path / "001.jpg").touch()
    assert "earlier run" not in run_sample(checkpoint, tmp_path, "--prompt", "a dot", "--num", 2)[0]
    printed, files = run_sample(checkpoint, tmp_path, "--prompt", "a cat", "--num", 1)
    assert "still has 2 files of an earlier run: 001.png, sheet.png\n" in printed and files == ["000.png", "001.jpg", "001.png", "sheet.png"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(checkpoint, tmp_path, place, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("extras.runs.load_checkpoint", lambda *_: 1 / 0)
    for script, option, path in (("sample.py", "--out", place), ("evaluate.py", "--json", f"{place}/x.json")):
        code, _, err = run_here(script, *(["--ckpt"] * (script == "sample.py")), checkpoint, option, path)
        assert code == 1 and re.fullmatch(f"error: {option}.*: {place} (is not a folder|cannot be written to \\(.*\\))\n", err), err


def test_text_streams(checkpoint, tmp_path):
    """A prompt that the model goes on with freely, without pictures."""
    printed, files = run_sample(checkpoint, tmp_path / "out", "--prompt", "abc", "--free", "--num", 1, "--max_images", 0, "--max_tokens", 6, "--temperature", 1)
    assert re.fullmatch(r"0: abc [a-h]{1,6}\n", printed) and not files


def test_a_film_of_nothing_is_not_promised(checkpoint, tmp_path):
    image(3).save(tmp_path / "x.png")
    printed, files = run_sample(checkpoint, tmp_path / "out", "--image", tmp_path / "x.png", "--max_tokens", 2, "--gif")
    assert printed.endswith("no film.gif: nothing was drawn\n") and not files


@pytest.mark.parametrize("content, message", [(None, "no such file"), (b"\n \n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")])
def test_bad_prompt_files(checkpoint, tmp_path, content, message):
    if content:
        (tmp_path / "prompts.txt").write_bytes(content)
    code, _, err = run_here("sample.py", "--ckpt", checkpoint, "--prompts", tmp_path / "prompts.txt")
    assert code == 1 and "prompts.txt: " in err and message in err and len(err.splitlines()) == 1


def test_an_image_of_nan_is_not_a_black_one():
    from extras.engine import to_pil
    with pytest.raises(FloatingPointError, match="came out as NaN"):
        to_pil(torch.full((3, 2, 2), torch.nan))
    assert to_pil(torch.full((3, 2, 2), -1.0)).getpixel((0, 0)) == (0, 0, 0)


def test_a_token_of_nan_is_not_the_first_one():
    from extras.engine import pick_tokens
    with pytest.raises(FloatingPointError, match="came out as NaN"):
        pick_tokens(torch.full((1, 5), torch.nan), torch.zeros(1), torch.zeros(1))
