"""evaluate.py: the judge reads what was drawn, rejects what was not, and the scores are what they say."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_trained
from PIL import Image

import evaluate as evaluate_module
from data import BACKGROUNDS, COLOURS, GRAMMARS, PLACES, RELATIONS, Scenes, Tokenizer
from evaluate import ASPECTS, components, evaluate, format_scores, judge, parse_caption, perplexity, prompt_accuracy, read_scene

SIZES = [("places", 32), ("relations", 32), ("rich", 64), ("rich", 256)]
SPLITS = Scenes.SPLITS[1:]
RIGHT = dict.fromkeys(ASPECTS, True)


def scenes(grammar, image_size, n, split="seen", keep=lambda scene: True):
    """The first n scenes that pass `keep`."""
    source = Scenes(grammar, image_size, split)
    return list(itertools.islice(filter(keep, map(source.example, itertools.count())), n))


def expect(caption, picture, grammar, **wrong):
    """The judge finds everything right but the named aspects."""
    verdict = judge(caption, picture.render(), grammar)
    assert verdict == RIGHT | wrong, (caption, picture.caption, verdict)


# ---- What is right is accepted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("grammar, image_size", SIZES)
def test_every_rendered_picture_is_read(grammar, image_size, split):
    for scene in scenes(grammar, image_size, 100 if split == "seen" else 50, split):
        expect(scene.caption, scene, grammar)


def test_pictures_are_read_through_a_little_noise_and_blur():
    """As a VAE may leave them."""
    rng = np.random.default_rng(0)
    for scene in scenes("places", 32, 50):
        noisy = np.clip(scene.render() + rng.normal(0, 8, (32, 32, 3)), 0, 255).astype(np.uint8)
        assert judge(scene.caption, noisy, "places") == RIGHT


@pytest.mark.parametrize("grammar, image_size", SIZES)
def test_the_other_wording_is_as_good(grammar, image_size):
    """The objects in any order; a relation told from the other side."""
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for scene in scenes(grammar, image_size, 50, keep=lambda s: len(s.shapes) > 1):
        reversed_wording = replace(scene, shapes=scene.shapes[::-1], relation=opposite.get(scene.relation, ""))
        assert reversed_wording.caption != scene.caption or scene.shapes[0] == scene.shapes[1]
        expect(reversed_wording.caption, scene, grammar)


# ---- What is wrong is rejected, in the aspect that is wrong ---------------------------------------------------------


def two_places(n, **options):
    """Pictures of two objects that share neither colour nor shape, each at its place."""
    return scenes("places", 32, n, keep=lambda s: len({x.colour for x in s.shapes}) == len({x.kind for x in s.shapes}) == 2, **options)


def with_first(scene, **change):
    return replace(scene, shapes=(replace(scene.shapes[0], **change), *scene.shapes[1:]))


@pytest.mark.parametrize("grammar, image_size", SIZES)
def test_another_colour_is_rejected(grammar, image_size):
    for n, scene in enumerate(scenes(grammar, image_size, 40)):
        colour = [c for c in COLOURS if c != scene.shapes[0].colour][n % (len(COLOURS) - 1)]
        expect(with_first(scene, colour=colour).caption, scene, grammar, all=False, colours=False)


@pytest.mark.parametrize("grammar, image_size", SIZES)
def test_another_shape_is_rejected(grammar, image_size):
    for n, scene in enumerate(scenes(grammar, image_size, 40)):
        kinds = [k for k in GRAMMARS[grammar][0] if k != scene.shapes[0].kind]
        expect(with_first(scene, kind=kinds[n % len(kinds)]).caption, scene, grammar, all=False, shapes=False)


@pytest.mark.parametrize("image_size", [64, 256])
def test_another_size_is_rejected(image_size):
    for scene in scenes("rich", image_size, 40):
        other = "large" if scene.shapes[0].size == "small" else "small"
        expect(with_first(scene, size=other).caption, scene, "rich", all=False, shapes=False)


@pytest.mark.parametrize("image_size", [64, 256])
def test_another_background_is_rejected(image_size):
    for scene in scenes("rich", image_size, 40):
        other = next(name for name in BACKGROUNDS if name != scene.background)
        expect(replace(scene, background=other).caption, scene, "rich", all=False, relation=False)


@pytest.mark.parametrize("grammar, image_size", [("places", 32), ("rich", 64)])
def test_another_place_is_rejected(grammar, image_size):
    for n, scene in enumerate(scenes(grammar, image_size, 40, keep=lambda s: not s.relation)):
        free = [place for place in PLACES[GRAMMARS[grammar][2]] if place not in {x.place for x in scene.shapes}]
        expect(with_first(scene, place=free[n % len(free)]).caption, scene, grammar, all=False, relation=False)


@pytest.mark.parametrize("grammar, image_size", [("relations", 32), ("rich", 64)])
def test_every_other_relation_is_rejected(grammar, image_size):
    unlike = lambda s: s.relation and (s.shapes[0].colour, s.shapes[0].kind, s.shapes[0].size) != (s.shapes[1].colour, s.shapes[1].kind, s.shapes[1].size)
    for scene in scenes(grammar, image_size, 30, keep=unlike):
        for relation in RELATIONS:
            wrong = dict(all=False, relation=False) if relation != scene.relation else {}
            expect(replace(scene, relation=relation).caption, scene, grammar, **wrong)


def test_another_number_is_rejected():
    """One object fewer in the picture, or in the caption: nothing else is then compared."""
    nothing = dict.fromkeys(ASPECTS, False)
    for scene in two_places(40):
        fewer = replace(scene, shapes=scene.shapes[:1])
        expect(scene.caption, fewer, "places", **nothing)
        expect(fewer.caption, scene, "places", **nothing)


@pytest.mark.parametrize("attribute, kept", [("colour", "relation"), ("kind", "relation"), ("place", "colours")])
def test_swapped_attributes_are_rejected_as_binding_alone(attribute, kept):
    """The right colours, the right shapes and the right places, but not on the right objects."""
    for scene in two_places(40):
        a, b = scene.shapes
        swapped = replace(scene, shapes=(replace(a, **{attribute: getattr(b, attribute)}), replace(b, **{attribute: getattr(a, attribute)})))
        verdict = judge(swapped.caption, scene.render(), "places")
        assert not verdict["all"] and verdict["number"] and verdict["colours"] and verdict["shapes"] and verdict[kept]


@pytest.mark.parametrize("attribute", ["colour", "kind"])
def test_swapped_attributes_across_a_relation_are_rejected(attribute):
    """Where models go wrong: `a red circle above a blue square` drawn as a blue circle above a red square."""
    unlike = lambda s: all(getattr(s.shapes[0], name) != getattr(s.shapes[1], name) for name in ("colour", "kind"))
    for scene in scenes("relations", 32, 40, keep=unlike):
        a, b = scene.shapes
        swapped = replace(scene, shapes=(replace(a, **{attribute: getattr(b, attribute)}), replace(b, **{attribute: getattr(a, attribute)})))
        verdict = judge(swapped.caption, scene.render(), "relations")
        assert not verdict["all"] and verdict["number"] and verdict["colours"] and verdict["shapes"]


@pytest.mark.parametrize("grammar, image_size", SIZES)
@pytest.mark.parametrize("kind", ["noise", "grey", "white", "smear"])
def test_what_is_no_scene_is_rejected(kind, grammar, image_size):
    rng = np.random.default_rng(0)
    shape = image_size, image_size, 3
    ramp = np.linspace(0, 255, image_size).astype(np.uint8)
    pixels = {"noise": rng.integers(0, 256, shape, np.uint8), "grey": np.full(shape, 128, np.uint8), "white": np.full(shape, 246, np.uint8),
              "smear": np.broadcast_to(ramp[:, None, None], shape).copy()}[kind]  # fmt: skip
    for scene in scenes(grammar, image_size, 5):
        assert not judge(scene.caption, pixels, grammar)["all"]


def test_a_shapeless_blob_is_no_shape_and_an_odd_colour_no_colour():
    pixels = np.full((32, 32, 3), 246, np.uint8)
    pixels[4:14, 4:6], pixels[12:14, 4:14] = COLOURS["red"], COLOURS["red"]  # an L
    _, (blob,) = read_scene(pixels, GRAMMARS["places"][0])
    assert (blob.colour, blob.kind) == ("red", "?")
    scene = scenes("places", 32, 1)[0]
    brown = np.where((scene.render() == 246).all(-1, keepdims=True), scene.render(), np.uint8([90, 60, 30]))
    assert {blob.colour for blob in read_scene(brown, GRAMMARS["places"][0])[1]} <= {"?"}


def test_components():
    mask = np.array([[c == "#" for c in row] for row in ("##..#", "#.#.#", "#.###", ".#...")])
    found = components(mask)
    assert sorted(part.sum() for part in found) == [1, 4, 6]
    assert np.array_equal(sum(part.astype(int) for part in found), mask)
    assert components(np.zeros((3, 3), bool)) == []


# ---- Captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", Scenes.SPLITS)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_every_caption_is_parsed(grammar, split):
    for scene in scenes(grammar, 64, 100, split):
        claims = parse_caption(scene.caption, grammar)
        assert claims.objects == [(s.size, s.colour, s.kind, s.place) for s in scene.shapes]
        assert claims.relation == scene.relation and claims.background == (scene.background if scene.tell_background else "")


@pytest.mark.parametrize("grammar, text", [
    ("places", "a red circle at the top left and a blue square at the bottom right"), ("relations", "a red circle left of a blue square"),
    ("rich", "a small red ring above a large blue diamond on a pink background"),
    ("rich", "a small red ring at the top, a large blue square at the centre and a small cyan circle at the left on a black background"),
])  # fmt: skip
def test_a_space_around_a_caption_does_not_matter(grammar, text):
    assert parse_caption(text, grammar) is not None
    assert parse_caption(f" {text} ", grammar) == parse_caption(text, grammar)


@pytest.mark.parametrize("grammar, text", [
    *(("places", text) for text in (
        "", " ", "red", "a red circle", "a mauve circle at the top left", "a red circle at the middle", "a red ring at the top left",
        "the red circle at the top left", "a red circle at the top left and", "and a red circle at the top left",
        "a red circle at the top left and a blue square", "a red circle at the top left a blue square at the bottom right",
        "a red circle at the top left\na blue square at the top right", "A RED CIRCLE AT THE TOP LEFT",
        "a small red circle at the top left", "a red circle at the top left on a white background", "a red circle at the top left.")),
    *(("relations", text) for text in (
        "", "a red circle", "a red circle and a blue square", "a red circle above", "a red circle beside a blue square",
        "a red circle above a blue square above a red circle", "a red circle at the top left", "above a red circle a blue square")),
    *(("rich", text) for text in (
        "a small red circle at the top", "a red circle at the top on a white background", "a small red circle above a large blue ring on a green background",
        "a small red circle at the top above a large blue ring on a white background", "a small red circle on a white background")),
])  # fmt: skip
def test_what_is_no_caption_is_rejected(grammar, text):
    assert parse_caption(text, grammar) is None
    verdict = judge(text, scenes(grammar, 64, 1)[0].render(), grammar)
    assert not any(verdict.values())


# ---- Scores ---------------------------------------------------------------------------------------------------------


def flat_model(tokenizer):
    """A model to which every token is as likely."""
    model = tiny_model(side=32, patch_size=8, vocab_size=tokenizer.vocab_size)
    torch.nn.init.zeros_(model.head.weight)
    return model


def test_perplexity_of_knowing_nothing():
    """Per token the size of the vocabulary; per byte, less where a token stands for several bytes."""
    captions = [Scenes().example(i).caption for i in range(150)]
    for tokenizer in (Tokenizer(), Tokenizer.learn(captions, 100)):
        per_token, per_byte = perplexity(tiny_trained(flat_model(tokenizer), tokenizer), captions)
        assert per_token == pytest.approx(tokenizer.vocab_size, rel=1e-4)
        tokens, text = sum(len(tokenizer.encode(c)) for c in captions), sum(len(c.encode()) for c in captions)
        assert per_byte == pytest.approx(tokenizer.vocab_size ** (tokens / text), rel=1e-4)


def test_perplexity_does_not_depend_on_what_stands_beside():
    """Captions are padded to the longest of their batch; that must not show."""
    trained = tiny_trained(tiny_model(scale=8.0, side=32, patch_size=8))
    texts = ["abc", "a much longer caption than the other"]
    log = [math.log(perplexity(trained, [text])[1]) * len(text) for text in texts]
    assert math.log(perplexity(trained, texts)[1]) * sum(map(len, texts)) == pytest.approx(sum(log), rel=1e-4)


def truth(pairs, wrong=0):
    """A generate that knows the right answer, and gives the previous one's for the first `wrong` documents."""

    def generate(trained, documents, *_, **__):
        answers = {caption: (caption, load()) for caption, load in pairs} | {load().tobytes(): (caption, load()) for caption, load in pairs}
        known = [answers[d[0] if isinstance(d[0], str) else np.array(d[0]).tobytes()] for d in documents]
        known[:wrong] = [known[n - 1] for n in range(wrong)]
        return [[*d, Image.fromarray(picture) if isinstance(d[0], str) else caption] for d, (caption, picture) in zip(documents, known)]

    return generate


