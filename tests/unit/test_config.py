"""Configuration: defaults, overrides, and one sentence for each mistake."""

from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load, load_config, save_config
from megatron_rl.config.rules import ConfigError

GRPO = """
trainer: grpo
model: {path: some/model}
data: {train: prompts.jsonl}
train: {steps: 3, batch_size: 4}
run: {dir: out}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grpo.yaml"
    path.write_text(GRPO)
    return path


def test_file_then_overrides(file: Path) -> None:
    config = load_config(file, ["optim.lr=3e-4", "parallel.tp=2", "data.task={size: 7}"])
    assert (config.optim.lr, config.parallel.tp, config.data.task) == (3e-4, 2, {"size": 7})
    assert config.train.steps == 3 and config.rollout.temperature == 1.0


def test_base_files_and_origins(tmp_path: Path) -> None:
    """defaults < base < file < override, and each value says where it was written."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "base.yaml").write_text(GRPO + "optim: {lr: 1e-3, beta2: 0.95}\n")
    user = tmp_path / "user.yaml"
    user.write_text("base: common/base.yaml\noptim: {lr: 2e-3}\nreward: {options: {answer_key: a}}\n")
    loaded = load(user, ["optim.clip_grad=0.5"])
    optim = loaded.config.optim
    assert (optim.beta1, optim.beta2, optim.lr, optim.clip_grad) == (0.9, 0.95, 2e-3, 0.5)
    origins = {key: Path(origin).name for key, origin in loaded.origins.items()}
    assert origins["optim.beta1"] == "default" and origins["optim.beta2"] == "base.yaml"
    assert origins["optim.lr"] == origins["reward.options"] == "user.yaml"
    assert origins["optim.clip_grad"] == "override 'optim.clip_grad=0.5'"
    assert origins["algorithm.clip_low"] == "derived"
    (tmp_path / "common" / "base.yaml").write_text("base: ../user.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load(user)


def test_algorithms_are_named_settings(file: Path) -> None:
    gspo = load_config(file, ["algorithm.name=gspo"]).algorithm
    assert (gspo.clip_low, gspo.clip_high, gspo.aggregation) == (3e-4, 4e-4, "seq-mean-token-mean")
    grpo = load_config(file).algorithm
    assert (grpo.clip_low, grpo.dual_clip, grpo.aggregation, grpo.normalize_by_std) == (0.2, 3.0, "token-mean", True)
    dr = load_config(file, ["algorithm.name=dr_grpo", "algorithm.clip_high=0.28"]).algorithm
    dapo = load_config(file, ["algorithm.name=dapo"]).algorithm
    assert (dapo.clip_low, dapo.clip_high, dapo.max_rollout_batches, dapo.overlong_buffer) == (0.2, 0.28, 10, 102)
    assert (dr.clip_high, dr.normalize_by_std, dr.aggregation) == (0.28, False, "seq-mean-token-sum-norm")


def test_saved_config_reads_back(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["algorithm.name=gspo", "eval.limit=5"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_parity_tolerance_follows_the_precision(file: Path) -> None:
    assert load_config(file).rollout.parity_tolerance == 1e-3
    assert load_config(file, ["model.dtype=bfloat16"]).rollout.parity_tolerance == 0.25


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim.learning_rate=1"], r"unknown key 'optim.learning_rate' .* mean 'optim"),
        (["optim.lrr=1"], r"unknown key 'optim.lrr' for trainer 'grpo'; did you mean 'optim.lr'"),
        (["data.response_key=x"], r"unknown key 'data.response_key' for trainer 'grpo'; it belongs to trainer 'sft'"),
        (["train.steps=many"], r"train.steps.*many"),
        (["model.dtype=fp8"], r"model.dtype.*fp8"),
        (["train.steps"], r"'train.steps' is not of the form a.b=c"),
        (["train.steps=0"], r"train.steps=0 must be greater than 0"),
        (["optim.warmup_steps=-1"], r"optim.warmup_steps=-1 must not be negative"),
        (["parallel.sequence_parallel=true"], r"needs parallel.tp > 1"),
        (["average.rate=0"], r"average.rate=0.0 must be in \(0, 1\]; it weighs the new weights"),
        (["average.power=0"], r"average.power=0.0 must be greater than 0"),
        (["average.inv_gamma=-1"], r"average.inv_gamma=-1.0 must be greater than 0"),
        (["average.min=0.9", "average.max=0.5"], r"average.min=0.9 and average.max=0.5 bound a decay"),
        (["average.update_after=-1"], r"average.update_after=-1 must not be negative"),
        (["parallel.vpp=2"], r"parallel.vpp=2 needs parallel.pp > 1"),
        (["rollout.group_size=1"], r"rollout.group_size=1 must be at least 2"),
        (["rollout.engine=vlm"], r"rollout.engine: .*'vlm'"),
        (["rollout.top_p=0"], r"rollout.top_p=0"),
        (["rollout.top_p=0.9"], r"another distribution"),
        (["train.mini_batches_per_step=3"], r"train.mini_batches_per_step=3 does not divide train.batch_size=4"),
        (["train.epochs_per_step=0"], r"train.epochs_per_step=0 must be greater than 0"),
        (["kl.where=loss", "kl.estimator=k1"], r"kl.estimator=k1 .* cannot be a loss.*kl.where=reward"),
        (["ema.axis=token", "algorithm.name=gspo"], r"ema.axis=token .* does not go with algorithm.loss=gspo"),
        (["ema.beta=0"], r"ema.beta=0.0 must be in \(0, 1\]"),
        (["algorithm.name=dro", "algorithm.pull=0"], r"algorithm.pull=0.0 must be greater than 0"),
        (["algorithm.max_rollout_batches=0"], r"algorithm.max_rollout_batches=0 must be at least 1"),
        (["algorithm.overlong_buffer=600"], r"algorithm.overlong_buffer=600 .* rollout.max_new_tokens=512"),
        (["train.profile=[0]"], r"train.profile=\[0\] names steps from 1 to train.steps=3; there is no \[0\]"),
        (["train.profile=[3,11]"], r"train.profile=\[3, 11\] names steps .* there is no \[11\]"),
        (["rollout_correction.low=3"], r"rollout_correction.low=3.0 .* at most high=2.0"),
        (["rollout_correction.bypass=true", "rollout_correction.level=token"], r"nothing between them to correct"),
        (["kl.coeff=-1"], r"kl.coeff=-1.0 must not be negative"),
        (["kl.where=both"], r"kl.where.*both"),
        (["algorithm.aggregation=mean"], r"algorithm.aggregation='mean' is not one of token-mean"),
        (["algorithm.dual_clip=0.5"], r"algorithm.dual_clip=0.5 must be above 1"),
        (["optim.min_lr=1"], r"optim.min_lr=1.0 is above optim.lr"),
        (["trainer=sft"], r"cannot be overridden"),
        (["algorithm.name=ppo"], r"algorithm.advantage=gae .* needs a critic.* set trainer: ppo"),
        (["algorithm.advantage=gae"], r"algorithm.name=grpo\) needs a critic"),
    ],
)
def test_mistakes_are_named(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["distill.weight=1.5"], r"distill.weight=1.5 must be between 0 and 1"),
        (["algorithm.clip_high=0.28"], r"algorithm.clip_high=0.28 is of the policy loss, and distill.weight=1 leaves"),
        (["algorithm.name=gspo"], r"algorithm.name=gspo .* remove it, or set distill.weight below 1"),
        (["rollout_correction.opsm_delta=0.1"], r"opsm_delta=0.1 asks for advantages.* set distill.weight below 1"),
        (["distill.weight=0.5", "rollout.group_size=1"], r"rollout.group_size=1 must be at least 2"),
        (["distill.weight=0.5", "algorithm.aggregation=mean"], r"algorithm.aggregation='mean' is not one of"),
        (["distill.entropy_weighting=-1"], r"distill.entropy_weighting=-1.0 must not be negative"),
        (["distill.success_weighting=passed"], r"distill.success_weighting.*passed"),
        (["teacher.refresh_every=-1"], r"teacher.refresh_every=-1 must not be negative"),
        (["teacher.refresh_every=5", "teacher.mode=live"], r"teacher.mode=live .* use teacher.mode=ema or frozen"),
        (["teacher.refresh_every=5", "teacher.mode=trust_region"], r"refresh_every=5 .* teacher.mode=trust_region"),
    ],
)
def test_mistakes_of_self_distillation_are_named(file: Path, overrides: list[str], message: str) -> None:
    file.write_text(GRPO.replace("trainer: grpo", "trainer: sdpo"))
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


