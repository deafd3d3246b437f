"""Tiny models, data and runs of the training tests, importable by the processes that they start."""

import multiprocessing
import os
import random
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from chatmagic.accel.captured import CapturedStep, Recording
from chatmagic.training import KerasModel, StepRunner, adalora_config

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LAYERS = 2 * len(PROJECTIONS)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_llama(size=32):
    torch.manual_seed(0)
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **HEADS)).eval()


def adalora(steps=40, dropout=0.0, base=None):
    base = base or tiny_llama()
    torch.manual_seed(0)
    settings = {"init_r": 6, "target_r": 3, "lora_alpha": 16, "lora_dropout": dropout}
    return get_peft_model(base, adalora_config(steps, PROJECTIONS, **settings))


def lora():
    return get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=PROJECTIONS))


def rows(n, seed=0, length=12):
    """n samples, of which a third of the tokens is not trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (n, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels)]


def uneven_rows(n, seed=0):
    """Samples that differ in how many of their tokens are trained."""
    samples = rows(n, seed)
    for index, sample in enumerate(samples):
        sample["labels"][: 4 + index % 8] = -100
    return samples


class Drawn(torch.utils.data.Dataset):
    """Samples that are made up as they are fetched, as the seed's MyDataset does."""

    def __init__(self, n):
        self.rows = rows(n)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return random.choice(self.rows)


def loader(data, batch_size=2, **kwargs):
    return DataLoader(data, batch_size=batch_size, **kwargs)


def fit(
    model,
    path,
    epochs=10,
    lr=1e-2,
    train=None,
    val=None,
    scheduler=None,
    runner=None,
    optimizer=torch.optim.AdamW,
    **settings,
):
    """A quiet run in fp32; 40 steps unless told otherwise. `val=False` is none."""
    optimizer = optimizer(model.parameters(), lr=lr)
    keras_model = KerasModel(model, optimizer=optimizer, lr_scheduler=scheduler and scheduler(optimizer))
    keras_model.StepRunner = runner or keras_model.StepRunner
    settings = {"plot": False, "cpu": True, "mixed_precision": "no", "patience": epochs} | settings
    train = loader(rows(8)) if train is None else train
    val = loader(rows(4, seed=1)) if val is None else None if val is False else val
    return keras_model.fit(train, val, epochs=epochs, ckpt_path=path, **settings)


def runner_that(acts, batch):
    """A StepRunner that calls `acts` with itself before the `batch`-th training batch of a process."""

    class Runner(StepRunner):
        seen = 0

        def __call__(self, inputs):
            if self.stage == "train":
                Runner.seen += 1
                if Runner.seen == batch:
                    acts(self)
            return super().__call__(inputs)

    return Runner


class Replayed(CapturedStep):
    """Computes each replay anew, from the graph's inputs, where there is no GPU to record on; with the optimizer's
    numbers as they were when it was captured, which a graph holds."""

    def capture(self, function, inputs):
        inputs, result = {name: tensor.clone() for name, tensor in inputs.items()}, torch.zeros(6)
        groups = self.optimizer.param_groups
        held = [{name: group[name] for name in ("betas", "eps", "weight_decay")} for group in groups]

        def replay():
            now = [dict(group) for group in groups]
            for group, numbers in zip(groups, held):
                group |= numbers
            if (found := function(inputs)) is not None:
                result.copy_(found)
            for group, numbers in zip(groups, now):
                group |= numbers

        return Recording(SimpleNamespace(replay=replay), inputs, result)


def processes(target, *arguments):
    """Started processes, one for each tuple of arguments, all forked from a server that has imported torch already. Its
    environment is that of the test which asked first; theirs is the present one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chatmagic.training", "transformers.models.llama.modeling_llama"])
    here = dict(os.environ)
    started = [context.Process(target=_with, args=(here, target, args), daemon=True) for args in arguments]
    for process in started:
        process.start()
    return started


def _with(environment, target, arguments):
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)
