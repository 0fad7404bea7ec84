"""evaluate.py: the judge reads what was drawn, rejects what was not, and the scores are what they say."""

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FIXTURES, frechet_features, run_here, tiny_model, tiny_trained
from PIL import Image

import evaluate as evaluate_module
import extras
from data import Tokenizer
from evaluate import draw_images, evaluate, perplexity
from extras.judge import ASPECTS, components, exact, judge, parse_caption, read_scene
from extras.metrics import cider, clip_metric, frechet_distance, inception_features, latent_features, words
from extras.pairs import Pairs
from extras.scenes import BACKGROUNDS, COLOURS, GRAMMARS, PLACES, RELATIONS, Scenes
from extras.scores import format_scores
from extras.text import read_texts
from extras.tokenizers import BPETokenizer

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
        kinds = [k for k in GRAMMARS[grammar].kinds if k != scene.shapes[0].kind]
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
        free = [place for place in PLACES[GRAMMARS[grammar].cells] if place not in {x.place for x in scene.shapes}]
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
    _, (blob,) = read_scene(pixels, "places")
    assert (blob.colour, blob.kind) == ("red", "?")
    scene = scenes("places", 32, 1)[0]
    brown = np.where((scene.render() == 246).all(-1, keepdims=True), scene.render(), np.uint8([90, 60, 30]))
    assert {blob.colour for blob in read_scene(brown, "places")[1]} <= {"?"}


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
    for tokenizer in (Tokenizer(), BPETokenizer.learn(captions, 100)):
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
def test_accuracies_count_what_is_right(wrong):
    """Of a model that is right but for `wrong` of 20 answers, in both directions and on every split."""
    pairs = [Scenes(split=split, seed=1).pair(i) for split in SPLITS for i in range(20)]
    scores = evaluate(tiny_trained(flat_model(Tokenizer())), judged=20, generate=truth(pairs, wrong))
    assert list(scores["splits"]) == list(SPLITS) and scores["judged"] == 20
    for found in scores["splits"].values():
        assert found["n"] == 20 and found["prompts"]["all"] == found["captions"]["all"] == (20 - wrong) / 20
        assert list(found["prompts"]) == list(ASPECTS)
    table = format_scores(scores)
    assert f"{100 * (20 - wrong) / 20:.1f}" in table and all(split.replace("_", " ") + ", prompts" in table for split in SPLITS)


def test_prompts_are_judged_by_the_pictures_drawn():
    pairs = [Scenes().pair(i) for i in range(7)]
    captions = [caption for caption, _ in pairs]
    pictures = draw_images(tiny_trained(flat_model(Tokenizer())), captions, generate=truth(pairs))
    found = exact("places")(pictures, pictures, captions, [[caption] for caption in captions])["prompts"]
    assert found == dict.fromkeys(ASPECTS, 1.0) and np.array_equal(pictures[3], pairs[3][1]())


def test_an_untrained_model_scores_nothing():
    scores = evaluate(tiny_trained(flat_model(Tokenizer()), steps=1), judged=3)
    assert all(found[what]["all"] == 0 for found in scores["splits"].values() for what in ("prompts", "captions"))


# ---- Scores on real data --------------------------------------------------------------------------------------------

METRICS = json.loads((FIXTURES / "metrics.json").read_text())  # made by make_fixtures.py


def test_cider_equals_coco_captions():
    """One caption after the other, on words that both were given; one of them is empty."""
    candidates, references = [text.split() for text in METRICS["candidates"]], [[text.split() for text in texts] for texts in METRICS["references"]]
    assert cider(candidates, references) == pytest.approx(METRICS["cider"], abs=1e-6) and METRICS["cider"] > 1
    for n, expected in enumerate(METRICS["each"]):  # the mean of all with this one changed to nothing tells its share
        alone = [caption if m == n else [] for m, caption in enumerate(candidates)]
        assert cider(alone, references) == pytest.approx(expected / len(candidates), abs=1e-6)


def test_cider_knows_the_best_and_the_worst():
    references = [[words(text)] for text in ("a dog runs over the green grass", "two cats sleep on a bed", "the man's red hat falls down")]
    assert cider([r[0] for r in references], references) == pytest.approx(10)
    assert cider([["nothing"], ["of"], ["these"]], references) == 0


def test_words_are_lower_case_without_punctuation():
    assert words("A man's dog, running -- fast!") == ["a", "man", "'s", "dog", "running", "fast"]
    assert words("I'm sure they don't wear dogs' t-shirts") == ["i", "'m", "sure", "they", "do", "n't", "wear", "dogs", "t-shirts"]
    assert words("3.5 'old' ones, 1,000 — the man’s.") == ["3.5", "old", "ones", "1,000", "the", "man", "'s"]
    assert words("Zwei Stühle; 3 cats") == ["zwei", "stühle", "3", "cats"] and words("...") == []


