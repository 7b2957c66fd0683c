"""A report held against an older one, case by case."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from megatron_rl.bench.rows import Report, Row
from megatron_rl.bench.table import duration

_COLUMNS = "{:<64} {:>9} {:>9} {:>8} {:>7}   {:<16} {}"


@dataclass(frozen=True, slots=True)
class Change:
    """One case in both reports."""

    old: Row
    new: Row
    same_conditions: bool  # machine, threads and clock: otherwise seconds say nothing

    @property
    def over_old(self) -> float:
        """New seconds over old ones; where the conditions differ, the new ratio to the baseline over the old one."""
        if self.same_conditions:
            return self.new.seconds / self.old.seconds
        return self.new.ratio / self.old.ratio if self.new.ratio and self.old.ratio else float("nan")

    @property
    def spread(self) -> float:
        """Of both measurements, the larger."""
        return max(self.old.spread, self.new.spread)

    @property
    def verdict(self) -> str:
        """`worse` or `better` by more than the spread; otherwise nothing."""
        if self.over_old > 1 + self.spread:
            return "worse"
        return "better" if self.over_old < 1 / (1 + self.spread) else ""


def changes(old: Report, new: Report) -> list[Change]:
    before = {(row.bench, row.case): row for row in old.rows}
    pairs = [(before[key], row) for row in new.rows if (key := (row.bench, row.case)) in before]
    return [Change(a, b, old.machine == new.machine and (a.threads, a.clock) == (b.threads, b.clock)) for a, b in pairs]


def differences(old: Report, new: Report) -> list[str]:
    """What keeps the reports from being compared, in words."""
    theirs, ours = asdict(old.machine), asdict(new.machine)
    found = [f"{name}: {theirs[name]} then, {ours[name]} now" for name in ours if theirs[name] != ours[name]]
    for name in ("threads", "clock"):
        for a, b in ((change.old, change.new) for change in changes(old, new)):
            if getattr(a, name) != getattr(b, name):
                found.append(f"{name} of {a.bench} {a.case}: {getattr(a, name)} then, {getattr(b, name)} now")
    return found


def compared(old: Report, new: Report) -> Iterator[str]:
    """Lines of text."""
    found = differences(old, new)
    yield f"against {old.date}:"
    for difference in found:
        yield f"  {difference}"
    if found:
        yield "  where that differs no seconds are compared, but ratios to the baselines, which are of the same run"
    yield _COLUMNS.format("", "then", "now", "now/then", "spread", "ratio to baseline", "")
    for change in changes(old, new):
        a, b = change.old, change.new
        yield _COLUMNS.format(
            f"{b.bench} {b.case}",
            duration(a.seconds),
            duration(b.seconds),
            f"{change.over_old:.2f}",
            f"{change.spread:.0%}",
            f"{a.ratio:.3g} -> {b.ratio:.3g}" if a.ratio is not None and b.ratio is not None else "",
            change.verdict,
        ).rstrip()
    for where, rows, others in (("then", old.rows, new.rows), ("now", new.rows, old.rows)):
        known = {(row.bench, row.case) for row in others}
        for row in rows:
            if (row.bench, row.case) not in known:
                yield f"only {where}: {row.bench} {row.case}"