def test_self_distillation_with_a_policy_loss(file: Path, tmp_path: Path) -> None:
    """The named algorithm is filled in as GRPO's trainer has it, and a plain config reads back too."""
    named = ["algorithm.name=dapo", "rollout.max_new_tokens=500"]
    of_grpo = load_config(file, named).algorithm
    file.write_text(GRPO.replace("trainer: grpo", "trainer: sdpo"))
    assert load_config(file, [*named, "distill.weight=0.5"]).algorithm == of_grpo
    load_config(file, ["rollout.group_size=1"])
    save_config(plain := load_config(file), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == plain


PPO = GRPO.replace("trainer: grpo", "trainer: ppo")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.aggregation=mean"], r"train.aggregation='mean' is not one of token-mean, seq-mean-token-mean, "),
        (["train.normalizer=3"], r"train.normalizer=3.0 divides the sums .* does not go with .*=token-mean: remove"),
        (["train.aggregation=seq-mean-token-sum-norm"], r"train.normalizer=None must be a number greater than 0"),
        (["train.epochs_per_step=0"], r"train.epochs_per_step=0 must be greater than 0"),
        (["expert.top_k=2"], r"expert.top_k=2 is of expert.keep=top, and expert.keep=correct keeps all"),
        (["expert.keep=top"], r"expert.top_k=None must be from 1 to rollout.group_size=8"),
        (["expert.keep=top", "expert.top_k=9"], r"expert.top_k=9 must be from 1 to rollout.group_size=8"),
        (["expert.min_tokens=600"], r"expert.min_tokens=600 must be from 1 to rollout.max_new_tokens=512"),
        (["average.rate=0"], r"average.rate=0.0 must be in"),
        (["algorithm.name=grpo"], r"unknown key 'algorithm(.name)?' .* it belongs to trainer 'grpo'"),
        (["checkpoint.best=val/accuracy"], r"checkpoint.best='val/accuracy' .* there are none: set data.val"),
        (["checkpoint.best=accuracy", "data.val=b.jsonl"], r"checkpoint.best='accuracy' must be a figure of eval"),
        (["checkpoint.best=val/truncated", "data.val=b.jsonl"], r"for which more is better, as val/accuracy"),
    ],
)
def test_mistakes_of_expert_iteration_are_named(file: Path, overrides: list[str], message: str) -> None:
    file.write_text(GRPO.replace("trainer: grpo", "trainer: expert_iteration"))
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


