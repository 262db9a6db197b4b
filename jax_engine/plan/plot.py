"""The picture of a comparison: what a step's time is made of, and how many sequences fit, row by row."""

from collections.abc import Sequence

from jax_engine.plan.compare import Impossible
from jax_engine.plan.drawing import Bar, Drawing, Label
from jax_engine.plan.figures import Plan

COLORS = {"compute": "#4477aa", "memory": "#ccbb44", "communication": "#ee6677", "capacity": "#66ccee"}
_ROW, _THIN, _LEFT, _PANEL, _GAP = 62, 12, 230, 380, 110


def comparison_drawing(rows: Sequence[Plan | Impossible], title: str) -> Drawing:
    """Bars of the three parts of a step of decodes, of which the longer of compute and memory, and communication, add
    up; and of the sequences of the longest context that fit.
    """
    slowest = max((max(_parts(row).values()) for row in rows if _parts(row)), default=1.0) or 1.0
    most = max((_capacity(row) for row in rows), default=1) or 1
    second = _LEFT + _PANEL + _GAP
    marks: list[Bar | Label] = [
        Label(20, 28, title, 16, bold=True),
        Label(_LEFT, 60, "a step of decodes, at least"),
        Label(second, 60, "sequences of the longest context that fit"),
    ]
    for place, (name, color) in enumerate(list(COLORS.items())[:3]):
        marks += [Bar(_LEFT + 130 * place, 70, 12, 12, color), Label(_LEFT + 130 * place + 18, 81, name)]
    for number, row in enumerate(rows):
        top = 100 + number * _ROW
        marks += [
            Label(_LEFT - 12, top + 16, row.strategy, 13, end=True, bold=True),
            Label(_LEFT - 12, top + 34, " ".join((row.device, row.mesh)), 11, end=True),
        ]
        if isinstance(row, Impossible) or not _parts(row):
            reason = row.reason if isinstance(row, Impossible) else "; ".join(row.problems)
            marks.append(Label(_LEFT, top + 24, _short(reason), 11))
            continue
        for line, (name, seconds) in enumerate(_parts(row).items()):
            width = max(1.0, _PANEL * seconds / slowest)
            y = top + line * (_THIN + 2)
            marks += [
                Bar(_LEFT, y, width, _THIN, COLORS[name]),
                Label(_LEFT + width + 5, y + 10, f"{1e3 * seconds:.3g} ms", 10),
            ]
        count = _capacity(row)
        width = max(1.0, _PANEL * count / most)
        marks += [
            Bar(second, top + 8, width, 22, COLORS["capacity"]),
            Label(second + width + 5, top + 24, f"{count:,}", 11),
        ]
    return Drawing(second + _PANEL + _GAP, 110 + len(rows) * _ROW, marks)


def _parts(row: Plan | Impossible) -> dict[str, float]:
    """Seconds of a step of decodes; none of a row without them."""
    if isinstance(row, Impossible) or "decode" not in row.steps:
        return {}
    time = row.steps["decode"].time
    if time is None:
        return {}
    return {"compute": time.compute, "memory": time.memory, "communication": time.communication}


def _capacity(row: Plan | Impossible) -> int:
    return 0 if isinstance(row, Impossible) else row.sequences[row.max_model_len]


def _short(reason: str, length: int = 130) -> str:
    return reason if len(reason) <= length else f"{reason[: length - 3]}..."
