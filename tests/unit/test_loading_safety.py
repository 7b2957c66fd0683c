"""Nothing that a model directory, a row or a config holds is run; each test plants code that would leave a mark."""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.checkpoint.hf import SafetensorsReader
from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.data.chat import encode_prompt
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.models.hf_config import load_config, load_shape, tensor_shapes
from megatron_rl.rewards import REWARDS
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.reasoning import EVALUATING_TASKS
from tests.models import ascii_tokenizer, tiny_model, tiny_tokenizer
from tests.unit.test_reward_pool import pair


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What planted code would make."""
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_tokenizer(tiny_model(tmp_path / "model"), 99)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_bomb_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_a_remedy(
    model: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    (tmp_path / "train.jsonl").write_text('{"prompt": "w5", "answer": "1"}\n')
    (tmp_path / "c.yaml").write_text(
        f"trainer: grpo\nmodel: {{path: {model}}}\ndata: {{train: {tmp_path}/train.jsonl}}\n"
        f"train: {{steps: 1, batch_size: 1}}\nrun: {{dir: {tmp_path}/run}}\n"
    )
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    err = capsys.readouterr().err
    said = err[err.index("megatron-rl: ") :]
    assert said.count("\n") == 1 and name in said and "never opened" in said and "save_pretrained" in said
    assert not mark.exists()


def test_pickles_beside_safetensors_are_not_opened(model: Path, mark: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "added_tokens.pickle"):
        (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    SafetensorsReader(model).check_shapes(tensor_shapes(model))
    assert len(load_tokenizer(model)) == 99
    assert not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "tokenizer.json", "tokenizer.pkl", "vocab.bin"])
def test_a_pickle_is_no_tokenizer(model: Path, mark: Path, name: str) -> None:
    for path in model.glob("*tok*"):
        path.unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(model)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_an_index_names_safetensors_of_its_own_directory(model: Path, tmp_path: Path, place: str) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(tensor_shapes(model), place)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must lie in a \*\.safetensors file of this directory"):
        SafetensorsReader(model)


def test_code_of_a_model_is_not_run(model: Path, mark: Path) -> None:
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Custom: pass\n"
    for name in ("custom.py", "modeling_llama.py", "configuration_llama.py", "generate.py", "tokenizer.py"):
        (model / name).write_text(code)
    tensor_shapes(model)  # code that nothing names is no reason to refuse
    change(model / "config.json", auto_map={"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"})
    for look in (load_config, load_shape, tensor_shapes):
        with pytest.raises(ValueError, match=r"config\.json names Python code of the model's own \(auto_map\)"):
            look(model)
    assert not mark.exists()


def test_code_of_a_tokenizer_is_not_run(model: Path, mark: Path) -> None:
    (model / "custom.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Custom: pass\n")
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "custom.Custom"]})
    with pytest.raises(ValueError, match=r"it comes with Python code of its own \(auto_map"):
        load_tokenizer(model)
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_chat_templates_are_confined(tmp_path: Path, mark: Path, template: str) -> None:
    """transformers renders them in Jinja's sandbox; what it refuses is one line."""
    ascii_tokenizer(tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(template.replace("MARK", str(mark)))
    tokenizer = load_tokenizer(tmp_path / "chat")
    with pytest.raises(ValueError, match="chat template refuses these messages"):
        encode_prompt(tokenizer, "hello", chat="always")
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_yaml_makes_plain_values_only(tmp_path: Path, mark: Path, tag: str) -> None:
    text = f"{tag} [{mark}]"
    (tmp_path / "c.yaml").write_text(f"trainer: {text}\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not valid YAML: could not determine a constructor"):
        load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("trainer: sft\n")
    with pytest.raises(ValueError, match="cannot be read: could not determine a constructor"):
        load(tmp_path / "c.yaml", [f"model.path={text}"])
    assert not mark.exists()
    yaml.unsafe_load(text)
    assert mark.exists()


def test_rows_name_no_code(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row says of rewards, modules and functions is data to the reward that the config names."""
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\ndef f(*_, **__): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    prompt, rollout = pair(1, "1")
    row = {
        "answer": "1",
        "reward": "planted:f",
        "reward_function": "planted:f",
        "data_source": "planted",
        "name": "planted",
    }
    prompt.row.update(row)  # type: ignore[attr-defined]
    with RewardPool("exact", {}, workers=1, deadline_s=10.0) as pool:
        assert [reward.value for reward in pool.score([(prompt, rollout)])] == [1.0]
    assert not mark.exists() and "planted" not in sys.modules


def test_tasks_whose_verifiers_run_text_are_refused_unless_asked_for(mark: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra megatron_rl[tasks]")
    code = f"__import__('os').mkdir({str(mark)!r})"
    prompt, rollout = pair(1, f"<answer>{code}</answer>")
    entry = {"question": "", "answer": code, "metadata": {}}
    for task in sorted(EVALUATING_TASKS):
        prompt.row.update({"dataset": task, "entry": entry})  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=rf"{task}.*evaluates answers and rows as Python code.*evaluate=true"):
            REWARDS["reasoning"](prompt, rollout)
    assert not mark.exists()
    prompt.row.update({"dataset": "string_insertion", "entry": entry | {"answer": "A"}})  # type: ignore[attr-defined]
    REWARDS["reasoning"](prompt, rollout, evaluate=True)
    assert mark.exists(), "there was nothing to refuse"


def test_what_a_reward_prints_is_never_unpickled(tmp_path: Path, mark: Path) -> None:
    """Whole messages of the protocol, printed in every way that reaches what was the pipe."""
    code = (
        "import os, sys, subprocess\n"
        "from megatron_rl.rewards.worker import pack\n"
        "from tests.unit.test_loading_safety import Bomb\n"
        f"message = pack(Bomb({str(mark)!r}))\n"
        "def f(prompt, rollout):\n"
        "    os.write(1, message)\n"
        "    sys.stdout.buffer.write(message), sys.stdout.flush()\n"
        "    sys.__stdout__.buffer.write(message), sys.__stdout__.flush()\n"
        "    subprocess.run([sys.executable, '-c', 'import os; os.write(1, %r)' % message])\n"
        "    return 0.5\n"
    )
    (tmp_path / "loud.py").write_text(code)
    with RewardPool(f"{tmp_path}/loud.py:f", workers=1, deadline_s=30.0) as pool:
        assert [reward.value for reward in pool.score([pair(1), pair(2)])] == [0.5, 0.5]
    assert not mark.exists()
