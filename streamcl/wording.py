"""How numbers are written for people: scores, sizes, times. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTHING = "–"
VALUES = {"mae", "rmse", "correlation"}  # metrics that are no shares of one, though they may lie below it
LOWER = {"mae", "rmse", "base_as_new", "new_as_base", "confusion"}  # of which less is better


class Scale:
    """How the values of `metric` are written: shares of one in per cent, anything else as it is, to three significant digits."""

    def __init__(self, values: Iterable[float | None], digits: int = 1, metric: str | None = None, percent: bool | None = None) -> None:
        known = [value for value in values if value is not None]
        self.percent = percent if percent is not None else metric not in VALUES and all(-1 <= value <= 1 for value in known)
        self.digits = digits
        self.low, self.high = (0.0, 1.0) if self.percent or not known else (min(known), max(known))

    def number(self, value: float | None) -> str:
        """Without the unit."""
        if value is None:
            return NOTHING
        text = f"{100 * value:.{self.digits}f}" if self.percent else f"{value:.3g}"
        return text.lstrip("-") if text.strip("-0.") == "" else text  # no minus zero

    def score(self, value: float | None) -> str:
        return self.number(value) + (" %" if self.percent and value is not None else "")

    def difference(self, value: float | None) -> str:
        """A difference of two percentages is in points."""
        return self.number(value) + (" points" if self.percent and value is not None else "")

    def share(self, value: float) -> float:
        """Where the value stands between the ends of the scale, from 0 to 1."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low or 1.0)))


def size(count: float | None) -> str:
    """Bytes: 51.2 kB."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float | None) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def aligned(rows: Sequence[Sequence[str]], left: int = 1, gap: str = "  ") -> list[str]:
    """Lines of a table: the first `left` columns flush left, the others flush right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [
        gap.join(cell.ljust(w) if c < left else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers in order, runs of them drawn together: 0–3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs)
