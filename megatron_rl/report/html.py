"""A report as one HTML file: style and pictures are in it, and it asks for nothing from anywhere."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_rl.report.page import Page

TEMPLATE = Path(__file__).with_name("report.html.j2")


def as_html(page: Page) -> str:
    """Everything that a run wrote is escaped: models write what they like."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE.name).render(page=page)
