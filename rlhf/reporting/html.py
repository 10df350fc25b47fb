"""What the project's HTML pages share: templates, tables and figures.

A page is a template in rlhf/reporting/templates/ that extends base.html. Every value is escaped by
jinja2, unless it is Markup; only figures, made by plotly and matplotlib, are Markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TEMPLATES = Environment(
    loader=PackageLoader("rlhf.reporting"),
    autoescape=True,
    undefined=StrictUndefined,  # a misspelt name raises
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template_name: str, **context: Any) -> str:
    """Fill a template of rlhf/reporting/templates/; base.html needs `title`.

    Raises: jinja2.UndefinedError for a name that `context` lacks.
    """
    return TEMPLATES.get_template(template_name).render(**context)


class Table(NamedTuple):
    """A table of a page, drawn by the macro `table` of tables.html."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[str] = ()  # names in `header` whose cells may break into lines


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin: 1.5em 0 .3em; }
table { border-collapse: collapse; margin: .8em 0; font-size: 14px; } th, td { padding: .2em .8em; border-bottom: 1px solid #e4e4e4; }
th { text-align: left; font-weight: 600; } td { text-align: right; white-space: nowrap; }
td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; vertical-align: top; }
td.text { overflow-wrap: anywhere; min-width: 8em; }
.fine { color: #1a7f37; } .warning { color: #9a3412; } .note { color: #666; font-size: 14px; } figure { margin: 0; }
svg { max-width: 100%; height: auto; }
"""


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[str] = ()
) -> str:
    """A table; all cells are escaped. Args: texts: columns that may break into lines."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [
        "".join(
            f"<td{' class=text' if column in texts else ''}>{escape(cell)}</td>"
            for column, cell in zip(header, row)
        )
        for row in rows
    ]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


class Figures:
    """Plotly figures as parts of a page; the library goes with the first one."""

    def __init__(self) -> None:
        self.first = True

    def add(self, figure: Figure) -> Markup:
        """The figure as a <div> with the script that draws it."""
        import plotly.io

        text = plotly.io.to_html(
            figure, include_plotlyjs=self.first, full_html=False, config={"displaylogo": False}
        )
        self.first = False
        return Markup(text)  # plotly escapes "<", ">" and "/" in what it is given


def document(title: str, body: Sequence[str], style: str = "", scripts: bool = False) -> str:
    """A whole page that needs no other file. Args: scripts: it runs those that are in it (plotly's); else none, whatever slips in."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    policy += "; script-src 'unsafe-inline'; img-src data: blob:; font-src data:" if scripts else ""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f"<title>{escape(title)}</title><style>{STYLE}{style}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )
