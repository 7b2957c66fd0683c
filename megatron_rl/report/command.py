"""`megatron-rl report RUN [OTHER]`: reads, judges, writes the two files, and says what was found."""

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.metrics.bar import counting
from megatron_rl.report.findings import is_severe
from megatron_rl.report.html import as_html
from megatron_rl.report.markdown import as_markdown
from megatron_rl.report.page import Page, make_page
from megatron_rl.report.series import RunData, event_files, read_run
from megatron_rl.report.verdict import Result


def report(runs: Sequence[Path], out: Path | None = None) -> int:
    """Writes `report.md` and `report.html` of one run, or of two, to `out` or the first run's directory.

    The exit code: 1 where something severe was found, otherwise 0. ValueError where there is nothing to read.
    """
    sizes = [sum(path.stat().st_size for path in event_files(run)) for run in runs]
    with counting("reading", sum(sizes)) as on_bytes:
        data: list[RunData] = [read_run(run, on_bytes) for run in runs]
    page = make_page(data)
    directory = out or runs[0]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "report.md").write_text(as_markdown(page), encoding="utf-8")
        (directory / "report.html").write_text(as_html(page), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"the report cannot be written to {directory}: {error.strerror}; name another --out"
        ) from error
    _say(page, directory)
    return int(any(is_severe(found) for _, found in page.found))


def _say(page: Page, directory: Path) -> None:
    several = len(page.found) > 1
    for name, rows in page.verdicts:
        for row in rows:
            number = f" ({row.number})" if row.number else ""
            print(f"{name + ': ' if several else ''}{row.result.value:<12} {row.question}{number}")
    for name, found in page.found:
        for finding in found:
            print(f"{name + ': ' if several else ''}{finding.severity.value:<12} {finding.name}: {finding.evidence}")
        if not found:
            print(f"{name + ': ' if several else ''}nothing was found")
    failed = sum(row.result is Result.failed for _, rows in page.verdicts for row in rows)
    if failed:
        print(f"the critic fails {failed} of 5")
    print(f"written to {directory / 'report.html'} and report.md")
