"""Edits and stories: instructions mean what is drawn, documents say what is conditioning, scores can fail, and the scripts as a user runs them."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, divide, flags, run_here, tiny_model, tiny_trained
from PIL import Image

from data import NO_LOSS, DataConfig, ImageSegment, Tokenizer, collate
from evaluate import evaluate
from extras import Choices, open_pairs
from extras.judge import judge
from extras.runs import load_checkpoint
from extras.scenes import COLOURS, GRAMMARS, NEVER_SEEN, PLACES, Scenes, Shape, held_out_combination, split_of
from extras.scores import format_scores
from extras.show import captioned
from extras.stories import Stories, StoryDocuments, judge_change, own_story_accuracy, story_accuracy, tell
from train import losses, parse, set_up, train_step

SPLITS = Scenes.SPLITS[1:]
CHANGE_ASPECTS = ("all", "scene", "changed", "kept")
RIGHT = dict.fromkeys(CHANGE_ASPECTS, True)


def configured(**options):
    """Options as what opens sources takes them."""
    data, extra = divide(options, DataConfig, Choices)
    return SimpleNamespace(data=DataConfig(**data), extra=Choices(**extra))


def stories(n, **options):
    source = Stories(**options)
    return [source.example(i) for i in range(n)]


# ---- Instructions ---------------------------------------------------------------------------------------------------


def follow(scene, instruction, cells=2):
    """What a reader makes of an instruction -> the objects after it, as a Counter of (size, colour, kind, place). A second grammar, so that
    what writes instructions cannot agree with itself alone."""
    objects = [(s.size, s.colour, s.kind, s.place) for s in scene.shapes]
    name = r"(?:it|the(?: (?P<size>small|large))?(?: (?P<colour>%s))? (?P<kind>%s)(?: at the (?P<at>%s))?)" % tuple(
        "|".join(sorted(words, key=len, reverse=True)) for words in (COLOURS, GRAMMARS["rich"].kinds, PLACES[cells]))  # fmt: skip
    found = re.fullmatch(rf"(?:make {name} (?P<new>\w+))|(?:add a (?P<added>.+) at the (?P<place>.+))", instruction) or re.fullmatch(
        rf"remove {name}|move {name.replace('?P<', '?P<m')} to the (?P<to>.+)", instruction)  # fmt: skip
    said = {key: value for key, value in found.groupdict().items() if value}
    if "added" in said:
        *size, colour, kind = said["added"].split()
        return Counter([*objects, (" ".join(size), colour, kind, said["place"])])
    wanted = [said.get(key) or said.get("m" + key) for key in ("size", "colour", "kind", "at")]
    (meant,) = [o for o in objects if all(word in (None, part) for word, part in zip(wanted, o))]  # exactly one
    objects.remove(meant)
    size, colour, kind, place = meant
    if "new" in said:
        objects.append((size, said["new"], kind, place))
    if "to" in said:
        to = said["to"]
        if to not in PLACES[cells]:  # a side of the 2 x 2 grid
            vertical, horizontal = place.split()
            to = f"{to} {horizontal}" if to in ("top", "bottom") else f"{vertical} {to}"
        objects.append((size, colour, kind, to))
    return Counter(objects)


@pytest.mark.parametrize("split", Scenes.SPLITS)
@pytest.mark.parametrize("grammar, image_size, changes", [("places", 32, 1), ("places", 32, 2), ("rich", 64, 3)])
def test_instructions_mean_what_is_drawn(grammar, image_size, changes, split):
    """To a reader of words and to the judge of pictures alike; and nothing else changes."""
    for scenes, instructions in stories(100 if changes == 1 else 40, grammar=grammar, image_size=image_size, split=split, changes=changes):
        assert len(instructions) == len({text.split()[0] for text in instructions}) == changes == len(scenes) - 1
        for before, after, instruction in zip(scenes, scenes[1:], instructions):
            assert follow(before, instruction, GRAMMARS[grammar].cells) == Counter((s.size, s.colour, s.kind, s.place) for s in after.shapes)
            assert judge_change(before, after, before.render(), after.render(), grammar) == RIGHT
            assert judge(after.caption, after.render(), grammar)["all"]
            assert len(set(before.shapes) - set(after.shapes)) <= 1 and len(set(after.shapes) - set(before.shapes)) <= 1


@pytest.mark.parametrize("grammar, image_size", [("places", 32), ("rich", 64)])
def test_every_instruction_that_may_follow_is_known(grammar, image_size):
    """Those that stories are told with, and what they mean, are among them; to a reader, all mean what they are said to."""
    source = Stories(grammar, image_size, changes=2)
    for i in range(20):
        scenes, texts = source.example(i)
        for before, after, text in zip(scenes, scenes[1:], texts):
            found = source.following(before)[text]
            assert found.caption == after.caption and (text.startswith("add") or found == after)
            assert [s.width for s in found.shapes] == [s.width for s in after.shapes]
    for text, after in source.following(before).items():
        assert follow(before, text, GRAMMARS[grammar].cells) == Counter((s.size, s.colour, s.kind, s.place) for s in after.shapes)
    text, after = next((text, after) for text, after in source.following(scenes[-1]).items() if text.startswith("move"))
    assert judge_change(scenes[-1], after, scenes[-1].render(), after.render(), grammar) == RIGHT


def test_a_move_is_by_whole_places():
    for (before, after), (instruction,) in stories(300):
        if instruction.startswith("move"):
            (a,), (b,) = set(before.shapes) - set(after.shapes), set(after.shapes) - set(before.shapes)
            assert {round(abs(a.x - b.x), 6), round(abs(a.y - b.y), 6)} <= {0, 0.5} and a.place != b.place


@pytest.mark.parametrize("changes", [1, 2])
def test_no_scene_of_training_is_held_out(changes):
    """Neither what goes in nor what comes out."""
    for split in Scenes.SPLITS:
        for scenes, _ in stories(150, split=split, changes=changes):
            objects = [[(s.colour, s.kind) for s in scene.shapes] for scene in scenes]
            never_seen = any(pair in NEVER_SEEN for pairs in objects for pair in pairs)
            held_out = any(held_out_combination(*two) for pairs in objects for two in itertools.combinations(pairs, 2))
            assert never_seen == (split == "never_seen") and (held_out == (split == "held_out") or never_seen)


@pytest.mark.parametrize("grammar, image_size, changes", [("places", 32, 1), ("places", 32, 2), ("rich", 64, 1)])
def test_what_is_drawn_last_is_of_the_split(grammar, image_size, changes):
    """An edit's output, whatever its input; and every kind of change that can lead there does."""
    for split in Scenes.SPLITS:
        found = stories(150, grammar=grammar, image_size=image_size, split=split, changes=changes)
        assert {split_of([(s.colour, s.kind) for s in scenes[-1].shapes]) for scenes, _ in found} == {"train" if split == "seen" else split}
        kinds = {text.split()[0] for _, texts in found for text in texts}
        assert kinds == {"make", "move", "add"} | ({"remove"} if split != "held_out" else set())