@pytest.mark.parametrize("n, dim, shift, by_torchmetrics, by_scipy", METRICS["frechet"])
def test_frechet_distance_equals_torchmetrics_and_scipy(n, dim, shift, by_torchmetrics, by_scipy):
    assert frechet_distance(*frechet_features(n, dim, shift)) == pytest.approx(by_torchmetrics, rel=1e-6)
    assert by_torchmetrics == pytest.approx(by_scipy, rel=1e-6) and by_scipy > 1


def test_frechet_distance_of_like_and_of_few():
    a, _ = frechet_features(100, 5, 0.0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 5)  # equal covariances: the means' distance alone
    assert frechet_distance(a[:1], a[:1] + 1) == pytest.approx(5)  # one picture has no covariance


def test_latent_features_tell_pictures_apart():
    """Those of other scenes are near, those of noise far."""
    vae, rng = tiny_trained(tiny_model()).vae, np.random.default_rng(0)
    scenes, others = ([Scenes(seed=seed).example(i).render() for i in range(200)] for seed in (0, 1))
    noise = list(rng.integers(0, 256, (200, 32, 32, 3), np.uint8))
    features = [latent_features(vae, pictures) for pictures in (scenes, others, noise)]
    assert features[0].shape == (200, 48)
    assert 10 * frechet_distance(features[0], features[1]) < frechet_distance(features[0], features[2])


