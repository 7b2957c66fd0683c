"""`python -m megatron_rl` is `megatron-rl`."""

import sys

from megatron_rl.cli import main
from megatron_rl.rewards.worker import die_with_parent, outlast_signals

if __name__ == "__mp_main__":  # a helper that multiprocessing spawned for a rank
    die_with_parent()
    outlast_signals()
if __name__ == "__main__":
    sys.exit(main())
