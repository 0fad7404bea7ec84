"""data.py: tokens, scenes, folders of pictures, documents, packing, and the batch with its targets. test_formats.py has tars, COCO and text."""

import copy
import io
import itertools
import json
import random
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import divide, flags, picture, run_here, tiny_model
from PIL import Image, ImageCms

from data import NO_LOSS, DataConfig, ImageSegment, PairDocuments, Stream, Tokenizer, clean_text, collate, document_length, to_pixels
from diffusion import DDPM
from extras import Choices, open_documents, open_pairs, open_text, open_tokenizer, restore_tokenizer
from extras.pairs import Pairs, fit_image, load_image
from extras.scenes import COLOURS, GRAMMARS, NEVER_SEEN, Scenes, SceneText, held_out_combination
from extras.sources import Skipped, WithText, interleave, shuffled
from extras.text import like_training, read_prompt, style_of
from extras.tokenizers import BPETokenizer
from train import losses, parse


def configured(**options):
    """Options as what opens sources takes them."""
    data, extra = divide(options, DataConfig, Choices)
    return SimpleNamespace(data=DataConfig(**data), extra=Choices(**extra))


# ---- Text -----------------------------------------------------------------------------------------------------------

ODD = ["", " ", "a", "a red circle", "  two  spaces ", "\t\n\r\n tabs\x00\x1f", "naïve café Łódź", "日本語 テキスト", "🎨👩‍👩‍👧 🇵🇱",
       "\u3000wide\u00a0space\u2028", "\ufeffé\u0301"]  # fmt: skip


@pytest.fixture(scope="module")
def learned():
    scenes = Scenes()
    return BPETokenizer.learn([scenes.example(i).caption for i in range(1000)], 512)


@pytest.mark.parametrize("merged", [False, True])
def test_any_text_comes_back(merged, learned):
    tokenizer = learned if merged else Tokenizer()
    rng = random.Random(0)
    wild = ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(40)) for _ in range(50)]
    for text in ODD + wild:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < len(tokenizer.pieces) for i in ids)  # no special tokens, whatever the text says


@pytest.mark.parametrize("text, clean", [
    ("\ufeff a red\r\nsquare \n", "a red square"), ("a\u2028red\u00a0 square\u200b", "a red square"), ("\u200ea\0red\tsquare\x1b", "a red square"),
    ("cafe\u0301 \ud800", "café ?"), ("👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿"), ("\u200b", ""), ("\u200d\u3000", ""), ("\0\x01", ""), (None, ""), (["a"], ""),
])  # fmt: skip
def test_what_nobody_sees_is_no_part_of_a_caption_or_a_prompt(text, clean):
    assert clean_text(text) == clean and clean_text(clean) == clean


def test_a_prompt_becomes_like_the_captions_of_training(learned, capsys):
    captions = [Scenes().pair(i)[0] for i in range(500)]
    style = json.loads(json.dumps(style_of(captions, learned)))  # plain values, as a checkpoint holds them
    caption = captions[0]
    assert like_training(caption, style, learned) == (caption, [])
    text, (note,) = like_training(caption.capitalize() + ".", style, learned)
    assert text == caption and f'"{caption.capitalize()}." is read as "{caption}"' in note
    assert like_training(".", style, learned)[0] == "."  # nothing would be left
    text, (note,) = like_training("a zebra at the top left and a blüe square", style, learned)
    assert text.startswith("a zebra") and "zebra" in note and note.split("such words as ")[1] == "zebra, blüe"
    learned.style = style
    assert read_prompt(f" {caption.upper()}.\n", learned) == caption and "is read as" in capsys.readouterr().err and read_prompt("\ufeff", learned) == ""
    del learned.style
    assert read_prompt("A red circle.", learned) == "A red circle."
    assert style_of([f"a {n}" for n in range(90)], BPETokenizer())["tokens"] and not style_of(["a b", "a c"], BPETokenizer())["tokens"]  # not all that there are
    written = style_of([*captions, "A Capital and a stop."], learned)
    assert like_training("A red circle.", written, learned)[0] == "A red circle."


def test_words_that_were_never_seen_fall_back_to_bytes(learned):
    assert learned.encode("zzyzx") == list(b"zzyzx") == Tokenizer().encode("zzyzx")


