"""data.py, the formats of your own data: tars, COCO, mixtures, pictures of every kind, text, tokenizer.json, and loading in other
processes. Bad input is a counted skip or one clear sentence."""

import io
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, divide, flags, run_here
from PIL import Image

import data
from data import DataConfig, ImageSegment, PairDocuments, Stream, Tokenizer
from extras.loader import BatchDataset, Loader
from extras import Choices, open_pairs, open_text, open_tokenizer, pairs, restore_tokenizer
from extras.pairs import Pairs, load_image
from extras.scenes import Scenes
from extras.sources import Mixture, Skipped, WithText, fitting, readable, say
from extras.text import TextFiles
from extras.tokenizers import BPETokenizer, JSONTokenizer, read_tokenizer
from sample import load

BYTES = Tokenizer()


@pytest.fixture(autouse=True)
def nothing_said_before():
    say.cache_clear()


def configured(**options):
    """Options as what opens sources takes them."""
    own, extra = divide({"image_size": 8} | options, DataConfig, Choices)
    return SimpleNamespace(data=DataConfig(**own), extra=Choices(**extra))


def with_text(documents, config, text):
    """The recipe with text alone between its documents, if there is any."""
    return WithText(documents, text, config.data.text_fraction, 16) if text else documents


def image_bytes(shade, kind="PNG", size=(12, 10)):
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    """members: (name, bytes) or TarInfo."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def numbered(numbers):
    """The members of a shard, as img2dataset writes them."""
    for n in numbers:
        yield f"{n:09d}.png", image_bytes(n)
        yield f"{n:09d}.txt", f"picture {n}".encode()
        yield f"{n:09d}.json", json.dumps({"caption": f"json {n}", "key": f"{n:09d}", "status": "success"}).encode()


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "shards").mkdir()
    for s in range(3):
        write_tar(tmp_path / "shards" / f"{s:05d}.tar", numbered(range(20 * s, 20 * s + 20)))
    return tmp_path / "shards"


def everything(path, **options):
    """All captions of a source, both splits, one epoch."""
    return sorted(source.pair(i)[0] for split in ("train", "held_out") for source in [Pairs(path, 8, split, **options)] for i in range(len(source)))


# ---- Tars -----------------------------------------------------------------------------------------------------------


def test_tars_hold_the_pairs_that_the_same_files_in_a_folder_do(shards, tmp_path):
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path / "folder", filter="data")
    for split in Pairs.SPLITS:
        a, b = Pairs(shards, 8, split, seed=3), Pairs(tmp_path / "folder", 8, split, seed=3)
        assert len(a) == len(b) > 0
        for i in range(2 * len(a)):
            (caption, load), (same, load_same) = a.pair(i), b.pair(i)
            assert caption == same and np.array_equal(load(), load_same()) and caption == f"picture {load()[0, 0, 0]}"
    assert everything(shards) == sorted(f"picture {n}" for n in range(60))
    assert [Pairs(shards, 8).pair(i)[0] for i in range(9)] != [Pairs(shards, 8, seed=1).pair(i)[0] for i in range(9)]
    assert everything(shards / "00001.tar") == sorted(f"picture {n}" for n in range(20, 40))  # a single one will do
    assert "00000.tar: 0000000" in Pairs(shards / "00000.tar", 8).name(0)


def test_tars_are_indexed_once_and_again_when_they_change(shards, monkeypatch):
    before = everything(shards)
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **more: (opened.append(1), real(*args, **more))[1])
    assert everything(shards) == before and not opened
    write_tar(shards / "00001.tar", numbered(range(100, 125)))
    after = everything(shards)
    assert "picture 124" in after and "picture 20" not in after and len(opened) == 1 + 3  # 1: write_tar's own


def test_index_goes_to_the_cache_folder_or_to_out_if_need_be(shards, tmp_path, monkeypatch):
    assert len(everything(shards, cache=str(tmp_path / "mine"))) == 60 and list((tmp_path / "mine").iterdir()) and not (shards / ".transfusion").exists()
    (shards / ".transfusion").write_text("in the way, as a folder that cannot be written would be")
    monkeypatch.chdir(tmp_path)
    assert len(everything(shards)) == 60 and list((tmp_path / "out/cache").iterdir())
    with pytest.raises(ValueError, match="--cache .*cannot be written"):
        Pairs(shards, 8, cache=str(shards / "00000.tar" / "below"))


def test_folders_are_read_once_and_again_when_a_caption_changes(tmp_path, monkeypatch):
    path = folder_with(tmp_path / "data", set(), 30)
    before = everything(path)
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "join", lambda *_: 1 / 0)
        assert everything(path) == before and len(list((path / ".transfusion").iterdir())) == 1
    (path / "007.txt").write_text("another caption")
    assert "another caption" in (after := everything(path))
    (path / "008.jpg").unlink()
    assert len(everything(path)) == len(after) - 1


def test_hidden_files_are_not_data(tmp_path):
    path = folder_with(tmp_path / "data", set(), 10)
    for hidden in (".git/a", "deep/.cache/a", "._000"):
        (path / hidden).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".jpg", ".tar", ".txt"):
            (path / hidden).with_name((path / hidden).name + suffix).write_bytes(b"no picture")
    assert len(everything(path)) == 10


def test_tars_and_pictures_in_one_folder_are_refused(shards):
    """Neither is a silent loss of the other."""
    folder_with(shards / "more", set(), 7)
    with pytest.raises(ValueError, match="shards: holds 3 tars and 7 pictures; name the tars, or"):
        Pairs(shards, 8)
    assert len(everything(shards / "more")) == 7


def test_what_is_neither_folder_tar_nor_json_is_refused(shards):
    for name, message in (("x.png", "is no folder, .tar or .json; --data"), ("x.tar.gz", "is no folder, .tar or .json; a .tar must not be compressed"),
                          ("none", "no such file or folder; --data wants"), ("none.tar", "no such file or folder"), ("none.json", "no such file or folder")):  # fmt: skip
        if "none" not in name:
            (shards / name).write_bytes(b"...")
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            Pairs(shards / name, 8)


def test_interrupted_indexing_leaves_nothing(shards, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", stop)  # not reached: indexing opens no picture
    assert len(everything(shards)) == 60
    monkeypatch.setattr(tarfile, "open", stop)
    os.utime(shards / "00000.tar", (1, 1))
    with pytest.raises(KeyboardInterrupt):
        Pairs(shards, 8)
    assert len(list((shards / ".transfusion").iterdir())) == 1  # the first index


def test_several_processes_may_index_at_the_same_time(shards):
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert [len(found) for found in pool.map(everything, [shards] * 3)] == [60] * 3
    assert len(list((shards / ".transfusion").iterdir())) == 1


def test_captions_come_from_json_where_there_is_no_text(tmp_path):
    members = [m for m in numbered(range(10)) if not m[0].endswith(".txt")] + [("x.jpg", image_bytes(1, "JPEG")), ("x.txt", b" "), ("x.json", b'{"caption": "of x"}')]
    assert everything(write_tar(tmp_path / "a.tar", members)) == sorted([f"json {n}" for n in range(10)] + ["of x"])


@pytest.mark.parametrize("where", ["in a picture", "in a header", "between members"])
def test_a_tar_cut_short_keeps_what_came_before_and_says_so(where, shards, capsys):
    path = shards / "00002.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[30]  # a picture
    path.write_bytes(path.read_bytes()[: {"in a picture": member.offset_data + 20, "in a header": member.offset + 100, "between members": member.offset}[where]])
    assert len(everything(shards)) == 50
    assert "tars cut short or damaged (first: " in (said := capsys.readouterr().err) and "00002.tar)" in said


def test_what_is_no_tar_is_refused_by_name(shards):
    for content in (b"not a tar", b"", b"\x1f\x8b" + bytes(2000)):
        (shards / "00001.tar").write_bytes(content)
        with pytest.raises(ValueError, match="00001.tar: is not an uncompressed tar"):
            Pairs(shards, 8)


@pytest.mark.parametrize("at", [0, 1])
def test_a_tar_with_a_negative_size_is_named(at, tmp_path, capsys):
    member = tarfile.TarInfo("x.png")
    member.size = -256
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    path = write_tar(tmp_path / "a.tar", numbered(range(10 * at)))
    content = path.read_bytes().rstrip(b"\0") if at else b""
    path.write_bytes(content + bytes(-len(content) % 512) + header + bytes(10240))
    if at:
        assert len(everything(path)) == 10 and "1 tars cut short or damaged (first: " in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="a.tar: is not an uncompressed tar, or is broken from the start"):
            Pairs(path, 8)


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, str(target)
    return info


def test_hostile_names_and_links_are_left_out_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(image_bytes(200))
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    before = {p for p in tmp_path.rglob("*")}
    members = [*numbered(range(60)), ("../up.png", image_bytes(1)), ("../up.txt", b"up"), ("/abs.png", image_bytes(1)), ("/abs.txt", b"abs"),
               link("s.png", tarfile.SYMTYPE, tmp_path / "secret.png"), ("s.txt", b"a link"), link("h.png", tarfile.LNKTYPE, "000000001.png"), ("h.txt", b"a link"),
               link("f.png", tarfile.FIFOTYPE, ""), ("f.txt", b"a pipe"), ("odd\x1b[2Jname\n.png", image_bytes(1))]  # fmt: skip
    path = write_tar(work / "x.tar", members)
    assert everything(path) == sorted(f"picture {n}" for n in range(60))
    said = capsys.readouterr().err
    assert "4 names that lead out of the tar (first: " in said and "3 links and special files" in said and "3 captions without a picture" in said
    assert "1 without a caption" in said and "odd?[2Jname?" in said and "\x1b" not in said
    assert {p for p in tmp_path.rglob("*") if ".transfusion" not in p.parts} == before | {path}


def test_names_that_come_twice(tmp_path, capsys):
    """As in unpacking, the last one counts; the same name in another tar is another pair."""
    write_tar(tmp_path / "0.tar", [*numbered(range(9)), ("000000003.png", image_bytes(77)), ("000000003.txt", b"picture 77")])
    write_tar(tmp_path / "1.tar", [("000000003.png", image_bytes(99)), ("000000003.txt", b"picture 99")])
    assert everything(tmp_path) == sorted([f"picture {n}" for n in (0, 1, 2, 4, 5, 6, 7, 8, 77, 99)])
    assert "2 names that come twice" in capsys.readouterr().err


@pytest.mark.parametrize("files, kind", [
    ([("x.png", b"...")], "without a caption"), ([("x.png", b"..."), ("x.txt", b"")], "empty"), ([("x.png", b"..."), ("x.txt", b"\xff\xfe")], "UTF-8"),
    ([("x.png", b"..."), ("x.json", b"[1, 2]")], "JSON"), ([("x.png", b"..."), ("x.json", b'{"caption": null}')], "empty"),
    ([("x.png", b"..."), ("x.json", b'{"caption": 3')], "JSON"), ([("x.png", b"..."), ("x.json", b"[" * 100_000)], "JSON"),
])  # fmt: skip
def test_bad_captions_in_tars(files, kind, tmp_path, capsys):
    assert len(everything(write_tar(tmp_path / "a.tar", [*numbered(range(40)), *files]))) == 40
    said = capsys.readouterr().err
    assert kind in said and "x" in said and "40 pictures with captions; left out: 1 with" in said
    with pytest.raises(ValueError, match="holds pictures with captions of no kind that can be used: 1 with"):
        Pairs(write_tar(tmp_path / "b.tar", files), 8)
    assert not [p for p in (tmp_path / ".transfusion").iterdir() if p.name.startswith(("b-", "tmp"))]


def test_a_table_takes_no_memory_per_pair(tmp_path):
    """Only numpy arrays, mapped from disk; `bench.py data --pairs 210000` measures it."""
    source = Pairs(write_tar(tmp_path / "a.tar", numbered(range(50))), 8)
    assert isinstance(source.table.blob, np.memmap) and isinstance(source.table.rows.base, np.memmap)
    assert not any(isinstance(value, (list, dict, set)) and len(value) > 1 for value in (vars(source) | vars(source.table)).values())


ODD = {
    "a,b.png": image_bytes(1), "a,b.json": b'\xef\xbb\xbf{"caption": ["one", "two", 3, " "]}', ".hidden.png": image_bytes(1), ".hidden.txt": b"hidden",
    "key.left.png": image_bytes(1), "key.right.png": image_bytes(2), "key.txt": b"by its key", "zero.png": image_bytes(1), "zero.txt": b"\xe2\x80\x8b",
    "long.png": image_bytes(1), "long.txt": b"x" * 2**21, "alone.png": image_bytes(1), "object.png": image_bytes(1), "object.json": b'{"caption": {"a": 1}}',
}  # fmt: skip
ODD |= {f"{n}.JPG": image_bytes(n, "JPEG") for n in range(10)} | {f"{n}.TXT": b"\xef\xbb\xbfpicture\r\n%d \xe2\x80\x8b" % n for n in range(10)}


def test_odd_files_are_the_same_pairs_in_folders_and_tars(tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, content in ODD.items():
        (folder / name).write_bytes(content)
    write_tar(tmp_path / "odd.tar", sorted(ODD.items()))
    (folder / "a.txt").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "fifo.png")
    for path in (folder, tmp_path / "odd.tar"):
        assert everything(path, max_broken=0.5) == sorted([f"picture {n}" for n in range(10)] + ["one", "by its key"])
        said = capsys.readouterr().err
        for part in ("1 with a caption longer than a megabyte", "2 with an empty caption", "1 without a caption", "1 pictures too many for one caption", "found 12 pictures"):
            assert part in said
    for split in ("train", "held_out"):
        a, b = Pairs(folder, 8, split, max_broken=0.5), Pairs(tmp_path / "odd.tar", 8, split, max_broken=0.5)
        assert [a.captions(i) for i in range(len(a))] == [b.captions(i) for i in range(len(b))] and a.fingerprint == b.fingerprint


@pytest.mark.parametrize("name", ["{n:03d}", "{tar}/{n}", "{tar:04d}{n:05d}", "{tar}{n}/front", "{tar}/{n}/00"])
def test_about_a_tenth_is_held_out_whatever_the_names_are(name, tmp_path):
    """Though every tar has the same names, too. What has one name has one side."""
    for tar in range(40):
        members = [(name.format(tar=tar, n=n) + suffix, content) for n in range(10) for suffix, content in ((".png", b"..."), (".txt", b"x"))]
        write_tar(tmp_path / f"{tar:03d}.tar", members)
    train, held_out = (Pairs(tmp_path, 8, split) for split in ("train", "held_out"))
    assert 0.06 < len(held_out) / (len(train) + len(held_out)) < 0.14
    names = [{source.name(i).split(": ")[1] for i in range(len(source))} for source in (train, held_out)]
    assert not names[0] & names[1]


def test_pairs_of_a_folder_stay_together_if_asked(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n % 25}/{n}{suffix}", content) for n in range(500) for suffix, content in ((".png", b"..."), (".txt", b"x"))])
    train, held_out = (Pairs(tmp_path / "a.tar", 8, split, by_folder=True) for split in ("train", "held_out"))
    groups = [{source.name(i).split(": ")[1].split("/")[0] for i in range(len(source))} for source in (train, held_out)]
    assert not groups[0] & groups[1] and 0.03 < len(held_out) / 500 < 0.2


def change(column, value):
    def do(folder):
        rows = np.fromfile(folder / "rows", np.int64).reshape(-1, 5)
        rows[0, column] = value
        rows.tofile(folder / "rows")

    return do


def in_blob(before, after):
    return lambda folder: (folder / "blob").write_bytes((folder / "blob").read_bytes().replace(before, after, 1))


def pipe(folder):
    (folder / "blob").unlink()
    os.mkfifo(folder / "blob")


@pytest.mark.parametrize("forge, found", [
    (lambda folder: (folder / "rows").write_bytes(b"short"), True), (lambda folder: (folder / "blob").write_bytes(b""), True), (lambda folder: (folder / "note").unlink(), True),
    (pipe, True), (change(0, 10**9), True), (change(1, -5), True), (change(1, 9), True), (change(2, -1), True), (change(2, 7), False), (change(3, 2**60), False),
    (in_blob(b"000.jpg", b"../0jpg"), False), (in_blob(b"000.jpg", b"/00.jpg"), False), (in_blob(b"000.jpg", b"001.txt"), False), (in_blob(b"000.jpg", b"00p.jpg"), False),
])  # fmt: skip
def test_a_table_that_came_with_the_data_is_not_believed(forge, found, tmp_path):
    """A broken one is made anew. One that names what the data's rules forbid opens nothing."""
    path = folder_with(tmp_path / "data", set(), 30)
    everything(path)
    os.mkfifo(path / "00p.jpg")
    for folder in (path / ".transfusion").iterdir():
        forge(folder)
    source = Pairs(path, 8)
    if found:
        assert source.read(0).shape == (8, 8, 3) and len(everything(path)) == 30
    else:
        with pytest.raises(ValueError, match="is not there, or lies outside of the data|cannot be read as an image"):
            source.read(0)