@pytest.mark.parametrize("wrong", [0, 5])
def test_accuracies_count_what_is_right(wrong, monkeypatch):
    """Of a model that is right but for `wrong` of 20 answers, in both directions and on every split."""
    pairs = [Scenes(split=split, seed=1).pair(i) for split in SPLITS for i in range(20)]
    monkeypatch.setattr(evaluate_module, "generate", truth(pairs, wrong))
    scores = evaluate(tiny_trained(flat_model(Tokenizer())), judged=20)
    assert list(scores["splits"]) == list(SPLITS) and scores["judged"] == 20
    for found in scores["splits"].values():
        assert found["n"] == 20 and found["prompts"]["all"] == found["captions"]["all"] == (20 - wrong) / 20
        assert list(found["prompts"]) == list(ASPECTS)
    table = format_scores(scores)
    assert f"{100 * (20 - wrong) / 20:.1f}" in table and all(split.replace("_", " ") + ", prompts" in table for split in SPLITS)


def test_prompt_accuracy_returns_its_pictures(monkeypatch):
    pairs = [Scenes().pair(i) for i in range(7)]
    monkeypatch.setattr(evaluate_module, "generate", truth(pairs))
    found, pictures = prompt_accuracy(tiny_trained(flat_model(Tokenizer())), [caption for caption, _ in pairs], "places")
    assert found == dict.fromkeys(ASPECTS, 1.0) and np.array_equal(pictures[3], pairs[3][1]())


def test_an_untrained_model_scores_nothing():
    scores = evaluate(tiny_trained(flat_model(Tokenizer()), steps=1), judged=3)
    assert all(found[what]["all"] == 0 for found in scores["splits"].values() for what in ("prompts", "captions"))