def test_expert_iteration_by_itself(file: Path, tmp_path: Path) -> None:
    """Batches need not divide, sampling may be cut, and a plain config reads back."""
    file.write_text(GRPO.replace("trainer: grpo", "trainer: expert_iteration"))
    config = load_config(file, ["train.mini_batches_per_step=3", "rollout.top_p=0.9", "rollout.group_size=1"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config and config.expert.min_tokens == 4


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["algorithm.name=grpo"], r"algorithm.advantage=grpo .* has no use for a critic: set algorithm.name=ppo"),
        (["ppo.gamma=0"], r"ppo.gamma=0.0 must be in \(0, 1\]"),
        (["ppo.lam=1.1"], r"ppo.lam=1.1 must be between 0 and 1"),
        (["ppo.value_clip=0"], r"ppo.value_clip=0.0 must be greater than 0, or null"),
        (["ppo.critic_warmup=-1"], r"ppo.critic_warmup=-1 must not be negative"),
        (["critic.optim.lr=-1"], r"critic.optim.lr=-1.0 must not be negative"),
        (["critic.lr=1"], r"unknown key 'critic.lr' .* mean 'critic.optim.lr'"),
        (["rollout.group_size=1", "algorithm.max_rollout_batches=2"], r"max_rollout_batches=2 replaces groups"),
    ],
)
def test_mistakes_of_ppo_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "ppo.yaml").write_text(PPO)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "ppo.yaml", overrides)


def test_ppo_by_itself(tmp_path: Path) -> None:
    """One answer to a prompt is enough; no dual clip, as in the paper."""
    (tmp_path / "ppo.yaml").write_text(PPO)
    config = load_config(tmp_path / "ppo.yaml", ["rollout.group_size=1", "ppo.value_clip=null"])
    algorithm = config.algorithm
    assert (algorithm.advantage, algorithm.loss, algorithm.clip_low, algorithm.clip_high) == (
        "gae",
        "ppo_clip",
        0.2,
        0.2,
    )
    assert (algorithm.dual_clip, algorithm.aggregation, config.ppo.value_clip) == (0, "token-mean", None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("trainer: ppo2\n", "trainer='ppo2' is not one of sft, grpo"),
        ("- a\n", "must hold keys and values"),
        ("trainer: [\n", "not valid YAML"),
        ("trainer: grpo\n", r"\w+\.\w+ must be set"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_command_line_says_it_in_one_line(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(file), "optim.lrr=1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == ["megatron-rl: unknown key 'optim.lrr' for trainer 'grpo'; did you mean 'optim.lr'?"]
    assert main(["train", str(file.with_name("none.yaml"))]) == 2
    assert "does not exist" in capsys.readouterr().err
