"""A traced step: what is in its files, and that the run is the same with and without."""

import gzip
import json
from pathlib import Path

from tests.dist.pool import Pool
from tests.loop.test_timing import folder  # noqa: F401
from tests.loop.test_trainers import comparable, steps, train


def test_a_traced_run_is_the_same(pool: Pool, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["parallel.dp=2", "train.steps=3"]
    pool.run(train, 2, str(folder), "grpo.yaml", [*options, f"run.dir={tmp_path}/plain"])
    pool.run(train, 2, str(folder), "grpo.yaml", [*options, f"run.dir={tmp_path}/traced", "train.profile=[2]"])
    plain, traced = ([comparable(row) for row in steps(tmp_path / name)] for name in ("plain", "traced"))
    assert len(plain) == 3 and traced == plain
    a, b = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("plain", "traced"))
    assert a == b
    assert not (tmp_path / "plain" / "profile").exists()
    place = tmp_path / "traced" / "profile"
    files = sorted(str(path.relative_to(place)) for path in place.glob("*/*"))
    assert files == [f"step-2/rank-{rank}.{kind}" for rank in range(2) for kind in ("json.gz", "txt")]
    row = steps(tmp_path / "traced")[1]
    for rank in range(2):
        path = place / "step-2" / f"rank-{rank}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        ranges = {event["name"]: event["dur"] / 1e6 for event in events if event.get("cat") == "user_annotation"}
        for name in ("step", "gen", "update_actor/forward_backward/reduce_gradients"):
            assert name in ranges
        assert sum(event["name"] == "aten::mm" for event in events) > 20
        table = path.with_name(f"rank-{rank}.txt").read_text()
        assert "aten::mm" in table and "Self CPU" in table
        if rank == 0:  # the trace and the log tell of the same seconds
            assert abs(ranges["step"] - row["timing_s/step"]) < 0.1 * row["timing_s/step"]
