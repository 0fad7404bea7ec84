"""Curves as an image, drawn with Pillow alone: how losses go down, with the range of several runs."""

import math

from PIL import Image, ImageDraw, ImageFont

COLOURS = ((31, 98, 176), (214, 96, 32), (44, 140, 70), (140, 70, 160), (120, 120, 120))
WIDTH, HEIGHT = 420, 260  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 34  # margins within it
FINER = 3  # drawn so many times larger, then made smaller: smooth lines
QUARTERS = {n: f"quarter {n} of t" for n in (1, 2, 3, 4)}
PANELS = {  # title -> {figure of log.jsonl: its label}
    "text loss, nats a token": dict(lm="training", val_lm="held out"),
    "diffusion loss": dict(ddpm="training", val_ddpm="held out"),
    "diffusion loss, held out": {f"val_ddpm_q{n}": text for n, text in QUARTERS.items()},
    "loss of image tokens": dict(val_codes="held out"),
    "conditioning gap, %": {f"val_gap_q{n}": text for n, text in QUARTERS.items()},
    "text gap, nats a token": dict(val_text_gap="held out"),
}


def panels(points):
    """What PANELS names, as draw_panels takes it. points(figure) -> a list of (step, mean, low, high)."""
    found = []
    for title, figures in PANELS.items():
        known = {label: points(name) for name, label in figures.items()}
        lines = [(label, *zip(*rows)) for label, rows in known.items() if rows]
        found += [(title, lines)] if lines else []
    return found


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= n)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_panel(title, lines):
    """A diagram. lines: (label, steps, means, lows, highs) each; the last two bound a band -> PIL image."""
    image = Image.new("RGB", (FINER * WIDTH, FINER * HEIGHT), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    small, large = (ImageFont.load_default(size=FINER * size) for size in (11, 13))
    x_high = max(max(steps) for _, steps, *_ in lines)
    y_low = min(0.0, min(min(lows) for _, _, _, lows, _ in lines))
    y_high = max(y_low + 1e-3, 1.05 * max(max(highs) for *_, highs in lines))  # a flat curve has height, too

    def at(x, y):
        """A step and a value -> pixels."""
        across = LEFT + x / x_high * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return FINER * across, FINER * down

    for y in ticks(y_low, y_high):
        draw.line([at(0, y), at(x_high, y)], fill=(225, 225, 225), width=FINER)
        x, y_of_line = at(0, y)
        draw.text((x - 6 * FINER, y_of_line), f"{y:g}", fill="black", font=small, anchor="rm")
    for x in ticks(0, x_high):
        x_of_line, y_of_line = at(x, y_low)
        draw.text((x_of_line, y_of_line + 5 * FINER), f"{x:,g}", fill="black", font=small, anchor="mt")
    _, _, highest, *_ = max(lines, key=lambda line: max(line[2]))
    rises = highest[-1] > highest[0]  # then there is room at the left
    for n, (label, steps, means, lows, highs) in enumerate(lines):
        colour = COLOURS[n % len(COLOURS)]
        band = [at(*point) for point in zip(steps, highs)]
        band += [at(*point) for point in zip(reversed(steps), reversed(lows))]
        if len(steps) > 1:
            draw.polygon(band, fill=(*colour, 60))
        draw.line([at(*point) for point in zip(steps, means)], fill=colour, width=2 * FINER, joint="curve")
        place = FINER * (LEFT + 6 if rises else WIDTH - RIGHT - 6), FINER * (TOP + 6 + 15 * n)
        draw.text(place, label, fill=colour, font=small, anchor="lt" if rises else "rt")
    draw.text((FINER * LEFT, FINER * 9), title, fill="black", font=large)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_panels(panels, columns=2):
    """Diagrams side by side: (title, lines) each, as `draw_panel` takes them -> PIL image."""
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for n, (title, lines) in enumerate(panels):
        sheet.paste(draw_panel(title, lines), (n % columns * WIDTH, n // columns * HEIGHT))
    return sheet
