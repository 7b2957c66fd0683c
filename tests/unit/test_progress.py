"""Counting progress: what is seen from outside, and what it costs."""

import os
import timeit
from pathlib import Path

from megatron_rl.metrics.progress import Place, Progress, bytes_in, progress, read_note
from megatron_rl.metrics.timing import Timer


def test_phases_and_places() -> None:
    own = Progress()
    assert str(own.place) == "start-up"
    own.begin(7)
    assert own.place == Place(7) and str(own.place) == "step 7"
    with own.phase("step"):
        with own.phase("gen"):
            assert str(own.place) == "step 7, phase gen"
        assert own.place == Place(7, "step")
    assert own.place == Place(7)


def test_every_change_of_phase_and_every_tick_is_progress() -> None:
    own = Progress()
    seen = [own.seen()]
    with own.phase("gen"):
        seen.append(own.seen())
        own.tick()
        seen.append(own.seen())
    seen.append(own.seen())
    assert len(set(seen)) == 4 and own.seen() == seen[-1]


def test_a_growing_directory_is_progress(tmp_path: Path) -> None:
    own = Progress()
    with own.phase("save_checkpoint", growing=lambda: bytes_in(tmp_path)):
        before = own.seen()
        assert own.seen() == before
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "shard").write_bytes(b"12345")
        assert bytes_in(tmp_path) >= 5 and own.seen() != before
    assert own.seen()[1] is None


def test_a_span_of_the_timer_is_a_phase() -> None:
    with Timer()("update_actor"):
        assert progress.place.phase == "update_actor"
    assert progress.place.phase == ""


def test_a_note_tells_the_latest_place(tmp_path: Path) -> None:
    own = Progress()
    own.note_in(tmp_path / "3")
    assert read_note(tmp_path / "3") == (os.getpid(), Place())
    own.begin(1234567)
    with own.phase("a_long_name_of_a_phase"):
        assert read_note(tmp_path / "3") == (os.getpid(), Place(1234567, "a_long_name_of_a_phase"))
    own.begin(8)
    assert read_note(tmp_path / "3") == (os.getpid(), Place(8))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_tick_costs_nothing_that_counts() -> None:
    """Below a microsecond; a generated token or a micro-batch takes thousands of them."""
    assert min(timeit.repeat(Progress().tick, number=20_000, repeat=10)) / 20_000 < 1e-6
