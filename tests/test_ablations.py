"""The driver of the comparisons, with training stubbed: which cells it starts, with how many steps, and what it makes of them."""

import json
import time
from dataclasses import asdict

import ablations
import pytest
from conftest import run_script

import extras
from extras.runs import save_checkpoint

FLOPS = {ablations.PAPER: 8e9, ablations.TRANSFUSION: 4e9}  # of a step; of all others 2e9


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """(run(*words), the calls that it makes: lists of words). A cell's scores depend on its folder alone."""
    calls = []

    def call(words, log=None):
        calls.append(words)
        if "--wandb" in ablations.COMMON:
            time.sleep(0.05)
            raise SystemExit("failed")
        if words[0] == "vae.py":
            return
        place = tmp_path / "cells" / (words[words.index("--out") + 1] if "--out" in words else words[1]).rsplit("/", 1)[1]
        judged, share = int(words[words.index("--judged") + 1]), 0.5 + 0.1 * int(place.name.split("-seed")[1][0])
        found = {"prompts": {"all": share}, "captions": {"all": 1 - share}}
        never = {"prompts": {"all": share - 0.3}, "captions": {"all": 0.75}}
        (place / "scores.json").write_text(json.dumps({"judged": judged, "splits": {"held_out": found, "never_seen": never, "seen": {"perplexity_per_token": 3.0}}}))
        steps = int(place.name.split("steps-seed")[0].rsplit("-", 1)[1])
        (place / "log.jsonl").write_text("".join(json.dumps({"step": step, "flops": 1e9 * step}) + "\n" for step in (1, steps)))

    monkeypatch.setattr(ablations, "call", call)
    monkeypatch.setattr(ablations, "flops_per_step", lambda variant, out: FLOPS.get(variant, 2e9))
    monkeypatch.setattr(ablations, "print_besides", lambda *_: None)
    return lambda *words: ablations.main(["--out", str(tmp_path / "cells"), "--jobs", "1", *words]), calls


def test_cells_of_equal_compute(driver, capsys):
    run, calls = driver
    run("--tables", "models", "noise", "--steps", "100", "--seeds", "0", "1", "--judged", "8")
    same_shape = "--vae_unshuffle 4 --vae_latent_channels 4 --vae_batch 8".split()
    autoencoders = [words[1 : words.index("--out")] for words in calls if words[0] == "vae.py"]
    assert autoencoders == [["--config", "small"], ["--config", "chameleon"], ["--config", "chameleon", *same_shape]] and calls[3][0] == "train.py"
    cells = {words[words.index("--out") + 1].rsplit("/", 1)[1].rsplit("-", 1)[0]: words for words in calls[3:]}
    assert set(cells) == {f"{name}-seed{seed}" for seed in (0, 1) for name in
                          ("small-patch_size-4-200steps", "chameleon-400steps", "small-patch_size-2-100steps", "small-patch_size-2-image_first_max_t-1000-400steps",
                           "chameleon-vae_unshuffle-4-vae_latent_channels-4-vae_batch-8-400steps", "small-patch_size-2-t_draw-uniform-400steps",
                           "small-patch_size-2-t_draw-uniform-image_first_max_t-1000-400steps")}  # fmt: skip
    words = cells["chameleon-400steps-seed1"]
    assert words[words.index("--max_steps") + 1] == "400" and words[words.index("--seed") + 1] == "1" and words[words.index("--vae") + 1].endswith("/chameleon/vae.pt")
    out = capsys.readouterr().out
    assert "| Transfusion, 4 patches | 55.0 (50.0-60.0) | 25.0 (20.0-30.0) | 45.0 (40.0-50.0) | 75.0 (75.0-75.0) | 3.000 (3.000-3.000) | 200 | 20.10 |" in out  # mean of 1 and 200 GFLOPs, times 200


@pytest.mark.slow
def test_finished_cells_are_kept_and_other_steps_are_other_cells(driver):
    run, calls = driver
    for steps, judged, expected in ((100, 8, 4), (100, 8, 0), (50, 8, 4), (100, 9, 4)):
        before = len(calls)
        run("--tables", "noise", "--steps", str(steps), "--judged", str(judged), "--seeds", "0")
        made = [words for words in calls[before:] if words[0] != "vae.py"]
        assert len(made) == expected and all(words[0] == ("evaluate.py" if judged == 9 else "train.py") for words in made)


@pytest.mark.slow
def test_a_failure_stops_the_others(driver, monkeypatch, tmp_path):
    run, calls = driver
    monkeypatch.setattr(ablations, "COMMON", f"{ablations.COMMON} --wandb fail")
    monkeypatch.setattr(ablations, "load_checkpoint", lambda path: {"done": True})
    for name in ("small", "chameleon"):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "vae.pt").touch()
    with pytest.raises(SystemExit, match="failed"):
        run("--tables", "patches", "--seeds", "0", "1", "2")
    assert len(calls) < 3 * 7  # cells; one or two more may have begun before it was heard of


def test_every_variant_is_understood_by_train():
    models = (ablations.TRANSFUSION, ablations.CHAMELEON)
    for variant in {variant for rows in ablations.TABLES.values() for variant in rows.values()} | {f"{model} {size}" for model in models for size in ablations.SIZES}:
        ablations.parse([*variant.split(), *ablations.COMMON.split()])


def test_other_recipes_are_other_cells():
    words = ablations.PAPER.split()
    recipes = [ablations.recipe(more) for more in (words, [*words, "--out", "elsewhere", "--seed", "3"], [*words, "--seq_len", "99"], [*words, "--patch_size", "4"])]
    assert recipes[0] == recipes[1] and len(set(recipes)) == 3


def test_the_figure_of_scaling(driver, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run, calls = driver
    run("--tables", "scaling", "--steps", "100", "--seeds", "0", "1", "--judged", "8", "--figure", str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    steps = [int(words[words.index("--max_steps") + 1]) for words in calls if words[0] == "train.py"]
    assert len(steps) == 2 * 2 * 4 and set(steps) == {100, 200, 400}  # 200: the preset's Transfusion, whose step costs half of the yardstick's
    assert "| Chameleon, --dim 64 --n_layers 3 --n_heads 2 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_table_made_as_a_user_would(tmp_path):
    """Nothing stubbed: four models of three steps or so, on untrained autoencoders."""
    for variant in ablations.TABLES["models"].values():
        words = ablations.autoencoder(variant)
        network, config = extras.vae_kind(ablations.parse(words)[0])
        save_checkpoint(tmp_path / ablations.name(words) / "vae.pt", {"vae_config": asdict(config), "step": config.steps, "vae": network(config).state_dict(), "done": True})
    code, out, err = run_script("tests/ablations.py", "--tables", "models", "--steps", 3, "--judged", 2, "--seeds", 0, "--out", tmp_path, cwd=tmp_path)
    assert code == 0, err
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| Transfusion", "| Chameleon"))]
    assert len(rows) == 4 and all(int(row[-2]) == 3 for row in rows)
    assert "Sampling, 16 pictures" in out and out.count("autoencoder gives back rightly: seen") == 4
