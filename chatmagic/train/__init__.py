"""Fine-tuning: AdaLoRA's schedule and ranks, torchkeras' KerasModel with a step and a `fit` for it, checkpoints."""

import contextlib
import io

from .. import quantize  # noqa: F401, before PEFT imports bitsandbytes: it says what need not be heard

with contextlib.redirect_stdout(io.StringIO()):  # torchkeras prints on import that scikit-learn is missing
    import torchkeras  # noqa: F401

from .adalora import adalora_config, find_all_linear_names
from .keras import KerasModel
from .runtime import prepare
from .step import StepRunner

__all__ = ["KerasModel", "StepRunner", "adalora_config", "find_all_linear_names", "prepare"]