def test_a_source_tells_what_its_data_are_wherever_they_lie(shards, tmp_path):
    before = Pairs(shards, 8).fingerprint
    assert before.startswith("60 pictures with captions (") and Pairs(shards, 16, "held_out", seed=2).fingerprint == before
    shards.rename(tmp_path / "moved")
    assert Pairs(tmp_path / "moved", 8).fingerprint == before
    mixed = open_pairs(configured(data=f"{tmp_path}/moved/:2,{tmp_path}/moved/00000.tar"))
    assert mixed.fingerprint.startswith(before + ", 20 pictures")
    write_tar(tmp_path / "moved" / "9.tar", numbered(range(100, 101)))
    assert Pairs(tmp_path / "moved", 8).fingerprint.startswith("61 pictures with captions (")
    (tmp_path / "t.txt").write_text("words " * 90)
    text = TextFiles(text_config(tmp_path / "t.txt"), BYTES)
    assert text.fingerprint.startswith("14 texts (")
    config = configured(seq_len=40)
    documents = with_text(PairDocuments(mixed, BYTES, config.data), config, text)
    assert documents.pairs is mixed and documents.text is text  # where checkpoints look


def test_one_process_says_what_all_of_them_found(shards, monkeypatch, capsys):
    monkeypatch.setattr("extras.sources.FIRST", False)
    assert len(Pairs(shards, 8)) and not capsys.readouterr().err
    say("skipped: this picture, by this process alone")
    assert "this picture" in capsys.readouterr().err


