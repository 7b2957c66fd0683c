"""The adapter's critics: which cases it refuses, and the cases themselves where the environment has them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.goldens import adapter
from tests.goldens.adapter import OPS

IDS, MASK = np.array([[7, 8, 9], [7, 9, 0]]), np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_scores_by_hand() -> None:
    inputs = {"values": np.array([[1.0, 3.0, 8.0], [2.0, 6.0, np.nan]]), "ids": IDS, "mask": MASK}
    result = OPS["gad_score_pool"](inputs, {"mode": "mean_no_eos", "eos_id": 9})
    np.testing.assert_allclose(result["out.score"], [2.0, 2.0])
    np.testing.assert_allclose(result["grad.sum.values"], [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])


def test_an_end_inside_of_the_text_is_refused() -> None:
    inputs = {"values": MASK, "ids": IDS, "mask": MASK}
    with pytest.raises(NotImplementedError, match="inside"):
        OPS["gad_score_pool"](inputs, {"mode": "mean_no_eos", "eos_id": 8})


def test_cases() -> None:
    folder = os.environ.get("MEGATRON_RL_GOLDENS", "")
    if not folder:
        pytest.skip("set MEGATRON_RL_GOLDENS to a directory with check_goldens.py and its cases")
    script, only = str(Path(folder) / "check_goldens.py"), r"(gad\.|value_loss|gae)"
    command = [sys.executable, script, "--adapter", adapter.__file__, "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed, failed, _, _ = (int(word) for word in done.stdout.split() if word.isdigit())
    assert passed >= 10 and failed == 0, done.stdout
