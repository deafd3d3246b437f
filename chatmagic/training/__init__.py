"""Fine-tuning: AdaLoRA's schedule and ranks, torchkeras' KerasModel with a step and a `fit` for it, states."""

import contextlib
import io

from ..machine import share_cores

share_cores()  # before torch is imported, which counts the cores then

from ..models import quantize  # noqa: E402, F401, before PEFT imports bitsandbytes: it says what need not be heard

with contextlib.redirect_stdout(io.StringIO()):  # torchkeras prints on import that scikit-learn is missing
    import torchkeras  # noqa: F401

from .adalora import adalora_config, adapter_config, find_all_linear_names  # noqa: E402
from .keras import KerasModel  # noqa: E402
from .runtime import prepare  # noqa: E402
from .step import StepRunner  # noqa: E402

__all__ = ["KerasModel", "StepRunner", "adalora_config", "adapter_config", "find_all_linear_names", "prepare"]
