"""A report as Markdown: all that it says, in words and tables; the pictures are in the HTML file."""

import re
from collections.abc import Iterator

from megatron_rl.report.page import Page, Part, Table


def as_markdown(page: Page) -> str:
    return "\n".join(_lines(page)).rstrip() + "\n"


def _lines(page: Page) -> Iterator[str]:
    several = len(page.facts) > 1
    yield from (f"# {page.title}", "")
    for name, facts in page.facts:
        yield from (f"{name}: {facts}." if several else f"{facts}.", "")
    if page.verdicts:
        yield from ("## Verdict on the critic", "")
    for name, rows in page.verdicts:
        yield from (f"### {name}", "") if several else ()
        yield from _grid(
            Table(["wanted", "result", "measured"], [[r.question, r.result.value, r.number] for r in rows])
        )
    yield from ("## Findings", "")
    for name, found in page.found:
        yield from (f"### {name}", "") if several else ()
        for finding in found:
            yield f"* **{finding.severity.value}: {finding.name}.** {finding.evidence}."
            yield f"  Likely cause: {finding.cause}. To try: {finding.remedy}."
        yield from ("" if found else "Nothing was found.", "")
    for part in page.parts:
        yield from _part(part)


def _part(part: Part) -> Iterator[str]:
    yield from (f"## {part.title}", "")
    for picture in part.pictures:
        yield f"* {picture.title}: {picture.says}."
    if part.pictures:
        yield ""
    for table in part.tables:
        yield from _grid(table)
    for sample in part.samples:
        yield from (f"### {sample.title}", "")
        if sample.table:
            yield from _grid(sample.table)
        else:
            longest = max((len(run) for run in re.findall("`+", sample.text)), default=0)
            fence = "`" * max(3, longest + 1)
            yield from (fence, sample.text, fence, "")


def _grid(table: Table) -> Iterator[str]:
    for row in (table.header, ["---"] * len(table.header), *table.rows):
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""
