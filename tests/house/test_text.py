"""Tracked text is finished and says nothing about the machine it was written on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Spelled in two halves, so that this file does not find itself.
HOME = re.compile("|".join(["/ro" + "ot/", "/ho" + "me/"]))
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
CONFLICT = re.compile(r"^(<{7}|>{7}) ")


def faults(text: str) -> list[tuple[int, str]]:
    """Line numbers, and what is wrong there."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if match := HOME.search(line):
            found.append((number, f"an absolute path into {match[0]}"))
        if match := UNFINISHED.search(line):
            found.append((number, f"a {match[0]}"))
        if CONFLICT.search(line):
            found.append((number, "a conflict of a merge"))
        if line != line.rstrip():
            found.append((number, "trailing whitespace"))
    return found


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_text_is_clean() -> None:
    paths = tracked_files()
    assert ROOT / "setup.py" in paths
    contents = {path: path.read_bytes() for path in paths}
    texts = {path: content.decode("utf-8") for path, content in contents.items() if b"\0" not in content}
    found = [f"{path.relative_to(ROOT)}:{n}: {fault}" for path, text in texts.items() for n, fault in faults(text)]
    assert not found, "\n" + "\n".join(found)


PLANTED = [
    ("a = 1\npath = '/ro" + "ot/models'", [(2, "an absolute path into /ro" + "ot/")]),
    ("see /ho" + "me/ann/run.sh", [(1, "an absolute path into /ho" + "me/")]),
    ("# TO" + "DO: later", [(1, "a TO" + "DO")]),
    ("\n\nFIX" + "ME", [(3, "a FIX" + "ME")]),
    ("<" * 7 + " HEAD\nours\n" + "=" * 7, [(1, "a conflict of a merge")]),
    ("one \ntwo\n\t", [(1, "trailing whitespace"), (3, "trailing whitespace")]),
    ("line\r\n", [(1, "trailing whitespace")]),
]


@pytest.mark.parametrize(("text", "expected"), PLANTED)
def test_planted_faults_are_found(text: str, expected: list[tuple[int, str]]) -> None:
    assert faults(text) == expected


def test_clean_text_has_no_fault() -> None:
    assert faults("home/ and root are words\nMASTODON and " + "X" * 4 + "\n\n") == []
