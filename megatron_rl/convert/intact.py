"""Whether the files of a checkpoint are what was written, before anything is made of them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_rl.checkpoint.manifest import DamagedCheckpoint, Entry, complaints
from megatron_rl.convert.jobs import THREADS
from megatron_rl.metrics.bar import counting


def check_files(path: Path, entries: Mapping[str, Entry], names: Sequence[str]) -> None:
    """Refuses a checkpoint of which one of the files `names` is not what its manifest says."""
    for name in names:
        if name not in entries:
            raise DamagedCheckpoint(f"{path}: its description names {name}, which its manifest does not")
    with counting("checking", sum(entries[name].bytes for name in names)) as on_bytes:

        def look(name: str) -> list[str]:
            found = complaints(path, entries, [name])
            on_bytes(entries[name].bytes)
            return found

        with ThreadPoolExecutor(THREADS) as threads:
            for found in threads.map(look, names):
                for complaint in found:
                    raise DamagedCheckpoint(complaint)
