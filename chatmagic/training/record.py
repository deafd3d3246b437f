"""What a run was, beside its adapter: run.json, and the history as history.csv."""

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch.utils.data import DataLoader

from ..files import write
from ..machine import package_version
from ..models.checkpoint import read_manifest
from ..models.provenance import base_name
from .checks import rows_of

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
        "data": {"train": data_hash(run.train_loader), "val": data_hash(run.val_loader)},
        "settings": run.settings
        | {
            "patience": run.patience,
            "save_every": run.save_every,
            "mixed_precision": run.accelerator.mixed_precision,
            "processes": run.accelerator.num_processes,
            "fast": run.fast,
            "captured": run.captured is not None,
        },
        "device": torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in TRAINED_WITH},
    }
    write(run.ckpt_path / RUN, json.dumps(record | about, ensure_ascii=False, indent=1, default=str))


def write_history(history: dict[str, list], folder: Path) -> None:
    """Write history.csv: a row an epoch, a column a measurement."""
    write(folder / HISTORY, pd.DataFrame(history).to_csv(index=False))


def data_hash(loader: DataLoader | None) -> str | None:
    """A SHA-256 of the ids and labels of a dataset that is a list; None for any other, which may draw its rows."""
    rows = rows_of(loader, "input_ids", "labels") if loader else []
    if not rows:
        return None
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            digest.update(json.dumps(torch.as_tensor(row[name]).tolist()).encode())
    return digest.hexdigest()
