"""The driver of the comparisons, with training stubbed: which cells it starts, with how many steps, and what it makes of them."""

import json

import ablations
import pytest

FLOPS = {ablations.PAPER: 8e9, ablations.TRANSFUSION: 4e9}  # of a step; of all others 2e9


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """(run(*words), the calls that it makes: lists of words). A cell's scores depend on its folder alone."""
    calls = []

    def call(words, log=None):
        calls.append(words)
        if "--fail" in ablations.COMMON:
            raise SystemExit("failed")
        if words[0] == "vae.py":
            return
        place = tmp_path / "cells" / (words[words.index("--out") + 1] if "--out" in words else words[1]).rsplit("/", 1)[1]
        judged, share = int(words[words.index("--judged") + 1]), 0.5 + 0.1 * int(place.name[-1])
        found = {"prompts": {"all": share}, "captions": {"all": 1 - share}, "perplexity_per_token": 3.0}
        never = {"prompts": {"all": share - 0.3}, "captions": {"all": 0.75}}
        (place / "scores.json").write_text(json.dumps({"judged": judged, "splits": {"held_out": found, "never_seen": never}}))
        steps = int(place.name.split("-")[-2].removesuffix("steps"))
        (place / "log.jsonl").write_text("".join(json.dumps({"step": step, "flops": 1e9 * step}) + "\n" for step in (1, steps)))

    monkeypatch.setattr(ablations, "call", call)
    monkeypatch.setattr(ablations, "flops_per_step", lambda variant, out: FLOPS.get(variant, 2e9))
    monkeypatch.setattr(ablations, "print_besides", lambda *_: None)
    return lambda *words: ablations.main(["--out", str(tmp_path / "cells"), "--jobs", "1", *words]), calls


def test_cells_of_equal_compute(driver, capsys):
    run, calls = driver
    run("--tables", "models", "noise", "--steps", "100", "--seeds", "0", "1", "--judged", "8")
    assert [words[:3] for words in calls[:2]] == [["vae.py", "--config", "small"], ["vae.py", "--config", "chameleon"]]
    cells = {words[words.index("--out") + 1].rsplit("/", 1)[1]: words for words in calls[2:]}
    assert set(cells) == {f"{name}-seed{seed}" for seed in (0, 1) for name in
                          ("small-patch_size-4-200steps", "chameleon-400steps", "small-patch_size-2-100steps", "small-patch_size-2-image_first_max_t-1000-400steps")}  # fmt: skip
    words = cells["chameleon-400steps-seed1"]
    assert words[words.index("--max_steps") + 1] == "400" and words[words.index("--seed") + 1] == "1" and words[words.index("--vae") + 1].endswith("vqvae/vae.pt")
    out = capsys.readouterr().out
    assert "| Transfusion | 55.0 (50.0-60.0) | 25.0 (20.0-30.0) | 45.0 (40.0-50.0) | 75.0 (75.0-75.0) | 3.000 (3.000-3.000) | 200 | 20.10 |" in out  # mean of 1 and 200 GFLOPs, times 200


def test_finished_cells_are_kept_and_other_steps_are_other_cells(driver):
    run, calls = driver
    for steps, judged, expected in ((100, 8, 2), (100, 8, 0), (50, 8, 2), (100, 9, 2)):
        before = len(calls)
        run("--tables", "noise", "--steps", str(steps), "--judged", str(judged), "--seeds", "0")
        made = [words for words in calls[before:] if words[0] != "vae.py"]
        assert len(made) == expected and all(words[0] == ("evaluate.py" if judged == 9 else "train.py") for words in made)


def test_a_failure_stops_the_others(driver, monkeypatch, tmp_path):
    run, calls = driver
    monkeypatch.setattr(ablations, "COMMON", "--fail")
    monkeypatch.setattr(ablations, "load_checkpoint", lambda path: {"done": True})
    for name in ("vae", "vqvae"):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "vae.pt").touch()
    with pytest.raises(SystemExit, match="failed"):
        run("--tables", "patches", "--seeds", "0", "1", "2")
    assert len(calls) <= 2


def test_every_variant_is_understood_by_train():
    from train import parse

    for variant in {variant for rows in ablations.TABLES.values() for variant in rows.values()} | {f"{ablations.TRANSFUSION} {size}" for size in ablations.SIZES}:
        parse([*variant.split(), *ablations.COMMON.split()])