def test_learned_words_are_single_tokens(learned):
    words = [*COLOURS, *GRAMMARS["places"].kinds, "at", "the", "and", "top", "bottom", "left", "right"]
    assert {word: len(learned.encode(" " + word)) for word in words} == dict.fromkeys(words, 1)
    caption = "a red circle at the top left and a blue square at the bottom right"
    assert len(learned.encode(caption)) <= len(caption.split())


def test_no_token_binds_what_must_vary_freely(learned):
    """A token `red circle` would share nothing with a red square. A place is one thing: `at the top left` is a token."""
    words = [set(piece.decode(errors="replace").split()) for piece in learned.pieces]
    free = [set(COLOURS), set(GRAMMARS["places"].kinds), {"top", "bottom", "left", "right"}]
    assert all(sum(bool(found & names) for names in free) <= 1 for found in words)
    assert b" at the top left" in learned.pieces


def test_special_tokens_follow_the_pieces_and_decode_to_nothing(learned):
    special = [learned.bos, learned.eos, learned.boi, learned.eoi, learned.pad]
    assert sorted(special) == list(range(len(learned.pieces), learned.vocab_size))
    assert learned.decode([learned.bos, *learned.encode("a b"), learned.boi, learned.eoi, learned.eos]) == "a b"


def test_broken_utf8_decodes_without_an_error():
    assert Tokenizer().decode(list("é".encode())[:1]) == "\ufffd"


def test_tokenizer_is_restored_from_its_merges(learned):
    again = restore_tokenizer(json.loads(json.dumps(learned.state())))  # plain values, as a checkpoint holds them
    assert again.vocab_size == learned.vocab_size and again.pieces == learned.pieces
    assert again.encode("a red circle, zzyzx") == learned.encode("a red circle, zzyzx")


def test_learning_is_repeatable_and_limited():
    texts = ["low lower lowest", "new newer newest"] * 3
    assert BPETokenizer.learn(texts, 7).merges == BPETokenizer.learn(list(reversed(texts)), 7).merges
    assert len(BPETokenizer.learn(texts, 7).merges) == 7 and BPETokenizer.learn(texts, 0).vocab_size == 261
    assert BPETokenizer.learn([], 10).merges == []


def test_learning_looks_at_so_much_of_each_text(monkeypatch):
    monkeypatch.setattr("extras.tokenizers.LEARNED", 40)
    assert BPETokenizer.learn(["aaaaaaaaab" + "xy" * 1000] * 4, 50).merges == BPETokenizer.learn(["aaaaaaaaab"] * 4, 50).merges


# ---- Scenes ---------------------------------------------------------------------------------------------------------

ALL = [(grammar, split) for grammar in GRAMMARS for split in Scenes.SPLITS]


@pytest.mark.parametrize("grammar, split", ALL)
def test_example_is_a_function_of_seed_and_index(grammar, split):
    a, b = (Scenes(grammar, 64, split, seed=3) for _ in range(2))
    backwards = {i: b.example(i) for i in reversed(range(20))}
    assert [a.example(i) for i in range(20)] == [backwards[i] for i in range(20)]
    assert np.array_equal(a.example(5).render(), b.example(5).render())
    assert [a.example(i) for i in range(20)] != [Scenes(grammar, 64, split, seed=4).example(i) for i in range(20)]
    assert len({a.example(i) for i in range(20)}) == 20


@pytest.mark.parametrize("grammar, split", ALL)
def test_splits_hold_what_they_say(grammar, split):
    scenes = Scenes(grammar, 64, split)
    for i in range(600):
        pairs = scenes.example(i).objects
        never_seen = any(pair in NEVER_SEEN for pair in pairs)
        held_out = any(held_out_combination(*combination) for combination in itertools.combinations(pairs, 2))
        assert never_seen == (split == "never_seen")
        if split != "never_seen":
            assert held_out == (split == "held_out")


