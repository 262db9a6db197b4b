"""A flat drawing, written as SVG without any package, or as PNG by matplotlib."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

_DOTS_PER_INCH = 100


@dataclass(frozen=True)
class Bar:
    """A filled rectangle; the origin is the upper left corner."""

    x: float
    y: float
    width: float
    height: float
    color: str


@dataclass(frozen=True)
class Label:
    """A line of text whose baseline begins, or with `end` ends, at a point."""

    x: float
    y: float
    text: str
    size: float = 12.0
    end: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Drawing:
    """Marks on a white sheet, in pixels."""

    width: float
    height: float
    marks: Sequence[Bar | Label]

    def svg(self) -> str:
        size = f'width="{self.width:g}" height="{self.height:g}"'
        box = f'viewBox="0 0 {self.width:g} {self.height:g}" font-family="sans-serif"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}>', f'<rect {size} fill="white"/>']
        for mark in self.marks:
            if isinstance(mark, Bar):
                parts.append(
                    f'<rect x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" height="{mark.height:.1f}" '
                    f'fill="{mark.color}"/>'
                )
            else:
                anchor, weight = "end" if mark.end else "start", "bold" if mark.bold else "normal"
                parts.append(
                    f'<text x="{mark.x:.1f}" y="{mark.y:.1f}" font-size="{mark.size:g}" text-anchor="{anchor}" '
                    f'font-weight="{weight}">{escape(mark.text)}</text>'
                )
        return "\n".join([*parts, "</svg>\n"])

    def write(self, path: Path, *, title: str, table: str) -> None:
        """Write it to a file: .svg, .html (with the table as text under it), or .png.

        Raises:
            ValueError: the name ends otherwise; or matplotlib is missing for a .png.
        """
        kind = path.suffix.lower()
        if kind == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        elif kind == ".html":
            path.write_text(
                f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n{self.svg()}'
                f"<pre>{escape(table)}</pre></html>\n",
                encoding="utf-8",
            )
        else:
            self._write_png(path)

    def _write_png(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        figure = Figure(figsize=(self.width / _DOTS_PER_INCH, self.height / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        axes: Any = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        for mark in self.marks:
            if isinstance(mark, Bar):
                axes.add_patch(Rectangle((mark.x, mark.y), mark.width, mark.height, color=mark.color, linewidth=0))
            else:
                points = mark.size * 72 / _DOTS_PER_INCH
                side, weight = "right" if mark.end else "left", "bold" if mark.bold else "normal"
                axes.text(mark.x, mark.y, mark.text, fontsize=points, ha=side, va="baseline", weight=weight)
        figure.savefig(path, dpi=_DOTS_PER_INCH)


def check_plot(path: Path) -> None:
    """ValueError for a file that no drawing can be written to: known before anything is compiled."""
    if path.suffix.lower() not in (".svg", ".html", ".png"):
        raise ValueError(f"plot={str(path)!r} must end in .html, .svg or .png")
    if path.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"plot={str(path)!r} needs matplotlib; pip install 'jax-engine[plan]', or write .html or .svg, which need "
            "nothing"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"plot={str(path)!r} is in no folder that exists; make it first")
