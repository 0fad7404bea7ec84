"""Parquet files as the Hugging Face hub stores images with captions: the same pairs as a folder gives, and nothing bad in a file does more than be counted."""

import builtins
import io
import pickle

import numpy as np
import pytest
from conftest import TINY, flags, run_here
from PIL import Image
from test_train import complaint, config_of

import extras
from extras import parquet
from extras.pairs import Pairs
from extras.parquet import Parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # what datasets.Image() is stored as


def png(n, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (n % 256, 3 * n % 256, 99)).save(file, "PNG")
    return file.getvalue()


def write(path, images, texts, name="text", kind=HUB, group=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = pa.array(texts)
    pq.write_table(pa.table({"image": pa.array(images, kind), name: text, "id": list(range(len(images)))}), path, row_group_size=group)
    return path


def hub(path, n=24, first=0, **more):
    images = [{"bytes": png(first + i), "path": f"{first + i:03d}.png"} for i in range(n)]
    return write(path, images, [f"number {first + i}" for i in range(n)], **more)


def opened(path, split="train", cache=None, **more):
    return Parquet(path, 8, split, cache=cache or (path if path.is_dir() else path.parent) / "cache", **more)


def found(source):
    """{caption: the image's first value} of an epoch."""
    return {caption: int(load()[0, 0, 0]) for caption, load in map(source.pair, range(len(source)))}


def test_the_pairs_are_those_of_a_folder(tmp_path):
    """The same captions, images and split; and the order differs from epoch to epoch."""
    path = hub(tmp_path / "hub/train-00000-of-00001.parquet")
    (tmp_path / "folder").mkdir()
    for i in range(24):
        (tmp_path / f"folder/{i:03d}.png").write_bytes(png(i))
        (tmp_path / f"folder/{i:03d}.txt").write_text(f"number {i}")
    for split in Pairs.SPLITS:
        source, folder = opened(path, split), Pairs(tmp_path / "folder", 8, split)
        assert found(source) == found(folder) and len(source) == len(folder)
    source, n = opened(path), len(opened(path))
    names = [source.pair(i)[0] for i in range(2 * n)]
    assert names[:n] != names[n:] and sorted(names[:n]) == sorted(names[n:]) and "train-00000-of-00001.parquet: 0" in source.name(0)
    sent = pickle.loads(pickle.dumps(source))
    assert type(sent) is Parquet and found(sent) == found(source)


@pytest.mark.parametrize("name, texts, expected", [
    ("text", "a cat", ["a cat"]), ("caption", " a\ncat ", ["a cat"]), ("captions", ["a cat", "", "a pet"], ["a cat", "a pet"]), ("caption", ["a cat"], ["a cat"]),
])  # fmt: skip
@pytest.mark.parametrize("kind", [HUB, pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())]), pa.struct([("path", pa.string()), ("bytes", pa.binary())])], ids=str)
def test_columns_as_people_have_them(kind, name, texts, expected, tmp_path):
    cell = lambda n: {"bytes": png(n), "path": f"{n}.png"} if pa.types.is_struct(kind) else png(n)
    if pa.types.is_struct(kind) and len(kind) == 1:
        cell = lambda n: {"bytes": png(n)}
    source = opened(write(tmp_path / "a.parquet", [cell(n) for n in range(12)], [texts] * 12, name, kind))
    assert all(source.captions(i) == expected for i in range(len(source))) and 10 <= len(source) < 12
    assert len({int(source.pair(i)[1]()[0, 0, 0]) for i in range(len(source))}) == len(source)


@pytest.mark.parametrize("paths", [None, "image.png"])
def test_rows_without_names_of_their_own_are_held_out_by_number(paths, tmp_path):
    images = [{"bytes": png(n), "path": paths} for n in range(60)]
    path = write(tmp_path / "a.parquet", images, [f"t {n}" for n in range(60)])
    train, held_out = found(opened(path)), found(opened(path, "held_out"))
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 60 and 1 <= len(held_out) < 15


def test_a_folder_of_them_and_several_sources(tmp_path):
    for k in range(3):
        hub(tmp_path / f"hub/train-0000{k}-of-00003.parquet", 12, first=12 * k)
    both = found(opened(tmp_path / "hub")) | found(opened(tmp_path / "hub", "held_out"))
    assert both == {f"number {n}": n for n in range(36)}
    one = tmp_path / "hub/train-00001-of-00003.parquet"
    pairs = extras.open_pairs(config_of(tmp_path / "out", data=f"{one}:2,{tmp_path / 'hub'}", image_size=8))
    assert [type(source) for source in pairs.sources] == [Parquet, Parquet]
    (tmp_path / "hub/0.tar").write_bytes(b"")  # img2dataset leaves a table of what it fetched beside each tar
    assert extras.kind_of(extras.Choices(), str(tmp_path / "hub")) is Pairs