def test_training_shows_every_colour_and_every_shape():
    """A never-seen pair is new as a pair only."""
    for grammar in GRAMMARS:
        scenes = Scenes(grammar)
        shown = {pair for i in range(600) for pair in scenes.example(i).objects}
        assert {colour for colour, _ in shown} == set(COLOURS) and {kind for _, kind in shown} == set(GRAMMARS[grammar].kinds)
        assert shown == set(itertools.product(COLOURS, GRAMMARS[grammar].kinds)) - NEVER_SEEN
    assert len(COLOURS) >= 6 and all(len(grammar.kinds) >= 4 for grammar in GRAMMARS.values())


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_about_15_percent_of_combinations_are_held_out(grammar):
    pairs = set(itertools.product(COLOURS, GRAMMARS[grammar].kinds)) - NEVER_SEEN
    held_out = [held_out_combination(a, b) for a, b in itertools.combinations_with_replacement(sorted(pairs), 2)]
    assert abs(np.mean(held_out) - 0.15) < 3 * (0.15 * 0.85 / len(held_out)) ** 0.5
    assert all(held_out_combination(a, b) == held_out_combination(b, a) for a, b in itertools.combinations(pairs, 2))


@pytest.mark.parametrize("grammar, image_size", [("places", 32), ("relations", 32), ("rich", 64), ("rich", 256)])
def test_pictures_are_whole_and_objects_lie_apart(grammar, image_size):
    """Nothing leaves the picture, and no object touches another: the judge relies on it."""
    scenes = Scenes(grammar, image_size)
    for i in range(150):
        scene = scenes.example(i)
        assert scene.render().shape == (image_size, image_size, 3) and scene.render().dtype == np.uint8
        for shape in scene.shapes:
            assert shape.width / 2 < shape.x < 1 - shape.width / 2 and shape.width / 2 < shape.y < 1 - shape.width / 2
        for a, b in itertools.combinations(scene.shapes, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.width + b.width) / 2


def test_captions():
    scene = Scenes("places", 32).example(0)
    two = [replace(scene.shapes[0], colour=c, kind=k, place=p) for c, k, p in (("red", "circle", "top left"), ("blue", "square", "bottom right"))]
    assert replace(scene, shapes=tuple(two)).caption == "a red circle at the top left and a blue square at the bottom right"
    assert replace(scene, shapes=tuple(two[:1])).caption == "a red circle at the top left"
    bare = tuple(replace(shape, place="", size="small") for shape in two)
    assert replace(scene, shapes=bare, relation="left of", tell_background=True, background="black").caption == (
        "a small red circle left of a small blue square on a black background")  # fmt: skip
    assert replace(scene, shapes=(two[0], two[1], two[0])).caption.count(", ") == 1


# ---- Folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        Image.new("RGB", (20 + i, 30), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"picture {i}\n", encoding="utf-8")
    return tmp_path


