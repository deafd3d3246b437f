"""What a run was, beside its adapter: run.json, and the history as history.csv."""

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from ..files import write
from ..machine import package_version
from ..models.checkpoint import read_manifest
from ..models.provenance import base_name

if TYPE_CHECKING:
    from .keras import KerasModel

RUN, HISTORY = "run.json", "history.csv"
TRAINED_WITH = ("chatmagic", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchkeras")


def write_run(run: "KerasModel", about: dict) -> None:
    """Write run.json to the run's ckpt_path. about: what the caller knows of it besides, plain values."""
    config, net = run.net.config, run.net.get_base_model()
    quantised = getattr(config, "quantization_config", None)
    name = getattr(config, "name_or_path", None) or ""
    noted = read_manifest(Path(name))
    record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": {
            "name": base_name(name) if name else None,
            "revision": noted.get("commit") or noted.get("revision") or getattr(config, "_commit_hash", None),
            "class": type(net).__name__,
            "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
            "quantization": quantised.to_dict() if hasattr(quantised, "to_dict") else quantised,
        },
        "data": run.settings["data"],
        "settings": {name: value for name, value in run.settings.items() if name != "data"}
        | {
            "resumed_from_step": run.step,
            "patience": run.patience,
            "save_every": run.save_every,
            "mixed_precision": run.accelerator.mixed_precision,
            "processes": run.accelerator.num_processes,
            "fast": run.fast,
            "log_with": run.log_with,
            "captured": run.captured is not None,
        },
        "device": torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in TRAINED_WITH},
    }
    write(run.ckpt_path / RUN, json.dumps(record | about, ensure_ascii=False, indent=1, default=str))


def write_history(history: dict[str, list], folder: Path) -> None:
    """Write history.csv: a row an epoch, a column a measurement."""
    write(folder / HISTORY, pd.DataFrame(history).to_csv(index=False))
