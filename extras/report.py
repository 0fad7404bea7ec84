"""A page to look at after training: report.html in the run's folder, one file that needs nothing else.

It shows the scores, the losses over the steps, the sample sheets, and the options that are not the paper's.
"""

import base64
import html
import json
from pathlib import Path

from extras import cli, curves, runs
from extras.scores import format_scores

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
pre { overflow-x: auto; background: #f5f5f5; padding: 1em } img { max-width: 100% }
td { padding: 0 1.5em 0 0 } figure { margin: 1em 0 }"""


def series(lines):
    """The lines of log.jsonl as dicts -> panels, as curves.draw_panels takes them; those without data go."""

    def points(name):
        """(step, value, and it again as both bounds) of each line that has the figure."""
        return [(line["step"], *[line[name]] * 3) for line in lines if line.get(name) is not None]

    return curves.panels(points)


def embedded(path):
    """The path of a PNG -> an <img> that holds it."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def page(title, options, scores, chart, sheets):
    """The report -> str. options: (name, value here, the paper's value) each; chart, sheets: of PNGs."""
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>']
    parts.append(f"<style>{STYLE}</style><body><h1>{html.escape(title)}</h1>")
    if scores:
        parts.append(f"<h2>Scores</h2><pre>{html.escape(format_scores(scores))}</pre>")
    if chart:
        parts.append(f"<h2>Losses by step</h2>{embedded(chart)}")
    parts.append("<h2>Samples for held-out captions</h2>")
    for sheet in reversed(sheets):  # the last comes first
        parts.append(f"<figure><figcaption>{html.escape(sheet.stem)}</figcaption>{embedded(sheet)}</figure>")
    parts.append("<h2>Options that are not the paper's</h2><table><tr><th>option<th>here<th>paper")
    for row in options:
        parts.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row))
    return "".join(parts) + "</table></body></html>\n"


def write(folder, config):
    """Write report.html and curves.png of a run. config: a dataclass; its defaults are the paper's."""
    folder = Path(folder)
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        panels = series([json.loads(line) for line in file])
    chart = folder / "curves.png" if panels else None
    if panels:
        with runs.written(chart) as file:
            curves.draw_panels(panels).save(file, "png")
    scores = folder / "scores.json"
    defaults, here = cli.flat(type(config)()), cli.flat(config)
    options = [(name, here[name], defaults[name]) for name in here if here[name] != defaults[name]]
    sheets = sorted(folder.glob("samples_*.png"))
    found = runs.read_json(scores) if scores.exists() else None
    with runs.written(folder / "report.html") as file:
        file.write(page(str(folder), options, found, chart, sheets).encode())