# ---- COCO -----------------------------------------------------------------------------------------------------------


def write_coco(path, folder, n=12, **change):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i:012d}.jpg").write_bytes(image_bytes(10 * i, "JPEG"))
    content = {"images": [{"id": 7 * i, "file_name": f"{i:012d}.jpg"} for i in range(n)],
               "annotations": [{"id": 100 * i + k, "image_id": 7 * i, "caption": f"caption {k} of {i}\n"} for i in range(n) for k in range(5)]}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | change))
    return path


@pytest.mark.parametrize("name, folder", [
    ("captions.json", "."), ("captions.json", "images"), ("annotations/captions_train2017.json", "train2017"),
    ("annotations/captions_val2014.json", "images/val2014"), ("captions_train2017.json", "train2017"),
])  # fmt: skip
def test_coco_finds_its_pictures_and_takes_another_caption_each_epoch(name, folder, tmp_path):
    source = Pairs(write_coco(tmp_path / name, tmp_path / folder), 8)
    n = len(source)
    assert n + len(Pairs(tmp_path / name, 8, "held_out")) == 12
    seen = {}
    for i in range(5 * n):
        caption, load = source.pair(i)
        _, k, _, picture = caption.split()
        assert abs(int(load()[0, 0, 0]) - 10 * int(picture)) < 4 and len(source.captions(i)) == 5 and caption in source.captions(i)
        seen.setdefault(picture, []).append(k)
    assert len(seen) == n and all(sorted(ks) == list("01234") for ks in seen.values())