def test_training_has_8192_edits():
    source = Stories()
    assert len({(tuple(scenes), *texts) for scenes, texts in map(source.example, range(0, 8192, 4))}) == 2048
    assert source.example(8192 + 5) == source.example(5) != source.example(6)
    held_out = Stories(split="held_out")
    assert held_out.example(8192 + 5) != held_out.example(5)


def test_example_is_a_function_of_seed_split_and_index():
    assert stories(20, changes=2) == stories(20, changes=2) != stories(20, changes=2, seed=1)
    assert not any(a in stories(50, split="seen") for a in stories(50))


def test_every_kind_of_change_is_as_frequent():
    kinds = Counter(text.split()[0] for _, texts in stories(1000) for text in texts)
    assert set(kinds) == {"make", "move", "remove", "add"} and all(abs(n - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5 for n in kinds.values())


def test_pairs_of_stories_are_texts_and_the_pictures_after_them():
    """What the tokenizer and the VAE learn from, if they must."""
    source = Stories(changes=2)
    scenes, texts = source.example(3)
    found = [source.pair(9 + k) for k in range(3)]
    assert [text for text, _ in found] == [scenes[0].caption, *texts]
    assert all(np.array_equal(load(), scene.render()) for (_, load), scene in zip(found, scenes))


@pytest.mark.parametrize("wrong, message", [
    (dict(documents="novels"), "documents is 'novels'; it must be one of pairs, edits, stories"),
    (dict(documents="edits", grammar="relations"), "give --grammar places or rich"), (dict(documents="stories", data="folder"), "leave --data out"),
])  # fmt: skip
def test_impossible_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        parse(flags(config="small", **wrong))


# ---- Documents ------------------------------------------------------------------------------------------------------

T = Tokenizer()


def documents(kind, timesteps=1000, **options):
    config = configured(documents=kind, image_size=32, seq_len=256, **options)
    return StoryDocuments(open_pairs(config), T, config.data, timesteps)


def test_an_edit_written_out():
    """<BOI> input <EOI> instruction <BOI> output <EOI>: text loss on the instruction, a diffusion loss on the output alone."""
    make = documents("edits", timesteps=200)
    (before, after), (instruction,) = make.pairs.example(4)
    given, text, drawn = make(4)
    assert (given.max_t, text, drawn.max_t) == (0, T.encode(instruction), 200)
    assert np.array_equal(given.load(), before.render()) and np.array_equal(drawn.load(), after.render())
    batch = collate([[make(4)]], T, 256, 2)
    n = 11 + len(text) - 2
    assert batch.tokens[0, :n].tolist() == [T.bos, T.boi, T.pad, T.pad, T.eoi, *text, T.boi, T.pad, T.pad, T.eoi]
    assert batch.targets[0, :n].tolist() == [T.boi, NO_LOSS, NO_LOSS, NO_LOSS, *text, T.boi, NO_LOSS, NO_LOSS, NO_LOSS, T.eos]
    assert batch.max_t.tolist() == [0, 200]


def test_a_story_written_out():
    """caption <BOI> picture <EOI> instruction <BOI> picture <EOI> ...; the pictures before the picked one are clean."""
    make, picked, dropped, n = documents("stories"), Counter(), 0, 900
    for i in range(n):
        document = make(i)
        (scenes, instructions), limits = make.pairs.example(i), [part.max_t for part in document[1::2]]
        assert [type(part) for part in document] == [list, ImageSegment] * 3
        assert [T.decode(part) for part in document[::2]] in ([scenes[0].caption, *instructions], ["", *instructions])
        assert limits in ([1000, 1000, 1000], [0, 1000, 1000], [0, 0, 1000])
        picked[limits.count(0)] += 1
        dropped += not document[0]
    assert all(abs(picked[k] / n - share) < 4 * (share * (1 - share) / n) ** 0.5 for k, share in enumerate((1 / 9, 3 / 9, 5 / 9))) and abs(dropped - n / 10) < 4 * (n * 0.09) ** 0.5
    assert all(np.array_equal(part.load(), scene.render()) for part, scene in zip(document[1::2], scenes))


def test_a_step_counts_no_loss_on_clean_pictures(small_run, tmp_path):
    """The logged diffusion loss is the mean over the noised pictures, and the clean ones are at t = 0."""
    options = dict(config="small_edit", init_from=small_run[0] / "out/small", rows=2, eval_documents=4, out=tmp_path)
    run = set_up(*parse(flags(**options)))
    again = set_up(*parse(flags(**options | dict(out=tmp_path / "again"))))
    (rows,) = again.loader.rows
    batch, x_0, t, eps = again.objective.latents_and_noise(next(again.loader), rows, (1, again.step))
    assert ((t == 0) == (batch.max_t == 0)).all() and (batch.max_t[0::2] == 0).all() and (batch.max_t[1::2] == 1000).all()
    with torch.no_grad():
        _, per_image = losses(again.model, again.ddpm, batch, x_0, t, eps)
    assert train_step(run)["ddpm"] == pytest.approx(per_image[1::2].mean().item(), rel=1e-2)


# ---- Scores ---------------------------------------------------------------------------------------------------------


def scene(*shapes):
    """Objects, "red circle top left" each, in a Scene."""
    found = []
    for shape in shapes:
        colour, kind, place = shape.split(maxsplit=2)
        k = PLACES[2].index(place)
        found.append(Shape(colour, kind, x=0.25 + 0.5 * (k % 2), y=0.25 + 0.5 * (k // 2), place=place))
    return replace(Scenes().example(0), shapes=tuple(found))


def nudge(picture, kind, pixels=0, wider=0):
    """The Scene with one of its objects that many pixels further to the right, and wider."""
    return replace(picture, shapes=tuple(replace(s, x=s.x + pixels / 32, width=s.width + wider / 32) if s.kind == kind else s for s in picture.shapes))


RED, BLUE, AT_LEFT = "red circle top left", "blue circle top left", "red circle bottom left"
SQUARE, GREEN, TRIANGLE = "green square bottom right", "cyan square bottom right", "red triangle bottom left"
TWO, ONE = scene(RED, SQUARE), scene(RED)
EDITS = {"recolour": (TWO, scene(BLUE, SQUARE)), "move": (TWO, scene(AT_LEFT, SQUARE)), "remove": (TWO, scene(SQUARE)), "add": (ONE, scene(RED, SQUARE))}


@pytest.mark.parametrize("edit, drawn, wrong", [
    *((edit, EDITS[edit][1], ()) for edit in EDITS),
    *((edit, EDITS[edit][0], ("scene", "changed")) for edit in EDITS),  # nothing was done
    *((edit, scene(), ("scene", "changed", "kept")) for edit in ("recolour", "move", "add")),
    ("remove", scene(), ("scene", "kept")),  # that, and more
    ("recolour", scene("purple circle top left", SQUARE), ("scene", "changed")),
    ("recolour", scene(BLUE, GREEN), ("scene", "kept")),  # the other one was recoloured, too
    ("recolour", scene(RED, "blue square bottom right"), ("scene", "changed", "kept")),  # only the other one
    ("recolour", scene("blue square top left", SQUARE), ("scene", "kept")),  # it became another shape
    ("recolour", scene(BLUE, SQUARE, TRIANGLE), ("scene", "kept")),
    ("recolour", scene(BLUE), ("scene", "kept")),
    ("move", scene(RED, AT_LEFT, SQUARE), ("scene", "changed")),  # it was copied
    ("move", scene("blue circle bottom left", SQUARE), ("scene", "kept")),
    ("move", scene("red circle top right", SQUARE), ("scene", "changed", "kept")),
    ("move", scene(AT_LEFT, "green square top right"), ("scene", "kept")),
    ("remove", ONE, ("scene", "changed", "kept")),  # the wrong one was removed
    ("add", scene(RED, GREEN), ("scene", "changed")),
    ("add", scene(SQUARE), ("scene", "kept")),
    ("add", scene(RED, SQUARE, TRIANGLE), ("scene", "kept")),
    *((edit, nudge(EDITS[edit][1], kind, wider=wider), (wrong,) if abs(wider) > 2 else ()) for wider in (-5, -1, 1, 3)  # shrunken or grown
      for edit, kind, wrong in [(edit, "square", "kept") for edit in ("recolour", "move", "remove")]
      + [("recolour", "circle", "kept"), ("move", "circle", "kept"), ("add", "circle", "kept"), ("add", "square", "changed")]),
])  # fmt: skip
def test_an_edit_is_wrong_where_it_is_wrong(edit, drawn, wrong):
    verdict = judge_change(*EDITS[edit], EDITS[edit][0].render(), drawn.render(), "places")
    assert verdict == RIGHT | dict.fromkeys(wrong, False) | {"all": not wrong}


@pytest.mark.parametrize("edit, kind", [("recolour", "square"), ("recolour", "circle"), ("move", "square"), ("move", "circle"), ("remove", "square"), ("add", "circle")])
@pytest.mark.parametrize("pixels", [-2, -1, 1, 2])
def test_what_was_to_stay_may_be_one_pixel_off_and_no_more(edit, kind, pixels):
    before, after = EDITS[edit]
    verdict = judge_change(before, after, before.render(), nudge(after, kind, pixels).render(), "places")
    assert verdict["kept"] == verdict["all"] == (abs(pixels) == 1) and verdict["changed"] and verdict["scene"]


def test_a_background_is_to_stay():
    before, after = stories(1, grammar="rich", image_size=64)[0]
    other = replace(after := before[1], background="black" if after.background != "black" else "pink")
    assert judge_change(*before, before[0].render(), other.render(), "rich") == RIGHT | dict(all=False, scene=False, kept=False)


def test_a_wrong_picture_can_be_changed_rightly():
    """A story's second picture is compared with what the first shows, and with what it should have shown."""
    before, after = scene("purple circle top left", SQUARE), scene("purple circle bottom left", SQUARE)
    assert judge_change(*EDITS["move"], before.render(), after.render(), "places") == RIGHT | dict(all=False, scene=False)


def teller(examples, wrong=0):
    """A generate that draws every story as it should be, and the first `wrong` each time it is asked as noise."""
    known = {}
    for scenes, texts in examples:
        for k in range(len(scenes)):
            known[(*([scenes[0].caption] if k or len(texts) > 1 else []), *texts[:k])] = scenes[k]
        known[(scenes[0].render().tobytes(), *texts)] = scenes[-1]
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    firsts = {scene.caption: scene for split in SPLITS for scene in map(Scenes(split=split, seed=1).example, range(20))}

    def go_on(scene, changes):
        text, after = next(iter(Stories().following(scene).items()))
        return [Image.fromarray(scene.render()), *([text, *go_on(after, changes - 1)] if changes else [])]

    def generate(trained, documents, *_, max_images=1, **__):
        if max_images > 1:  # to be told as the model likes
            return [[*d, *(go_on(firsts[d[0]], max_images - 1) if n >= wrong else [])] for n, d in enumerate(documents)]
        keys = [tuple(part for part in d if isinstance(part, str)) if isinstance(d[0], str) else (np.array(d[0]).tobytes(), *d[1:]) for d in documents]
        return [[*d, Image.fromarray(noise if n < wrong else known[key].render())] for n, (d, key) in enumerate(zip(documents, keys))]

    return generate


def untrained(kind):
    return tiny_trained(tiny_model(side=32, patch_size=8), steps=1, seq_len=256, documents=kind)


@pytest.mark.parametrize("wrong", [0, 5])
@pytest.mark.parametrize("kind, rows", [("edits", {"edits"}), ("stories", {"stories", "picture 1", "picture 2", "picture 3", "own stories"})])
def test_scores_count_what_is_right(kind, rows, wrong):
    source = {split: open_pairs(configured(documents=kind, image_size=32), split, 1) for split in SPLITS}
    scores = evaluate(untrained(kind), judged=20, generate=teller([source[split].example(i) for split in SPLITS for i in range(20)], wrong))
    assert list(scores["splits"]) == list(SPLITS) and json.loads(json.dumps(scores)) == scores
    for split, found in scores["splits"].items():
        changes, kinds = found["changes"], {"make", "move", "add"} | ({"remove"} if split != "held_out" else set())
        assert set(changes) == rows | kinds | ({"own words"} if kind == "stories" else set())
        assert all(changes[row]["all"] == (20 - wrong) / 20 and changes[row]["n"] == 20 for row in rows)
        assert sum(changes[word]["n"] for word in kinds) == 20 * (1 if kind == "edits" else 2)
    table = format_scores(scores)
    assert all(f"{split.replace('_', ' ')}, {row}" in table for split in SPLITS for row in rows) and "kept" in table and "perplexity" not in table
    assert f"{100 * (20 - wrong) / 20:.1f}" in table


def test_a_story_is_right_if_all_of_its_pictures_are():
    """Each of three stories fails in another picture: two thirds of each picture are right, and no story is."""
    examples, asked = stories(3, changes=2), itertools.count()
    right = teller(examples)

    def generate(trained, documents, *_, **__):
        of_all, wrong = right(trained, documents), next(asked)
        return [[*d[:-1], Image.new("RGB", (32, 32)) if n == wrong else d[-1]] for n, d in enumerate(of_all)]

    found = story_accuracy(untrained("stories"), examples, generate)
    assert found["stories"] == {"all": 0, "n": 3} and found["picture 1"] == {"all": pytest.approx(2 / 3), "n": 3}
    # A story that goes on rightly from a wrong picture has not kept what was there.
    assert found["picture 2"]["scene"] == found["picture 3"]["scene"] == pytest.approx(2 / 3) and found["picture 2"]["all"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("told, own", [
    ("1 make the circle blue 2 remove the square 3 the", (2, True)), ("1 make the circle blue 2 remove the square 3", (2, True)),
    ("1 make the circle blue 2 remove the circle 3", (2, False)),  # the other one was removed
    ("1 make the circle green 2 remove the square 3", (2, False)), ("2 make the circle blue 2 remove the square 3", (2, False)),
    ("1 make the cross blue 2 remove the square 3", (0, False)), ("1 make the circle blue 2 remove the red circle 3", (1, False)),
    ("1 make the circle blue 2 remove the square", (2, False)), ("1 make the circle blue 2 3", (1, False)), ("1 2 3", (0, False)), ("", (0, False)),
    ("1 add a blue cross at the top right 2 remove the square 3", (0, False)),  # a third object
])  # fmt: skip
def test_a_story_may_be_of_the_models_own_words(told, own):
    """Pictures as numbers: TWO, its circle blue, that circle alone. Own: how many instructions can be followed, and is all right?"""
    pictures = {"1": TWO, "2": scene(BLUE, SQUARE), "3": scene(BLUE)}
    parts = [part.strip() for part in re.split(r"([123])", told) if part.strip()]
    document = [Image.fromarray(pictures[part].render()) if part in pictures else part for part in parts]
    generate = lambda trained, documents, *_, max_images: [[*d, *document] for d in documents] * (max_images == 3)
    found = own_story_accuracy(untrained("stories"), [TWO], Stories(changes=2), generate)
    assert found == {"own words": {"all": own[0] / 2, "n": 2}, "own stories": {"all": own[1], "n": 1}}


@pytest.mark.parametrize("kind", ["edits", "stories"])
def test_an_untrained_model_scores_nothing(kind):
    scores = evaluate(untrained(kind), judged=2)
    assert all(shares["all"] == 0 for found in scores["splits"].values() for shares in found["changes"].values())
    assert "held out, " in format_scores(scores)


def test_stories_are_told_after_the_pictures_that_were_drawn():
    """Each prompt is all that came before, the model's own pictures included."""
    asked = []

    def generate(trained, documents, seeds, **_):
        asked.append(documents)
        return [[*d, Image.new("RGB", (32, 32), (len(asked), 0, 0))] for d in documents]

    (scenes, texts), = examples = stories(1, changes=2)
    (document,) = tell(untrained("stories"), examples, generate)
    assert [part if isinstance(part, str) else part.getpixel((0, 0))[0] for part in document] == [scenes[0].caption, 1, texts[0], 2, texts[1], 3]
    assert [len(documents[0]) for documents in asked] == [1, 3, 5] and asked[2][0][:4] == document[:4]


def test_pictures_go_with_the_text_before_them():
    a, b = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert captioned(["one", a, "two", b, "end"]) == [(a, "one"), (b, "two")] and captioned([a, b]) == [(a, ""), (b, "")] and captioned(["one"]) == []


# ---- As a user runs them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["small_edit", "small_story"])
def test_fine_tuning_as_a_user_does_it(config, small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {name: TINY[name] for name in ("rows", "eval_documents", "judged", "steps", "max_steps")}
    code, out, err = run_here("train.py", *flags(config=config, init_from=small_run[0] / "out/small", **tiny))
    assert code == 0, err
    kind = {"small_edit": "edits", "small_story": "picture 2"}[config]
    assert f"held out, {kind}" in out and "the VAE" not in out and f"python sample.py --ckpt out/{config}/checkpoint.pt" in out
    sheet = Image.open(tmp_path / f"out/{config}/samples_000004.png")
    assert sheet.width > 500 and sheet.height > 4 * 128
    assert load_checkpoint(tmp_path / f"out/{config}/checkpoint.pt")["config"]["extra"]["documents"] in ("edits", "stories")
    code, out, err = run_here("evaluate.py", "--judged", 2, "--json", "scores.json")
    assert code == 0 and f"never seen, {kind}" in out, err
    assert set(json.loads((tmp_path / "scores.json").read_text())["splits"]["held_out"]["changes"][kind]) == {*CHANGE_ASPECTS, "n"}

    if config == "small_edit":
        Image.fromarray(TWO.render()).save("a.png")
        code, out, err = run_here("sample.py", "--image", "a.png", "--prompt", "make the circle blue", "--num", 1)
        assert code == 0 and "make the circle blue" in out and "[out/samples/000.png]" in out, err
    else:
        code, out, err = run_here("sample.py", "--prompt", "a red circle at the top left", "--max_images", 3, "--num", 1, "--max_tokens", 30)
        assert code == 0 and "[out/samples/000.png]" in out, err
