"""The sources that a config names."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rl.config.rules import Config, ConfigError
from megatron_rl.config.schema import EvaluationConfig, GadConfig, HeldOutConfig, PairDataConfig, SftDataConfig
from megatron_rl.data.demonstrations import DemonstrationEncoder, DemonstrationSource, may_be_conversations
from megatron_rl.data.shots import FewShotEncoder, read_shots
from megatron_rl.data.sources import ExampleEncoder, ExampleSource, PromptEncoder, PromptSource, Rows, load_rows
from megatron_rl.data.templates import load_template


def prompt_encoder(data: HeldOutConfig, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    """What makes a prompt of a row; ValueError where there is no such template."""
    return PromptEncoder(
        tokenizer=tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        prompt_key=data.prompt_key,
        template=None if data.template is None else load_template(data.template),
        chat=data.chat.value,
        truncation_side=data.truncation_side.value,
    )


def _rows(source: str, task: Mapping[str, Any]) -> Rows:
    options = dict(task)
    return load_rows(source, size=options.pop("size", None), seed=options.pop("seed", 0), options=options or None)


def train_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSource:
    """The prompts of `data.train`."""
    rows = _rows(config.data.train, config.data.task)
    return PromptSource(rows, prompt_encoder(config.data, tokenizer), seed=config.train.seed)


def train_examples(config: Config, tokenizer: PreTrainedTokenizerBase) -> ExampleSource:
    """The prompts of `data.train` with their responses as text."""
    return _example_source(config, tokenizer, _rows(config.data.train, config.data.task))


def train_demonstrations(
    config: Config, tokenizer: PreTrainedTokenizerBase, stop: tuple[int, ...]
) -> DemonstrationSource:
    """What is to be learned of `data.train`; `stop` are the ids that end a response."""
    data = config.data
    assert isinstance(data, SftDataConfig)
    rows = _rows(data.train, data.task)
    encoder = DemonstrationEncoder(
        prompt=prompt_encoder(data, tokenizer),
        response_key=data.response_key,
        stop=stop,
        conversations=may_be_conversations(rows, data.prompt_key, data.response_key),
    )
    return DemonstrationSource(rows, encoder, seed=config.train.seed)


def _example_source(config: Config, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> ExampleSource:
    """ValueError where a row has no response."""
    assert isinstance(config.data, PairDataConfig)
    encoder = ExampleEncoder(prompt=prompt_encoder(config.data, tokenizer), response_key=config.data.response_key)
    return ExampleSource(rows, encoder, seed=config.train.seed)


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSource | None:
    """The prompts of `data.val`, if it is set; where a critic tells them apart, with the teacher's responses."""
    if config.data.val is None:
        return None
    rows = _rows(config.data.val, config.data.val_task)
    if isinstance(config, GadConfig):
        _example_source(config, tokenizer, rows)
    return PromptSource(rows, prompt_encoder(config.data, tokenizer), seed=config.train.seed)


def problems(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSource:
    """The prompts of an evaluation, solved examples before each of them where that is asked."""
    data, measure = config.data, config.eval
    if data.val is None:
        raise ConfigError("eval needs held-out problems: name them after MODEL, or set data.val")
    encoder = prompt_encoder(data, tokenizer)
    if measure.shots_from is not None:
        keys = {"prompt_key": data.prompt_key, "response_key": measure.shots_response_key}
        shots = read_shots(measure.shots_from, measure.shots, **keys)
        own = {item.name: getattr(encoder, item.name) for item in fields(encoder)}
        encoder = FewShotEncoder(**own, shots=shots)
    return PromptSource(_rows(data.val, data.val_task), encoder, seed=measure.seed)