def test_coco_with_single_faults_counts_them(tmp_path, capsys):
    path = write_coco(tmp_path / "c.json", tmp_path / "images", 60)
    content = json.loads(path.read_text())
    content["images"] += [{"id": 1, "file_name": "../c.json"}, {"id": 2, "file_name": "absent.jpg"}, {"id": 0, "file_name": "000000000000.jpg"}]
    content["images"] += [{"id": 3, "file_name": None}, {"id": [4], "file_name": "x"}, {"id": 5}, None, {"id": 6, "file_name": "\ud800\0"}]
    content["annotations"] += [{"image_id": 7}, {"image_id": [7], "caption": "x"}, None, {"image_id": 6, "caption": "x"}]
    content["annotations"] += [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "x"}, {"image_id": 999, "caption": "x"}, {"image_id": 7, "caption": None}]
    path.write_text(json.dumps(content))
    assert len(everything(path)) == 60
    said = capsys.readouterr().err
    for part in ("1 names that lead out of the folder", "2 without the picture", "absent.jpg", "5 images with an id that was there before", "image_id 999"):
        assert part in said


def test_pictures_that_come_to_a_coco_file_later_are_found(tmp_path):
    path = write_coco(tmp_path / "annotations" / "captions_x.json", tmp_path / "x", 60)
    (tmp_path / "x" / f"{59:012d}.jpg").rename(tmp_path / "kept.jpg")
    assert len(everything(path)) == 59
    (tmp_path / "kept.jpg").rename(tmp_path / "x" / f"{59:012d}.jpg")
    assert len(everything(path)) == 60


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": 3, "annotations": []}', '{"images": [{"id": 1}], "annotations": []}', "not JSON", "[" * 100_000,
                                     '{"images": [{"id": 1, "file_name": 3}], "annotations": []}', '{"images": [{"id": [1], "file_name": "a"}], "annotations": []}'])  # fmt: skip
def test_json_of_another_shape_is_refused(content, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"c.json: is not COCO captions \(.*expected"):
        Pairs(tmp_path / "c.json", 8)


def test_coco_without_its_pictures_says_where_it_looked(tmp_path):
    path = write_coco(tmp_path / "a" / "captions_train2017.json", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"000000000000.jpg, .*are not there; looked in .*a/images, .*a/train2017"):
        Pairs(path, 8)


# ---- Several sources ------------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight(shards, tmp_path):
    coco = write_coco(tmp_path / "c.json", tmp_path / "images")
    mixed = open_pairs(configured(data=f"{shards}:3,{coco}"), "train", seed=1)
    assert isinstance(mixed, Mixture) and len(mixed) == sum(len(Pairs(path, 8)) for path in (shards, coco))
    captions = [mixed.pair(i)[0] for i in range(2048)]
    assert sum(caption.startswith("picture") for caption in captions) == 1536
    again = open_pairs(configured(data=f"{shards}:3,{coco}"), "train", seed=1)
    assert captions == [again.pair(i)[0] for i in range(2048)]
    often = Counter(caption for caption in captions if caption.startswith("picture")).values()
    assert max(often) - min(often) <= 1  # by epochs of its own, not drawn with repetition
    load = mixed.pair(0)[1]
    assert load().shape == (8, 8, 3) and mixed.captions(0) and mixed.name(0)


def test_a_path_may_look_like_a_list(shards, tmp_path):
    odd = tmp_path / "a,b:2"
    shards.rename(odd)
    assert isinstance(open_pairs(configured(data=str(odd))), Pairs)


@pytest.mark.parametrize("names", [["a,b", "c"], ["a,b", "c,"], ["a,b:3", "a,b"]])
@pytest.mark.parametrize("weights", [["", ""], ["", ":2"], [":2", ""], [":3", ":2"]])
def test_commas_in_paths_go_together_with_weights(names, weights, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in names:
        shutil.copytree(shards, tmp_path / name)
    source = open_pairs(configured(data=",".join(map(str.__add__, names, weights))))
    assert [str(one.options[0]) for one in source.sources] == names
    assert source.weights == [float(weight[1:] or 1) for weight in weights]


@pytest.mark.parametrize("option", ["data", "text"])
@pytest.mark.parametrize("item", ["{}:0", "{}:1.2.3", "{},", ",{}", ":3", "{}:-1"])
def test_wrong_weights_are_refused(item, option, shards):
    (shards / "a.txt").write_text("some words " * 99)
    with pytest.raises(ValueError, match=f"--{option}"):
        config = configured(**{option: item.format(shards)})
        open_pairs(config) if option == "data" else TextFiles(config, BYTES)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def enormous_png(side=30_000):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(99))) + png_chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BROKEN = {"zero bytes": b"", "text": b"this is text, whatever its name says", "truncated": image_bytes(5, "JPEG", (200, 200))[:400], "30,000 x 30,000": enormous_png(),
          "12,000 x 12,000": enormous_png(12_000), "EPS": EPS}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_are_refused_by_name(kind):
    with pytest.raises(ValueError, match="x.jpg: cannot be read as an image"):
        load_image(io.BytesIO(BROKEN[kind]), 16, "x.jpg")


NONSENSE = [b"", b"\0\0\0", b"key\0\x07abc", b"key\0\0abcdef", b"key\0\1\0en\0tr\0no", bytes(range(200)), b"key\0\0" + zlib.compress(bytes(2**27))]


