"""Jobs for Slurm: a training or an array of them, with servers beside it and an evaluation after it."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rl import __version__
from megatron_rl.config.load import load_config
from megatron_rl.config.rules import Config, ConfigError
from megatron_rl.config.schema import EngineName
from megatron_rl.launch.torchrun import processes

TEMPLATES = Path(__file__).parent / "templates"
QUEUE = ("partition", "account", "qos", "time")
# As sbatch takes it: minutes, hours:minutes:seconds, days-hours and so on.
TIME = re.compile(r"((?P<days>\d+)-)?(?P<first>\d+)(:(?P<second>\d+))?(:(?P<third>\d+))?")
SWEEP_KEYS = {"cases", "options", "seeds"}
OTHER_SWEEP_KEYS = {"config", "title", "runs", "results", "figures"}  # those of tools/sweep.py


@dataclass(frozen=True, slots=True)
class Element:
    """One training of a job; an array has several."""

    config: Config
    overrides: list[str]

    @property
    def run_dir(self) -> str:
        return self.config.run.dir

    @property
    def last_step(self) -> int:
        steps, stop = self.config.train.steps, self.config.run.stop_after
        return min(steps, stop or steps)

    @property
    def last_checkpoint(self) -> str:
        """The name of the checkpoint with which it is done."""
        from megatron_rl.checkpoint.store import name_of  # late: it takes torch

        return name_of(self.last_step)

    @property
    def result(self) -> str:
        """The folder of the run directory that is there then: a run that ends before its last step exports nothing."""
        return "hf" if self.last_step == self.config.train.steps else "checkpoints"


def parser() -> argparse.ArgumentParser:
    """The arguments of `megatron-rl slurm`."""
    made = argparse.ArgumentParser(
        prog="megatron-rl slurm",
        description="Writes the scripts of a job, and submits them with --submit. docs/slurm.md says what they do.",
    )
    made.add_argument("config", metavar="CONFIG", help="a YAML file that names its trainer")
    made.add_argument("overrides", nargs="*", metavar="a.b=c", help="options that overrule the file")
    made.add_argument("--nodes", type=int, default=1, help="nodes that train (default 1)")
    made.add_argument("--ranks-per-node", type=int, default=8, help="ranks on each, with a GPU each (default 8)")
    made.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: ranks compute on CPUs")
    made.add_argument("--rollout-nodes", type=int, default=0, help="more nodes, for vLLM servers alone (default 0)")
    made.add_argument("--sweep", type=Path, metavar="FILE", help="an array: one training per case of a sweep")
    made.add_argument("--evaluate", metavar="DATA", help="a second job: `megatron-rl eval` of the run, once it is done")
    for name in QUEUE:
        made.add_argument(f"--{name}", help=f"as sbatch's --{name}")
    made.add_argument("--job-name", metavar="NAME", help="default: the name of CONFIG")
    made.add_argument("--stop-before", type=int, default=300, metavar="SECONDS", help="before the time limit (300)")
    made.add_argument("--max-restarts", type=int, default=20, metavar="N", help="of one job (20)")
    made.add_argument("--logs", type=Path, metavar="DIR", help="of scripts and logs; default: slurm in run.dir")
    made.add_argument("--site", type=Path, metavar="FILE", help="shell settings of the cluster, read by every job")
    made.add_argument("--container", metavar="IMAGE", help="what runs on the nodes runs in it")
    made.add_argument("--mounts", metavar="A:B,...", help="folders that the container sees")
    made.add_argument("--runtime", choices=("pyxis", "apptainer"), default="pyxis", help="of containers (pyxis)")
    made.add_argument("--submit", action="store_true", help="submit, and print the job's id")
    return made


def slurm(options: argparse.Namespace) -> None:
    """Writes the scripts; prints where they are, or the ids of the submitted jobs."""
    check(options)
    overrides = list(map(str, options.overrides))
    elements = list(sweep(options, overrides)) if options.sweep else [element(options, overrides)]
    for one in elements:
        check_layout(options, one.config)
    base = load_config(options.config, overrides)
    logs = (options.logs or Path(base.run.dir) / "slurm").absolute()
    logs.mkdir(parents=True, exist_ok=True)
    scripts = [logs / "train.sbatch", *([logs / "eval.sbatch"] if options.evaluate else [])]
    for script in scripts:
        script.write_text(render(script.name, options, elements, logs))
    if not options.submit:
        print(*scripts, sep="\n")
        return
    number = submit(scripts[0])
    print(number)
    for script in scripts[1:]:
        # Of an array, each evaluation follows its own training.
        print(submit(script, f"--dependency={'aftercorr' if len(elements) > 1 else 'afterok'}:{number}"))


def render(template: str, options: argparse.Namespace, elements: Sequence[Element], logs: Path) -> str:
    """A script as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # late: nothing else of the command line draws it

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{*",  # in a shell {# is a length
        comment_end_string="*}",
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    name = options.job_name or Path(options.config).stem
    given: dict[str, Any] = vars(options) | {
        "version": __version__,
        "directory": os.getcwd(),
        "python": sys.executable,
        "job_name": f"{name}-eval" if template == "eval.sbatch" else name,
        "queue": {key: value for key in QUEUE if (value := getattr(options, key)) is not None},
        "elements": elements,
        "logs": logs,
        "site": options.site and options.site.absolute(),
        "rollout_nodes": 0 if template == "eval.sbatch" else options.rollout_nodes,
        "servers_per_node": options.ranks_per_node // elements[0].config.rollout.vllm.tp,
    }
    return environment.get_template(template).render(given)


def submit(script: Path, *options: str) -> str:
    """Hands a script to Slurm; the job's id."""
    if shutil.which("sbatch") is None:
        raise ValueError("--submit needs sbatch, which is not on this machine: submit from a login node of the cluster")
    done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refuses {script}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


def element(options: argparse.Namespace, given: list[str]) -> Element:
    """One training, its config checked as it will be: with servers somewhere, if it is to have some."""
    config = load_config(options.config, given)
    if not options.rollout_nodes:
        return Element(config, given)
    rollout = config.rollout
    if rollout.engine is not EngineName.vllm_server:
        raise ConfigError(
            f"--rollout-nodes={options.rollout_nodes} needs rollout.engine=vllm_server, not {rollout.engine.value}"
        )
    if rollout.vllm.server.urls:
        raise ConfigError("rollout.vllm.server.urls and --rollout-nodes both name servers: remove one of them")
    if options.ranks_per_node % rollout.vllm.tp:
        raise ConfigError(
            f"--ranks-per-node={options.ranks_per_node} GPUs of a rollout node cannot be shared out among servers of "
            f"rollout.vllm.tp={rollout.vllm.tp}: it must divide them"
        )
    return Element(load_config(options.config, [*given, "rollout.vllm.server.urls=[http://node:8000]"]), given)


def sweep(options: argparse.Namespace, overrides: Sequence[str]) -> Iterable[Element]:
    """The trainings of a sweep, as in tools/sweep.py: every case with every seed, each in a run directory."""
    path = options.sweep
    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--sweep={str(path)!r} cannot be read: {error}") from error
    if not isinstance(held, dict) or not isinstance(held.get("cases"), dict) or not held["cases"]:
        raise ConfigError(f"--sweep={str(path)!r} must have cases: a table from names to lists of a.b=c")
    if unknown := held.keys() - SWEEP_KEYS - OTHER_SWEEP_KEYS:
        raise ConfigError(f"--sweep={str(path)!r} has the key {min(unknown)!r}; it may have cases, options and seeds")
    if "config" in held and str(held["config"]) != options.config:
        raise ConfigError(f"--sweep={str(path)!r} is of {held['config']}, and not of {options.config}")
    place = load_config(options.config, overrides).run.dir
    for seed in held.get("seeds", [None]):
        for case, own in held["cases"].items():
            name = str(case).replace(" ", "_") + ("" if seed is None else f"_{seed}")
            written = [str(text).replace("{seed}", str(seed)) for text in [*held.get("options", []), *own]]
            seeded = [] if seed is None else [f"train.seed={seed}"]
            yield element(options, [*written, *overrides, *seeded, f"run.dir={place}/{name}"])


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError on an option that cannot be meant."""
    smallest = {"nodes": 1, "ranks_per_node": 1, "rollout_nodes": 0, "stop_before": 1, "max_restarts": 0}
    for name, least in smallest.items():
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least {least}")
    if options.time is not None and seconds(options.time) <= options.stop_before:
        raise ConfigError(
            f"--time={options.time} is over before --stop-before={options.stop_before} seconds: the run would be asked "
            "to stop as it starts"
        )
    name = options.job_name or Path(options.config).stem
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ConfigError(f"--job-name={name!r} must be letters, digits and . _ + = - only: files are named after it")
    if options.site is not None and not options.site.is_file():
        raise ConfigError(f"--site={str(options.site)!r} is no file: examples/cluster/site.sh is one to start from")
    if options.mounts is not None and options.container is None:
        raise ConfigError(f"--mounts={options.mounts} is for a container: name one with --container")


def seconds(time: str) -> int:
    """Of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    match = TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"--time={time!r} is no time as 90 (minutes), 12:00:00 or 2-12:00:00")
    parts = [int(part) for part in (match["first"], match["second"], match["third"]) if part is not None]
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return int(match["days"] or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))


def check_layout(options: argparse.Namespace, config: Config) -> None:
    """The job has the ranks that the layout is made of."""
    parallel, ranks = config.parallel, options.nodes * options.ranks_per_node
    needed = processes(parallel)
    if ranks == needed or (parallel.dp is None and ranks % needed == 0):
        return
    axes = {axis: getattr(parallel, axis) for axis in ("tp", "pp", "dp", "ep", "etp")}
    layout = ", ".join(f"parallel.{axis}={size}" for axis, size in axes.items() if size != 1)
    raise ConfigError(
        f"{layout} needs {'a multiple of ' if parallel.dp is None else ''}{needed} ranks, and --nodes={options.nodes} "
        f"with --ranks-per-node={options.ranks_per_node} are {ranks}"
    )
