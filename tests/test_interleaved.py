"""Documents in JSON lines: every form is read, every flag changes the gradient, and nothing bad in a file does more than be counted."""

import gzip
import json
import os
import pickle
import shutil
import tarfile
from types import SimpleNamespace

import edits
import numpy as np
import pytest
import torch
from conftest import TINY, flags, run_here, tiny_model, tiny_trained
from PIL import Image
from test_train import complaint, config_of

import extras
from data import NO_LOSS, DataConfig, ImageSegment, Stream, Tokenizer, collate, document_length
from diffusion import DDPM
from evaluate import evaluate
from extras import generate, interleaved, sources
from extras.interleaved import Interleaved, InterleavedDocuments, draw_again, read_line, score
from extras.loader import Loader
from extras.scores import format_scores
from extras.stories import Stories, StoryDocuments
from train import losses, parse, save, set_up, train_step, validate

TOKENIZER, N_PATCHES = Tokenizer(), 4
encode = TOKENIZER.encode


def write(folder, lines, images=4, name="docs.jsonl", side=8):
    """A file of these lines, dicts or text, and images 0.png, 1.png, ... beside it -> the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(images):
        Image.new("RGB", (side, side), (60 * n % 256, n, 255 - n)).save(folder / f"{n}.png")
    content = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    return folder / name


def parts(*given):
    """A line: texts as they are, images by their numbers, and whole parts."""
    return {"parts": [{"text": part} if isinstance(part, str) else {"image": f"{part}.png"} if isinstance(part, int) else part for part in given]}


def opened(path, split="train", **more):
    return Interleaved(path, 8, split, **{"cache": path.parent / "cache"} | more)


def documents(path, split="train", data={}, max_broken=0.05, **more):
    """{line: document} of a split."""
    config = DataConfig(**{"image_size": 8, "seq_len": 64, "drop_caption": 0.0, "image_first_max_t": 500} | data)
    make = InterleavedDocuments(opened(path, split, max_broken=max_broken), TOKENIZER, config, **more)
    return {int(make.name(i).rsplit(":", 1)[1]): make(i) for i in range(len(make.pairs))}


def described(document):
    """A document's segments: ("learned" or "given", text), or (max_t, the image's number)."""
    kinds = {list: "learned", tuple: "given"}
    return [(s.max_t, int(s.load()[0, 0, 1])) if isinstance(s, ImageSegment) else (kinds[type(s)], TOKENIZER.decode(s)) for s in document]


def of_line(line, folder, **more):
    """What becomes of one line. Others stand beside it, one of which is held out."""
    found = documents(write(folder, [line, *[parts(f"other {n}", n) for n in range(3)]]), **more) | documents(folder / "docs.jsonl", "held_out", **more)
    return described(found[1])


# ---- What a line becomes ------------------------------------------------------------------------------------------------

GIVEN_TEXT, GIVEN_IMAGE = {"text": "so", "loss": False}, {"image": "1.png", "loss": False}
TURN = lambda who, text: {"from": who, "value": text}


@pytest.mark.parametrize("line, expected", [
    (parts("a cat", 1), [("learned", "a cat"), (1000, 1)]),
    (parts(1, "a cat"), [(500, 1), ("learned", "a cat")]),  # the paper's limit where the image comes first
    (parts("a cat", 1, "make it blue", 2, "done"), [("learned", "a cat"), (1000, 1), ("learned", "make it blue"), (1000, 2), ("learned", "done")]),
    (parts(0, 1, "both"), [(500, 0), (500, 1), ("learned", "both")]),
    (parts(2), [(1000, 2)]),
    (parts("only words"), [("learned", "only words")]),
    (parts("one", "two", 1), [("learned", "one"), ("learned", " two"), (1000, 1)]),
    (parts(" a\ncat\u200b ", "\n", 1), [("learned", "a cat"), (1000, 1)]),  # texts are cleaned as captions are
    (parts(GIVEN_TEXT, 2), [("given", "so"), (1000, 2)]),
    (parts(GIVEN_IMAGE, "a cat"), [(0, 1), ("learned", "a cat")]),
    (parts({"image": "1.png", "max_t": 300}, "a cat"), [(300, 1), ("learned", "a cat")]),
    (parts("a cat", {"image": "1.png", "max_t": 5000}), [("learned", "a cat"), (1000, 1)]),
    (parts({"image": "1.png", "max_t": 300, "loss": False}, "a cat"), [(0, 1), ("learned", "a cat")]),
    (parts(1, "a cat") | {"id": 7, "source": "mine"}, [(500, 1), ("learned", "a cat")]),
    ({"input": "1.png", "instruction": "make it blue", "output": "2.png"}, [(0, 1), ("learned", "make it blue"), (1000, 2)]),
    ({"id": "x", "image": "1.png", "conversations": [TURN("human", "<image>\nWhat is it?"), TURN("gpt", "A cat."), TURN("human", "Sure?"), TURN("gpt", "Yes.")]},
     [(0, 1), ("given", "What is it?"), ("learned", " A cat."), ("given", " Sure?"), ("learned", " Yes.")]),
    ({"image": ["1.png", "2.png"], "conversations": [TURN("human", "Compare <image> with"), TURN("human", "<image>"), TURN("gpt", "no")]},
     [("given", "Compare"), (0, 1), ("given", "with"), (0, 2), ("learned", "no")]),
    ({"image": "2.png", "conversations": [TURN("human", "Draw a cat."), TURN("gpt", "<image>")]}, [("given", "Draw a cat."), (1000, 2)]),
    ({"conversations": [TURN("system", "Be brief."), TURN("user", "Hi"), TURN("assistant", "Ho")]}, [("given", "Be brief."), ("given", " Hi"), ("learned", " Ho")]),
])  # fmt: skip
def test_a_line_becomes_a_document(line, expected, tmp_path):
    assert of_line(line, tmp_path) == expected


def test_a_first_text_is_dropped_as_captions_are(tmp_path):
    path = write(tmp_path, [parts("a cat", n % 4, "more") for n in range(40)] + [parts(1, "b", 2)] * 4)
    config = DataConfig(image_size=8, drop_caption=0.5)
    make = InterleavedDocuments(opened(path), TOKENIZER, config)
    first = [make(i)[0] for i in range(400)]
    dropped = [ids == [] for ids in first if not isinstance(ids, ImageSegment)]
    assert 0.4 < np.mean(dropped) < 0.6 and any(isinstance(s, ImageSegment) for s in first)
    assert all(make(i)[2] == encode("more") for i in range(400) if not isinstance(make(i)[0], ImageSegment))


# ---- The loss -------------------------------------------------------------------------------------------------------


def gradient(document, model, ddpm, change=lambda batch: None):
    """Of both losses' sum on one document: one flat vector, the targets, and each image's loss where it counts."""
    batch = collate([[document]], TOKENIZER, 64, 16)
    change(batch)
    draw = torch.Generator().manual_seed(0)
    t, eps = ddpm.draw_timesteps(batch.max_t, draw), torch.randn(batch.images.shape, generator=draw)
    lm, images = losses(model, ddpm, batch, batch.images, t, eps)
    model.zero_grad()
    (lm.sum() + (images * (t > 0)).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), batch, t


def test_a_loss_flag_changes_the_gradient(tmp_path):
    """What is given has no target, and no diffusion loss; and all else keeps its own."""
    whole = parts("hello", 1, "see", 2)["parts"]
    flagged = lambda k, **more: {"parts": [part | more if n == k else part for n, part in enumerate(whole)]}
    path = write(tmp_path, [{"parts": whole}, flagged(0, loss=False), flagged(2, loss=False), flagged(1, loss=False), parts("x", 0)])
    found = documents(path) | documents(path, "held_out")
    model, ddpm = tiny_model(scale=2.0), DDPM(prediction="v")
    model.requires_grad_(True)
    plain, batch, _ = gradient(found[1], model, ddpm)
    ends = [1 + 5, 1 + 5 + 18 + 3]  # the last of each text, whose target is <BOI>
    for line, tokens in ((2, range(0, 5)), (3, range(1 + 5 + 18 - 1, ends[1] - 1))):
        by_hand = lambda batch: batch.targets.__setitem__((0, list(tokens)), NO_LOSS)
        given, without, _ = gradient(found[line], model, ddpm)
        expected, _, _ = gradient(found[1], model, ddpm, by_hand)
        assert (batch.targets[0, list(tokens)] != NO_LOSS).all() and (without.targets[0, list(tokens)] == NO_LOSS).all()
        assert int((batch.targets != without.targets).sum()) == len(tokens) and torch.equal(batch.tokens, without.tokens)
        assert torch.equal(given, expected) and not torch.allclose(given, plain)
    clean, without, t = gradient(found[4], model, ddpm)
    assert without.max_t.tolist() == [0, 1000] and t[0] == 0 < t[1] and torch.equal(without.targets, batch.targets)
    assert not torch.allclose(clean, plain)


def test_an_image_alone_with_a_loss_teaches_the_way_out_and_a_clean_one_does_not(tmp_path):
    path = write(tmp_path, [parts(GIVEN_IMAGE, "a"), parts({"image": "1.png", "max_t": 1}, "a"), parts("x", 0)])
    found = documents(path) | documents(path, "held_out")
    model, ddpm = tiny_model(), DDPM(prediction="v")
    model.requires_grad_(True)
    for line, learns in ((1, False), (2, True)):
        gradient(found[line], model, ddpm)
        assert (model.patches.decoder.weight.grad.abs().sum() > 0) == learns


# ---- Bad input, one by one ------------------------------------------------------------------------------------------

DEEP = '{"parts": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("line, kind", [
    ("{", "lines that are no JSON"), ("\xff\0", "lines that are no JSON"), (DEEP, "lines that are no JSON"), ('{"parts": [' + "9" * 5000 + "]}", "lines that are no JSON"),
    ("[]", 'lines without "parts"'), ("7", 'lines without "parts"'), ('"instruction"', 'lines without "parts"'), ("null", 'lines without "parts"'), ({}, 'lines without "parts"'),
    ({"parts": 3}, 'lines without "parts"'), ({"parts": None}, 'lines without "parts"'), ({"input": "1.png", "instruction": "x"}, 'lines without "parts"'),
    ({"conversations": [{"from": "gpt"}]}, 'lines without "parts"'), ({"conversations": [TURN("gpt", None)]}, 'lines without "parts"'),
    ({"conversations": [TURN("gpt", "<image>")]}, 'lines without "parts"'), ({"image": "1.png", "conversations": [TURN("gpt", "x")]}, 'lines without "parts"'),
    ({"parts": {"text": "x"}}, "not one text or one image"), ({"parts": ["x"]}, "not one text or one image"), ({"parts": [[["text", "x"]]]}, "not one text or one image"),
    (parts({"text": "x", "image": "1.png"}), "not one text or one image"), (parts({}), "not one text or one image"), (parts({"text": 7}), "not one text or one image"),
    (parts({"image": None}), "not one text or one image"), (parts({"image": ["1.png"]}), "not one text or one image"),
    ({"input": 1, "instruction": "x", "output": "1.png"}, "not one text or one image"),
    (parts({"text": "x", "losses": False}), "an unknown 'losses'"), (parts({"text": "x", "max_t": 3}), "an unknown 'max_t'"),
    *((parts({"text": "x", "loss": loss}), "neither true nor false") for loss in (0, 1, None, "false", [])),
    *((parts({"image": "1.png", "max_t": t}), "no whole number") for t in (-1, 1.5, "3", True)),
    (parts(), "empty documents"), (parts(" \n", {"text": "\u200b", "loss": False}), "empty documents"),
    (parts(GIVEN_TEXT, GIVEN_IMAGE), "nothing is learned"), (parts({"image": "1.png", "max_t": 0}), "nothing is learned"),
    *((parts("x", {"image": name}), "not in the folder") for name in (
        "gone.png", "", ".", "sub", "../secret.png", "/etc/passwd", "http://127.0.0.1/1.png", "file:///etc/passwd", "a\0b.png", "\ud800.png", "out.png", "out/secret.png", "dead.png", "x" * 5000)),
])  # fmt: skip
def test_what_cannot_be_used_is_skipped_and_named(line, kind, tmp_path, capfd):
    folder = tmp_path / "data"
    path = write(folder, [parts(f"good {n}", n) for n in range(3)] + [line, "", parts("good", 3)])
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "dead.png").symlink_to(folder / "nothing")
    (folder / "sub").mkdir()
    found = documents(path, max_broken=0.5) | documents(path, "held_out", max_broken=0.5)
    assert set(found) == {1, 2, 3, 6}
    said = capfd.readouterr().err
    assert "4 documents; left out: 1 " in said and kind in said and f"(first: {path}:4)" in said
    with pytest.raises(ValueError, match="1 of 5 documents cannot be used, more than --max_broken 0.05 allows") as error:
        opened(path)
    assert kind in str(error.value) and "\n" not in str(error.value)


def test_links_within_the_folder_and_folders_are_followed(tmp_path):
    path = write(tmp_path / "real", [parts(n, "x") for n in range(3)] + [parts("x", {"image": "a/../link.png"}), parts("x", {"image": str(tmp_path / "real/2.png")})])
    (path.parent / "a").mkdir()
    (path.parent / "link.png").symlink_to("1.png")
    (tmp_path / "linked").symlink_to("real")
    found = documents(tmp_path / "linked/docs.jsonl") | documents(tmp_path / "linked/docs.jsonl", "held_out")
    assert described(found[4])[1] == (1000, 1) and described(found[5])[1] == (1000, 2)


def test_a_link_that_changes_later_is_not_followed(tmp_path):
    path = write(tmp_path / "data", [parts(f"t {n}", n) for n in range(4)])
    source = opened(path)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for n in range(4):
        (path.parent / f"{n}.png").unlink()
        (path.parent / f"{n}.png").symlink_to(tmp_path / "secret.png")
    for name in ("0.png", "../secret.png", str(tmp_path / "secret.png")):  # as of a table that came with the data
        with pytest.raises(ValueError, match="is not there, or lies outside of the folder"):
            source.read(name, name, 0, 0)
    with pytest.raises(ValueError, match="outside of the folder"):
        source.read("x", "docs.jsonl", 1, 2**40)


@pytest.mark.parametrize("name, content, expected", [
    ("gone.jsonl", None, "no such file"), ("docs.json", b"[]", "is no .jsonl or .jsonl.gz"), ("docs.jsonl", b"", "holds documents of no kind that can be used: nothing"),
    ("docs.jsonl", b'{"parts": [{"text": "a"}]}\n' * 3, "none of its documents has an image; text alone goes to --text"),
    ("docs.jsonl", b'{"parts": [{"image": "0.png"}]}\n', "at least two are needed"), ("docs.jsonl.gz", b"no gzip", "is not whole JSON lines|cannot be read"),
    ("docs.jsonl.gz", gzip.compress(b'{"parts": [{"image": "0.png"}]}\n' * 9)[:-9], "is not whole JSON lines"),
])  # fmt: skip
def test_a_file_that_is_none_is_one_sentence(name, content, expected, tmp_path):
    path = write(tmp_path, []).with_name(name)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        opened(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def loader(path, seq_len=40, rows=2, max_broken=0.5, workers=0):
    """Batches, as training has them -> (Loader, its count of pictures, its count of documents)."""
    make = InterleavedDocuments(opened(path, max_broken=max_broken), TOKENIZER, DataConfig(image_size=8, seq_len=seq_len))
    pictures, too_long = sources.Skipped("pictures", max_broken), sources.Skipped("documents", max_broken)
    stream = Stream(make, seq_len, rows, N_PATCHES, skipped=too_long)
    return Loader(stream, TOKENIZER, workers, skipped=pictures), pictures, too_long


def test_for_a_broken_image_another_document_stands_in(tmp_path, capfd):
    """It is cut to no more images, and fits the row."""
    path = write(tmp_path, [parts("one", 1, "two", 2, "three", 3, "and more"), parts("a", {"image": "broken.png"}), parts("b", 0)] * 8)
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    load, pictures, too_long = loader(path, seq_len=45)
    for _ in range(30):
        batch = next(load)
    said = capfd.readouterr().err
    assert pictures.skipped == 1 and "broken.png: cannot be read as an image" in said and not too_long.named
    with pytest.raises(ValueError, match="pictures had to be left out, more than --max_broken 0 allows; the last: .*broken.png"):
        load = loader(path, seq_len=45)[0]
        load.skipped.max_broken = 0.0
        for _ in range(30):
            next(load)
    make = load.stream.documents
    for number in range(24):
        for attempt in range(1, 5):
            stand_in, first = make(number, attempt), make(number)
            assert interleaved.count_images(stand_in) <= interleaved.count_images(first)
    assert batch.tokens.shape == (2, 45)


def test_a_document_longer_than_a_row_is_skipped_and_named(tmp_path, capfd):
    path = write(tmp_path, [parts(f"short {n}", n % 4) for n in range(30)] + [parts("long " * 20, 1)] * 2 + [parts(0, 1, 2, 3, 0, 1, 2, 3)])
    load, _, too_long = loader(path)
    for _ in range(40):
        next(load)
    said = capfd.readouterr().err
    assert 1 <= too_long.skipped <= 3 and "docs.jsonl:3" in said and "positions and seq_len is 40" in said


# ---- Where images are -----------------------------------------------------------------------------------------------


def test_images_may_be_members_of_tars_beside_the_file(tmp_path):
    """Files come first. A member that is a link, or leads out, is none; a broken tar costs what is in it."""
    path = write(tmp_path, [parts(f"t {n}", n) for n in range(6)], images=6)
    plain = {line: described(document) for split in ("train", "held_out") for line, document in documents(path, split).items()}
    for n in range(1, 6):
        with tarfile.open(tmp_path / f"{n % 2}.tar", "a") as tar:
            tar.add(tmp_path / f"{n}.png", ("./" if n == 3 else "") + f"{n}.png")
        (tmp_path / f"{n}.png").unlink()
    tars = {line: described(document) for split in ("train", "held_out") for line, document in documents(path, split).items()}
    assert tars == plain and len(plain) == 6
    before = opened(path).fingerprint
    (tmp_path / "1.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="3 of 6 documents cannot be used.*3 documents with an image that is not in the folder"):
        opened(path)
    assert "6 documents" in before


@pytest.mark.parametrize("what", ["gz", "several", "mixed"])
def test_gzipped_and_several_files(what, tmp_path, capfd):
    lines = [parts(f"t {n}", n % 4) for n in range(20)]
    plain = write(tmp_path / "a", lines)
    other = write(tmp_path / "b", lines, name="docs.jsonl.gz")
    assert {n: described(d) for n, d in documents(plain).items()} == {n: described(d) for n, d in documents(other).items()}
    assert opened(plain).fingerprint == opened(other).fingerprint  # wherever it lies
    if what == "several":
        pairs = extras.open_pairs(config_of(tmp_path / "out", data=f"{plain}:3,{other}", image_size=8))
        assert isinstance(pairs, sources.Mixture) and 250 < sum(str(plain) in pairs.name(i) for i in range(400)) < 350
        assert [type(part) for part, _ in pairs.parts(5)] == [str, type(pairs.parts(5)[1][0])] and pairs.pair(3)[0].startswith("t ")
    if what == "mixed":
        with pytest.raises(ValueError, match=f"{tmp_path}/a: is no .jsonl or .jsonl.gz, as the others are"):
            extras.open_pairs(config_of(tmp_path / "out", data=f"{plain},{tmp_path}/a"))


@pytest.mark.parametrize("options, expected", [
    (dict(latents="somewhere", vae="x.pt"), "latents are of pairs"), (dict(inception="x"), "trained on documents in .jsonl"), (dict(encode="somewhere"), "--encode writes latents of pairs"),
])  # fmt: skip
def test_what_is_of_pairs_alone_is_refused(options, expected, tmp_path):
    path = write(tmp_path, [parts("a", n) for n in range(4)])
    if "encode" in options:
        assert expected in complaint("vae.py", *flags(**TINY, data=path, out=tmp_path / "out", **options))
    elif "inception" in options:
        trained = tiny_trained(tiny_model())
        trained.extra.data = str(path)
        with pytest.raises(ValueError, match=expected):
            evaluate(trained, 1, **options)
    else:
        assert expected in complaint("train.py", *flags(**TINY, data=path, out=tmp_path / "out", **options))


# ---- Order, splits, memory ------------------------------------------------------------------------------------------


def test_the_lines_are_read_once_and_not_kept_in_memory(tmp_path, monkeypatch):
    path = write(tmp_path, [parts(f"text {n}", n % 4) for n in range(2000)])
    first = opened(path)
    monkeypatch.setattr(interleaved, "read_line", lambda line: pytest.fail("it is read again"))
    again = opened(path)
    assert again.fingerprint == first.fingerprint and isinstance(again.table.blob, np.memmap) and isinstance(again.table.rows, np.memmap)
    assert [part for part, _ in again.parts(1234)][0] == [part for part, _ in first.parts(1234)][0]
    os.utime(path, (0, 0))
    with pytest.raises(pytest.fail.Exception):
        opened(path)


def test_splits_are_by_the_first_image_and_by_the_text_where_there_is_none(tmp_path):
    lines = [parts(n % 50, f"question {n}") for n in range(200)] + [parts(f"text {n}") for n in range(100)]
    path = write(tmp_path, lines, images=50)
    train, held_out = documents(path), documents(path, "held_out")
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 300 and 5 < len(held_out) < 60
    number = lambda found: {(line - 1) % 50 for line in found if line <= 200}
    assert not number(train) & number(held_out)
    changed = write(tmp_path / "changed", [*lines[:-1], parts("another text")], images=50)
    assert opened(changed).fingerprint != opened(path).fingerprint


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_the_rows_and_workers_make_the_same_documents(ranks, tmp_path):
    path = write(tmp_path, [parts(f"t {n}", n % 4, *[f"and {n}", (n + 1) % 4] * (n % 3)) for n in range(60)])
    make = InterleavedDocuments(opened(path), TOKENIZER, DataConfig(image_size=8, seq_len=60))
    streams = [Stream(make, 60, 4, N_PATCHES, range(rank, 4, ranks)) for rank in range(ranks)]
    alone = Stream(make, 60, 4, N_PATCHES)
    for _ in range(10):
        rows = [next(stream) for stream in streams]
        expected = [[described(d) for d in row] for row in next(alone)]
        assert [[described(d) for d in rows[r % ranks][r // ranks]] for r in range(4)] == expected
    sent = pickle.loads(pickle.dumps(make))
    assert [described(sent(i)) for i in range(60)] == [described(make(i)) for i in range(60)]


def test_a_stopped_run_goes_on_bit_for_bit(small_run, tmp_path):
    path = write(tmp_path, [parts(f"t {n}", n % 4, f"and {n}", (n + 1) % 4) for n in range(30)], side=32)
    options = dict(data=path, vae=small_run[0] / "out/small/vae.pt", image_size=32)
    straight = set_up(config_of(tmp_path / "a", **options))
    expected = [train_step(straight) for _ in range(4)]
    stopped = set_up(config_of(tmp_path / "b", **options))
    found = [train_step(stopped) for _ in range(2)]
    save(stopped)
    again = set_up(config_of(tmp_path / "b", **options), resume=True)
    found += [train_step(again) for _ in range(2)]
    assert [(step["lm"], step["ddpm"], step["norm"]) for step in found] == [(step["lm"], step["ddpm"], step["norm"]) for step in expected]
    write(tmp_path, [parts(f"t {n}", n % 4, f"and {n} more", (n + 1) % 4) for n in range(30)], side=32)
    with pytest.raises(ValueError, match="was trained with data 30 documents .*, not 30 documents"):
        set_up(config_of(tmp_path / "b", **options), resume=True)


# ---- Edits of one's own ---------------------------------------------------------------------------------------------


def test_exported_edits_are_the_built_in_ones(tmp_path):
    """Token for token and pixel for pixel, noise limits included: so they train the same model, and score the same."""
    edits.export(tmp_path, 40)
    data = DataConfig(image_size=32, seq_len=112)
    built_in = StoryDocuments(Stories(), TOKENIZER, data)
    config = SimpleNamespace(data=data, extra=extras.Choices(data=str(tmp_path / "edits.jsonl"), documents="edits"))
    lines = set()
    for split in ("train", "held_out"):
        own = InterleavedDocuments(extras.open_pairs(config, split), TOKENIZER, data)
        for i in range(len(own.pairs)):
            line = int(own.name(i).rsplit(":")[-1]) - 1
            batches = [collate([[document]], TOKENIZER, 112, N_PATCHES) for document in (built_in(line), own(i))]
            for name, value in vars(batches[0]).items():
                assert torch.equal(value, getattr(batches[1], name)), name
            lines.add(line)
    assert lines == set(range(40))


@pytest.mark.parametrize("wrong", [0, 3])
def test_images_are_scored_by_their_distance(wrong, tmp_path):
    """The last image that a text precedes is drawn again, after all that is before it."""
    lines = [parts(1, "x", 2), parts("a", "b", 2, 3), parts(1, 2), parts("words"), parts(0, "y", 1, "z", 2, "end")] * 8
    path = write(tmp_path, lines, images=4)
    trained = tiny_trained(tiny_model())
    trained.extra.data, trained.extra.cache = str(path), str(tmp_path / "cache")
    asked = []

    def draws(trained, prompts, seeds, max_tokens):
        asked.extend(prompts)
        return [[*prompt, Image.new("RGB", (8, 8), (120, 2, 253) if n >= wrong else (120, 2, 0))] for n, prompt in enumerate(prompts)]

    found = score(extras.open_pairs, trained, "seen", 8, 1, draws)["images"]
    shapes = {tuple(part if isinstance(part, str) else part.getpixel((0, 0))[1] for part in prompt) for prompt in asked}
    assert shapes <= {(1, "x"), ("a b",), (0, "y", 1, "z")} and found["n"] == len(asked) == 8
    assert found["distance"] == pytest.approx(wrong / 8 * 253 / 255 / 3) and found["copied"] > 0
    scores = evaluate(trained, 4, generate=draws)
    assert list(scores["splits"]) == ["seen", "held_out"] and "distance   copied" in format_scores(scores)
    documents, true = draw_again(trained, opened(path), 3, generate)
    assert len(documents) == len(true) == 3 and all(isinstance(document[-1], Image.Image) for document in documents)


def test_own_edits_as_a_user_trains_them(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edits.export(tmp_path / "data", 24)
    tiny = {name: TINY[name] for name in ("rows", "eval_documents", "judged", "steps", "max_steps")}
    command = flags(config="small_edit", data="data/edits.jsonl", init_from=small_run[0] / "out/small", **tiny)
    code, out, err = run_here("train.py", *command)
    assert code == 0, err
    assert "held out, images" in out and "distance" in out and "python sample.py --ckpt out/small_edit/checkpoint.pt --image IMAGE.png" in out
    assert Image.open("out/small_edit/samples_000004.png").width > 300 and "24 documents" in err
    shutil.move("data", "moved")
    code, out, err = run_here("train.py", *[word.replace("data/", "moved/") for word in command], "--resume")
    assert code == 0, err
    code, out, err = run_here("sample.py", "--image", "moved/00000.png", "--prompt", "make it blue", "--num", 1)
    assert code == 0 and "[out/samples/000.png]" in out, err


def test_own_documents_as_a_user_trains_them(tmp_path, monkeypatch):
    """From a VAE and a tokenizer of their own to a caption."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", [parts(f"number {n}", n, "go on", n + 1) for n in range(30)] + [parts(f"text {n}") for n in range(9)], images=31, side=32)
    code, out, err = run_here("train.py", *flags(**TINY, data="data/docs.jsonl", out="out/mine"))
    assert code == 0 and "held out, images" in out, err
    code, out, err = run_here("evaluate.py", "out/mine", "--judged", 2)
    assert code == 0 and "distance" in out, err
    code, out, err = run_here("sample.py", "--ckpt", "out/mine", "--prompt", "number 3", "--num", 1)
    assert code == 0 and "[out/samples/000.png]" in out, err


@pytest.mark.slow
def test_edits_from_files_train_as_the_built_in_ones(small_run, tmp_path, monkeypatch, capsys):
    """A few steps of each, in other orders, end at nearly the same loss; and the exact judge judges what came from files."""
    monkeypatch.chdir(tmp_path)
    edits.export(tmp_path / "data", 400)
    common, found = dict(config="small_edit", init_from=small_run[0] / "out/small", max_steps=40, warmup=10, eval_documents=32, rows=4, steps=2), {}
    for out, more in (("built_in", {}), ("own", dict(data="data/edits.jsonl"))):
        run = set_up(parse(flags(**common, out=out, **more))[0])
        before = validate(run)["val_ddpm"]
        for _ in range(40):
            train_step(run)
        save(run)
        found[out] = validate(run)["val_ddpm"]
        assert found[out] < before - 0.02
    assert found["own"] == pytest.approx(found["built_in"], rel=0.1)
    edits.judge("own", 4, 1)
    said = capsys.readouterr().out
    assert all(f"{split}, edits" in said for split in ("seen", "held out", "never seen")) and "kept" in said
