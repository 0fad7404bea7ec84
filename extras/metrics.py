"""Scores of your own data (section 4.2): CIDEr-D of captions; Frechet distances and CLIP score of images.

A metric is a function: metric(images, drawn, written, references) -> {name: number}. For each image it is
given the one drawn from its caption, the caption written of it, and the list of its own captions.
"""

import itertools
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import to_pixels
from extras.runs import load_checkpoint

FID = "give --inception FILE, FID's own network (weights-inception-2015-12-05-6726825d.pth of "
FID += "torch-fidelity's release v0.2.0), and pip install torch-fidelity"
CLIP = "give --clip FOLDER, a CLIP as transformers or open_clip saves it (such as "
CLIP += "openai/clip-vit-base-patch32), and pip install that package"


def words(text):
    """The words of a caption that CIDEr-D compares, in lower case, without punctuation.

    They are much as coco-caption's tokenizer (Stanford's) cuts them: `dog's`, `don't` and `I'm` are two,
    `t-shirt` and `3.5` one. But `cannot` stays one, and `o'clock`, `u.s.`, `$` and `&` fall apart or away.
    """
    pattern = r"\w+(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b|\w+(?:-\w+|(?<=\d)[.,]\d+)*"
    return re.findall(pattern, text.lower().replace("\u2019", "'"))


def ngrams(caption, n):
    """A list of words -> for each length up to n, a Counter of the n-grams of this length."""
    return [Counter(zip(*(caption[i:] for i in range(size)))) for size in range(1, n + 1)]


def cider(candidates, references, n=4, sigma=6.0):
    """CIDEr-D (Vedantam et al. 2015) as coco-caption computes it, from 0 to 10; papers print it times 100.

    candidates: a caption for each image, as a list of words; references: a list of such captions for each.
    """
    references = [[ngrams(caption, n) for caption in captions] for captions in references]
    frequency = Counter()  # in how many images' references an n-gram occurs
    for captions in references:
        frequency.update(set().union(*itertools.chain(*captions)))

    def similarity(a, b):
        cosines, idf = 0.0, lambda gram: math.log(len(references) / max(1, frequency[gram]))
        for counts in zip(a, b):
            v, w = ({gram: k * idf(gram) for gram, k in grams.items()} for grams in counts)
            shared = sum(min(x, w[gram]) * w[gram] for gram, x in v.items() if gram in w)
            cosines += shared / (math.hypot(*v.values()) * math.hypot(*w.values()) or 1)
        longer = a[1].total() - b[1].total()  # in bigrams
        return cosines / n * math.exp(-(longer**2) / (2 * sigma**2))

    candidates = [ngrams(caption, n) for caption in candidates]
    pairs = zip(candidates, references, strict=True)
    return 10 * fmean(fmean(similarity(caption, one) for one in captions) for caption, captions in pairs)


def captions_metric(images, drawn, written, references):
    """The share of captions that are one of the image's own, word for word, and CIDEr-D."""
    exact = [text in captions for text, captions in zip(written, references)]
    of_images = [[words(text) for text in captions] for captions in references]
    return {"captions": {"all": fmean(exact)}, "cider": cider(list(map(words, written)), of_images)}


def frechet_distance(a, b):
    """Between two sets of features (N, D), taken as Gaussians: |m - n|^2 + tr(S + T - 2 (S T)^(1/2)).

    m, n are their means and S, T their covariances (Heusel et al. 2017). With Inception's features it is FID.
    It is biased upwards where N is not many times D.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    s, t = (np.atleast_2d(np.cov(x, rowvar=False, ddof=min(1, len(x) - 1))) for x in (a, b))
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # S T has the eigenvalues of S^(1/2) T S^(1/2), which is symmetric and so gives no complex ones.
    mixed = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * mixed)


@torch.no_grad()
def in_chunks(function, *lists):
    """A function of lists, called with 32 items of each at a time -> its tensors, concatenated."""
    starts = range(0, len(lists[0]), 32)
    return torch.cat([function(*(items[i : i + 32] for items in lists)) for i in starts]).cpu()


def latent_features(vae, images, device="cpu"):
    """The VAE's standardised latents, averaged over a grid of 4 x 4: uint8 images -> (N, 16 C)."""
    encode = lambda chunk: vae.encode(to_pixels(np.stack(chunk)).to(device))
    pooled = lambda chunk: F.adaptive_avg_pool2d(encode(chunk), 4).flatten(1)
    return in_chunks(pooled, images).double().numpy()


def frechet_metric(name, features):
    """The Frechet distance between the features of two lists of images, under this name."""
    return lambda images, drawn, *_: {name: frechet_distance(features(images), features(drawn))}


def latent_metric(vae, device):
    """The Frechet distance of the VAE's latents."""
    return frechet_metric("latent_frechet_distance", partial(latent_features, vae, device=device))


def inception_features(path, device="cpu"):
    """The network that FID is defined by -> function: uint8 images (H, W, 3) -> features (N, 2048).

    path: its weights. Raises ValueError if they, or the package, cannot be used.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    except ImportError:
        raise ValueError(f"--inception: no FID; {FID}") from None
    if not Path(path).is_file():
        raise ValueError(f"--inception {path}: no such file; {FID}")
    load_checkpoint(path)  # it must hold tensors and nothing else: the package does not ask
    try:
        network = Inception("inception", ["2048"], feature_extractor_weights_path=str(path)).to(device)
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"--inception {path}: is another network; {FID}") from None
    features = lambda chunk: network(torch.from_numpy(np.stack(chunk)).movedim(-1, 1).to(device))[0]
    return lambda images: in_chunks(features, images).double().numpy()


def fid_metric(path, device):
    """FID. path: the weights of its network."""
    return frechet_metric("fid", inception_features(path, device))


def clip_embedder(path, device):
    """A CLIP in a folder -> function: PIL images, captions -> their embeddings."""
    if (Path(path) / "open_clip_config.json").exists():
        import open_clip

        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
        tokenize = open_clip.get_tokenizer(f"local-dir:{path}")

        def embed(images, texts):
            pixels = torch.stack([preprocess(image) for image in images]).to(device)
            return model.encode_image(pixels), model.encode_text(tokenize(texts).to(device))

    elif (Path(path) / "config.json").exists():
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(path, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(path, local_files_only=True)

        def embed(images, texts):
            inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
            found = model(**inputs.to(device))
            return found.image_embeds, found.text_embeds

    else:
        raise ValueError("there is no config.json and no open_clip_config.json")
    model.to(device).eval()
    return embed


def clip_metric(path, device="cpu"):
    """The CLIP score (Hessel et al. 2021) of what was drawn: 100 times the mean cosine, where below 0 is 0.

    path: a folder. Raises ValueError if the CLIP in it, or its package, cannot be used.
    """
    try:
        embed = clip_embedder(path, device)
    except Exception as error:  # the packages raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--clip {path}: no CLIP score ({reason}); {CLIP}") from None

    def cosines(images, references):
        captions = [captions[0] for captions in references]
        return F.cosine_similarity(*embed(list(map(Image.fromarray, images)), captions)).clamp(min=0)

    score = lambda drawn, references: 100 * in_chunks(cosines, drawn, references).mean().item()
    return lambda images, drawn, written, references: {"clip_score": score(drawn, references)}
