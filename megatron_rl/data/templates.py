"""Prompt templates: a text with a place for the question, one of ours by name or a file of the user's."""

import difflib
from pathlib import Path
from reprlib import repr as short
from typing import Any

PLACEHOLDER = "{question}"

TEMPLATES = {
    # The prompt opens the assistant's reasoning, so that a response begins inside of it.
    "r1_zero": (
        "Below, a user brings a problem to an assistant. The assistant works it out step by step before it answers. "
        "All of its reasoning goes into one think block, and after that its final answer alone into one answer block, "
        "in this form: <think> reasoning </think> <answer> final answer </answer>\n\n"
        "User: {question}\nAssistant: <think>"
    ),
    "question_only": "{question}\n\nAt the end, give the final answer inside \\boxed{}.",
}


def load_template(name: str) -> str:
    """The template called `name`, or the text of the file that it names, as it is. ValueError where it is neither."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    try:
        if not path.is_file():
            near = difflib.get_close_matches(name, TEMPLATES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"data.template={name!r} is no template{hint} and no file (seen from {Path.cwd()}): use one of "
                f"{', '.join(TEMPLATES)}, or name a text file that holds {PLACEHOLDER}"
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"data.template={name!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.template={name!r} is not UTF-8 text: {error}") from error
    if PLACEHOLDER not in text:
        raise ValueError(f"data.template={name!r} lacks {PLACEHOLDER}: write it where the question goes")
    return text


def fill_template(template: str, question: Any) -> str:
    """The template with the question in it. Other braces, in either, stay as they are."""
    if not isinstance(question, str):
        raise ValueError(
            f"data.template takes a question that is text, and this prompt is {short(question)}: set "
            "data.template=null for lists of messages"
        )
    return template.replace(PLACEHOLDER, question)
