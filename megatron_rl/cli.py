"""The command line: `megatron-rl train CONFIG [a.b=c ...]`."""

import argparse
import sys
from collections.abc import Sequence

from megatron_rl import __version__
from megatron_rl.config.load import load_config
from megatron_rl.config.rules import ConfigError
from megatron_rl.launch import torchrun

VERBS = ("train",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. A mistake in the configuration is one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="megatron-rl", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    train_parser = verbs.add_parser("train", help="train, on this machine's processes or under torchrun")
    train_parser.add_argument("config", help="a YAML file that names its trainer")
    train_parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options that overrule the file")
    options = parser.parse_args(arguments)
    try:
        return train(options.config, options.overrides, arguments)
    except ConfigError as error:
        print(f"megatron-rl: {error}", file=sys.stderr)
        return 2


def train(path: str, overrides: Sequence[str], arguments: Sequence[str]) -> int:
    """Checks the config, then trains: here, or in the processes that torchrun starts with these same arguments."""
    config = load_config(path, overrides)
    count = torchrun.processes(config.parallel)
    if count > 1 and not torchrun.under_torchrun():
        torchrun.replace_by_torchrun(count, arguments)
    # Imported late: a mistake in the config is reported without waiting for torch and megatron-core.
    from megatron_rl.trainers.run import run

    run(config)
    return 0
