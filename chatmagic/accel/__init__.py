"""What makes things faster, and changes nothing else."""

from ..models import quantize  # noqa: F401, before PEFT imports bitsandbytes: it says what need not be heard
