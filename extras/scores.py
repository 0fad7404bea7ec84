"""The scores of evaluate.py as a table, 80 columns wide."""

from extras import gap

NAMES = {  # of the numbers that own data are scored by
    "cider": "CIDEr-D of the captions",
    "latent_frechet_distance": "Frechet distance of latents (not FID)",
    "fid": "FID",
    "clip_score": "CLIP score",
}
HOW_TO_GET = {"fid": "give --inception FILE", "clip_score": "give --clip FOLDER"}


def format_scores(scores):
    """What evaluate returns, as text to print: shares in %, then the numbers, a line for each of a split."""
    splits = {split.replace("_", " "): found for split, found in scores["splits"].items()}
    shares, numbers = [], []
    for split, found in splits.items():
        judged = {what: found[what] for what in ("prompts", "captions") if what in found}
        for what, aspects in (judged | found.get("changes", {})).items():
            right = {"right": aspects["all"]} if "all" in aspects else {}
            shares.append((f"{split}, {what}", {"n": found["n"], **right, **aspects}))
        if "perplexity_per_token" in found:
            numbers.append(f"{split:24}{perplexities(found)}")
        known = [name for name in NAMES if name in found]
        numbers += [f"{split:24}{NAMES[name]} {found[name]:.3f}, n = {found['n']}" for name in known]
        if "cider" in found:
            missing = [name for name in HOW_TO_GET if name not in found]
            numbers += [f"no {NAMES[name]}: {HOW_TO_GET[name]}" for name in missing]
    named = dict.fromkeys(aspect for _, aspects in shares for aspect in aspects)  # in order, each once
    columns = [aspect for aspect in named if aspect not in ("n", "all")]
    lines = [f"{'% of n':24}" + "".join(f"{aspect:>9}" for aspect in [*columns, "n"])] if shares else []
    for label, aspects in shares:
        cells = (f"{100 * aspects[aspect]:9.1f}" if aspect in aspects else " " * 9 for aspect in columns)
        lines.append(f"{label:24}{''.join(cells)}{aspects['n']:9}")
    if gaps := gap.said(scores.get("validation", {})):
        numbers.append(f"{'held out':24}" + ", ".join(gaps))
    if "text" in scores:
        numbers.append(f"{scores['text']['path']}: {perplexities(scores['text'])}")
    return "\n".join(lines + list(dict.fromkeys(numbers)))


def perplexities(found):
    """The two perplexities of a text."""
    per_token, per_byte = found["perplexity_per_token"], found["perplexity_per_byte"]
    return f"text perplexity {per_token:.3f} per token, {per_byte:.3f} per byte"
