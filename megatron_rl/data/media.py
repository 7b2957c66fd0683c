"""Images, sound and video: rows of mixed datasets have their columns, and text-only ones leave them empty."""

from collections.abc import Mapping, Sequence
from typing import Any

# What datasets made for verl, TRL and transformers call them.
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios", "multi_modal_data", "multi_modal_inputs")


def refuse_media(row: Mapping[str, Any]) -> None:
    """Empty containers are ignored, at any depth; anything in them is refused, for it would be trained without."""
    for key in MEDIA_KEYS:
        if _holds_something(row.get(key)):
            raise ValueError(f"{key!r} is not empty, and only text is supported: remove the row or the column")


def _holds_something(value: Any) -> bool:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            waiting.extend(value)
        elif value is not None and value not in ("", b""):
            return True
    return False
