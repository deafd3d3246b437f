"""AdaLoRA: the layers that get an adapter, a schedule that fits the run, and tables of what the ranks became.

AdaLoRA (Zhang et al., 2023, https://openreview.net/pdf?id=lq62uWRJjiY) writes each update as B·diag(E)·A,
scores every triplet (a column of B, an entry of E, a row of A) by its importance, and prunes the least
important ones until the budget of `target_r` triplets a layer, on average, is left.
"""

import re
from typing import Any

import pandas as pd
import torch
from peft import AdaLoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from ..accel.allocator import rank_allocator
from ..errors import ChatmagicError

SHORTEST_RUN = 10


def find_all_linear_names(model: PreTrainedModel) -> list[str]:
    """The last name component of every linear layer but the output head, sorted.

    4-bit, 8-bit and plain linears alike: bitsandbytes' classes derive from `torch.nn.Linear`.
    Raises ChatmagicError where there is none, or where the model carries an adapter already.
    """
    if getattr(model, "peft_config", None):
        raise ChatmagicError(
            "This model already carries an adapter. Call find_all_linear_names on the base model, before "
            "get_peft_model; in a notebook, run again from the cell that loads it."
        )
    head = model.get_output_embeddings()
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not linears:
        raise ChatmagicError(f"{type(model).__name__} has no linear layer that an adapter could be put on.")
    return sorted({name.rpartition(".")[2] for name in linears})


def adalora_config(
    total_steps: int,
    target_modules: list[str] | str,
    init_r: int = 12,
    target_r: int = 8,
    tinit: int | None = None,
    tfinal: int | None = None,
    deltaT: int | None = None,
    **lora: Any,
) -> AdaLoraConfig:
    """An AdaLoraConfig for a causal language model whose schedule fits a run of `total_steps` optimizer steps.

    The ranks stay at `init_r` for the first tenth of the run (`tinit`), shrink to `target_r` on average in
    about twenty allocations (one every `deltaT` steps), and are final for the last three tenths (`tfinal`).
    `lora` goes on to AdaLoraConfig (`lora_alpha`, `lora_dropout`, ...).
    Raises ChatmagicError for a schedule that would never prune, or would prune in the wrong order.
    """
    if not 0 < target_r < init_r:
        raise ChatmagicError(
            f"AdaLoRA shrinks the rank from init_r to target_r, so it wants 0 < target_r < init_r, not "
            f"target_r={target_r} and init_r={init_r}. For a fixed rank use LoraConfig(r={target_r})."
        )
    if "r" in lora:
        raise ChatmagicError(f"AdaLoRA ignores r={lora['r']}: say init_r (at the start) and target_r (at the end).")
    if total_steps < SHORTEST_RUN:
        raise ChatmagicError(
            f"{total_steps} optimizer steps are too few to score ranks, prune them and train what is left: "
            f"AdaLoRA wants {SHORTEST_RUN} or more. Train more epochs, or in smaller batches."
        )
    tinit = total_steps // 10 if tinit is None else tinit
    tfinal = total_steps * 3 // 10 if tfinal is None else tfinal
    shrinking = total_steps - tfinal - tinit
    deltaT = max(1, shrinking // 20) if deltaT is None else deltaT
    if tinit < 0 or tfinal < 1 or deltaT < 1 or shrinking < 1:
        raise ChatmagicError(
            f"Of {total_steps} steps, tinit={tinit} come before the ranks shrink and tfinal={tfinal} after, which "
            f"leaves {shrinking} for shrinking every deltaT={deltaT} steps. Keep tinit >= 0, tfinal >= 1, deltaT >= 1 "
            f"and tinit + tfinal < {total_steps}."
        )
    return AdaLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=target_modules,
        init_r=init_r,
        target_r=target_r,
        total_step=total_steps,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=deltaT,
        **lora,
    )


def rank_table(config: AdaLoraConfig) -> pd.DataFrame:
    """The rank that each layer (rows, by number) and projection (columns) kept, int64, from an adapter's config.

    The config is `model.peft_config["default"]` of a trained model, or `PeftConfig.from_pretrained(adapter)`.
    """
    ranks = {}
    for name, kept in config.rank_pattern.items():
        layer, projection = layer_and_projection(name)
        ranks.setdefault(projection, {})[layer] = sum(kept)
    return pd.DataFrame(ranks).rename_axis("layer").sort_index()


def importance_table(model: PeftModel) -> pd.DataFrame:
    """The importance of every adapted layer (columns, as "3.q_proj") at each allocation (rows, by step)."""
    allocator = rank_allocator(model)
    names = ["{}.{}".format(*layer_and_projection(name)) for name in allocator.name_set]
    steps, importance = zip(*allocator.log)
    return pd.DataFrame(importance, columns=names, index=pd.Index(steps, name="step"))


def layer_and_projection(name: str) -> tuple[int, str]:
    """(3, "q_proj") of "model.layers.3.self_attn.q_proj.lora_E"; layer 0 if the name has no number."""
    parts = re.split(r"\.(?:lora_.|%s)", name)[0].split(".")
    return next((int(part) for part in parts if part.isdigit()), 0), parts[-1]
