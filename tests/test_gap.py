"""The conditioning gap against its definition, document by document; 0 for a model that cannot see the text; far above for one that does."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_model

import train
from attention_mask import transfusion_mask
from data import DataConfig, ImageSegment, PairDocuments, Tokenizer, collate
from diffusion import DDPM
from extras import gap
from extras.scenes import Scenes

SIDE, P = 8, 4  # latent pixels a side, patches an image
T = Tokenizer()


def documents(n=24, seed=0):
    """Documents in both orders, some without a caption, four in a row."""
    recipe = PairDocuments(Scenes(), T, DataConfig(caption_first=0.5, drop_caption=0.2), seed=seed)
    blank = np.zeros((SIDE, SIDE, 3), np.uint8)
    made = [[ImageSegment(lambda: blank, part.max_t) if isinstance(part, ImageSegment) else part for part in recipe(i)] for i in range(n)]
    return [made[i : i + 4] for i in range(0, n, 4)]


def mixed(rows, model, seed=0):
    batch = collate(rows, T, 700, P)
    generator = torch.Generator().manual_seed(seed)
    c, n = model.config, len(batch.images)
    x_0, eps = torch.randn(2, n, c.latent_channels, c.latent_size, c.latent_size, generator=generator)
    return batch, x_0, torch.randint(1, 1001, (n,), generator=generator), eps


def measured(model, rows, make_mask=transfusion_mask):
    losses = partial(train.losses, model, DDPM(), make_mask=make_mask)
    parts = mixed(rows, model)
    with torch.no_grad():
        lm, ddpm = losses(*parts)
        return gap.summary(gap.measure(losses, 1000, *parts, lm, ddpm)), lm, ddpm, parts


def test_it_is_the_loss_with_other_captions_minus_the_right_one():
    """Each exchanged document is laid out alone, as a batch of its own, with the caption of the one before it."""
    model = tiny_model(scale=8.0, side=SIDE, patch_size=4)
    rows = documents()
    found, lm, ddpm, (batch, x_0, t, eps) = measured(model, rows)
    flat = [document for row in rows for document in row]
    losses = partial(train.losses, model, DDPM())

    def alone(document, image, at):
        with torch.no_grad():
            return losses(collate([[document]], T, 700, P), x_0[[image]], t[[at]], eps[[at]])

    texts = [next(part for part in d if not isinstance(part, ImageSegment)) for d in flat]
    after = [n for n, d in enumerate(flat) if not isinstance(d[0], ImageSegment) and d[0]]
    before = [n for n, d in enumerate(flat) if isinstance(d[0], ImageSegment) and d[1]]
    assert len(after) > 3 and len(before) > 3 and len(after) + len(before) < len(flat)
    right = torch.stack([alone(flat[n], n, n)[1][0] for n in after])
    wrong = torch.stack([alone(flat[after[k + 1 - len(after)]], n, n)[1][0] for k, n in enumerate(after)])
    assert found["val_gap"] == pytest.approx(100 * ((wrong - right).mean() / right.mean()).item(), rel=1e-3)
    spread = (wrong - right).double().std(correction=0) / len(after) ** 0.5
    assert found["val_gap_error"] == pytest.approx(100 * (spread / right.mean()).item(), rel=1e-3)
    rises = []
    for k, n in enumerate(before):
        a, b = alone(flat[n], n, n)[0][0], alone(flat[n], before[k - 1], n)[0][0]
        rises += (b - a)[1 : 1 + P + 2 + len(texts[n]) + 1][(a != 0)[1 : 1 + P + 2 + len(texts[n]) + 1]].tolist()
    assert found["val_text_gap"] == pytest.approx(np.mean(rises), rel=1e-3)


def test_a_model_whose_images_cannot_see_the_text_has_none():
    def apart(image_id, doc_id):
        same = image_id[:, :, None] == image_id[:, None, :]
        return transfusion_mask(image_id, doc_id) & same[:, None]

    model = tiny_model(scale=8.0, side=SIDE, patch_size=4)
    found = measured(model, documents(48), apart)[0]
    assert abs(found["val_gap"]) <= 4 * found["val_gap_error"] + 1e-3 and found["val_text_gap"] == 0.0
    assert abs(measured(model, documents(48))[0]["val_text_gap"]) > 0  # with the mask of the paper it is another model


@pytest.mark.parametrize("rows", [[[[[65, 66]]]], [[[[65, 66]]], [[[67]]]]])
def test_text_alone_has_no_gap(rows):
    found = measured(tiny_model(side=SIDE, patch_size=4), rows)[0]
    assert not [name for name in found if "gap" in name and found[name] is not None]
