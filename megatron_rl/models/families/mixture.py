"""How families name the router and the experts of a layer."""

from dataclasses import dataclass

from megatron_rl.models.hf_map import GATED_LINEAR, REPLICATED, ROW_PARALLEL, Rule


@dataclass(frozen=True, slots=True)
class Mixture:
    """The module that holds them in a layer, and an expert's three projections, as the files of a model name them."""

    block: str
    gate: str
    up: str
    down: str

    def rules(self) -> tuple[Rule, ...]:
        block = f"model.layers.{{layer}}.{self.block}"
        expert = f"{block}.experts.{{expert}}"
        ours = "decoder.layers.{layer}.mlp.experts.{expert}"
        return (
            Rule("decoder.layers.{layer}.mlp.router.weight", REPLICATED, (f"{block}.gate.weight",)),
            Rule(
                f"{ours}.linear_fc1.weight",
                GATED_LINEAR,
                (f"{expert}.{self.gate}.weight", f"{expert}.{self.up}.weight"),
            ),
            Rule(f"{ours}.linear_fc2.weight", ROW_PARALLEL, (f"{expert}.{self.down}.weight",)),
        )