@pytest.mark.parametrize("kind", "tEXt zTXt iTXt iCCP eXIf gAMA cHRM sRGB pHYs tIME bKGD sPLT acTL fcTL fdAT xxxx".split())
def test_metadata_never_cost_a_png(kind):
    """Whatever is in them, before the pixels and after them."""
    png = image_bytes(50)
    for body in NONSENSE:
        for at in (33, len(png) - 12):
            odd = png[:at] + png_chunk(kind.encode(), body) + png[at:]
            assert np.array_equal(load_image(io.BytesIO(odd), 8, "x"), load_image(io.BytesIO(png), 8, "x"))


@pytest.mark.parametrize("marker", [*range(0xE0, 0xF0), 0xFE])
def test_metadata_never_cost_a_jpeg(marker):
    jpeg = image_bytes(50, "JPEG")
    for start in (b"", b"JFIF", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"ICC_PROFILE\0", b"Adobe", b"Photoshop 3.0\0", b"MPF\0"):
        for body in (start, start + bytes(range(200))):
            odd = jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
            assert abs(load_image(io.BytesIO(odd), 8, "x").astype(int) - load_image(io.BytesIO(jpeg), 8, "x")).max() < 3


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        assert load_image(tmp_path / f"x.{suffix}", 8)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=12)


def test_grey_of_32_bits_palette_with_transparency_and_cmyk_jpeg(tmp_path):
    Image.fromarray(np.full((20, 20), 0x8000, np.int32)).save(tmp_path / "i.tif")
    assert abs(int(load_image(tmp_path / "i.tif", 8)[4, 4, 0]) - 128) <= 1
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.gif", transparency=1)
    assert (load_image(tmp_path / "p.gif", 8) == 255).all()
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert load_image(tmp_path / "c.jpg", 8)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=20)


