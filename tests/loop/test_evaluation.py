"""`megatron-rl eval` from end to end: what it writes, how it goes on, and what it refuses."""

import json
import os
from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.models import tiny_model, tiny_tokenizer

OPTIONS = ["eval.samples=2", "eval.chunk=2", "rollout.max_new_tokens=6", "reward.workers=1", "rollout.stop=[w1]"]


def evaluation(cwd: str, options: list[str], stop_after: int | None = None) -> str:
    """Runs it, and returns what it refuses. `stop_after` chunks the process dies, a line half written."""
    from megatron_rl.config.rules import ConfigError
    from megatron_rl.trainers.evaluation_config import evaluation_config
    from megatron_rl.trainers.evaluation_files import SampleFile
    from megatron_rl.trainers.evaluation_run import evaluate

    os.chdir(cwd)
    written = 0
    append = SampleFile.append

    def die(self: SampleFile, lines: list) -> None:
        nonlocal written
        if written == stop_after:
            with self.path.open("a") as file:
                file.write(json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:20])
            raise KeyboardInterrupt
        written += 1
        append(self, lines)

    patch = pytest.MonkeyPatch()
    patch.setattr(SampleFile, "append", die)
    try:
        evaluate(evaluation_config("model", "test.jsonl", [*OPTIONS, *options]).config)
    except KeyboardInterrupt:
        return "died"
    except ConfigError as error:
        return str(error)
    finally:
        patch.undo()
    return ""


def test_an_evaluation_goes_on_where_it_stopped(pool: Pool, tmp_path: Path) -> None:
    tiny_tokenizer(tiny_model(tmp_path / "model"), 99)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(5, 10)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cwd, options = str(tmp_path), ["run.dir=parts"]
    assert pool.run(evaluation, 1, cwd, []) == [""]
    assert pool.run(evaluation, 1, cwd, options, 1) == ["died"]
    # Another layout answers the rest.
    assert pool.run(evaluation, 2, cwd, [*options, "parallel.tp=2"]) == ["", ""]
    whole, parts = tmp_path / "runs" / "eval" / "model-test", tmp_path / "parts"
    for name in ("samples.jsonl", "summary.json", "summary.md"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["draw"]) for line in lines] == [(i, d) for i in range(5) for d in ("greedy", 0, 1)]
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    assert all(line["reward"] in (0.0, 1.0) and 0 < line["tokens"] <= 6 for line in lines)
    found = json.loads((whole / "summary.json").read_text())["val"]
    assert sum(found["figures"][f"val/{kind}"] for kind in ("correct", "format_only", "format_wrong")) == 1.0
    assert found["problems"] == 5 and {"val/pass@1", "val/pass@2"} <= found["intervals"].keys()
    # The same once more changes nothing; other draws do not go into the same files.
    assert pool.run(evaluation, 1, cwd, options, 0) == [""]
    (refused,) = pool.run(evaluation, 1, cwd, [*options, "eval.seed=2"])
    assert "parts/samples.jsonl holds the answers of another evaluation (eval.seed is 1 there and 2 here)" in refused
    assert (parts / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
