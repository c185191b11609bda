"""The report as one HTML file that needs no network and no server: text, tables, pictures and the rule explorer.

The template is page.html beside this file. Imports decision.
"""

import base64
import gzip
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pneumo.decision.rule import Rule
from pneumo.decision.tune import Tuned

LARGE = 200_000  # bytes
RESULTS_NOTE = (
    "Gain, paired: the mean difference of Dice, image by image, to this recipe's own rule as it stands in the recipe, "
    "not tuned. Sensitivity and true-negative rate (specificity) are by image: of those with pneumothorax the share in "
    "which some was found, of those without the share left empty. Calibration error: how far the image score is from "
    "the share with pneumothorax among images of such a score, on average. It and the ROC are of all folds' networks "
    "together; each alone may rank better and be calibrated worse."
)
BESIDE_NOTE = " Tuned over tuned: another recipe under its tuned rules to this one under its own."
FOLDS_NOTE = (
    "Each fold by networks that did not train on it, and, if the last column has one, by a rule that was chosen on the "
    "other folds."
)
SIZES_NOTE = (
    "Calibration gap: how far the mean image score of these images, which all have pneumothorax, is below 1. ROC AUC "
    "and average precision set them against all images without. A part has few positives, so its average precision is "
    "below that of all images even if it is found as well."
)
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        path: the PNG.
        caption: what it shows; its text alternative as well.
    """

    path: Path
    caption: str


@dataclass(frozen=True)
class Content:
    """What a page says; parts that are empty are left out.

    Attributes:
        origin: what was trained when on what, in one line below the title.
        warnings: sentences that stand out, above all others.
        summary: sentences at the top.
        results_note: what else there is to say of the results' columns.
        results, folds, sizes: tables, each a row of column names and rows of text.
        explorer: from `explorer`.
        case_columns, cases: the per-case table.
        audit: of folds and leaks, preformatted.
        sources: sha256 of each checkpoint.
    """

    title: str
    origin: str = ""
    warnings: Sequence[str] = ()
    summary: tuple[str, ...] = ()
    results: Sequence[Sequence[str]] = ()
    results_note: str = ""
    folds: Sequence[Sequence[str]] = ()
    sizes: Sequence[Sequence[str]] = ()
    figures: Sequence[tuple[str, Sequence[Figure]]] = ()
    explorer: Mapping[str, Any] | None = None
    case_columns: Sequence[str] = ()
    cases: Sequence[Sequence[Any]] = ()
    audit: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)


def render(content: Content) -> str:
    """The page's text."""
    parts = {
        "TITLE": html.escape(content.title),
        "ORIGIN": html.escape(content.origin),
        "WARNINGS": "".join(
            f'<p class="warning" role="note">{html.escape(sentence)}</p>' for sentence in content.warnings
        ),
        "SUMMARY": "".join(f"<p>{html.escape(sentence)}</p>" for sentence in content.summary),
        "RESULTS": _table("results", "Result", content.results, RESULTS_NOTE + content.results_note),
        "FOLDS": _table("by-fold", "By fold", content.folds, FOLDS_NOTE),
        "SIZES": _table("by-size", "By size of the pneumothorax", content.sizes, SIZES_NOTE),
        "FIGURES": "".join(_figures(title, figures) for title, figures in content.figures if figures),
        "AUDIT": html.escape(content.audit),
        "SOURCES": "".join(
            f"<li><code>{html.escape(path)}</code> <code>{html.escape(digest[:16])}</code></li>"
            for path, digest in content.sources.items()
        ),
        "EXPLORER": _json(content.explorer),
        "CASES": _json({"columns": list(content.case_columns), "rows": [list(row) for row in content.cases]}),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def explorer(tuned: Tuned, recipe_rule: Rule) -> dict[str, Any]:
    """What the page needs to show the score of every rule exactly as tuning has it.

    Returns:
        The four lists of values, the places of the chosen and of the recipe's rule, the numbers of cases, and per
        rule the sum of Dice over positives (float64) and the counts of positives found and of negatives left empty
        (uint32), little-endian, gzipped, base64.
    """
    grid, total = tuned.grid, tuned.sums.without(-1)
    axes = asdict(grid)
    own = asdict(recipe_rule)
    names = {"thresholds": "threshold", "min_areas": "min_area", "top_thresholds": "top_threshold"}
    names["top_areas"] = "top_area"
    return {
        "axes": {name: list(values) for name, values in axes.items()},
        "chosen": list(tuned.choice.index),
        "recipe": [list(axes[name]).index(own[single]) for name, single in names.items()],
        "positives": int(total.positives.sum()),
        "negatives": int(total.negatives.sum()),
        "dice_positive": _packed(total.dice_positive[0], "<f8"),
        "found": _packed(total.found[0], "<u4"),
        "kept_empty": _packed(total.kept_empty[0], "<u4"),
    }


def _packed(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array, dtype=kind).tobytes(), 6, mtime=0)).decode()


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _table(name: str, title: str, rows: Sequence[Sequence[str]], note: str) -> str:
    if not rows:
        return ""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = "".join(
        f'<tr><th scope="row">{_two_lines(row[0])}</th>'
        + "".join(f"<td>{_two_lines(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    )
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<section id="{name}"><h2>{html.escape(title)}</h2><div class="wide" tabindex="0" role="region" '
        f'aria-label="{html.escape(title)}"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>'
        f'</div><p class="soft">{html.escape(note)}</p></section>'
    )


def _embedded(path: Path) -> str:
    """A picture as a data URL: the PNG itself, or WebP where that keeps a large picture of X-rays small."""
    content, kind = path.read_bytes(), "png"
    if len(content) > LARGE:
        smaller = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(smaller, "WEBP", quality=88)
        content, kind = smaller.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _two_lines(cell: str) -> str:
    """A value with its interval, or a name with its note, in brackets below it."""
    value, space, more = cell.partition(" (")
    return f"{value}<br><small>({more}</small>" if space else value


def _figures(title: str, figures: Sequence[Figure]) -> str:
    shown = "".join(
        f'<figure><img loading="lazy" alt="{html.escape(figure.caption)}" '
        f'src="{_embedded(figure.path)}">'
        f"<figcaption>{html.escape(figure.caption)} <small>{html.escape(figure.path.stem)}.png, .csv</small>"
        f"</figcaption></figure>"
        for figure in figures
    )
    return f"<section><h2>{html.escape(title)}</h2>{shown}</section>"
