"""The page that is written at the end of a run: it holds the scores, the curves, the sheets and the options, and nothing from outside."""

import base64
import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from extras import report
from extras.runs import write_json
from train import parse

SCORES = {"splits": {"held_out": {"n": 2, "prompts": {"all": 0.5, "colours": 1.0}, "captions": {"all": 1.0, "colours": 1.0}}}}


@pytest.fixture
def folder(tmp_path):
    lines = [{"step": 100, "lm": 2.0, "ddpm": 0.9}, {"step": 100, "val_lm": 2.2, "val_ddpm_q1": 0.5, "val_gap_q4": -3.0, "val_text_gap": None},
             {"step": 200, "lm": 1.0, "ddpm": 0.3}, {"step": 200, "val_lm": 1.2, "val_ddpm_q1": 0.4, "val_gap_q4": 30.0}]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(tmp_path / "scores.json", SCORES)
    for step, colour in ((100, "red"), (200, "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"samples_{step:06d}.png")
    return tmp_path


def test_the_page_holds_all_and_needs_nothing(folder):
    config = replace(parse(["--config", "small"])[0], out="<b>&", wandb='"x"')
    report.write(folder, config)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and re.findall(r'src="(?!data:image/png;base64,)', page) == [] and "<b>" not in page
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)"', page)]
    assert [image.size for image in images] == [Image.open(folder / "curves.png").size, (20, 10), (20, 10)]
    assert images[1].convert("RGB").getpixel((0, 0)) == (0, 0, 255)  # the last sheet comes first
    assert "held out, captions" in page and "<td>prediction<td>v<td>eps" in page and "<td>beta1" not in page


def test_panels_are_those_with_data(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    panels = dict(report.series(lines))
    assert list(panels) == ["text loss, nats a token", "diffusion loss", "diffusion loss, held out", "conditioning gap, %"]
    assert panels["text loss, nats a token"][1] == ("held out", (100, 200), (2.2, 1.2), (2.2, 1.2), (2.2, 1.2))


def test_a_run_without_scores_or_sheets(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    report.write(tmp_path, parse(["--config", "small"])[0])
    assert "<h2>Scores" not in (tmp_path / "report.html").read_text() and not (tmp_path / "curves.png").exists()
