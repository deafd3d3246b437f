"""Downloads through networks that fail, by seeded schedules: each ends in a verified folder or in a clear refusal.

    python benchmarks/download.py --schedules 200

The real clients of ModelScope and Hugging Face fetch a tiny model from a server on this machine, through a proxy that
cuts, delays, stalls, corrupts, throttles, and answers 500, 429 and 503; the process is killed now and then and started
again (tests/helpers/tiny_hub.py). Prints what came of how many.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from tiny_hub import schedule


def main() -> None:
    """Play the schedules, and print how they ended; the first that ends otherwise raises, with its seed printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    args = parser.parse_args()
    ended, began = Counter(), time.monotonic()
    for seed in range(args.first, args.first + args.schedules):
        print(f"\r{seed}", end="", flush=True)
        with tempfile.TemporaryDirectory() as home:
            ended[schedule(seed, Path(home).resolve())] += 1
    print(f"\r{args.schedules} schedules in {time.monotonic() - began:.0f} s: {dict(ended)}")


if __name__ == "__main__":
    main()