def test_a_row_group_is_read_once_for_its_neighbours_and_no_more(tmp_path, monkeypatch):
    source, reads = opened(hub(tmp_path / "a.parquet", 40, group=10)), []
    real = parquet.opened(tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "opened", lambda path: reads.append(path) or real)
    parquet.images.cache_clear()
    for row in range(40):
        source.read(row)
    assert len(reads) == 4


# ---- Bad input, one by one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, expected", [
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), "is not a whole parquet file"), (lambda path: path.write_bytes(path.read_bytes()[: 200]), "is not a whole parquet file"),
    (lambda path: path.write_bytes(b""), "is not a whole parquet file"), (lambda path: path.write_bytes(b"no parquet" * 99), "is not a whole parquet file"),
    (lambda path: pq.write_table(pa.table({"picture": [b"1"], "text": ["a"]}), path), "has the columns picture, text; --data wants an image"),
    (lambda path: pq.write_table(pa.table({"image": ["http://example.com/1.png"], "text": ["a"]}), path), "has the columns image, text; --data wants an image"),
    (lambda path: pq.write_table(pa.table({"image": [b"1"], "label": [3]}), path), "has the columns image, label; --data wants an image"),
    (lambda path: pq.write_table(pa.table({"image": [b"1"], "text": [3]}), path), "without a caption"),
])  # fmt: skip
def test_a_file_that_is_none_is_one_sentence_and_beside_others_is_counted(change, expected, tmp_path, capfd):
    path = hub(tmp_path / "one/a.parquet")
    change(path)
    with pytest.raises(ValueError, match=expected) as error:
        opened(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    for k in range(3):
        hub(tmp_path / f"one/b{k}.parquet", 24, first=24 * k)
    with pytest.raises(ValueError, match="more than --max_broken 0 allows"):
        opened(tmp_path / "one", max_broken=0.0)
    source = opened(tmp_path / "one", max_broken=0.5)
    assert len(found(source)) == len(source) > 60 and expected.split(";")[0][:20] in capfd.readouterr().err


@pytest.mark.parametrize("cell", [{"bytes": b"no image", "path": "1.png"}, {"bytes": None, "path": "/etc/passwd"}, None])
def test_a_broken_image_is_named_as_it_is_met(cell, tmp_path):
    images = [{"bytes": png(n), "path": f"{n:03d}.png"} for n in range(20)]
    images[7] = cell
    texts = [f"t {n}" for n in range(20)]
    source = opened(write(tmp_path / "a.parquet", images, texts))
    bad = [i for i in range(len(source)) if source.captions(i) == ["t 7"]]
    for i in bad:
        with pytest.raises(ValueError, match="a.parquet: .* cannot be read as an image|a.parquet"):
            source.pair(i)[1]()
    assert len(bad) <= 1 and sum(1 for i in range(len(source)) if i not in bad and source.pair(i)[1]().shape == (8, 8, 3)) >= len(source) - 1


def test_rows_without_captions_are_counted(tmp_path, capfd):
    path = write(tmp_path / "a.parquet", [{"bytes": png(n), "path": f"{n}.png"} for n in range(30)], ["x", None, ""] * 10)
    with pytest.raises(ValueError, match="20 of 30 pictures with captions cannot be used"):
        opened(path)
    assert len(opened(path, max_broken=0.9)) in (8, 9) and "20 without a caption" in capfd.readouterr().err


def test_a_file_that_changes_later_is_an_error_with_its_name(tmp_path):
    source = opened(hub(tmp_path / "a.parquet", 24))
    parquet.opened.cache_clear()
    parquet.images.cache_clear()
    hub(tmp_path / "a.parquet", 3)
    errors = 0
    for row in range(24):
        try:
            source.read(row)
        except ValueError as error:
            errors += str(error).startswith(f"{tmp_path}/a.parquet: ")
    assert errors == 21


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    path, real = hub(tmp_path / "a.parquet"), builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *more: (_ for _ in ()).throw(ImportError(name)) if name.startswith("pyarrow") else real(name, *more))
    with pytest.raises(ValueError, match="pip install pyarrow"):
        opened(path)


# ---- As a user runs it ----------------------------------------------------------------------------------------------


def test_training_and_latents_from_parquet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [{"bytes": png(n, 32), "path": f"{n:03d}.png"} for n in range(30)]
    write(tmp_path / "hub/train.parquet", images, [f"number {n}" for n in range(30)])
    code, out, err = run_here("train.py", *flags(**TINY, data="hub", out="out/a"))
    assert code == 0 and "30 pictures with captions" in err, err
    code, out, err = run_here("vae.py", *flags(**TINY, data="hub", vae="out/a/vae.pt", out="out/v"), "--encode", "latents")
    assert code == 0 and np.isfinite(np.load("latents/0/00000.npy").astype(np.float32)).all(), err
    code, out, err = run_here("train.py", *flags(**TINY, data="hub", vae="out/a/vae.pt", latents="latents", out="out/b"))
    assert code == 0, err
