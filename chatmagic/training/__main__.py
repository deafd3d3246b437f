"""`accelerate launch -m chatmagic.training PROFILE`: `chatmagic train PROFILE`, in each of its processes."""

import sys

from ..cli import main

sys.exit(main(["train", *sys.argv[1:]]))
