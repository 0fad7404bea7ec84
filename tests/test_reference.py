"""Is a run on track? The verdict beside a reference made here, and the reference that is kept."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from extras import curves, reference
from extras.runs import save_checkpoint
from train import parse


def run_folder(path, config, shift):
    """A finished run's checkpoint and log, its losses moved by `shift`."""
    path.mkdir()
    save_checkpoint(path / "checkpoint.pt", dict(config=asdict(config), ema={"x": torch.zeros(1)}))
    lines = [{"step": 1, "lm": 3.0}]
    for step in (500, 1000):
        names = [*reference.MEANINGS, *(f"val_{kind}_q{n}" for kind in ("ddpm", "gap") for n in (1, 2, 3, 4))]
        lines.append({"step": step} | {name: (10.0 if "gap" in name else 1.0) + shift for name in names})
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FILE", tmp_path / "reference.json")
    config = parse(["--config", "small"])[0]
    folders = [run_folder(tmp_path / str(n), replace(config, seed=n, out=str(n)), 0.1 * n) for n in range(3)]
    reference.main("small", *folders)
    return config


GOOD = {name: 10.1 if "gap" in name else 1.1 for name in reference.MEANINGS}


def test_what_is_kept(kept):
    found = reference.references()["small"]
    assert found["seeds"] == [0, 1, 2] and list(found["steps"]) == ["500", "1000"]
    assert found["steps"]["500"]["val_lm"] == pytest.approx([1.1, 1.0, 1.2])
    assert reference.FILE.with_name("curves.png").stat().st_size > 1000


@pytest.mark.parametrize("change, expected", [
    ({}, "within the range of 3 seeds"), ({"val_lm": 1.35}, "within the range"), ({"val_lm": 0.1, "val_text_gap": 99.0}, "within the range"),
    ({"val_lm": 1.45}, "val_lm 1.45, not 1 to 1.2 as in 3 seeds: captions are not learned"), ({"val_ddpm_q4": 9.0}, "colours and places"),
    ({"val_gap_q4": None, "val_lm": 1.1}, "within the range"), ({"val_gap_q4": 0.0}, "images ignore their captions"), ({"val_text_gap": 9.7}, "captions ignore their images"),
])  # fmt: skip
def test_verdict(kept, change, expected):
    assert expected in reference.verdict(kept, 500, GOOD | change)[0]


def test_no_verdict_on_other_settings_or_steps(kept):
    assert reference.verdict(replace(kept, seed=7, out="x", log_every=3), 1000, GOOD)
    assert reference.verdict(kept, 501, GOOD) == [] and reference.verdict(replace(kept, lr=1e-3), 500, GOOD) == []
    assert reference.verdict(replace(kept, data=replace(kept.data, seq_len=100)), 500, GOOD) == []
    reference.FILE.unlink()
    assert reference.verdict(kept, 500, GOOD) == []


def test_other_runs_are_refused(kept, tmp_path):
    other = run_folder(tmp_path / "other", replace(kept, lr=1e-3), 0.0)
    with pytest.raises(ValueError, match="not runs of the same settings"):
        reference.main("small", str(tmp_path / "0"), other)


def test_ticks_are_round():
    assert curves.ticks(0, 1.05) == pytest.approx([0, 0.5, 1.0]) or len(curves.ticks(0, 1.05)) in (5, 6)
    for high in (0.013, 0.7, 3.2, 870, 1000):
        found = curves.ticks(0, high)
        assert 2 <= len(found) <= 6 and found[0] == 0 and found[-1] <= high


@pytest.mark.parametrize("values", [(0.0, 0.0), (-1.0, -1.0), (-3.0, 2.0), (5.0,)])
def test_any_curve_can_be_drawn(values):
    steps = [60 * (n + 1) for n in range(len(values))]
    assert curves.draw_panel("gap", [("x", steps, values, values, values)]).size == (curves.WIDTH, curves.HEIGHT)
