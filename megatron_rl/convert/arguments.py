"""The arguments of `megatron-rl convert`. No torch here: a slip is told at once."""

import argparse
from pathlib import Path

VERBS = {
    "plan": "what an import or export would do, from headers alone",
    "import": "a Hugging Face directory to a checkpoint that model.weights names",
    "export": "a checkpoint, or a run's latest, to a Hugging Face directory",
    "verify": "show that two models are the same, by checksums or by logits",
    "inspect": "what is in a checkpoint or a Hugging Face directory",
    "diff": "what differs between two checkpoints or Hugging Face directories",
    "reshard": "a checkpoint, optimizer state included, in chunks that suit another layout",
}
LAYOUT = {
    "tp": "tensor-parallel ranks",
    "pp": "pipeline stages",
    "vpp": "interleaved stages per rank",
    "ep": "expert-parallel ranks",
    "etp": "tensor-parallel ranks inside an expert",
}
METHODS = ("checksum", "logits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All verbs of `convert`."""
    parser.description = "Converts checkpoints. One process, on the CPU. See docs/convert.md."
    verbs = parser.add_subparsers(dest="convert", required=True, metavar="|".join(VERBS))
    made = {verb: verbs.add_parser(verb, help=text, description=text) for verb, text in VERBS.items()}
    for verb in ("plan", "import", "export", "reshard", "inspect"):
        made[verb].add_argument("source", type=Path, metavar="SOURCE")
    for verb in ("import", "export", "reshard"):
        made[verb].add_argument("target", type=Path, metavar="TARGET")
        made[verb].add_argument("--overwrite", action="store_true", help="replace TARGET, once the new one is whole")
    for verb in ("verify", "diff"):
        made[verb].add_argument("one", type=Path, metavar="ONE")
        made[verb].add_argument("other", type=Path, metavar="OTHER")
    for verb in ("plan", "import", "reshard"):
        for name, text in LAYOUT.items():
            made[verb].add_argument(f"--{name}", type=int, default=1, metavar="N", help=text)
    for verb in ("plan", "import", "export", "reshard"):
        made[verb].add_argument("--max-memory", default="2GB", metavar="SIZE", help="what is held at once (2GB)")
    for verb in ("plan", "import", "export"):
        made[verb].add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as stored without it")
        allow = "a tensor that is left out; again for each"
        made[verb].add_argument("--allow", action="append", default=[], metavar="NAME", help=allow)
    for verb in ("import", "export"):
        made[verb].add_argument("--verify", choices=METHODS, help="show afterwards that the result is the source")
    made["export"].add_argument("--max-shard-size", default="4GiB", metavar="SIZE", help="of a file (4GiB)")
    made["verify"].add_argument("--method", choices=METHODS, default="checksum")
    for verb in ("import", "export", "verify"):
        made[verb].add_argument("--tokens", type=int, default=64, metavar="N", help="that logits are compared on (64)")
        made[verb].add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="of logits (1e-4)")
    for verb in ("plan", "import", "export", "verify", "diff"):
        made[verb].add_argument("--role", help="actor, critic, teacher, average or reference")
    for verb in ("plan", "export", "verify", "diff"):
        hf = "config and tokenizer of a checkpoint that does not say where they are"
        made[verb].add_argument("--hf", type=Path, metavar="DIR", help=hf)
    for verb in ("plan", "inspect", "diff"):
        made[verb].add_argument("--json", action="store_true", help="as JSON")
    made["inspect"].add_argument("--tensors", action="store_true", help="name every tensor")
