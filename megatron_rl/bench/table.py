"""Rows as lines of text."""

from megatron_rl.bench.rows import Row

_COLUMNS = "{:<52} {:>9} {:>6}   {:>7} {:<32} {:>6} {}"


def heading(bench: str) -> str:
    return _COLUMNS.format(bench, "median", "spread", "ratio", "to the baseline", "share", "of the limit").rstrip()


def lines(row: Row) -> str:
    """The measurement, and below it the figures."""
    clock = "" if row.clock == "cpu" else ", wall clock"
    first = _COLUMNS.format(
        row.case + clock,
        duration(row.seconds),
        f"{row.spread:.0%}",
        "" if row.ratio is None else _figure(row, "ratio"),
        row.baseline or "",
        "" if row.share is None else f"{row.share:.1%}",
        row.limit or "",
    )
    names = [*(["ratio"] if "ratio" in row.wanted else []), *row.figures]
    figures = [f"{name} {_figure(row, name)}{_bound(row, name)}" for name in names]
    return "\n".join([first.rstrip(), *([f"    {', '.join(figures)}"] if figures else [])])


def duration(seconds: float) -> str:
    """Three digits, in a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _figure(row: Row, name: str) -> str:
    value = row.measured(name)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _bound(row: Row, name: str) -> str:
    if name not in row.wanted:
        return ""
    bound = row.wanted[name]
    return f" (wanted at most {bound:.3g}{'' if row.measured(name) <= bound else ': MISSED'})"
