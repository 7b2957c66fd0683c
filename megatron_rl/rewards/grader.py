"""Are two written answers the same? By text, as in the MATH dataset's normalisation, or by value.

Own code for the behaviour of the grader that Understanding R1-Zero and Stanford's CS336 published. Where that one
misreads LaTeX (a sum in a fraction), this one does not, and it drops neither a number with the text around it nor one
before an equals sign, which would pay for `41=42` and `42\\text{ or 41}`.
"""

import re
from decimal import Decimal, InvalidOperation

from megatron_rl.rewards.expression import are_equal

# Above this many characters, only the same text is the same answer.
_MAX_LENGTH = 1000

# What may stand behind a number: words that the published normalisation drops, as far as they name units, money or
# things that are counted.
_UNITS = (
    "mm|cm|dm|m|km|metre|meter|centimetre|centimeter|kilometre|kilometer|inch|inches|ft|foot|feet|yard|mile|mtr|"
    "g|gm|kg|mg|gram|lb|l|liter|litre|ml|gallon|gal|cc|hectare|acre|"
    "s|sec|second|min|minute|h|hr|hour|day|week|month|year|yr|noon|am|pm|"
    "degree|deg|percent|mph|kmph|kmh|rupee|rs|ohm|unit|number|square|sq|cubic|cube|cu|per|"
    "apple|coin|toy|tile|soldier|monkey|man|men|woman|women|mark|round|way|pie|"
    "profit|loss|gain|increase|decrease|more|less"
)
_UNITS_AT_END = re.compile(rf"(?<=[0-9}})\]])(?:\s+(?:{_UNITS})s?)+\s*$")
_MEASURES = re.compile(
    r"(?<![A-Za-z\\])(?:degree|cm|(?:centi)?meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
    r"(?:es|s)?(?![A-Za-z])\s*(?:\^[0-9]+)?"
)
_WORDS_AT_END = re.compile(r"(?<=\S)\s*\\(?:text|mbox|mathrm)\{[^{}0-9]*\}(?:\^\{?[0-9]\}?)?\s*$")
_WHOLE_TEXT = re.compile(r"^\\text\{([^{}]+)\}$")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)")
_SIZES = re.compile(r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])|\\[!,;]")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt\{([^{}]*)\}")
_MIXED = re.compile(r"(-?)([0-9]+) +([0-9]+ */ *[0-9]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_RATIO = re.compile(r"-?[0-9]+/0*[1-9][0-9]*")
_SIMPLE = re.compile(r"[0-9.]+|[a-z]")
_LATEX_WORDS = {r"\cdot": "*", r"\times": "*", r"\div": "/", r"\infty": "inf", r"\cup": "U"}


def is_equal(answer: str, truth: str) -> bool:
    """Is `answer` right, where `truth` is? Not symmetric: an integer is to be written out, and a fraction reduced."""
    answer, truth = answer.strip(), truth.strip()
    if max(len(answer), len(truth)) > _MAX_LENGTH:
        return answer == truth
    if text_form(answer) == text_form(truth):
        return True
    given, wanted = value_form(answer), value_form(truth)
    if given == wanted:
        return True
    givens, wanteds = _elements(given), _elements(wanted)
    if not given or len(givens) != len(wanteds):
        return False
    if len(wanteds) > 1 and (given[0], given[-1]) != (wanted[0], wanted[-1]):
        return False
    return all(map(_is_equal_element, givens, wanteds))


def _is_equal_element(given: str, wanted: str) -> bool:
    if given == wanted:
        return True
    if _RATIO.fullmatch(given) and _RATIO.fullmatch(wanted):
        return False
    whole, wanted_whole = integer(given), integer(wanted)
    if whole is not None or wanted_whole is not None:
        return whole == wanted_whole
    return are_equal(given, wanted)


def text_form(text: str) -> str:
    """The text as the MATH dataset's scorer would compare it: LaTeX of one spelling, no units, no spaces."""
    text = _one_spelling(_WHOLE_TEXT.sub(r"\1", text))
    text = _WORDS_AT_END.sub("", text)
    text = _UNITS_AT_END.sub("", text)
    text = _DEGREES.sub("", text).replace(r"\$", "").replace(r"\%", "")
    text = re.sub(r"^\s*[A-Za-z]\w?\s?=(?=[^=]+$)", "", text)
    text = re.sub(r"\s", "", text)
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))$", r"\\frac{\1}{\2}", text)


def value_form(text: str) -> str:
    """The text as an expression to calculate with: no LaTeX, units, currency, spaces or capitals; `7 3/4` as a sum."""
    text = _WHOLE_TEXT.sub(r"\1", text)
    text = re.sub(r"\\?[$%]", "", text)
    text = re.sub(r" (?:or|and) ", " , ", text)
    text = _DEGREES.sub("", _MEASURES.sub("", text))
    text = text.replace(",\\!", "").replace("{,}", "")
    text = _without_latex(text) if "\\" in text else text
    text = re.sub(r"-\s*", "-", text.strip())
    text = _MIXED.sub(lambda mixed: f"{mixed[1]}{mixed[2]}{mixed[1] or '+'}{mixed[3]}", text)
    text = re.sub(r"[\s{}]", "", text).lower()
    return integer(text) or text


def integer(text: str) -> str | None:
    """`text` as a plain integer ("42.0", "4.2e1" and "1,000" are some), or None."""
    try:
        value = Decimal(_THOUSANDS.sub("", text))
    except InvalidOperation:
        return None
    if not value.is_finite() or value.adjusted() > 308:
        return None
    nearest = value.to_integral_value()
    return str(int(nearest)) if abs(value - nearest) <= Decimal("1e-7") else None


def _one_spelling(text: str) -> str:
    text = text.replace("\n", "").replace("\\\\", "\\")
    text = _SIZES.sub("", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(ne|le|ge)q(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"\\(begin|end)\{(?:array|bmatrix)\}(?:\{[^{}]*\})?", r"\\\1{pmatrix}", text)
    text = re.sub(r"\\sqrt\s*([^\s{\\\[])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([^\s{\\])", r"\\frac{\1}", text)
    return re.sub(r"(\\frac\{[^{}]*\})\s*([^\s{\\])", r"\1{\2}", text)


def _without_latex(text: str) -> str:
    """Fractions, roots and products as one would type them; other commands by their name."""
    text = _one_spelling(text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=[0-9])\s*(?=\\frac)", " ", text)
    for _ in range(20):  # from the inside out
        shorter = _ROOT.sub(r"sqrt(\1)", _FRACTION.sub(_typed_fraction, text))
        if shorter == text:
            break
        text = shorter
    for command, sign in _LATEX_WORDS.items():
        text = re.sub(re.escape(command) + r"(?![A-Za-z])", sign, text)
    return text.replace("\\", "")


def _typed_fraction(fraction: re.Match[str]) -> str:
    parts = [part.strip() for part in fraction.groups()]
    above, below = (part if _SIMPLE.fullmatch(part) else f"({part})" for part in parts)
    return f"{above}/{below}"


def _elements(text: str) -> list[str]:
    """The elements of a tuple or an interval without brackets inside; else the text alone."""
    text = _THOUSANDS.sub("", text)
    inner = text[1:-1]
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not set(inner) & set("()[]"):
        return inner.split(",")
    return [text]
