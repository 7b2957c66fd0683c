"""A critic beside the policy: the model that it is."""

from dataclasses import replace

from megatron_rl.config.schema import GadConfig, ModelConfig, PpoConfig

CriticTrainerConfig = PpoConfig | GadConfig


def critic_model(config: CriticTrainerConfig) -> ModelConfig:
    """The critic's model: where its section is silent, the policy's."""
    critic, model = config.critic, config.model
    return replace(model, path=critic.path or model.path, weights=critic.weights or model.weights)
