"""From a config to the predicted seconds of one step, by its phases. A model, no measurement: docs/performance.md."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import (
    CorrectionLevel,
    EngineName,
    GadConfig,
    KLPlace,
    PolicyConfig,
    PolicyGradientConfig,
    RolloutTrainerConfig,
    SdpoConfig,
)
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.machine import MACHINES, Machine
from megatron_rl.planning.memory import Case, has_reference, has_teacher, samples_per_update
from megatron_rl.planning.parameters import model_parameters
from megatron_rl.planning.rollouts import GIB, keys_values
from megatron_rl.planning.schedule import Schedule, schedule
from megatron_rl.planning.speed import (
    Batch,
    Model,
    Seconds,
    attention_flops,
    forward_seconds,
    layer_flops,
    model_flops,
    update_seconds,
)


def step_seconds(case: Case, lengths: Sequence[int], machine: Machine) -> dict[str, Seconds]:
    """Phases under the names of `timing_s/*`; samples have these `lengths`, answers are at their longest."""
    config, cut = case.config, schedule(case.config, case.layout, lengths)
    batch = _batch(config, case.layout, lengths, cut)
    actor = Model(shape=case.actor, layout=case.layout, machine=machine, width=case.width, build=case.build)
    forward = forward_seconds(actor, batch, cut.micro_batches)
    found: dict[str, Seconds] = {}
    parts = 1
    if isinstance(config, RolloutTrainerConfig):
        parts = config.train.mini_batches_per_step
        found["sync"] = sync_seconds(actor)
        found["gen"] = generation_seconds(case, machine)
        if _asks_old(config, cut):
            found["old_log_prob"] = forward * parts
        if has_reference(config):
            found["ref"] = forward * parts
    if case.critic is not None:
        critic = replace(actor, shape=case.critic)
        read = forward_seconds(critic, batch, cut.micro_batches) * parts
        found["critic" if isinstance(config, GadConfig) else "values"] = read
        found["update_critic"] = update_seconds(critic, batch, cut.micro_batches) * cut.updates
    update = update_seconds(actor, batch, cut.micro_batches)
    if has_teacher(config):
        update += Seconds({"teacher": forward.total})
    found["update_actor"] = update * cut.updates
    return found


def generation_seconds(case: Case, machine: Machine) -> Seconds:
    """Answers at their longest, of the engines with n of them each, B at once and always so many:

    the forward pass of the prompts' tokens;    n / B times a decoding step for each token of an answer
    """
    config, shape = case.config, case.actor
    assert isinstance(config, RolloutTrainerConfig)
    rollout = config.rollout
    tp = 1 if rollout.engine is EngineName.hf else rollout.vllm.tp
    server = rollout.vllm.server
    servers = len(server.urls) or server.count
    engines = servers if rollout.engine is EngineName.vllm_server else max(case.world // tp, 1)
    sequences = -(-config.train.batch_size * rollout.group_size // engines)
    prompt, answer = config.data.max_prompt_tokens, rollout.max_new_tokens
    at_once = min(sequences, rollout.max_sequences)
    if rollout.engine is not EngineName.hf:
        room = tp * rollout.vllm.kv_cache_gb * GIB
        at_once = max(min(at_once, int(room // keys_values(shape, case.width, prompt + answer))), 1)
    engine = Model(shape=shape, layout=Layout(tp=tp), machine=machine, width=case.width, build=case.build)
    reading = shape.num_layers * (
        layer_flops(shape, engine.layout, sequences * prompt) / machine.products
        + attention_flops(shape, engine.layout, sequences * prompt**2) / machine.attention
    )
    drawing = decode_seconds(engine, at_once, prompt + answer / 2) * (answer * sequences / at_once)
    return Seconds({"prompts": reading}) + drawing


def decode_seconds(model: Model, sequences: int, context: float) -> Seconds:
    """One token for each of B sequences that are `context` tokens long: what is read, or what is computed if longer.

    Weights are read once, of experts as many as B k choices can reach; keys and values of every sequence; over tp two
    all-reduces of e B H in each layer. Nothing is left to the host between tokens.
    """
    shape, machine, tp = model.shape, model.machine, model.layout.tp
    parameters = float(model_parameters(shape))
    if shape.experts is not None:
        experts = shape.experts
        every = 3 * shape.num_layers * experts.num_experts * experts.ffn_hidden_size * shape.hidden_size
        parameters -= every * max(1 - sequences * experts.top_k / experts.num_experts, 0.0)
    flops = shape.num_layers * layer_flops(shape, model.layout, sequences)
    flops += 2 * sequences * shape.vocab_size * shape.hidden_size / tp
    weights = max(model.width * parameters / tp / machine.memory, flops / machine.products)
    cached = sequences * keys_values(shape, model.width, 1) * context / tp / machine.memory
    exchanged = machine.reduce(model.width * sequences * shape.hidden_size, tp, tp)
    return Seconds({"weights": weights, "keys and values": cached, "tensor parallel": 2 * shape.num_layers * exchanged})


def sync_seconds(model: Model) -> Seconds:
    """The weights to every rank: shards gathered over tp, stages sent over pp, and what arrives written once.

    Experts are gathered like the rest. The way to a server is not known here.
    """
    layout, machine = model.layout, model.machine
    size = float(model.width * model_parameters(model.shape))
    whole = Seconds({"memory": 2 * size / machine.memory})
    if layout.tp > 1:
        whole += Seconds({"tensor parallel": machine.gather(size, layout.tp, layout.tp)})
    if layout.pp > 1:
        whole += Seconds({"stage to stage": machine.send(size / layout.tp, layout.pp * model.stage_span)})
    return whole


def _batch(config: Config, layout: Layout, lengths: Sequence[int], cut: Schedule) -> Batch:
    """Of an update the mean over ranks and micro-batches."""
    lengths = lengths[: samples_per_update(config)]
    parts = layout.dp * cut.micro_batches
    tokens = sum(lengths) / parts
    answered = 1.0
    if isinstance(config, RolloutTrainerConfig):
        answered = config.rollout.max_new_tokens / (config.rollout.max_new_tokens + config.data.max_prompt_tokens)
    return Batch(tokens=tokens, loss_tokens=answered * tokens, squares=sum(length**2 for length in lengths) / parts)


def _asks_old(config: RolloutTrainerConfig, cut: Schedule) -> bool:
    """Whether the policy that drew is asked again before the updates."""
    if not isinstance(config, PolicyConfig) or config.rollout_correction.bypass:
        return False
    corrected = config.rollout_correction.level is not CorrectionLevel.none or bool(config.rollout_correction.reject)
    penalised = isinstance(config, PolicyGradientConfig) and config.kl.where is KLPlace.reward
    moved = cut.updates > 1 and not (isinstance(config, SdpoConfig) and config.distill.weight == 1)
    return corrected or penalised or moved


def describe_step(case: Case, lengths: Sequence[int]) -> list[str]:
    """For a page: phases and what they consist of on H100s, and the whole on the other machines."""
    name, *others = MACHINES
    found = step_seconds(case, lengths, MACHINES[name])
    width = max(map(len, found)) + 2
    lines = [
        f"a step takes {_whole(found)} on {name}s, by a model of FLOPs, bytes and links (docs/performance.md);",
        "nothing was measured, and reward, data and what a checkpoint takes are not in it:",
    ]
    for phase, of in found.items():
        parts = sorted(((seconds, part) for part, seconds in of.items() if seconds > 0), reverse=True)
        shown = ", ".join(f"{part} {_shown(seconds)}" for seconds, part in parts)
        lines.append(f"  {phase:<{width}}{_shown(of.total):>9}  {shown}")
    share = products_share(case, lengths, MACHINES[name])
    lines.append(f"  the policy's update makes {share:.0%} of the products that the devices could make")
    lines += [f"  on {other}s {_whole(step_seconds(case, lengths, MACHINES[other]))}" for other in others]
    return lines


def products_share(case: Case, lengths: Sequence[int], machine: Machine) -> float:
    """Of the policy's update: model FLOPs over what the devices' rate of products would make in its seconds."""
    cut = schedule(case.config, case.layout, lengths)
    batch = _batch(case.config, case.layout, lengths, cut)
    each = model_flops(case.actor, batch.tokens, batch.loss_tokens, batch.squares)
    work = cut.updates * cut.micro_batches * case.layout.dp * each
    return work / (machine.products * case.world * step_seconds(case, lengths, machine)["update_actor"].total)


def _whole(found: dict[str, Seconds]) -> str:
    return _shown(sum(of.total for of in found.values()))


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