def own_data(folder, n=30):
    """A folder of scenes with captions."""
    folder.mkdir()
    for i in range(n):
        scene = Scenes().example(i)
        Image.fromarray(scene.render()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder


def of_folder(folder):
    """The tiny model, as if trained on that folder."""
    trained = tiny_trained(flat_model(Tokenizer()), steps=1, data=str(folder))
    return replace(trained, data=replace(trained.data, max_broken=0.5))


@pytest.mark.parametrize("wrong", [0, 5])
def test_real_data_is_scored_by_cider_and_the_distance_of_latents(wrong, tmp_path, monkeypatch):
    """Of a model that is right, or `wrong` times gives another's answer."""
    trained = of_folder(own_data(tmp_path / "data", 100))
    pairs = [extras.open_pairs(trained, split, 1).pair(i) for split in Pairs.SPLITS[1:] for i in range(5)]
    scores = evaluate(trained, judged=5, generate=truth(pairs, wrong))
    for found in scores["splits"].values():
        assert found["n"] == 5 and (found["captions"]["all"] == 1) == (not wrong)
        assert (found["cider"] > 9) == (not wrong) and found["latent_frechet_distance"] == pytest.approx(0, abs=1e-6)  # the same pictures, in another order
    table = format_scores(scores)
    assert "CIDEr-D" in table and "not FID" in table and "no FID: give --inception" in table and "no CLIP score: give --clip" in table
    monkeypatch.setattr(evaluate_module, "draw_images", lambda trained, captions, *_: [np.zeros((32, 32, 3), np.uint8)] * len(captions))
    assert all(found["latent_frechet_distance"] > 1 for found in evaluate(trained, judged=5, generate=truth(pairs, wrong))["splits"].values())


def test_scenes_are_asked_for_no_files():
    assert "--inception" not in format_scores(evaluate(tiny_trained(flat_model(Tokenizer()), steps=1), judged=1))


def test_long_texts_are_cut_to_the_rows(tmp_path):
    """Each piece has its own <BOS>; nothing is left out and nothing counted twice."""
    trained = tiny_trained(tiny_model(scale=8.0, side=32, patch_size=8), seq_len=21)
    text = "what is longer than a row of twenty-one tokens is cut into pieces of twenty. "
    cut = [text[i : i + 20] for i in range(0, len(text), 20)]
    assert perplexity(trained, [text]) == pytest.approx(perplexity(trained, cut))
    assert perplexity(trained, [text * 60])[0] == pytest.approx(perplexity(trained, [text * 60 + "!"])[0], rel=0.01)
    with pytest.raises(ValueError, match="no text"):
        perplexity(trained, ["", ""])


def test_texts_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert "".join(read_texts(tmp_path / "a.txt")) == "one\ntwo\n" and read_texts(tmp_path / "b.jsonl") == ["one", "two"]
    for name, content in (("empty.txt", b""), ("empty.jsonl", b'{"caption": "x"}\n'), ("latin.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_texts(tmp_path / name)
    with pytest.raises(ValueError, match="missing.txt: no such file"):
        read_texts(tmp_path / "missing.txt")


def test_script_says_at_once_that_a_text_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_here("evaluate.py", "--text", "none.txt")
    assert code == 1 and err == "error: none.txt: no such file\n"


def test_the_folder_of_the_scores_is_left_to_be_made_and_a_file_is_none(tmp_path):
    code, _, err = run_here("evaluate.py", tmp_path / "none.pt", "--json", tmp_path / "new" / "x.json")
    assert code == 1 and "none.pt: no such checkpoint" in err and not (tmp_path / "new").exists()
    code, _, err = run_here("evaluate.py", tmp_path / "none.pt", "--json", tmp_path)
    assert code == 1 and err == f"error: --json {tmp_path}: is a folder; name a file\n"


def test_ctrl_c_ends_it_quietly(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sample.load", stop)
    assert run_here("evaluate.py", "out/none") == (130, "", "")


# ---- Other people's networks ----------------------------------------------------------------------------------------


def clip_score(folder, pictures, captions):
    """That of pictures which were drawn from these captions."""
    return clip_metric(folder)(None, pictures, None, [[caption, "another"] for caption in captions])["clip_score"]


def test_without_the_packages_it_says_what_to_get(tmp_path, monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3", "transformers", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with pytest.raises(ValueError, match="--inception: no FID; give .*pip install torch-fidelity"):
        inception_features(tmp_path / "weights.pth")
    for config in ("config.json", "open_clip_config.json"):
        (tmp_path / config).write_text("{}")
        with pytest.raises(ValueError, match="no CLIP score .*pip install") as error:
            clip_metric(tmp_path)
        assert "\n" not in str(error.value)


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--clip .*there is no config.json"):
        clip_metric(tmp_path)


def test_inception_weights_that_are_none_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    with pytest.raises(ValueError, match="weights.pth: no such file; give --inception"):
        inception_features(tmp_path / "weights.pth")
    torch.save({"x": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth: is another network; give --inception"):
        inception_features(tmp_path / "weights.pth")


def test_inception_features_of_random_weights(tmp_path, monkeypatch):
    """Of pictures of any size, 2048 numbers each, the same whatever stands beside."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity")
    with monkeypatch.context() as patch:  # the package makes no network without weights
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(module.torch, "load", lambda *_, **__: None)
        network = module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    pictures = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(3)]
    features = inception_features(tmp_path / "weights.pth")
    found = features(pictures)
    assert found.shape == (3, 2048) and found.dtype == np.float64
    assert np.abs(found[2] - features(pictures[2:])[0]).max() < 0.01 * np.abs(found[2] - found[1]).max()


def test_clip_score_equals_transformers(tmp_path):
    """Of a tiny random CLIP."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {piece: n for n, piece in enumerate([*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=54, max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text | small, vision_config=dict(image_size=32, patch_size=16) | small, projection_dim=8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    model.save_pretrained(tmp_path)
    pictures_as_they_are = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pictures_as_they_are, tokenizer).save_pretrained(tmp_path)
    pictures = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(40)]
    captions = ["a red cat", "a dog that is far longer than sixteen tokens", "x", "blue"] * 10
    ids = torch.tensor([(tokenizer(c, padding="max_length", truncation=True, max_length=16))["input_ids"] for c in captions])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (pictures_as_they_are.image_mean, pictures_as_they_are.image_std))
    pixels = (torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255 - mean) / std
    with torch.no_grad():
        mask = torch.arange(16) < (ids == 53).int().argmax(1, keepdim=True) + 1
        cosines = (model(input_ids=ids, pixel_values=pixels, attention_mask=mask.long()).logits_per_image / model.logit_scale.exp()).diagonal()
    assert (cosines > 0).any() and (cosines < 0).any()
    assert clip_score(tmp_path, pictures, captions) == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=0.01)
    (tmp_path / "model.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match="--clip .*no CLIP score"):
        clip_metric(tmp_path)


def test_clip_score_equals_open_clip(tmp_path):
    """Likewise, of a folder as open_clip saves it."""
    open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch")
    config = dict(embed_dim=8, vision_cfg=dict(image_size=32, layers=1, width=64, patch_size=16), text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
    preprocess = dict(mean=[0.5] * 3, std=[0.25] * 3, interpolation="bicubic", resize_mode="shortest")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config, preprocess_cfg=preprocess)))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    model.visual.proj.data.neg_()  # with this seed, cosines above 0
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    pictures, captions = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(40)], ["a red cat", "two dogs", "x", "blue"] * 10
    with torch.no_grad():
        image = model.encode_image((torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255 - 0.5) / 0.25, normalize=True)
        cosines = (image * model.encode_text(open_clip.tokenize(captions), normalize=True)).sum(-1)
    assert cosines.std() > 0.01 and (cosines > 0).any()
    assert clip_score(tmp_path, pictures, captions) == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=0.01)
