"""AdaLoRA, and LoRA: the layers that get an adapter, a schedule that fits the run, what the ranks became.

AdaLoRA (Zhang et al., 2023, https://openreview.net/pdf?id=lq62uWRJjiY) writes each update as B·diag(E)·A,
scores every triplet (a column of B, an entry of E, a row of A) by its importance, and prunes the least
important ones until the budget of `target_r` triplets a layer, on average, is left.
"""

import re
from numbers import Integral
from typing import Any

import pandas as pd
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from ..accel.allocator import rank_allocator
from ..errors import ChatmagicError
from ..models.parts import experts
from ..text import did_you_mean

METHODS = ("adalora", "lora")
SHORTEST_RUN = 10
# Their fast kernel multiplies by the weight of out_proj itself, past any adapter on it; PEFT refuses one.
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def find_all_linear_names(model: PreTrainedModel) -> list[str]:
    """The last name component of every linear layer but the output head, sorted.

    4-bit, 8-bit and plain linears alike: bitsandbytes' classes derive from `torch.nn.Linear`. In a mixture of experts
    those of the blocks that hold experts are left out, in all layers: PEFT would take their names for the experts'.
    Raises ChatmagicError where there is none, or where the model carries an adapter already.
    """
    if getattr(model, "peft_config", None):
        raise ChatmagicError(
            "This model already carries an adapter. Call find_all_linear_names on the base model, before "
            "get_peft_model; in a notebook, run again from the cell that loads it."
        )
    blocks = {name.split(".experts.")[0].rpartition(".")[2] for name in experts(model)}
    head = model.get_output_embeddings()
    paths = [
        name.split(".")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    names = {path[-1] for path in paths if blocks.isdisjoint(path)}
    if model.config.model_type in MAMBA:
        names.discard("out_proj")
    if not names:
        raise ChatmagicError(f"{type(model).__name__} has no linear layer that an adapter could be put on.")
    return sorted(names)


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
    `target_modules` are the layers that get an adapter, as `find_all_linear_names` tells them.
    `lora` goes on to AdaLoraConfig (`lora_alpha`, `lora_dropout`, ...).
    Raises ChatmagicError for a schedule that would never prune, or would prune in the wrong order, and for settings
    that AdaLoraConfig does not take.
    """
    _check_whole(total_steps=total_steps, init_r=init_r, target_r=target_r)
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
    return _make(
        AdaLoraConfig,
        target_modules=target_modules,
        init_r=init_r,
        target_r=target_r,
        total_step=total_steps,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=deltaT,
        **lora,
    )


def adapter_config(
    method: str,
    total_steps: int,
    target_modules: list[str] | str,
    init_r: int = 12,
    target_r: int = 8,
    **lora: Any,
) -> AdaLoraConfig | LoraConfig:
    """The config of an adapter by its method: "adalora" as `adalora_config` makes it, or "lora" (Hu et al., 2021,
    https://arxiv.org/abs/2106.09685), of the one rank `target_r`, whatever the steps. The arguments are those of
    `adalora_config`; raises ChatmagicError for any other method, and as that does.
    """
    if method == "adalora":
        return adalora_config(total_steps, target_modules, init_r, target_r, **lora)
    if method == "lora":
        _check_whole(target_r=target_r)
        if target_r < 1:
            raise ChatmagicError(f"target_r={target_r}: a LoRA adapter's rank is 1 or more.")
        return _make(LoraConfig, target_modules=target_modules, r=target_r, **lora)
    raise ChatmagicError(f"method={method!r} is neither 'adalora' nor 'lora'{did_you_mean(method, METHODS)}")


def _check_whole(**numbers: object) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Integral):
            raise ChatmagicError(f"{name}={value!r} is no whole number.")


def _make(kind: type[LoraConfig], **settings: Any) -> Any:
    """A config of PEFT's for a causal language model."""
    try:
        return kind(task_type=TaskType.CAUSAL_LM, **settings)
    except (TypeError, ValueError) as error:  # an unknown name, or settings that exclude each other
        raise ChatmagicError(f"PEFT makes no {kind.__name__} of these settings: {error}") from error


def rank_table(config: AdaLoraConfig) -> pd.DataFrame:
    """The rank that each layer (rows, by number) and projection (columns) kept, int64, from an adapter's config.

    The config is `model.peft_config["default"]` of a trained model, or `PeftConfig.from_pretrained(adapter)`. Raises
    ChatmagicError for LoRA's.
    """
    if not isinstance(config, AdaLoraConfig):
        raise ChatmagicError(f"Every layer of a LoRA adapter keeps rank {config.r}: only AdaLoRA has ranks to show.")
    ranks = {}
    for name, kept in config.rank_pattern.items():
        layer, projection = layer_and_projection(name)
        ranks.setdefault(projection, {})[layer] = sum(kept)
    return pd.DataFrame(ranks).rename_axis("layer").sort_index()


def importance_table(model: PeftModel) -> pd.DataFrame:
    """The importance of every adapted layer (columns, as "3.q_proj") at each allocation (rows, by step). Raises
    ChatmagicError for LoRA, which measures none."""
    if (allocator := rank_allocator(model)) is None:
        raise ChatmagicError("LoRA does not measure how important its layers are: only AdaLoRA does.")
    names = ["{}.{}".format(*layer_and_projection(name)) for name in allocator.name_set]
    steps, importance = zip(*allocator.log)
    return pd.DataFrame(importance, columns=names, index=pd.Index(steps, name="step"))


def layer_and_projection(name: str) -> tuple[int, str]:
    """(3, "q_proj") of "model.layers.3.self_attn.q_proj.lora_E"; layer 0 if the name has no number."""
    parts = re.split(r"\.(?:lora_.|%s)", name)[0].split(".")
    return next((int(part) for part in parts if part.isdigit()), 0), parts[-1]
