"""The example of knights and knaves: configs that `check` accepts, and a reward that knows the solution."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_rl.cli import main
from megatron_rl.rewards import resolve
from megatron_rl.types import Prompt, Reward, Rollout
from tests.models import ascii_tokenizer, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "knights_knaves"
reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(("name", "rows"), [("grpo", "20000 rows to train on, 256"), ("smollm2", "10000 rows")])
def test_check_accepts_it(
    name: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As it stands, but for the model, whose tokens are characters."""
    tiny_model(tmp_path, "qwen3", vocab_size=ascii_tokenizer(tmp_path))
    capsys.readouterr()
    monkeypatch.chdir(EXAMPLE.parents[1])
    changes = [f"model.path={tmp_path}", "data.max_prompt_tokens=2048"]
    assert main(["check", f"examples/knights_knaves/{name}.yaml", *changes]) == 0
    said = capsys.readouterr()
    assert said.err == "" and rows in said.out


@pytest.mark.parametrize(("name", "form"), [("grpo", "Suppose. <answer>{}</answer>"), ("smollm2", "{}")])
def test_solutions_are_paid_and_their_opposites_are_not(name: str, form: str) -> None:
    """Under the options of each config; held-out puzzles come from seeds that training does not reach."""
    config = OmegaConf.to_container(OmegaConf.load(EXAMPLE / f"{name}.yaml"))
    task, held_out = config["data"]["task"], config["data"]["val_task"]
    assert task["seed"] + task["size"] <= held_out["seed"]
    judge = resolve(config["reward"]["name"])
    for row in reasoning_gym.create_dataset("knights_knaves", **held_out | {"size": 5}):
        prompt = Prompt(index=0, text=row["question"], token_ids=(1,), row={"dataset": "knights_knaves", "entry": row})
        terms = row["metadata"]["knight_knave_terms"]
        kinds = terms["a_knight"], terms["a_knave"]
        opposite = row["answer"].replace(kinds[0], "?").replace(kinds[1], kinds[0]).replace("?", kinds[1])
        values = [
            judge(prompt, _said(form.format(answer)), **config["reward"].get("options", {}))
            for answer in (row["answer"], opposite)
        ]
        assert all(isinstance(value, Reward) for value in values)
        assert values[0].value == 1.0 > values[1].value, row


def _said(text: str) -> Rollout:
    return Rollout(
        prompt_index=0,
        sample_index=0,
        token_ids=(1,),
        text=text,
        log_probs=(0.0,),
        log_kept_mass=(0.0,),
        finish_reason="stop",
        policy_version=0,
    )
