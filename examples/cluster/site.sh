# shellcheck shell=bash disable=SC2034
# Settings of a cluster, for `megatron-rl slurm --site`. Every job reads this on its first node, in bash, and all that is
# set here is in the environment of every step. Remove the # of what you need.

# Megatron-Core overlaps communication with computation in the order of launch, where there is one queue per GPU.
export CUDA_DEVICE_MAX_CONNECTIONS=1

# The network that ranks meet on and that gloo uses: `ip address` on a node shows the names.
# NCCL_SOCKET_IFNAME=bond0
# GLOO_SOCKET_IFNAME=bond0

# The network that carries tensors. `ibstat -l` shows InfiniBand's adapters.
# NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7
# NCCL_IB_GID_INDEX=3      # RoCE
# FI_PROVIDER=efa          # Amazon's EFA

# What to look at when something hangs.
# NCCL_DEBUG=INFO
# TORCH_NCCL_TRACE_BUFFER_SIZE=20000

# Runs on each node before every attempt; a node where it fails is left out of the next one.
# PREFLIGHT_COMMAND='dcgmi diag -r 1'
# Seconds that a stage of the preflight may take; the first one also waits for a container's image.
# PREFLIGHT_TIMEOUT_S=300

# By what address a node is reached, where what Slurm knows of it is another network. The name of the node comes in.
# address_of() { getent hosts "$1-ib" | cut -d ' ' -f 1; }