def test_pictures_of_floating_point_numbers_are_refused(tmp_path):
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="f.tif: cannot be read as an image .*floating-point"):
        load_image(tmp_path / "f.tif", 8)


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).resize((1800, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    smooth.save(tmp_path / "x.png")
    a, b = load_image(tmp_path / "x.jpg", 64), load_image(tmp_path / "x.png", 64)
    assert np.abs(a.astype(int) - b).mean() < 1.5
    began = time.process_time()
    for _ in range(3):
        load_image(tmp_path / "x.jpg", 64)
    small, began = time.process_time() - began, time.process_time()
    for _ in range(3):
        load_image(tmp_path / "x.jpg", 640)
    assert small < 0.7 * (time.process_time() - began)


# ---- Broken pictures on the way to a batch --------------------------------------------------------------------------


def folder_with(path, broken, n=120):
    """n pictures, of which the numbers `broken` are so, each in another way."""
    path.mkdir()
    for i in range(n):
        (path / f"{i:03d}.jpg").write_bytes(list(BROKEN.values())[i % len(BROKEN)] if i in broken else image_bytes(2 * i, "JPEG"))
        (path / f"{i:03d}.txt").write_text(f"{i} " + "and " * (i % 5))
    return path


def loader(path, workers=0, rows=3, seed=0, text=None, batch_rows=None, **more):
    config = configured(data=str(path), seq_len=96, **{"text": text or "", "text_fraction": 0.0} | more)
    documents = PairDocuments(open_pairs(config, "train", seed), BYTES, config.data, seed=seed)
    documents = with_text(documents, config, open_text(config, BYTES, "train", seed))
    return Loader(packed(documents, config.data.max_broken, rows), BYTES, workers, batch_rows, Skipped("pictures", config.data.max_broken))


def packed(documents, max_broken=0.05, rows=3):
    return Stream(documents, 96, rows, 16, skipped=Skipped("documents", max_broken))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_a_broken_picture_gives_its_place_to_a_following_pair(tmp_path, capsys):
    broken = {3, 40, 77, 99, 100}
    path = folder_with(tmp_path / "data", broken)
    batches = loader(path)
    total = 0
    for _ in range(60):
        batch = next(batches)
        captions = bytes(i for i in batch.tokens.flatten().tolist() if i < 256).decode()
        assert not {str(i) for i in broken} & set(captions.replace("and", "").split()) and (batch.doc_id >= 0).any()
        total += len(batch.images)
        for row, ids in zip(batch.tokens, batch.image_id):
            for image in set(ids.tolist()) - {-1}:
                assert (ids == image).sum() == 16
    said = capsys.readouterr().err.splitlines()
    named = [line for line in said if line.startswith("skipped: ")]
    assert 0 < len(named) <= 5 and len(set(named)) == len(named) and all("cannot be read as an image" in line and ".jpg" in line for line in named)
    assert batches.skipped.skipped == len(named) < 0.1 * total and batches.skipped.seen >= total + len(named)  # each counted once, in however many epochs
    again = loader(path)
    assert all(same(next(again), next(other)) for other in [loader(path)] for _ in range(20))


def test_the_place_is_never_too_small(tmp_path):
    """Whatever takes the place of a document is no longer than it, or the row would overflow."""
    path = folder_with(tmp_path / "data", {i for i in range(0, 120, 3)})
    config = configured(data=str(path), seq_len=96, max_broken=1.0, text_fraction=0.0)
    documents = PairDocuments(open_pairs(config), BYTES, config.data)

    def broken(document):
        try:
            return [part.load() for part in document if isinstance(part, ImageSegment)] == []
        except ValueError:
            return True

    for i in range(200):
        document, errors = documents(i), []
        final = BatchDataset(documents, BYTES, 96, 16, strict=False).loaded(i, errors)
        assert sum(isinstance(part, ImageSegment) for part in final) == 1 and data.document_length(final, 16) <= data.document_length(document, 16)
        order = lambda d: [isinstance(s, ImageSegment) for s in d]
        assert order(final) == order(document) and bool(errors) == broken(document)


def test_too_many_broken_pictures_stop_training(tmp_path):
    with pytest.raises(ValueError, match=r"of \d+ pictures had to be left out, more than --max_broken 0.05 allows; the last: .*jpg: cannot be read"):
        batches = loader(folder_with(tmp_path / "some", set(range(0, 120, 8))))
        for _ in range(100):
            next(batches)
    with pytest.raises(ValueError, match="jpg: cannot be read as an image"):
        next(loader(folder_with(tmp_path / "all", set(range(120))), max_broken=1.0))
    with pytest.raises(ValueError, match="jpg: cannot be read as an image"):
        readable(Pairs(tmp_path / "all", 8), itertools.count(), 3, Skipped("pictures", 1.0))


def test_readable_goes_on_to_the_next(tmp_path):
    source = Pairs(folder_with(tmp_path / "data", {3, 40, 77}), 8)
    skipped = Skipped("pictures", 0.5)
    found = readable(source, itertools.count(), 90, skipped)
    assert len(found) == 90 and skipped.seen == 90 + skipped.skipped and 0 < skipped.skipped <= 3
    assert all(pixels.shape == (8, 8, 3) and source.pair(i)[0].split()[0] not in ("3", "40", "77") for i, pixels in found)


def test_a_document_too_long_is_counted_once(tmp_path, capsys):
    """However often a small split is gone through; but if nothing else is left, it stops."""
    path = folder_with(tmp_path / "data", set())
    held_out = Pairs(path, 8, "held_out")
    Path(held_out.name(0)).with_suffix(".txt").write_text("far too long " * 40)
    config = configured(data=str(path), seq_len=96, text_fraction=0.0)
    stream = packed(PairDocuments(open_pairs(config, "held_out"), BYTES, config.data))
    for _ in range(20 * len(held_out)):
        next(stream)
    assert stream.skipped.skipped == 1 and stream.skipped.seen > 10 * len(held_out)
    for i in range(len(held_out)):
        Path(held_out.name(i)).with_suffix(".txt").write_text("far too long " * 40)
    config.data.max_broken = 1.0
    with pytest.raises(ValueError, match=f"all {len(held_out)} pairs of a split are too long: .*give --seq_len"):
        next(packed(PairDocuments(open_pairs(config, "held_out"), BYTES, config.data), 1.0))


def test_a_picture_that_vanishes_later_is_skipped_too(tmp_path):
    path = folder_with(tmp_path / "data", set())
    batches = loader(path)
    (path / "005.jpg").unlink()
    for _ in range(30):
        next(batches)
    assert batches.skipped.skipped > 0


# ---- Loading in other processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_and_goes_on_from_its_state(workers, tmp_path):
    path = folder_with(tmp_path / "data", {3, 40})
    expected = [next(batches) for batches in [loader(path)] for _ in range(9)]
    batches = loader(path, workers)
    start = batches.state
    for batch in expected[:4]:
        assert same(next(batches), batch)
    state = batches.state
    again = loader(path, workers)
    again.stream.load_state(state)
    assert again.state == state != start
    for batch in expected[4:]:
        assert same(next(batches), batch) and same(next(again), batch)
    assert torch.save({"stream": state}, tmp_path / "x.pt") is None and torch.load(tmp_path / "x.pt", weights_only=True)["stream"] == state


def test_loader_can_cut_a_step_into_parts(tmp_path):
    path = folder_with(tmp_path / "data", set())
    whole, parts = loader(path, rows=5), loader(path, rows=5, batch_rows=2)
    for _ in range(3):
        step, cut = next(whole), [next(parts) for _ in range(3)]
        assert [len(batch.tokens) for batch in cut] == [2, 2, 1] and torch.equal(step.tokens, torch.cat([batch.tokens for batch in cut]))
        assert torch.equal(step.images, torch.cat([batch.images for batch in cut])) and parts.state == whole.state


def test_drawing_batches_leaves_torchs_random_numbers_alone(tmp_path):
    path = folder_with(tmp_path / "data", set())
    before = torch.random.get_rng_state()
    next(loader(path, workers=1)), next(loader(path))
    assert torch.equal(before, torch.random.get_rng_state())


def test_errors_of_workers_are_one_sentence(tmp_path):
    batches = loader(folder_with(tmp_path / "data", set(range(120))), workers=1, max_broken=1.0)
    with pytest.raises(ValueError, match=r"\A[^\n]*cannot be read as an image[^\n]*\Z"):
        next(batches)


def test_workers_end_with_their_loader(tmp_path):
    batches = loader(folder_with(tmp_path / "data", set()), workers=1)
    next(batches)
    workers, began = batches._batches._workers, time.time()
    del batches
    assert not any(worker.is_alive() for worker in workers) and time.time() - began < 4  # not by DataLoader's timeout of 5 s


def test_a_worker_that_dies_is_one_sentence(tmp_path):
    batches = loader(folder_with(tmp_path / "data", set()), workers=1)
    next(batches)
    for worker in batches._batches._workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="has died .*--workers"):
        for _ in range(9):
            next(batches)


def test_everything_a_worker_needs_can_be_sent_to_it(shards, tmp_path):
    """Where processes are not forked (macOS, Windows), they are sent the loader."""
    (tmp_path / "t.txt").write_text("some text and more of it\n" * 200)
    coco = write_coco(tmp_path / "c.json", tmp_path / "images")
    for batches in (loader(f"{shards},{coco}", text=str(tmp_path / "t.txt"), text_fraction=0.5), loader("")):
        dataset = BatchDataset(batches.stream.documents, BYTES, 512, 16, strict=False)
        sent = pickle.dumps(dataset)
        assert len(sent) < 20_000  # paths, not tables
        numbers = [[0, 1], [2, 3, 4]]
        found, expected = pickle.loads(sent)[numbers][0], dataset[numbers][0]
        assert len(expected["images"]) >= 2 and all(torch.equal(found[name], value) for name, value in expected.items())


SCRIPT = """
import sys, time
from tests.test_formats import loader
batches = loader(sys.argv[1], workers=2)
try:
    next(batches)
    print("ready", flush=True)
    while True: next(batches)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_prints_no_traceback(tmp_path):
    """The terminal sends it to every process of the group."""
    path = folder_with(tmp_path / "data", set())
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"})  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err and err.count("\n") == 2, err  # that the folder is read once, and what was found


# ---- Text -----------------------------------------------------------------------------------------------------------


def text_config(paths, **more):
    return configured(text=str(paths), **{"seq_len": 40} | more)


def pieces(config, tokenizer=BYTES, split="train", epochs=1):
    text = TextFiles(config, tokenizer, split)
    return [text.ids(i) for i in range(epochs * len(text))]


def test_text_is_cut_into_pieces_and_all_of_it_is_there(tmp_path):
    text = "".join(f"line {i} — naïve\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    config = text_config(tmp_path / "a.txt")
    train, held_out = pieces(config), pieces(config, split="held_out")
    assert all(0 < len(piece) <= 39 for piece in train) and 1 <= len(held_out) < 0.3 * len(train)
    whole = text.encode()
    assert sorted(bytes(piece) for piece in train + held_out) == sorted(whole[i : i + 39] for i in range(0, len(whole), 39))
    twice = pieces(config, epochs=2)
    assert sorted(twice[: len(train)]) == sorted(twice[len(train) :]) and twice[: len(train)] != twice[len(train) :]


def test_only_the_last_piece_of_a_text_ends_with_eos(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter * 100}) + "\n" for letter in "abcdefgh"))
    config = text_config(tmp_path / "a.jsonl")
    found = [(bytes(p), p) for split in ("train", "held_out") for p in pieces(config, split=split)]
    assert sorted(text for text, _ in found) == sorted(letter * n for letter in (b"%c" % c for c in b"abcdefgh") for n in (39, 39, 22))
    batch = data.collate([[[p]] for _, p in found], BYTES, 40, 0)
    for (text, _), targets in zip(found, batch.targets):
        assert targets[: len(text)].tolist() == list(text) and int(targets[len(text)]) == (data.NO_LOSS if len(text) == 39 else BYTES.eos)
    config.data.text_fraction = 1.0
    documents = with_text(PairDocuments(Scenes(), BYTES, config.data), config, open_text(config, BYTES))
    assert any(isinstance(pickle.loads(pickle.dumps(documents))(i)[0], data.Cut) for i in range(5))


def test_json_lines_and_folders(tmp_path):
    (tmp_path / "t" / "deep").mkdir(parents=True)
    (tmp_path / "t" / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} \ud83c\udfa8", "meta": 1}) + "\n" for i in range(30)) + "\n")
    (tmp_path / "t" / "deep" / "b.txt").write_text("words " * 5)
    (tmp_path / "t" / "c.md").write_text("not read")
    found = sorted(bytes(p).decode() for split in ("train", "held_out") for p in pieces(text_config(tmp_path / "t"), split=split))
    assert found == sorted([f"number {i} 🎨" for i in range(30)] + ["words " * 5])
    assert len(pieces(text_config(f"{tmp_path / 't' / 'a.jsonl'},{tmp_path / 't' / 'deep'}"))) == len(pieces(text_config(tmp_path / "t")))


def test_a_folder_of_text_is_the_same_when_it_is_opened_again(tmp_path, monkeypatch):
    """What is kept there of the first time is no text."""
    (tmp_path / "a.txt").write_text("words " * 40)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "some more words " * 9}) + "\nno JSON\n")
    config = text_config(tmp_path, max_broken=0.5)
    first = pieces(config)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: 1 / 0)
    assert pieces(config) == first and len(list((tmp_path / ".transfusion").iterdir())) == 1


def test_text_is_tokenised_once_per_tokenizer_and_length(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a red circle and a blue square " * 40)
    learned = BPETokenizer.learn(["a red circle and a blue square"] * 9, 30)
    a, b = pieces(text_config(tmp_path / "a.txt")), pieces(text_config(tmp_path / "a.txt"), learned)
    assert max(map(max, a)) < 256 <= max(map(max, b))
    assert len(list((tmp_path / ".transfusion").iterdir())) == 2
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: 1 / 0)
    learned.style = {"capitals": True}  # of the captions: it changes no tokens
    assert pieces(text_config(tmp_path / "a.txt")) == a and pieces(text_config(tmp_path / "a.txt"), learned) == b
    with pytest.raises(ZeroDivisionError):
        pieces(text_config(tmp_path / "a.txt", seq_len=50))


def test_large_vocabularies_take_32_bits(tmp_path):
    class Large(Tokenizer):
        vocab_size = property(lambda self: 100_000, lambda self, value: None)

        def encode(self, text):
            return [90_000 + ord(c) for c in text]

    (tmp_path / "a.txt").write_text("abc" * 100)
    assert set(sum(pieces(text_config(tmp_path / "a.txt"), Large()), [])) == {90_000 + ord(c) for c in "abc"}


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"fine \xff\xfe not", "a.txt: is not UTF-8 text"), ("a.txt", b"", "holds texts of no kind that can be used"),
    ("a.txt", b"short", "only one of texts; at least two"), ("a.jsonl", b'{"text": "fine"}\n{"other": 1}\n', "1 of 2 texts cannot be used.*lines that are no JSON object.*a.jsonl:2"),
    ("a.jsonl", b"[1]\n\xff\nnull\n", "3 lines that are no JSON object"),
])  # fmt: skip
def test_bad_text(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pieces(text_config(tmp_path / name))


def test_one_text_that_cannot_be_read_does_not_stop_the_rest(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    assert sum(len(pieces(text_config(tmp_path), split=split)) for split in ("train", "held_out")) == 40
    assert "left out: 1 files that cannot be read (first: " in (said := capsys.readouterr().err) and "a.txt: is not UTF-8 text" in said


def test_a_long_text_comes_in_stretches(tmp_path, monkeypatch):
    """However long the line is that it is on."""
    monkeypatch.setattr("extras.text.STRETCH", 1000)
    monkeypatch.setattr("extras.text.LONGEST", 9000)
    text = "".join(f"{n} " for n in range(1500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "x" * 10_000}) + "\n")
    asked = []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: (asked.append(len(text)), list(text.encode()))[1])
    for name in ("a.txt", "b.jsonl"):
        config = text_config(tmp_path / name, max_broken=0.5)
        found = [bytes(piece) for split in ("train", "held_out") for piece in pieces(config, split=split)]
        assert sorted(b"".join(found).split(b" ")) and sum(map(len, found)) == len(text) and max(asked) <= 2000


def test_text_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (("absent.txt", "no such file"), ("empty", "no .txt or .jsonl files")):
        with pytest.raises(ValueError, match=message):
            open_text(text_config(tmp_path / path), BYTES)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_text_makes_its_share_of_the_positions(fraction, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "x" * int(rng.integers(5, 200))}) + "\n" for _ in range(400)))
    config = configured(text=str(tmp_path / "t.jsonl"), text_fraction=fraction, seq_len=128)
    documents = with_text(PairDocuments(Scenes(), BYTES, config.data), config, open_text(config, BYTES))
    lengths = [(data.document_length(documents(i), 16), any(isinstance(s, ImageSegment) for s in documents(i))) for i in range(3000)]
    assert abs(sum(n for n, pair in lengths if not pair) / sum(n for n, _ in lengths) - fraction) < 0.02


def test_built_in_text_goes_with_the_scenes_only(shards):
    said = lambda text, i: BYTES.decode(text.ids(i))
    assert said(open_text(configured(), BYTES), 0).endswith(".")
    assert open_text(configured(data=str(shards)), BYTES) is None and open_text(configured(text_fraction=0.0), BYTES) is None
    scenes = [open_text(configured(), BYTES, split) for split in Scenes.SPLITS]
    assert len({said(text, 3) for text in scenes}) == 4 and said(scenes[0], 3) == said(open_text(configured(), BYTES), 3)
    lengths = [len(scenes[0].ids(i)) for i in range(200)]
    assert min(lengths) < 100 and max(lengths) > 700


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="reads tokenizer.json with the package tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(["a red circle", "a blue square"] * 9, tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_json(tokenizer_json, tmp_path):
    tokenizer = open_tokenizer(configured(tokenizer=str(tokenizer_json)), Scenes())
    n = tokenizer.inner.get_vocab_size()
    assert [tokenizer.bos, tokenizer.eos, tokenizer.boi, tokenizer.eoi, tokenizer.pad] == list(range(n, n + 5)) and tokenizer.vocab_size == n + 5
    for text in ("a red circle", "zzyzx naïve 🎨", "", "  two"):
        assert all(i < n for i in tokenizer.encode(text)) and tokenizer.decode([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]) == text
    assert len(tokenizer.encode("a red circle")) < 6
    torch.save(tokenizer.state(), tmp_path / "x.pt")
    again = restore_tokenizer(torch.load(tmp_path / "x.pt", weights_only=True))
    assert again.encode("a blue circle") == tokenizer.encode("a blue circle") and again.vocab_size == tokenizer.vocab_size
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red") == tokenizer.encode("a red")


def test_settings_of_a_tokenizer_json_change_nothing(tokenizer_json):
    """It neither cuts, pads nor rolls dice, and its special tokens are text where they are text."""
    from tokenizers import Tokenizer as Library

    plain = JSONTokenizer(tokenizer_json.read_text())
    inner = Library.from_file(str(tokenizer_json))
    inner.enable_truncation(3)
    inner.enable_padding(length=20)
    inner.model.dropout = 0.5
    tokenizer_json.write_text(inner.to_str(), encoding="utf-8-sig")
    tokenizer = read_tokenizer(tokenizer_json)
    for text in ("a red circle and a blue square", "a <s> and </s> in a text"):
        assert tokenizer.encode(text) == plain.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a <s>") == plain.encode("a <s>")


def test_captions_that_a_tokenizer_json_changes_are_counted_like_broken_ones(tokenizer_json, capsys):
    from tokenizers import Tokenizer as Library, normalizers

    inner = Library.from_file(str(tokenizer_json))
    inner.normalizer = normalizers.Lowercase()
    inner.save(str(tokenizer_json))
    captions = ["a red circle"] * 30 + ["A red circle"]
    read_tokenizer(tokenizer_json, captions, 0.05)
    assert "30 captions; left out: 1 that it changes (first: 'A red circle' becomes 'a red circle')" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--tokenizer .*1 of 31 captions cannot be used, more than --max_broken 0.01"):
        read_tokenizer(tokenizer_json, captions, 0.01)


@pytest.mark.parametrize("model", [{"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0}}, {"type": "WordLevel", "unk_token": "?", "vocab": {"a": 2**31}},
                                   {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}])  # fmt: skip
def test_what_a_tokenizer_json_raises_is_a_sentence(model, tokenizer_json):
    content = json.loads(tokenizer_json.read_text()) | {"model": model, "added_tokens": []}
    tokenizer_json.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"--tokenizer .*tokenizer.json: is not (able to encode every text|a tokenizer.json)"):
        read_tokenizer(tokenizer_json).encode("zebra")


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b"\xff\xfe", None])
def test_bad_tokenizer_json(content, tmp_path):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json with the package tokenizers")
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match="--tokenizer .*t.json: (is not|no such file)"):
        open_tokenizer(configured(tokenizer=str(tmp_path / "t.json")), Scenes())


def test_without_the_package_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="pip install tokenizers"):
        open_tokenizer(configured(tokenizer=str(tmp_path / "t.json")), Scenes())
    with pytest.raises(ValueError, match="pip install tokenizers"):
        JSONTokenizer("{}")


# ---- From each format to a trained model ----------------------------------------------------------------------------


def test_training_on_a_miniature_of_every_format(shards, tmp_path):
    """Tars, COCO, a folder and text at once, loaded by another process; then resumed, and sampled from."""
    coco, folder = write_coco(tmp_path / "annotations" / "captions_mini.json", tmp_path / "mini"), folder_with(tmp_path / "folder", {7})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"sentence number {i}"}) + "\n" for i in range(50)))
    args = flags(**TINY, data=f"{shards}:2,{coco},{folder}", text=tmp_path / "t.jsonl", text_fraction=0.5, workers=1, out=tmp_path / "out")
    code, _, err = run_here("train.py", *args)
    assert code == 0 and "Traceback" not in err, err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["splits"]
    assert set(scores) == {"seen", "held_out"}
    assert run_here("train.py", *args, "--max_steps", 6, "--resume")[0] == 0
    assert load(tmp_path / "out").tokenizer.encode("sentence")
    code, out, err = run_here("sample.py", "--ckpt", tmp_path / "out", "--prompt", "picture 3", "--num", 1, "--out", tmp_path / "drawn")
    assert code == 0 and (tmp_path / "drawn" / "000.png").exists(), err


def test_training_with_captions_too_long_to_draw(tmp_path):
    """One comes first in the held-out split wherever its pictures are drawn or judged: it is left out there, as in training."""
    folder = folder_with(tmp_path / "folder", set())
    for seed in (0, 1):
        Path(Pairs(folder, 8, "held_out", seed).name(0)).with_suffix(".txt").write_text("far too long " * 40)
    code, _, err = run_here("train.py", *flags(**TINY | dict(judged=4), data=folder, out=tmp_path / "out"))
    assert code == 0 and "give --seq_len " in err, err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["splits"]["held_out"]["n"] == 4 and (tmp_path / "out" / "samples_000004.png").exists()
    with pytest.raises(ValueError, match="no caption with its image fits into seq_len 19; give --seq_len [0-9]+ or more"):
        fitting(Pairs(folder, 8), 4, BYTES, 19, 16)


def test_training_with_a_tokenizer_json(tokenizer_json, shards, tmp_path):
    tiny = {name: value for name, value in TINY.items() if name != "merges"}
    code, _, err = run_here("train.py", *flags(**tiny, data=shards, tokenizer=tokenizer_json, out=tmp_path / "out"))
    assert code == 0, err
    tokenizer_json.unlink()  # the checkpoint has it
    assert isinstance(load(tmp_path / "out").tokenizer, JSONTokenizer)
