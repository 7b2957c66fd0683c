"""Images, sound and video: rows of mixed datasets have their columns, and text-only ones leave them empty."""

from collections.abc import Mapping, Sequence
from typing import Any

# What datasets made for verl, TRL and transformers call them.
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios", "multi_modal_data", "multi_modal_inputs")


def refuse_media(row: Mapping[str, Any]) -> None:
    """Empty containers are ignored, at any depth; anything in them is refused, for it would be trained without."""
    for key in MEDIA_KEYS:
        if not _is_empty(row.get(key)):
            raise ValueError(f"{key!r} is not empty, and only text is supported: remove the row or the column")


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_is_empty, value))
    return value is None or value in ("", b"")
