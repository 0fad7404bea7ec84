"""The weights that come with the project, assets/small.safetensors: right after the installation, they draw and describe what they are asked for."""

from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import run_here
from PIL import Image

from attention_mask import transfusion_mask
from data import PairDocuments, Stream, collate
from evaluate import write_captions
from extras import gap, open_pairs, reference
from extras.exports import read_safetensors
from extras.judge import judge
from extras.runs import IN_THE_BOX
from sample import generate, load
from train import Objective, parse

PROMPTS = ["a red circle at the top left", "a blue square at the bottom right and a green triangle at the top right", "a yellow cross at the bottom left"]


def test_three_prompts_are_drawn_and_described():
    trained = load(IN_THE_BOX)
    images = [np.array(document[-1]) for document in generate(trained, [[prompt] for prompt in PROMPTS], seeds=[0, 1, 2], max_tokens=0)]
    for prompt, image, written in zip(PROMPTS, images, write_captions(trained, images)):
        assert judge(prompt, image, "places")["all"], prompt
        assert judge(written, image, "places")["all"], written
    assert not judge(PROMPTS[1], images[0], "places")["all"]


def test_it_is_of_the_preset_and_small():
    assert IN_THE_BOX.stat().st_size <= 5_000_000
    trained, config = load(IN_THE_BOX), parse(["--config", "small"])[0]
    sized = dict(vocab_size=trained.model.config.vocab_size, latent_channels=4, latent_size=8)
    assert vars(trained.model.config) == vars(config.model) | sized
    assert (trained.data, trained.sampling, trained.ddpm.config) == (config.data, config.sampling, config.diffusion)
    assert vars(trained.vae.config) == vars(config.autoencoder)
    config.model = trained.model.config
    kept = reference.references()["small"]
    assert kept["settings"] == reference.settings(asdict(config)) and kept["seeds"] == [0, 1, 2, 3, 4]
    assert reference.verdict(config, 500, {"val_lm": 9.0})[0].startswith("val_lm 9")


def test_the_package_reads_it():
    package = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    ours, theirs = read_safetensors(IN_THE_BOX)[0], package.load_file(IN_THE_BOX)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_scripts_take_it_where_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_here("sample.py", "--prompt", PROMPTS[0], "--num", 1, "--steps", 4, "--guidance_scale", 2)
    assert code == 0 and "with assets/small.safetensors" in err, err
    assert Image.open(tmp_path / "out/samples/000.png").size == (32, 32)
    code, out, err = run_here("sample.py", "--image", "out/samples/000.png", "--out", "out/captions")
    assert code == 0 and out.startswith("0: a "), err
    code, out, err = run_here("evaluate.py", "--judged", 2)
    assert code == 0 and "held out, captions" in out, err


def test_the_model_uses_the_text():
    """Its conditioning gaps, on held-out documents, are far above 0."""
    trained, config = load(IN_THE_BOX), parse(["--config", "small"])[0]
    config.model = trained.model.config
    objective = Objective(config, trained.vae, trained.ddpm, trained.tokenizer, transfusion_mask, torch.device("cpu"), nullcontext)
    layout = trained.tokenizer, config.data.seq_len, config.model.n_patches
    stream = Stream(PairDocuments(open_pairs(config, "held_out"), trained.tokenizer, config.data), config.data.seq_len, 8, config.model.n_patches)
    sums = {}
    for n in range(2):
        with torch.no_grad():
            found = objective.validation_sums(trained.model, collate(next(stream), *layout), range(8), (2, n))
        sums = {name: np.add(sums.get(name, 0.0), pair) for name, pair in found.items()}
    found = gap.summary(sums)
    assert found["val_gap_q4"] - 4 * found["val_gap_q4_error"] > 100 and found["val_text_gap"] - 4 * found["val_text_gap_error"] > 1