def test_folder_splits_shuffles_and_repeats(folder):
    train, held_out = Pairs(folder, 16), Pairs(folder, 16, "held_out")
    n = len(train)
    epochs = [[train.pair(i)[0] for i in range(e * n, (e + 1) * n)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == n and epochs[0] != epochs[1]
    others = {held_out.pair(i)[0] for i in range(len(held_out))}
    assert 1 <= len(others) <= 12 and others | set(epochs[0]) == {f"picture {i}" for i in range(40)} and not others & set(epochs[0])
    for i in (0, n + 3):
        caption, load = Pairs(folder, 16).pair(i)
        assert caption == train.pair(i)[0] and caption == f"picture {load()[0, 0, 0]}" and load().shape == (16, 16, 3)


def test_open_pairs_takes_the_folder_for_the_scenes(folder):
    assert isinstance(open_pairs(configured(data=str(folder), image_size=16)), Pairs)
    assert isinstance(open_pairs(configured(image_size=32), "never_seen"), Scenes)


@pytest.mark.parametrize("break_it, message", [
    (lambda f, n: (f / f"{n}.txt").unlink(), "without a caption (first: 03.png)"),
    (lambda f, n: (f / f"{n}.txt").write_text("  \n"), "with an empty caption (first: 03.txt)"),
    (lambda f, n: (f / f"{n}.txt").write_bytes(b"\xff\xfe\x00"), "with a caption that is not UTF-8 (first: 03.txt)"),
])  # fmt: skip
def test_bad_captions_are_left_out_by_name_unless_they_are_many(folder, break_it, message, capsys):
    break_it(folder, "03")
    assert sum(len(Pairs(folder, 16, split)) for split in ("train", "held_out")) == 39
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "39 pictures with captions; left out: 1 " + message in said
    for n in range(4, 8):
        break_it(folder, f"0{n}")
    with pytest.raises(ValueError, match="5 of 40 pictures with captions cannot be used, more than --max_broken 0.05 allows: 5 with"):
        Pairs(folder, 16)
    assert len(Pairs(folder, 16, max_broken=0.2)) > 30


def test_captions_without_pictures_are_counted(folder, capsys):
    (folder / "99.txt").write_text("nobody")
    assert sum(len(Pairs(folder, 16, split)) for split in ("train", "held_out")) == 40
    assert "1 captions without a picture (first: 99.txt)" in capsys.readouterr().err
    [p.unlink() for p in folder.glob("*.png")]
    with pytest.raises(ValueError, match="no pictures here"):
        Pairs(folder, 16)


def test_missing_folder_is_refused(tmp_path):
    for path in ("absent", "absent.tar", "absent.json"):
        with pytest.raises(ValueError, match=f"{path}: no such f"):
            Pairs(tmp_path / path, 16)


def test_a_folder_too_small_to_split_is_refused_or_split(tmp_path):
    """One picture cannot serve both training and held-out scores; two can."""
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    assert {split: len(Pairs(tmp_path, 8, split)) for split in ("train", "held_out")} == {"train": 1, "held_out": 1}
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError):
        Pairs(tmp_path, 8, "held_out").pair(0)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_every_kind_of_picture_loads(mode, tmp_path):
    """A half grey picture, cut to its central square."""
    grey = Image.new("L", (40, 20), 255)
    grey.paste(0, (0, 0, 20, 20))  # left half black
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = load_image(path, 20)
    assert pixels.shape == (20, 20, 3) and pixels.dtype == np.uint8
    assert (pixels[:, :8] < 20).all() and (pixels[:, 12:] > 235).all()


def test_16_bit_greys_keep_their_shade(tmp_path):
    Image.fromarray(np.full((20, 20), 0x4000, np.uint16)).save(tmp_path / "x.png")
    assert abs(int(load_image(tmp_path / "x.png", 20)[10, 10, 0]) - 0x40) <= 1


def chunk(kind, body, wrong=0):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def png(depth, kind, row, *chunks):
    """A PNG of eight equal rows of eight pixels, with other chunks before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b""))


METADATA = {"a long text": chunk(b"tEXt", b"a\0" + bytes(3_000_000)), "longer texts": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000_000))) * 2,
            "a wrong checksum": chunk(b"tEXt", b"a\0b", wrong=1), "a short density": chunk(b"pHYs", b"ab"), "a short gamma": chunk(b"gAMA", b"a"),
            "no profile": chunk(b"iCCP", b"x\0\0junk"), "no EXIF": chunk(b"eXIf", b"ab"), "no animation": chunk(b"acTL", b"a")}  # fmt: skip


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_cost_a_picture(kind):
    assert (load_image(png(8, 2, bytes([255, 0, 0]) * 8, METADATA[kind]), 8) == [255, 0, 0]).all()


@pytest.mark.parametrize("entry", [b"junk", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0ab\0\0\0\0\0\0", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"])
def test_exif_of_a_wrong_type_never_costs_a_picture(entry):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "JPEG")
    body = b"Exif\0\0" + entry
    file = io.BytesIO(file.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + file.getvalue()[2:])
    assert load_image(file, 8)[4, 4].tolist() == pytest.approx([200, 30, 30], abs=4)


@pytest.mark.parametrize("depth, kind, pixel, colour", [(2, 0, b"\x55\x55", b"\0\x01"), (4, 0, b"\x55" * 4, b"\0\x05"), (8, 0, b"d" * 8, b"\0d"), (16, 0, b"\x80\0" * 8, b"\x80\0"),
                                                         (8, 2, b"abc" * 8, b"\0a\0b\0c"), (16, 2, b"\x80\0\0\1\0\2" * 8, b"\x80\0\0\1\0\2")])  # fmt: skip
def test_a_transparent_colour_of_any_depth_is_white(depth, kind, pixel, colour):
    assert (load_image(png(depth, kind, pixel, chunk(b"tRNS", colour)), 8) == 255).all()
    assert (load_image(png(depth, kind, pixel, chunk(b"tRNS", b"\0\0" * (len(colour) // 2))), 8) < 255).any()


def test_colours_become_srgb(tmp_path):
    """By the profile in the file; here of an RGB whose green and red change places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = {tag: struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i])[1:] for i, tag in enumerate(profile[132 + 12 * i : 136 + 12 * i].decode() for i in range(profile[131]))}
    (red, size), (green, _) = at["rXYZ"], at["gXYZ"]
    profile[red : red + size], profile[green : green + size] = profile[green : green + size], profile[red : red + size]
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "x.png", icc_profile=bytes(profile))
    assert load_image(tmp_path / "x.png", 8)[4, 4].tolist() == pytest.approx([0, 255, 0], abs=4)


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), Image.new("LAB", (5, 5)), Image.new("F", (5, 5)), Image.fromarray(np.full((5, 5), 70_000, np.int32))])
def test_what_cannot_be_shown_in_8_bits_of_srgb_is_refused(image):
    with pytest.raises(ValueError, match="no pixels|LAB|floating-point numbers or beyond 16 bits"):
        fit_image(image, 8)


