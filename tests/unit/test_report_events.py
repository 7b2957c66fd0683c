"""Event files are read as TensorBoard reads them, fast, and as far as they are whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_rl.metrics.backends import TensorBoard
from megatron_rl.report.events import QUANTILES, Events, quantiles
from megatron_rl.report.records import RecordFile, checksum
from megatron_rl.report.series import curve, event_files, read_run
from tests.event_files import write_scalars

ROOT = Path(__file__).parents[2]


def test_checksum_is_the_known_one() -> None:
    """CRC-32C of the digits is e3069283; it is rotated right by 15, and the constant is added."""
    crc = 0xE3069283
    assert checksum(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_all_is_read_that_tensorboard_reads(tmp_path: Path) -> None:
    """Figures, distributions and texts of a run that was killed after step 6 and went on at step 4."""
    random = np.random.default_rng(1)
    for first, last in ((0, 6), (4, 9)):
        board = TensorBoard(tmp_path, first)
        for step in range(first, last + 1):
            board.scalars(step, {"a/x": step + first / 100, "b": -step, **({"late": 1.0} if step > 7 else {})})
            board.histogram(step, "h", random.normal(size=50).tolist())
        board.text(last, "answers", "| a | b |\n|---|---|\n| 1 | 2 |")
        board.close()
        # The next file must have a later name.
        for path in tmp_path.glob("events*"):
            path.rename(path.with_name(f"{first}_{path.name}") if path.name[0] == "e" else path)
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()
    ours = Events()
    for path in event_files(tmp_path):
        ours.read(path)
    assert ours.damages == [] and set(ours.points) == set(theirs.Tags()["scalars"]) == {"a/x", "b", "late"}
    for tag, points in ours.points.items():
        expected = [(event.step, event.value) for event in theirs.Scalars(tag)]
        assert list(zip(points.steps, points.values)) == expected
    assert [round(v, 2) for v in ours.points["a/x"].values] == [0, 1, 2, 3, *(s + 0.04 for s in range(4, 10))]
    (histogram, distribution) = (theirs.Histograms("h")[-1], ours.distributions["h"][-1])
    assert [one.step for one in ours.distributions["h"]] == [one.step for one in theirs.Histograms("h")]
    low, *_, high = distribution.quantiles
    assert (low, high) == (histogram.histogram_value.min, histogram.histogram_value.max)
    (text,) = ours.texts["answers"]
    assert text.step == 9 and text.text.startswith("| a | b |")


def test_tensors_are_read_too(tmp_path: Path) -> None:
    """What TensorFlow 2 writes: a scalar as a tensor, packed or not, and a histogram as rows of three."""
    with (tmp_path / "events.out.tfevents.1").open("wb") as file:
        writer = RecordWriter(file)
        histogram = np.array([[0.0, 1.0, 5.0], [1.0, 2.0, 5.0]])
        values = [
            Summary.Value(tag="packed", tensor=TensorProto(dtype=1, tensor_content=np.float32(0.5).tobytes())),
            Summary.Value(tag="plain", tensor=TensorProto(dtype=1, float_val=[0.25])),
            Summary.Value(
                tag="h",
                tensor=TensorProto(dtype=2, tensor_content=histogram.tobytes()),
                metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="histograms")),
            ),
            Summary.Value(tag="a picture", tensor=TensorProto(dtype=4, tensor_content=b"12345678")),
        ]
        writer.write(Event(step=3, summary=Summary(value=values)).SerializeToString())
    events = Events()
    events.read(tmp_path / "events.out.tfevents.1")
    assert {tag: (list(p.steps), list(p.values)) for tag, p in events.points.items()} == {
        "packed": ([3], [0.5]),
        "plain": ([3], [0.25]),
    }
    assert events.distributions["h"][0].quantiles == pytest.approx([0, 0.2, 0.5, 1, 1.5, 1.8, 2])


def test_quantiles_of_histograms() -> None:
    values = np.random.default_rng(2).normal(size=20_000)
    counts, edges = np.histogram(values, bins=200)
    found = quantiles(edges[1:].tolist(), counts.tolist(), values.min(), values.max())
    assert found == pytest.approx(np.quantile(values, QUANTILES).tolist(), abs=0.05)
    assert quantiles([1.0, 2.0, 3.0], [0, 0, 4], 2.0, 3.0) == pytest.approx([2, 2.1, 2.25, 2.5, 2.75, 2.9, 3])
    assert quantiles([1.0], [0], 0, 0) == []
    # One value only, in the middle of empty buckets.
    assert set(quantiles([1.0, 2.0, 3.0], [0, 1, 0], 1.5, 1.5)) == {1.5}


@pytest.mark.parametrize("same_length", [3, 200])
def test_a_file_is_read_as_far_as_it_is_whole(tmp_path: Path, same_length: int) -> None:
    """Cut off at any byte of its last record; with a content, or a length, that was changed."""
    path = write_scalars(tmp_path, ((step, {"x": float(step)}) for step in range(1, same_length + 1)))
    whole = path.read_bytes()
    records = list(RecordFile(path))
    last = len(records[-1]) + 16
    for cut in range(1, last):
        path.write_bytes(whole[:-cut])
        run = read_run(tmp_path)
        assert run.curves["x"].steps.tolist() == list(range(1, same_length))
        (damage,) = run.damages
        assert damage == f"{path.name}: cut off within a record, at byte {len(whole) - last}"
    changed = bytearray(whole)
    changed[-6] ^= 1  # the last content byte of the last record
    changed[-2 * last + 14] ^= 1  # a content byte of the one before
    path.write_bytes(changed)
    run = read_run(tmp_path)
    assert run.curves["x"].steps.tolist() == list(range(1, same_length - 1))
    assert run.damages == [f"{path.name}: 2 records with a wrong checksum were left out"]
    changed = bytearray(whole)
    changed[-2 * last] ^= 1
    path.write_bytes(changed)
    run = read_run(tmp_path)
    assert run.curves["x"].steps.tolist() == list(range(1, same_length - 1))
    assert run.damages == [f"{path.name}: nothing could be read after byte {len(whole) - 2 * last}"]


def test_what_is_no_event_is_left_out(tmp_path: Path) -> None:
    path = write_scalars(tmp_path, [(1, {"x": 1.0})])
    with path.open("ab") as file:
        RecordWriter(file).write(b"\xff\xff\xff\xff")
    run = read_run(tmp_path)
    assert run.curves["x"].values.tolist() == [1.0]
    assert run.damages == [f"{path.name}: 1 records are no events and were left out"]


def test_of_a_step_that_was_taken_again_the_last_value_counts() -> None:
    events = Events()
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0), (4, 40.0)):
        events._scalar("x", step, value)
    steps, values = curve(events.points["x"])
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3, 4], [1.0, 20.0, 30.0, 40.0])


READ = """
import sys, time
from pathlib import Path
from megatron_rl.report.series import read_run
def most():  # of this program; getrusage remembers the process that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before, start = most(), time.process_time()
run = read_run(Path(sys.argv[1]))
assert "torch" not in sys.modules
seconds, after = time.process_time() - start, most()
print(sum(len(curve.steps) for curve in run.curves.values()), seconds, after / 1024, (after - before) / 1024)
"""


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_reading_is_fast_and_small(tmp_path: Path, count: int) -> None:
    """A million values in half a minute and a gigabyte; of fewer, a share of the time and of the memory."""
    names = [f"group/figure_{place}" for place in range(50)]
    write_scalars(tmp_path, ((step, dict.fromkeys(names, step / 7)) for step in range(count // 50)))
    read = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    found, seconds, peak, grown = (float(word) for word in read.stdout.split())
    share = count / 1_000_000
    assert found == count
    assert seconds < 30 * share and grown < 1024 * share and peak < 1024, (seconds, peak, grown)
