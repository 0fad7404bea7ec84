"""What a person sees of documents: contact sheets, films, a page, and the terminal meanwhile."""

import base64
import html
import io
import itertools
import math
import re
import shlex
import textwrap

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from extras.cli import printable
from extras.sources import say


def captioned(document):
    """The images of a document, each with the text right before it, or "": (PIL image, str) each."""
    said = [part if isinstance(part, str) else "" for part in ["", *document]]
    return [(part, before) for before, part in zip(said, document) if not isinstance(part, str)]


def contact_sheet(images, captions, columns=None, side=128):
    """PIL images in a grid, each with its caption under it -> PIL image."""
    root = math.sqrt(len(images))
    if not columns:  # as few empty places as can be
        possible = range(math.ceil(root), math.ceil(1.5 * root) + 1)
        columns = min(possible, key=lambda n: -len(images) % n)
    font, gap, line = ImageFont.load_default(size=12), 10, 15
    box, shown = bytes(font.getmask("\uffff")), filter(str.isprintable, sorted({*"".join(captions)} - {" "}))
    if odd := [c for c in shown if bytes(font.getmask(c)) == box]:
        say(f"boxes stand for characters that the sheet's font lacks: {''.join(odd[:20])}")
    texts = [textwrap.fill(caption, side // 6) for caption in captions]  # about six pixels a letter
    width, height = side + gap, side + gap + 6 + line * max(text.count("\n") + 1 for text in texts)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (gap + columns * width, gap + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (image, text) in enumerate(zip(images, texts)):
        x, y = gap + n % columns * width, gap + n // columns * height
        resampling = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), resampling), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(205, 205, 205))
        draw.text((x, y + side + 4), text, fill=(40, 40, 40), font=font, spacing=3)
    return sheet


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Transfusion</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 2em auto; padding: 0 1em }
article { border-bottom: 1px solid #ddd; padding: 1em 0 } .given { color: #888 }
img { width: 256px; max-width: 100%; image-rendering: pixelated }
</style><body>"""


def html_page(documents, given):
    """Documents as one HTML page -> str. given: how many parts of each are the prompt's, which are grey."""
    parts = [PAGE]
    for document, n in zip(documents, given):
        parts.append("<article>")
        for i, part in enumerate(document):
            kind = "given" if i < n else "new"
            if isinstance(part, str):
                parts.append(f'<p class="{kind}">{html.escape(part.strip())}</p>')
            else:
                part.save(file := io.BytesIO(), "PNG")
                pixels = base64.b64encode(file.getvalue()).decode()
                parts.append(f'<img class="{kind}" src="data:image/png;base64,{pixels}" alt="">')
        parts.append("</article>")
    return "".join(parts) + "</body></html>\n"


def save_film(path, films, captions, to_image, columns=None):
    """The denoising as an animated GIF of at most 41 contact sheets.

    films: for each image, what it was at every step, from noise to the end; `to_image` makes images of that.
    """
    steps = len(films[0]) - 1
    shown = sorted({round(n * steps / 40) for n in range(41)})
    sheets = [contact_sheet([to_image(film[n]) for film in films], captions, columns) for n in shown]
    duration = [80] * (len(sheets) - 1) + [2000]  # ms
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=duration, loop=0)


class Terminal:
    """What is seen while documents are written: a bar for the denoising and, of a single document, its text.

    prefix: what is printed before the text; None: no text is printed. keep: keep the films of the denoising.
    """

    def __init__(self, steps, keep, prefix=None):
        self.steps, self.keep, self.prefix = steps, keep, prefix
        self.films, self.bar = {}, None  # number of a document -> a film for each of its images

    def on_text(self, number, piece):
        """A document goes on with this text."""
        if self.prefix is not None:
            print(printable(self.prefix + piece), end="", flush=True)
            self.prefix = ""

    def on_step(self, number, step, x_t):
        """A document's image is so far after this step."""
        films = self.films.setdefault(number, [])
        if step == 0:
            films.append([])
            self.on_text(number, "\n")  # the bar takes the next line
            self.bar = self.bar or tqdm(desc="denoise", total=0, leave=False)
            self.bar.total += self.steps
        self.bar.update(step > 0)
        if self.keep:
            films[-1].append(x_t.clone())


def show(results, documents, out, terminal, settings, to_image):
    """Print the documents' text, and write their images and what gathers them to the folder `out`.

    An image's PNG holds the prompt, the whole document's text and the settings. What an earlier run left
    there, and this one does not write, is named.
    """
    if terminal.bar:
        terminal.bar.close()
    ours = re.compile(r"\d{3,}(_\d+)?\.png|sheet\.png|film\.gif|page\.html")
    left = {path.name for path in out.glob("*") if ours.fullmatch(path.name)}
    images, captions, numbers = [], [], set()

    def place(name):
        """Where a file of this name is written to."""
        out.mkdir(parents=True, exist_ok=True)
        left.discard(name)
        return out / name

    for n, (document, prompt) in enumerate(zip(results, documents)):
        text = " ".join(part.strip() for part in document if isinstance(part, str)) or "(no text)"
        new = captioned(document)[len(captioned(prompt)) :]
        numbers.add(len(new))
        notes = PngInfo()
        notes.add_text("prompt", " ".join(part for part in prompt if isinstance(part, str)))
        notes.add_text("text", text)
        notes.add_text("settings", settings[n])
        line = "" if terminal.prefix == "" else f"{n}: {text}"
        for k, (image, caption) in enumerate(new):
            path = place(f"{n:03d}_{k}.png" if k else f"{n:03d}.png")
            image.save(path, pnginfo=notes)
            line += f"  [{path}]"
            images.append(image)
            captions.append(caption or text)
        print(printable(line))
    columns = max(numbers) if len(numbers) == 1 < max(numbers) else None  # a row for each story
    if len(images) > 1:
        contact_sheet(images, captions, columns).save(place("sheet.png"))
        print(f"all of them: {out / 'sheet.png'}")
    if images and terminal.keep:
        films = itertools.chain(*(terminal.films[n] for n in sorted(terminal.films)))
        save_film(place("film.gif"), list(films), captions, to_image, columns)
        print(f"how they came about: {out / 'film.gif'}")
    elif terminal.keep:
        print("no film.gif: nothing was drawn")
    given = [len(prompt) for prompt in documents]
    if images and any(len(document) > min(2, n + 1) for document, n in zip(results, given)):
        place("page.html").write_text(html_page(results, given), encoding="utf-8")
        print(f"text and images in their order: {out / 'page.html'}")
    if left:
        some = ", ".join(sorted(left)[:5]) + ", ..." * (len(left) > 5)
        print(f"{out} still has {len(left)} files of an earlier run: {some}")


def next_command(checkpoint, documents, pairs):
    """The command to try after training: sample.py with a caption of the data, quoted for the shell."""
    more = {"edits": " --image IMAGE.png", "stories": " --max_images 3"}.get(documents, "")
    caption = pairs.pair(1 if documents == "edits" else 0)[0]  # the first image of an edit is given
    command = f"python sample.py --ckpt {shlex.quote(str(checkpoint))}{more} --prompt {shlex.quote(caption)}"
    return printable(command)