def test_32_bit_integers_that_hold_8_bits_are_as_they_are():
    assert (fit_image(Image.fromarray(np.full((5, 5), 200, np.int32)), 8) == 200).all()


def test_the_callers_picture_stays_as_it_was(tmp_path):
    Image.new("RGB", (900, 600)).save(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as image:
        assert fit_image(image, 8).shape == (8, 8, 3) and image.size == (900, 600)


def test_transparency_is_laid_on_white_and_exif_is_turned_upright(tmp_path):
    assert (fit_image(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), 8) == 255).all()
    image = Image.new("RGB", (20, 20))
    image.paste((255, 0, 0), (0, 0, 20, 10))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    image.save(tmp_path / "x.png", exif=exif)
    pixels = load_image(tmp_path / "x.png", 20)
    assert pixels[15, 10, 0] > 200 and pixels[5, 10, 0] < 50


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_picture_is_refused_by_name(content, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="x.png: cannot be read as an image"):
        load_image(tmp_path / "x.png", 16)


def test_truncated_missing_and_folder_pictures_are_refused_by_name(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "y.png").write_bytes((tmp_path / "x.png").read_bytes()[:4000])
    for path, message in ((tmp_path / "y.png", "y.png: cannot be read"), (tmp_path / "z.png", "z.png: no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(ValueError, match=message):
            load_image(path, 16)


def test_to_pixels():
    pixels = to_pixels(np.array([[[[0, 255, 51]]]], np.uint8))
    assert pixels.shape == (1, 3, 1, 1) and pixels.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


@pytest.mark.parametrize("wrong, message", [(dict(caption_first=1.2), "between 0 and 1"), (dict(grammar="haiku"), "places, relations, rich"), (dict(text_fraction=-1), "text_fraction is -1"), (dict(workers=-1), "workers is -1")])
def test_impossible_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        parse(flags(config="small", **wrong))


# ---- Documents ------------------------------------------------------------------------------------------------------


class Alphabet:
    """A source of pairs: captions of 1 to 26 letters, pictures whose first pixel is the index."""

    def name(self, index):
        return f"letters {index}"

    def pair(self, index):
        return "abcdefghijklmnopqrstuvwxyz"[: 1 + index * 7 % 26], lambda: np.full((8, 8, 3), index % 256, np.uint8)


def documents(seed=0, timesteps=1000, **config):
    config = dict(image_first_max_t=500) | config
    return PairDocuments(Alphabet(), Tokenizer(), DataConfig(image_size=8, seq_len=64, **config), timesteps, seed)


def test_both_orders_and_their_noise_limits():
    document, text = documents(), [Tokenizer().encode(Alphabet().pair(i)[0]) for i in range(4000)]
    seen = {"caption first": 0, "dropped": 0, "image first": 0}
    for i in range(4000):
        first, second = document(i)
        if isinstance(first, ImageSegment):
            seen["image first"] += 1
            assert first.max_t == 500 and second == text[i]
        else:
            seen["dropped" if first == [] else "caption first"] += 1
            assert second.max_t == 1000 and first in ([], text[i])
    for kind, share in {"caption first": 0.72, "dropped": 0.08, "image first": 0.2}.items():
        assert abs(seen[kind] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, (kind, seen)


def test_documents_are_a_function_of_seed_and_index():
    order = lambda document: [isinstance(document(i)[0], ImageSegment) for i in range(50)]
    assert order(documents()) == order(documents()) != order(documents(seed=1))


def test_noise_limits_follow_the_configuration():
    assert documents(caption_first=0.0, image_first_max_t=1000)(0)[0].max_t == 1000
    assert documents(caption_first=0.0, timesteps=200)(0)[0].max_t == 200
    assert documents(caption_first=1.0, drop_caption=0.0, timesteps=200)(0)[1].max_t == 200


# ---- Packing --------------------------------------------------------------------------------------------------------


def source(preset, n_patches):
    """The documents of a preset, its configuration of data, and its text alone."""
    config = parse(["--config", preset])[0]
    tokenizer = open_tokenizer(config, open_pairs(config))
    return open_documents(config, tokenizer, n_patches), config.data, open_text(config, tokenizer)


@pytest.mark.parametrize("preset, n_patches, steps", [("0.16b", 256, 12), ("small", 4, 40), ("relations", 4, 40)])
def test_scenes_fill_at_least_97_percent(preset, n_patches, steps):
    documents, data, _ = source(preset, n_patches)
    stream = Stream(documents, data.seq_len, rows_per_step=8, n_patches=n_patches)
    rows = [row for _ in range(steps) for row in next(stream)]
    used = [sum(document_length(document, n_patches) for document in row) for row in rows]
    assert max(used) <= data.seq_len and np.mean(used) / data.seq_len >= 0.97
    of_text = sum(document_length(document, n_patches) for row in rows for document in row if not any(isinstance(s, ImageSegment) for s in document))
    assert abs(of_text / sum(used) - data.text_fraction) < 0.03  # the long ones are packed first; what still waits is short


def test_interleaving_uses_every_document_of_every_source_once_and_in_proportion():
    found = [interleave(i, [0.5, 2, 1], seed=1) for i in range(7 * 1024)]
    assert sorted(found) == [(which, n) for which, share in enumerate((1, 4, 2)) for n in range(share * 1024)]
    near = [which for which, _ in found[:300]]
    assert 0.4 < near.count(1) / 300 < 0.75 and near[0::2] != near[1::2]
    assert [which for which, _ in found[:300]] != [interleave(i, [0.5, 2, 1], seed=2)[0] for i in range(300)]
    assert interleave(5, [3.0], seed=0) == (0, 5)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
def test_shuffling_is_a_permutation_that_its_key_picks(n):
    a, b = ([shuffled(i, n, key) for i in range(n)] for key in (1, 2))
    assert sorted(a) == sorted(b) == list(range(n))
    if n >= 64:
        assert a != b and abs(np.corrcoef(a, range(n))[0, 1]) < 4 / n**0.5 and np.mean(np.diff(a) == 1) < 0.1


def test_text_alone_is_cut_and_an_image_never_is():
    documents, _, text = source("small", 16)
    assert text is None and isinstance(documents, PairDocuments)  # the small presets have none
    config = configured(seq_len=30, image_size=8)
    text = open_text(config, BYTES)
    assert isinstance(text, SceneText)
    documents = WithText(PairDocuments(Alphabet(), BYTES, config.data), text, config.data.text_fraction, 16)
    stream = Stream(documents, 30, rows_per_step=4, n_patches=16, skipped=Skipped("documents", config.data.max_broken))
    with pytest.raises(ValueError, match="letters .* takes"):  # captions of up to 26 letters and 19 more positions: dropped, and soon too many
        for _ in range(100):
            next(stream)
    rows = [row for _ in range(100) for row in next(Stream(documents, 30, rows_per_step=4, n_patches=16, skipped=Skipped("documents", 1.0)))]
    for row in rows:
        batch = collate([row], BYTES, 30, 16)
        assert (batch.image_id >= 0).sum() == 16 * len(batch.images)
        assert [i for i in batch.image_id[0].tolist() if i >= 0] == sorted([*range(len(batch.images))] * 16)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_rows_of_all_ranks_are_the_rows_of_one_process(ranks):
    """And so are they when the union of their states goes on with another number of ranks."""
    whole = Stream(documents(), 64, rows_per_step=7, n_patches=16)
    expected = [spell(next(whole)) for _ in range(6)]
    state, found = {}, []
    for ranks_now, steps in ((ranks, 4), (8 - ranks, 2)):
        streams = [Stream(documents(), 64, 7, 16, my_rows=range(k, 7, ranks_now)) for k in range(ranks_now)]
        for stream in streams if state else []:
            stream.load_state(state)
        for _ in range(steps):
            rows = {r: row for stream in streams for r, row in zip(stream.my_rows, next(stream), strict=True)}
            found.append(spell([rows[r] for r in range(7)]))
        state = {r: value for stream in streams for r, value in stream.state.items()}
    assert found == expected and sorted(state) == list(range(7))
    with pytest.raises(ValueError, match="saved with 7 rows a step and now has 8"):
        Stream(documents(), 64, 8, 16).load_state(state)


def spell(rows):
    """Rows of documents as something comparable."""
    return [[[("picture", s.load()[0, 0, 0], s.max_t) if isinstance(s, ImageSegment) else tuple(s) for s in document] for document in row] for row in rows]


def test_stream_goes_on_from_its_state():
    stream = Stream(documents(), 64, rows_per_step=2, n_patches=16)
    for _ in range(7):
        next(stream)
    state = copy.deepcopy(stream.state)
    expected = [spell(next(stream)) for _ in range(10)]
    again = Stream(documents(), 64, rows_per_step=2, n_patches=16)
    again.load_state(state)
    assert [spell(next(again)) for _ in range(10)] == expected


def test_stream_uses_every_document_once_and_none_waits_for_ever():
    stream = Stream(documents(), 64, rows_per_step=2, n_patches=16)
    rows = [row for _ in range(40) for row in next(stream)]
    seen = [s.load()[0, 0, 0] for row in rows for document in row for s in document if isinstance(s, ImageSegment)]
    assert len(seen) == len(set(seen)) < 256  # the pictures' colours, which stand for their indices, have not begun again
    assert set(range(max(seen) - 4 * Stream.LOOK_AHEAD)) <= set(seen)


def test_document_longer_than_a_row_is_left_out_and_named_until_they_are_many(capsys):
    with pytest.raises(ValueError, match="documents .* had to be left out.*letters .* takes .* positions and seq_len is 20"):
        next(Stream(documents(), 20, rows_per_step=1, n_patches=16, skipped=Skipped("documents (with --seq_len 20)", 0.05)))
    with pytest.raises(ValueError, match="letters .* takes .* positions and seq_len is 20"):  # none may be left out
        next(Stream(documents(), 20, rows_per_step=1, n_patches=16))
    capsys.readouterr()
    stream = Stream(documents(), 44, rows_per_step=1, n_patches=16, skipped=Skipped("documents", 0.05))  # 26 letters and 19 positions are one too many
    rows = [next(stream)[0] for _ in range(60)]
    assert stream.skipped.skipped > 0 and all(document_length(document, 16) < 45 for row in rows for document in row)
    assert "takes 45 positions and seq_len is 44" in capsys.readouterr().err


# ---- The batch ------------------------------------------------------------------------------------------------------

BYTES = Tokenizer()
BOS, EOS, BOI, EOI, PAD, NONE = BYTES.bos, BYTES.eos, BYTES.boi, BYTES.eoi, BYTES.pad, NO_LOSS
A, B, C = b"abc"


def pic(max_t=1000):
    return ImageSegment(lambda: np.zeros((8, 8, 3), np.uint8), max_t)


@pytest.mark.parametrize("document, tokens, targets", [
    pytest.param([[A, B], pic()], [BOS, A, B, BOI, PAD, PAD, EOI], [A, B, BOI, NONE, NONE, NONE, EOS], id="caption first"),
    pytest.param([pic(), [A, B]], [BOS, BOI, PAD, PAD, EOI, A, B], [BOI, NONE, NONE, NONE, A, B, EOS], id="image first"),
    pytest.param([[], pic()], [BOS, BOI, PAD, PAD, EOI], [BOI, NONE, NONE, NONE, EOS], id="caption dropped"),
    pytest.param([pic(0), [A], pic(), [B]], [BOS, BOI, PAD, PAD, EOI, A, BOI, PAD, PAD, EOI, B],
                 [BOI, NONE, NONE, NONE, A, BOI, NONE, NONE, NONE, B, EOS], id="edit: two images"),
    pytest.param([pic(), pic()], [BOS, BOI, PAD, PAD, EOI, BOI, PAD, PAD, EOI], [BOI, NONE, NONE, NONE, BOI, NONE, NONE, NONE, EOS], id="images alone"),
    pytest.param([[A, B, C]], [BOS, A, B, C], [A, B, C, EOS], id="text alone"),
])  # fmt: skip
def test_targets_written_out(document, tokens, targets):
    """No loss where the input is <BOI> or a patch; <BOI> is a target; <EOI> as input predicts what follows; <EOS> ends."""
    n = document_length(document, 2)
    assert n == len(tokens)
    batch = collate([[document]], BYTES, n + 2, 2)
    assert batch.tokens[0].tolist() == tokens + [PAD, PAD]
    assert batch.targets[0].tolist() == targets + [NONE, NONE]
    assert batch.positions[0, :n].tolist() == list(range(n))
    assert batch.doc_id[0].tolist() == [0] * n + [-1, -1]
    assert EOI not in batch.targets and PAD not in batch.targets and BOS not in batch.targets
    assert batch.max_t.tolist() == [segment.max_t for segment in document if isinstance(segment, ImageSegment)]


def test_packed_batch_written_out():
    batch = collate([[[[A], pic(7)], [[B]]], [[pic(8), [C]]], []], BYTES, 9, 2)
    assert batch.tokens.tolist() == [[BOS, A, BOI, PAD, PAD, EOI, BOS, B, PAD], [BOS, BOI, PAD, PAD, EOI, C, PAD, PAD, PAD], [PAD] * 9]
    assert batch.targets.tolist() == [[A, BOI, NONE, NONE, NONE, EOS, B, EOS, NONE], [BOI, NONE, NONE, NONE, C, EOS] + [NONE] * 3, [NONE] * 9]
    assert batch.image_id.tolist() == [[-1, -1, -1, 0, 0, -1, -1, -1, -1], [-1, -1, 1, 1] + [-1] * 5, [-1] * 9]
    assert batch.doc_id.tolist() == [[0] * 6 + [1, 1, -1], [0] * 6 + [-1] * 3, [-1] * 9]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 0], [0, 1, 2, 3, 4, 5, 0, 0, 0], [0] * 9]
    assert batch.max_t.tolist() == [7, 8] and batch.images.shape == (2, 3, 8, 8)


def test_batch_without_images():
    batch = collate([[[[A]]]], BYTES, 4, 2)
    assert len(batch.images) == len(batch.max_t) == 0 and batch.max_t.dtype == torch.int64


def test_a_batch_moves_as_a_whole():
    batch = collate([[[[A], pic()]]], BYTES, 8, 2).to("meta")
    assert all(value.device.type == "meta" for value in vars(batch).values())


@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
def test_packed_losses_and_gradients_equal_unpacked(patch_encoder):
    """Three documents in one row, or each in a row of its own: the same text loss, diffusion losses and gradients."""
    text = lambda s: BYTES.encode(s)
    three = [[text("a red dot"), picture(1)], [picture(2, max_t=500), text("blue"), picture(3)], [text("no picture here")]]
    model, ddpm = tiny_model(scale=4.0, patch_encoder=patch_encoder), DDPM(prediction="v")
    eps, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 300, 20])
    found = []
    for rows in ([three], [[document] for document in three]):
        batch = collate(rows, BYTES, 96, 16)
        assert batch.max_t.tolist() == [1000, 500, 1000]
        model.zero_grad()
        lm, per_image = losses(model, ddpm, batch, batch.images, t, eps)
        (lm.sum() / 100 + 5 * per_image.mean()).backward()
        found.append((lm.detach().sum(), per_image.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)
    assert all(grad.abs().max() > 0 for grad in found[0][2].values())


def test_losses_count_each_target_once():
    """A model that knows nothing pays log(vocabulary) at every target, and at nothing else."""
    model = tiny_model()
    torch.nn.init.zeros_(model.head.weight)
    batch = collate([[[[A, B], pic()]], [[pic(), [C]]]], BYTES, 30, 16)
    lm, per_image = losses(model, DDPM(), batch, batch.images, torch.tensor([1, 2]), torch.randn(2, 3, 8, 8))
    assert lm.sum().item() == pytest.approx((4 + 3) * np.log(BYTES.vocab_size), rel=1e-5)
    assert per_image.shape == (2,)


def test_scripts_show_a_batch_and_scenes():
    code, out, _ = run_here("data.py")
    assert code == 0 and "<BOI>" in out
    code, out, _ = run_here("extras/scenes.py")
    assert code == 0 and "held_out" in out
