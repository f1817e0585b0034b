"""The report as Markdown, and as one HTML page that needs nothing else: white or dark, on screen or paper."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from benchmarks.report_tables import Table

CSS = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #fff; --line: #d0d7de; --link: #2f6fb3;
  --soft: #f3f5f7 }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #d9dde3; --paper: #14171c; --line: #3a414b; --link: #79b0e8; --soft: #1d2229 }
}
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 80rem; padding: 1rem }
a { color: var(--link) }
nav a { margin-right: 1em; white-space: nowrap }
h2 { margin-top: 2.2rem }
p { max-width: 48rem }
figure { margin: 1rem 0 }
figure svg { height: auto; max-width: 100% }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.45rem; text-align: left; vertical-align: top }
thead th { border-bottom-width: 2px }
code { background: var(--soft); font-size: 0.92em; padding: 0 0.2em }
small, th { white-space: nowrap }
summary { cursor: pointer; margin: 0.6rem 0 }
@page { margin: 1.2cm; size: landscape }
@media print {
  body { font-size: 9.5pt; max-width: none; padding: 0 }
  nav { display: none }
  figure, tr { break-inside: avoid }
  .scroll { overflow: visible }
  table { font-size: 6.5pt }
  th, td { padding: 0.1rem 0.25rem }
}
"""


@dataclass(frozen=True)
class Figure:
    """An ``svg`` element, the name of its file, and what it shows, in words."""

    name: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A part of the report: words, then a figure, then a table.

    Args:
        title: Its heading.
        text: A paragraph, in the markup of the cells.
        figure: Or None.
        table: Or None; one without rows is left out.
        folded: The table is shown when asked for.
        only: ``html`` or ``md``: for the other there is another section. Empty = both.
    """

    title: str
    text: str
    figure: Figure | None = None
    table: Table | None = None
    folded: bool = False
    only: str = ""


def markdown(title: str, sections: Iterable[Section]) -> str:
    """The report as Markdown; figures are ``NAME.svg`` beside it."""
    parts = [f"# {title}"]
    for s in sections:
        if s.only == "html":
            continue
        parts += [f"## {s.title}", s.text]
        if s.figure:
            parts.append(f"![{s.figure.alt}]({s.figure.name}.svg)")
        if s.table and s.table.rows:
            lines = "\n".join(table_lines(s.table))
            head = f"<details><summary>{s.title}: {len(s.table.rows)} lines</summary>"
            parts += [head, lines, "</details>"] if s.folded else [lines]
    return "\n\n".join(parts) + "\n"


def table_lines(table: Table) -> list[str]:
    """A Markdown table."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return [f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |" for cells in lines]


def page(title: str, sections: Iterable[Section]) -> str:
    """The report as one HTML page, figures inside."""
    shown = [s for s in sections if s.only != "md"]
    names = [re.sub(r"\W+", "-", s.title.lower()) for s in shown]
    links = " ".join(
        f'<a href="#{n}">{escape(s.title)}</a>' for n, s in zip(names, shown, strict=True)
    )
    body = "\n".join(_section(n, s) for n, s in zip(names, shown, strict=True))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(name: str, s: Section) -> str:
    parts = [f'<section>\n<h2 id="{name}">{escape(s.title)}</h2>\n<p>{inline(s.text)}</p>']
    if s.figure:
        parts.append(f"<figure>{s.figure.svg}</figure>")
    if s.table and s.table.rows:
        label = escape(s.title)
        # A box that scrolls sideways can be reached and moved with the keyboard.
        table = f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{_table(s.table)}</div>'
        if s.folded:
            summary = f"<summary>{label}: {len(s.table.rows)} lines</summary>"
            table = f"<details>{summary}{table}</details>"
        parts.append(table)
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{inline(c)}</th>' for c in table.head)
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{inline(c)}</td>" for c in others)
        rows.append(f'<tr><th scope="row">{inline(first)}</th>{cells}</tr>')
    body = "\n".join(rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def inline(text: str) -> str:
    """Cell markup as HTML: ``**bold**``, code in backticks; all else is escaped."""
    text = escape(text)
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    text = re.sub(
        r"(\[-?[\d.]+, -?[\d.]+\])", r"<small>\1</small>", text
    )  # an interval is not broken
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
