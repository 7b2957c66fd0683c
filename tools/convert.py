"""`megatron-rl convert` for those who look in tools/: `python tools/convert.py import HF CHECKPOINT --tp 2`."""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
