"""A critic beside the policy: the model that it is, and what it is exported as."""

from dataclasses import replace
from typing import Any

from megatron_rl.config.schema import GadConfig, ModelConfig, PpoConfig
from megatron_rl.models.hf_config import load_config

CriticTrainerConfig = PpoConfig | GadConfig


def critic_model(config: CriticTrainerConfig) -> ModelConfig:
    """The critic's model: where its section is silent, the policy's."""
    critic, model = config.critic, config.model
    return replace(model, path=critic.path or model.path, weights=critic.weights or model.weights)


def classifier_config(path: str) -> dict[str, Any]:
    """What a critic's config.json says otherwise than that of `path`: it is a sequence classifier with one label."""
    names = load_config(path).architectures or []
    return {
        "architectures": [name.replace("ForCausalLM", "ForSequenceClassification") for name in names],
        "id2label": {"0": "value"},
        "label2id": {"value": 0},
    }
