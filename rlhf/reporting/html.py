"""What the project's HTML pages share: templates, tables and figures.

A page is a template in rlhf/reporting/templates/ that extends base.html. Every value is escaped by
jinja2, unless it is Markup; only figures, made by plotly and matplotlib, are Markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf.base.log import valid_text

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
    return valid_text(TEMPLATES.get_template(template_name).render(**context))


class Table(NamedTuple):
    """A table of a page, drawn by the macro `table` of tables.html."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[str] = ()  # names in `header` whose cells may break into lines


class Figures:
    """Plotly figures as parts of a page; the library goes with the first one."""

    def __init__(self) -> None:
        self.first = True

    def add(self, figure: Figure | dict[str, Any], height: str = "100%") -> Markup:
        """The figure as a <div> with the script that draws it, as wide as its place in the page.

        Args: figure: or a dictionary with data and layout, as plotly.js reads them.
            height: in CSS; 100%: that of the figure's layout.
        """
        import plotly.io

        text = plotly.io.to_html(
            figure,
            include_plotlyjs=self.first,
            full_html=False,
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
            default_height=height,
            validate=not isinstance(figure, dict),
        )
        self.first = False
        return Markup(text)  # plotly escapes "<", ">" and "/" in what it is given
