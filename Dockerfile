# Two images: `trainer` learns, `rollout` answers for it over HTTP. docs/docker.md has the commands.
# Checked by hadolint; not yet built.

# megatron-core 0.16.1 is developed on this image (its docker/.ngc_version.dev).
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS trainer
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/megatron_rl
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_rl megatron_rl
COPY examples examples
# The image's torch, Transformer Engine and apex are built for each other, so nothing that it has may change. The list
# takes the place of the image's own constraints, which name packages that it does not have as well.
RUN python -m pip list --format=freeze | sort > /opt/base.txt \
    && python -m pip install --no-cache-dir --no-deps megatron-core==0.16.1 \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir --constraint /opt/base.txt '.[tasks]' \
    && changed=$(python -m pip list --format=freeze | sort | comm -23 /opt/base.txt -) \
    && { [ -z "$changed" ] || { echo "changed or removed: $changed" >&2; exit 1; }; }
RUN useradd --create-home --no-log-init --uid 10001 rl
USER 10001
# A GPU that has fallen off its bus makes this fail.
HEALTHCHECK --interval=60s --timeout=30s CMD ["nvidia-smi", "--list-gpus"]
CMD ["megatron-rl", "--help"]

# The version that setup.py pins.
FROM vllm/vllm-openai:v0.32.0 AS rollout
# Its workers take weights by one class of ours, which needs torch and safetensors alone.
COPY megatron_rl /opt/megatron_rl/megatron_rl
ENV PYTHONPATH=/opt/megatron_rl VLLM_SERVER_DEV_MODE=1
RUN useradd --create-home --no-log-init --uid 10001 rl
USER 10001
WORKDIR /tmp
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server", \
    "--load-format", "dummy", "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", \
    "--worker-extension-cls", "megatron_rl.rollout.vllm.receiver.Receiver", "--enable-scale-out", \
    "--host", "0.0.0.0", "--port", "8000"]
