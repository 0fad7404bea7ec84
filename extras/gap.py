"""Does the model use the text? The conditioning gap: what exchanged captions cost on held-out documents.

Where the caption comes first, each image is put after another document's caption: the same latents, the same
t, the same noise. The gap is how much its diffusion loss rises, in percent. Where the image comes first, the
caption is put after another document's image, at the same t and noise. The text gap is how much its loss
rises, in nats a token. A gap of 0 says that the condition is ignored.
"""

import math

import torch

from data import NO_LOSS


def kinds(batch):
    """Of each image (N,): does text come before it in its document? Does the document begin with it?

    The second holds only where text follows.
    """
    patches = (batch.image_id.flatten() >= 0).nonzero().flatten()  # (N P,): their places
    n = max(1, len(patches) // max(1, len(batch.max_t)))  # P
    first, last = patches[::n], patches[n - 1 :: n]  # (N,)
    start = batch.positions.flatten()[first]  # 2 after <BOS> <BOI>
    document = torch.nn.functional.pad(batch.doc_id, (0, 2), value=-1)  # (B, S + 2)
    row, place = last // batch.doc_id.shape[1], last % batch.doc_id.shape[1]
    goes_on = document[row, place + 2] == document[row, place]  # something stands after <EOI>
    return start > 2, (start == 2) & goes_on


def measure(losses, timesteps, batch, x_0, t, eps, lm, ddpm):
    """Sums over the documents of a batch: {name: (sum, how many)}, which `summary` understands.

    losses(batch, x_0, t, eps) -> lm, the loss of each position (B, S), and ddpm, of each image (N,). Those of
    the right pairs are given.
    """
    after, before = kinds(batch)
    own = torch.arange(len(t), device=t.device)
    other = own.clone()  # the image that takes each image's place
    for kind in (after, before):
        here = kind.nonzero().flatten()
        other[here] = here.roll(1)
    moved = torch.where(after, other, own)  # an image after a caption takes its t and its noise along
    lm_other, ddpm_other = losses(batch, x_0[other], t[moved], eps[moved])
    used = after & (other != own) & (t[moved] > 0)
    right, rise = ddpm[moved][used].double(), (ddpm_other - ddpm[moved])[used].double()
    found, quarter = sums("gap", right, rise), (t[moved][used] - 1) * 4 // timesteps
    for n in range(4):
        found |= sums(f"gap_q{n + 1}", right[quarter == n], rise[quarter == n])
    told = torch.isin(batch.image_id, own[before & (other != own)])  # (B, S): is it of an exchanged image?
    documents = batch.doc_id + (batch.doc_id.max() + 1) * torch.arange(len(told), device=t.device)[:, None]
    follows = torch.isin(documents, documents[told]) & (batch.targets != NO_LOSS) & (batch.positions > 0)
    return found | sums("text_gap", lm[follows].double(), (lm_other - lm)[follows].double())


def sums(name, right, rise):
    """The right losses and what the exchange adds to them, both (n,), as sums."""
    parts = {"": rise, "_right": right, "_squares": rise.square()}
    return {f"{name}{part}": (values.sum().item(), len(values)) for part, values in parts.items()}


def summary(found):
    """{name: (sum, how many)} -> means; gaps and their standard errors stand for what `measure` sums."""
    means = {name: total / n if n else None for name, (total, n) in found.items()}
    for name in [name.removesuffix("_squares") for name in found if name.endswith("_squares")]:
        rise, right, square = (means.pop(f"{name}{part}") for part in ("", "_right", "_squares"))
        if rise is not None:
            unit = 1.0 if name == "text_gap" else 100 / right
            error = math.sqrt(max(0.0, square - rise * rise) / found[name][1])
            means |= {f"val_{name}": rise * unit, f"val_{name}_error": error * unit}
    return means


def said(found):
    """The gaps of a validation, as a person reads them: a list of at most two texts."""
    texts = [("val_gap", "gap {:.1f} ± {:.1f} %"), ("val_text_gap", "text gap {:.2f} ± {:.2f} nats")]
    return [text.format(found[name], found[f"{name}_error"]) for name, text in texts if name in found]
