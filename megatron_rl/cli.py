"""The command line: `megatron-rl train CONFIG [a.b=c ...]` and `megatron-rl check CONFIG [a.b=c ...]`."""

import argparse
import sys
from collections.abc import Sequence

from megatron_rl import __version__
from megatron_rl.config.load import load
from megatron_rl.config.rules import ConfigError
from megatron_rl.launch import torchrun

VERBS = {
    "train": "train, on this machine's processes or under torchrun",
    "check": "say what `train` would do, and what is wrong, without training",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. A mistake of the user's is one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="megatron-rl", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for verb, help_text in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=help_text)
        verb_parser.add_argument("config", help="a YAML file that names its trainer")
        verb_parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options that overrule the file")
    options = parser.parse_args(arguments)
    try:
        look(options.config, options.overrides, show=options.verb == "check")
    except ValueError as error:
        return mistake(error)
    if options.verb == "train":
        try:
            train(options.config, options.overrides, arguments)
        except ConfigError as error:
            return mistake(error)
    return 0


def mistake(error: ValueError) -> int:
    """Says it in one line."""
    print(f"megatron-rl: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def look(path: str, overrides: Sequence[str], *, show: bool) -> None:
    """Finds mistakes before any process is started. Under torchrun that is over: whoever started it has looked."""
    loaded = load(path, overrides)
    if torchrun.under_torchrun() and not show:
        return
    # Imported late: a mistake in the config itself is reported without waiting for torch.
    from megatron_rl.trainers.preflight import describe, preflight

    findings = preflight(loaded.config)
    if show:
        print(describe(loaded, findings))


def train(path: str, overrides: Sequence[str], arguments: Sequence[str]) -> None:
    """Trains here, or in the processes that torchrun starts with these same arguments."""
    config = load(path, overrides).config
    count = torchrun.processes(config.parallel)
    if count > 1 and not torchrun.under_torchrun():
        torchrun.replace_by_torchrun(count, arguments)
    from megatron_rl.trainers.run import run

    run(config)
