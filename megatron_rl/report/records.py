"""The framing of event files: records with their lengths and checksums, read in large pieces.

A record is its length (8 bytes), the length's checksum (4), its content, and the content's checksum (4), all little
endian. A checksum is CRC-32C, rotated and shifted by a constant.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<QI")
_FOOTER = 4
_PIECE = 4 << 20
# Of larger records (pictures, graphs) only the length is checked.
_MOST_CHECKED = 64 << 10
# Fewer records of one length are checked one by one, more of them side by side.
_FEW = 64


def _make_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _make_table()
_WIDE_TABLE = np.array(_TABLE, dtype=np.uint32)


def checksum(content: bytes | memoryview) -> int:
    """The checksum of a few bytes."""
    state = 0xFFFFFFFF
    for byte in content:
        state = _TABLE[(state ^ byte) & 0xFF] ^ state >> 8
    state ^= 0xFFFFFFFF
    return ((state >> 15 | state << 17) + 0xA282EAD8) & 0xFFFFFFFF


@lru_cache(maxsize=1 << 16)
def _checksum_of_length(length: int) -> int:
    return checksum(struct.pack("<Q", length))


def _checksums(content: NDArray[np.uint8], starts: NDArray[np.int64], length: int) -> NDArray[np.uint32]:
    """Those of many records of one length, byte by byte over all of them."""
    state = np.full(len(starts), 0xFFFFFFFF, dtype=np.uint32)
    for place in range(length):
        state = _WIDE_TABLE[(state ^ content[starts + place]) & 0xFF] ^ state >> 8
    state ^= np.uint32(0xFFFFFFFF)
    return ((state >> 15 | state << 17) + np.uint32(0xA282EAD8)).astype(np.uint32)


class RecordFile:
    """The records of one file. What is wrong with it is in `damages` once it has been read."""

    def __init__(self, path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        self.path, self.on_bytes = path, on_bytes
        self.damages: list[str] = []

    def __iter__(self) -> Iterator[memoryview]:
        """Every sound record. A wrong content is left out; after a wrong length nothing more can be found."""
        rest, offset, wrong = b"", 0, 0
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                self.on_bytes(len(piece))
                piece = rest + piece
                starts, lengths, end, broken = _frames(piece)
                sound = _sound(piece, starts, lengths)
                wrong += len(sound) - sum(sound)
                view = memoryview(piece)
                for start, length, good in zip(starts, lengths, sound):
                    if good:
                        yield view[start : start + length]
                rest, offset = piece[end:], offset + end
                if broken:
                    self.damages.append(f"{self.path.name}: nothing could be read after byte {offset}")
                    break
            else:
                if rest:
                    self.damages.append(f"{self.path.name}: cut off within a record, at byte {offset}")
        if wrong:
            self.damages.append(f"{self.path.name}: {wrong} records with a wrong checksum were left out")


def _frames(piece: bytes) -> tuple[list[int], list[int], int, bool]:
    """Where the contents of the whole records are, how long, where the last ends, and whether the next is broken."""
    starts: list[int] = []
    lengths: list[int] = []
    place = 0
    while place + _HEADER.size <= len(piece):
        length, check = _HEADER.unpack_from(piece, place)
        if check != _checksum_of_length(length):
            return starts, lengths, place, True
        start = place + _HEADER.size
        if start + length + _FOOTER > len(piece):
            break
        starts.append(start)
        lengths.append(length)
        place = start + length + _FOOTER
    return starts, lengths, place, False


def _sound(piece: bytes, starts: Sequence[int], lengths: Sequence[int]) -> list[bool]:
    """Whether the content of each record has its checksum."""
    if not starts:
        return []
    content, places, sizes = np.frombuffer(piece, np.uint8), np.array(starts), np.array(lengths)
    footers = np.array(places + sizes)[:, None] + np.arange(_FOOTER)
    expected = content[footers].copy().view("<u4")[:, 0]
    found = expected.copy()
    view = memoryview(piece)
    for length in np.unique(sizes[sizes <= _MOST_CHECKED]).tolist():
        (which,) = np.nonzero(sizes == length)
        if len(which) < _FEW:
            found[which] = [checksum(view[start : start + length]) for start in places[which].tolist()]
        else:
            found[which] = _checksums(content, places[which], length)
    sound: list[bool] = (found == expected).tolist()
    return sound
