"""What a run leaves on disk, and runs that go on from it."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, SequentialLR, StepLR
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from chatmagic import ChatmagicError
from chatmagic.models.parts import trainable
from chatmagic.training import KerasModel, StepRunner, adalora_config
from chatmagic.training.keras import TrainingInterrupted
from chatmagic.training.states import load_adapter, newest_state, save_adapter
from disk import contents
from quick import first
from tiny_runs import PROJECTIONS, Drawn, adalora, fit, loader, lora, processes, rows, runner_that, tiny_llama

LOSSES = ["train_loss", "train_penalty", "val_loss", "val_penalty", "lr", "grad_norm", "rank_budget"]


SETTINGS = {
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40),
    "gradient_accumulation_steps": 2,
}


def run(path, workers=0, **settings):
    """80 batches, 40 steps, everything random in them: dropout, shuffling, samples drawn as they are fetched."""
    torch.manual_seed(1)
    random.seed(1)
    model = adalora(dropout=0.1)
    train = loader(Drawn(16), shuffle=True, num_workers=workers)
    history = fit(model, path, train=train, **SETTINGS, **settings)
    return history[LOSSES], dict(trainable(model))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken")
    return *run(path), (path / "adapter_model.safetensors").read_bytes()


def assert_goes_on_as(unbroken, path, workers=0):
    """Resumed, the run in `path` has the losses, the weights and the adapter of the unbroken one, bit for bit."""
    history, weights, adapter = unbroken
    resumed_history, resumed_weights = run(path, workers, resume=True)
    assert resumed_history.equals(history)
    assert all(torch.equal(weights[name], weight) for name, weight in resumed_weights.items())
    assert (path / "adapter_model.safetensors").read_bytes() == adapter


def runner_that_in_a_step(acts, batch):
    """A StepRunner that calls `acts` when the optimizer has stepped, on the `batch`-th training batch of a process."""

    def act(runner):
        hook = runner.optimizer.optimizer.register_step_post_hook(lambda *_: (hook.remove(), acts())[1])

    return runner_that(act, batch)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(path, batch, save_every):
    run(path, runner=runner_that_in_a_step(kill, batch), save_every=save_every)


@pytest.mark.parametrize("batch, save_every, saved", first(1, [(37, 3, 18), (2, None, 0), (37, 1, 18), (70, None, 32)]))
@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, unbroken, batch, save_every, saved):
    (process,) = processes(run_until_killed, (tmp_path, batch, save_every))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [folder.name for folder in tmp_path.glob("last-*")] == [f"last-{saved:06d}"]
    assert_goes_on_as(unbroken, tmp_path)


def run_until_killed_before(path, call, number):
    """Dies instead of making the call of that number of a function that touches the disk."""
    module, name = sys.modules[call.split(".")[0]], call.split(".")[1]
    calls, real = itertools.count(1), getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: kill() if next(calls) == number else real(*args, **kwargs))
    run(path, save_every=3)


@pytest.mark.parametrize(
    "call, number, left",
    first(
        1,
        [
            ("os.fsync", 10, [".last-000003.*.part", "last-000000"]),  # in the middle of a state
            ("shutil.rmtree", 1, [".last-000000.*.part", "last-000003"]),  # the older state is still there
            ("os.unlink", 2, [".last-000000.*.part", "last-000003"]),  # half of it is
            (
                "os.replace",
                77,
                [".adapter_config.json.*.part", "adapter_model.safetensors", "last-000030"],
            ),  # half of a better adapter
        ],
    ),
)
def test_a_run_killed_while_it_writes_goes_on(tmp_path, unbroken, call, number, left):
    (process,) = processes(run_until_killed_before, (tmp_path, call, number))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    names = {file.name for file in tmp_path.iterdir()} - {"run.json", "history.csv"}
    assert sorted(re.sub("[0-9a-f]{8}", "*", name) for name in names) == left
    assert_goes_on_as(unbroken, tmp_path)


def test_the_newest_state_is_of_the_newest_run(tmp_path):
    fit(adalora(), tmp_path)
    (process,) = processes(run_until_killed_before, (tmp_path, "os.rename", 2))
    process.join(120)
    assert sorted(folder.name for folder in tmp_path.glob("last-*")) == ["last-000000", "last-000040"]
    assert newest_state(tmp_path).step == 0


@pytest.mark.slow
def test_workers_draw_the_same_samples_and_go_on(tmp_path):
    """Under a seed and a number of workers; another number draws others, where a dataset draws."""
    unbroken = *run(tmp_path / "unbroken", 2), (tmp_path / "unbroken/adapter_model.safetensors").read_bytes()
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, 2, runner=runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), 37))
    assert_goes_on_as(unbroken, tmp_path, 2)


@pytest.mark.parametrize("batch, step", first(1, [(37, 19), (48, 24)]))
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, unbroken, batch, step):
    before = signal.getsignal(signal.SIGINT)  # ignored, where a job in the background runs the tests
    with pytest.raises(TrainingInterrupted, match=rf"step {step} of 40.*resume=True") as error:
        run(tmp_path, runner=runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), batch))
    assert f"last-{step:06d}" in str(error.value)
    assert signal.getsignal(signal.SIGINT) is before
    assert_goes_on_as(unbroken, tmp_path)


def test_a_full_disk_keeps_what_was_saved(tmp_path, unbroken):
    """A write that fails halfway, as on a full disk: a limit on the size of files stops it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = runner_that_in_a_step(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard)), 69)
    try:
        with pytest.raises(ChatmagicError, match="full.*resume=True"):
            run(tmp_path, runner=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chatmagic.json",
        "history.csv",
        "last-000032",
        "run.json",
    ]
    assert_goes_on_as(unbroken, tmp_path)


@pytest.mark.parametrize("size", [0, 7, 3000])
def test_a_damaged_state_is_told_in_words(tmp_path, size):
    fit(lora(), tmp_path, epochs=1)
    (state,) = tmp_path.glob("last-*/state.pt")
    state.write_bytes(state.read_bytes()[:size])
    with pytest.raises(ChatmagicError, match=r"state.pt is damaged: .*Move its folder away"):
        fit(lora(), tmp_path, epochs=1, resume=True)
    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:size])
    with pytest.raises(ChatmagicError, match="adapter_model.safetensors is cut short"):
        KerasModel(lora()).load_ckpt(tmp_path)
    adapter.unlink()
    with pytest.raises(ChatmagicError, match="There is no adapter in"):
        KerasModel(lora()).load_ckpt(tmp_path)


def test_a_finished_run_resumes_to_its_end(tmp_path, unbroken):
    run(tmp_path)
    assert_goes_on_as(unbroken, tmp_path)


def test_a_new_run_replaces_the_states_of_the_old(tmp_path):
    fit(adalora(), tmp_path)
    with pytest.raises(TrainingInterrupted):
        fit(adalora(), tmp_path, runner=runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), 3))
    assert [folder.name for folder in tmp_path.glob("last-*")] == ["last-000003"]


@pytest.mark.parametrize("batch", first(1, [37, 5, 70]))
@pytest.mark.parametrize("answer", first(2, ["resume", "anew", "anew with an optimizer made again", "unwatched"]))
def test_the_cell_of_fit_run_again_after_stop_asks(tmp_path, unbroken, monkeypatch, batch, answer):
    """With the model, the optimizer and the scheduler as the first call left them; either way leads to the same end."""
    torch.manual_seed(1)
    random.seed(1)
    model = adalora(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler, train = SETTINGS["scheduler"](optimizer), loader(Drawn(16), shuffle=True)

    def cell(runner=StepRunner, **resume):
        keras_model = KerasModel(model, optimizer=optimizer, lr_scheduler=scheduler)
        keras_model.StepRunner = runner
        settings = {
            "plot": False,
            "cpu": True,
            "mixed_precision": "no",
            "patience": 10,
            "gradient_accumulation_steps": 2,
        }
        return keras_model.fit(train, loader(rows(4, seed=1)), epochs=10, ckpt_path=tmp_path, **settings, **resume)

    with pytest.raises(TrainingInterrupted):
        cell(runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), batch))
    left = contents(tmp_path)
    weights = [param.clone() for param in model.parameters()]
    with pytest.raises(ChatmagicError, match=rf"stopped after step {-(-batch // 2)} of 40.*resume=True.*resume=False"):
        cell()
    assert contents(tmp_path) == left
    assert all(map(torch.equal, weights, model.parameters()))
    if answer.endswith("again"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = SETTINGS["scheduler"](optimizer)
    if answer == "unwatched":
        monkeypatch.setenv("CHATMAGIC_RESUME", "1")
    history = cell(**({} if answer == "unwatched" else {"resume": answer == "resume"}))
    assert history[LOSSES].equals(unbroken[0])
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == unbroken[2]
    monkeypatch.delenv("CHATMAGIC_RESUME", raising=False)
    with pytest.raises(ChatmagicError, match="trained already.*resume=False"):
        cell()


@pytest.mark.slow
def test_a_broken_off_run_of_another_kernel_is_asked_for_too(tmp_path):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, runner=runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), 37))
    with pytest.raises(ChatmagicError, match="stopped after step 19 of 40"):
        run(tmp_path)
    assert newest_state(tmp_path).step == 19
    with pytest.raises(ChatmagicError, match="of another run: .*epochs 10, now 20"):
        fit(adalora(), tmp_path, epochs=20, resume=True)
    run(tmp_path, resume=False)
    assert newest_state(tmp_path).finished


@pytest.mark.slow
def test_a_state_of_an_earlier_version_is_no_obstacle(tmp_path):
    """It does not say whether its run went through, nor of how many steps that was."""
    fit(adalora(), tmp_path)
    (file,) = tmp_path.glob("last-*/state.pt")
    state = torch.load(file, weights_only=True)
    torch.save({name: value for name, value in state.items() if name not in ("of", "finished", "settings")}, file)
    assert len(fit(adalora(), tmp_path, resume=True)) == 10
    torch.save({name: value for name, value in state.items() if name not in ("of", "finished", "settings")}, file)
    assert len(fit(adalora(), tmp_path)) == 10


@pytest.mark.slow
def test_a_readers_own_folders_are_left(tmp_path):
    """A copy of a state that somebody kept, and a folder with something of theirs, under any name."""
    fit(adalora(), tmp_path)
    kept = [tmp_path / name for name in ("last-week", "last-000007-good", "last-000013", "last-1")]
    for folder in kept:
        shutil.copytree(tmp_path / "last-000040", folder)
    (tmp_path / "last-000013" / "notes.txt").write_text("keep")
    assert newest_state(tmp_path).step == 40
    fit(adalora(), tmp_path)
    assert all(len([*folder.iterdir()]) >= 4 for folder in kept)
    (tmp_path / "last-000013").rename(tmp_path / "last-000012")  # where a state is to go
    with pytest.raises(ChatmagicError, match="last-000012 holds notes.txt.*move it"):
        fit(adalora(), tmp_path)
    assert (tmp_path / "last-000012" / "notes.txt").read_text() == "keep"
    assert newest_state(tmp_path).step == 8


def test_the_adapter_is_peft_s_and_pruned(tmp_path):
    model = adalora()
    fit(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    sizes = {name: len(param) for name, param in loaded.base_model.model.named_parameters() if "lora_E" in name}
    assert sizes == {f"{name}.default": sum(kept) for name, kept in pattern.items()}
    assert sum(sizes.values()) == 3 * 14
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    other = adalora()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ChatmagicError, match="no adapter in"):
        load_adapter(adalora(), tmp_path)
    with pytest.raises(ChatmagicError, match="Nothing to resume"):
        fit(adalora(), tmp_path, resume=True)
    fit(adalora(), tmp_path)
    fewer = get_peft_model(tiny_llama(), adalora_config(40, ["q_proj"]))
    with pytest.raises(ChatmagicError, match="other layers"):
        load_adapter(fewer, tmp_path)
    with pytest.raises(ChatmagicError, match="other layers"):
        fit(fewer, tmp_path, resume=True)


# --- a state is of one run


def stopped(path, **settings):
    with pytest.raises(TrainingInterrupted):
        fit(lora(), path, runner=runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), 13), **settings)


def warmup(optimizer):
    return get_constant_schedule_with_warmup(optimizer, 4)


def cosine(optimizer, steps=40):
    return get_cosine_schedule_with_warmup(optimizer, 4, steps)


@pytest.mark.parametrize(
    "then, now, words",
    first(
        3,
        [
            ({}, {"train": loader(rows(8), 4)}, "batch_size 2, now 4, batches 4, now 2"),
            ({}, {"train": loader(rows(6), 2)}, "rows 8, now 6"),
            ({}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1, now 2"),
            ({}, {"lr": 1e-3}, r"learning_rate \[0.01\], now \[0.001\]"),
            ({}, {"monitor": "train_loss"}, "monitor val_loss, now train_loss"),
            ({}, {"optimizer": torch.optim.SGD}, "optimizer AdamW, now SGD"),
            ({"scheduler": cosine}, {"scheduler": lambda opt: cosine(opt, 80)}, "num_training_steps 40, now 80"),
            ({"scheduler": cosine}, {"scheduler": cosine, "epochs": 8}, "epochs 10, now 8"),
            ({"scheduler": warmup}, {"scheduler": warmup, "epochs": 12}, "epochs 10, now 12"),
            ({"scheduler": cosine}, {}, "lr_scheduler.class LambdaLR, now None"),
            ({}, {"train": loader(rows(8, seed=9))}, "data.train [0-9a-f]{12}, now [0-9a-f]{12}"),
            ({}, {"val": loader(rows(4, seed=9))}, "data.val [0-9a-f]{12}, now [0-9a-f]{12}"),
            ({"learnt": loader(rows(2))}, {"learnt": loader(rows(2, seed=9))}, "data.learnt [0-9a-f]{12}, now"),
            ({}, {"train": loader(rows(8), shuffle=True)}, "sampler SequentialSampler, now RandomSampler"),
            ({}, {"optimizer": partial(AdamW, weight_decay=0.5)}, "weight_decay 0.01, now 0.5"),
            ({}, {"optimizer": partial(AdamW, betas=(0.5, 0.9))}, r"betas \[0.9, 0.999\], now \[0.5, 0.9\]"),
            (
                {"scheduler": lambda opt: LambdaLR(opt, lambda step: 1 / (1 + step))},
                {"scheduler": lambda opt: LambdaLR(opt, lambda step: 1)},
                r"factors \[1.0, .*\], now \[1.0, 1.0, 1.0\]",
            ),
            (
                {"scheduler": lambda opt: MultiStepLR(opt, [10, 20])},
                {"scheduler": lambda opt: MultiStepLR(opt, [20, 30])},
                r"milestones \[10, 20\], now \[20, 30\]",
            ),
            (
                {"scheduler": lambda opt: SequentialLR(opt, [StepLR(opt, 5), StepLR(opt, 7)], [20])},
                {"scheduler": lambda opt: SequentialLR(opt, [StepLR(opt, 5), StepLR(opt, 9)], [20])},
                "lr_scheduler.1.step_size 7, now 9",
            ),
        ],
    ),
)
def test_a_state_is_not_for_another_run(tmp_path, then, now, words):
    stopped(tmp_path, **then)
    left = contents(tmp_path)
    with pytest.raises(ChatmagicError, match=f"of another run: .*{words}.*resume=False"):
        fit(lora(), tmp_path, **now, resume=True)
    assert contents(tmp_path) == left


@pytest.mark.parametrize(
    "now", first(1, [{"epochs": 12}, {"epochs": 8}, {"patience": 20}, {"mixed_precision": "bf16"}])
)
def test_what_can_go_on_does(tmp_path, now):
    stopped(tmp_path)
    history = fit(lora(), tmp_path, **now, resume=True)
    assert history.epoch.tolist() == list(range(1, now.get("epochs", 10) + 1))


class Counting(StepRunner):
    """Reports one number more, from its fourth epoch on."""

    def __call__(self, batch):
        losses, metrics = super().__call__(batch)
        return losses, metrics | ({f"{self.stage}_more": 1.0} if self.epoch > 3 else {})


@pytest.mark.parametrize(
    "then, now, column, missing",
    [
        ({}, {"val": False}, "val_loss", range(4, 11)),
        ({"val": False}, {"val": loader(rows(4, seed=1))}, "val_loss", range(1, 4)),
        ({}, {"runner": Counting}, "val_more", range(1, 4)),
    ],
)
@pytest.mark.slow
def test_what_was_not_measured_in_an_epoch_is_no_number_of_it(tmp_path, then, now, column, missing):
    stopped(tmp_path, monitor="train_loss", **then)
    history = fit(lora(), tmp_path, monitor="train_loss", resume=True, **then | now)
    assert history.epoch[history[column].isna()].tolist() == list(missing)
    assert pd.read_csv(tmp_path / "history.csv").round(6).equals(history.round(6))


@pytest.mark.parametrize("make", [torch.optim.Adagrad, AdamW])
@pytest.mark.slow
def test_an_optimizer_with_a_state_from_its_beginning_is_a_new_one(tmp_path, make):
    def optimizer(params, lr):
        return make([param for param in params if param.requires_grad], lr)

    first = fit(lora(), tmp_path / "whole", optimizer=optimizer)
    stopped(tmp_path / "broken", optimizer=optimizer)
    columns = ["train_loss", "val_loss", "grad_norm"]
    assert fit(lora(), tmp_path / "broken", optimizer=optimizer, resume=True)[columns].equals(first[columns])
    assert len(first) == 10


# --- an adapter is taken up again


@pytest.mark.parametrize("settings", [{"lora_alpha": 99}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}])
def test_an_adapter_is_not_taken_up_where_it_would_be_scaled_otherwise(tmp_path, settings):
    save_adapter(lora(), tmp_path)
    other = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=PROJECTIONS, **settings))
    (name,) = settings
    with pytest.raises(ChatmagicError, match=f"trained with {name}=.* has {name}=.*scaled otherwise"):
        load_adapter(other, tmp_path)
    load_adapter(lora(), tmp_path)


def test_an_adapter_of_no_numbers_is_not_taken_up(tmp_path):
    save_adapter(lora(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(whole | {min(whole): whole[min(whole)] * torch.nan}, file)
    model = lora()
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ChatmagicError, match="is not finite, first in .*lora_A"):
        load_adapter(model, tmp_path)
    save_file(whole, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for pattern in ([1], {"model.layers.0.mlp.up_proj.lora_E": "all"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": pattern}))
        with pytest.raises(ChatmagicError, match="rank_pattern that PEFT never writes"):
            load_adapter(model, tmp_path)
    assert all(map(torch.equal, before, model.parameters()))


def test_without_a_path_it_is_the_one_that_fit_would_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = KerasModel(lora(), optimizer=AdamW([torch.nn.Parameter(torch.zeros(1))]))
    with pytest.raises(ChatmagicError, match="no adapter in checkpoint"):
        model.load_ckpt()
    model.save_ckpt()
    assert (tmp_path / "checkpoint" / "adapter_model.safetensors").is_file()
    model.load_ckpt()


def taken_up_by_peft(path, base):
    return PeftModel.from_pretrained(base, path, is_trainable=True)


def taken_up_by_load_ckpt(path, base):
    model = adalora(base=base)
    KerasModel(model, optimizer=torch.optim.AdamW(model.parameters())).load_ckpt(path)
    return model


@pytest.mark.parametrize("take_up", first(1, [taken_up_by_peft, taken_up_by_load_ckpt]))
@pytest.mark.parametrize("dtype", first(1, [torch.bfloat16, torch.float32]))
def test_a_trained_adapter_is_taken_up_again(tmp_path, take_up, dtype):
    """With its ranks, which stay, on more data and by a schedule of its own, however it came; and once more."""
    first = adalora(base=tiny_llama().to(dtype))
    fit(first, tmp_path / "first")
    ids, folder = torch.arange(40)[None], tmp_path / "first"
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    expected, more = first(ids).logits, loader(rows(4, seed=7))
    for name in ("second", "third"):
        model = take_up(folder, tiny_llama().to(dtype)).eval()
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6 if dtype is torch.float32 else 0.05)
        history = fit(model, tmp_path / name, epochs=3, train=more)
        assert len(history) == 3 and set(history.rank_budget) == {3 * 14}
        assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.02
        folder, expected = tmp_path / name, model.eval()(ids).logits
        assert json.loads((folder / "adapter_config.json").read_text())["rank_pattern"] == pattern
        loaded = PeftModel.from_pretrained(tiny_llama().to(dtype), folder)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-6 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("take_up", first(1, [taken_up_by_load_ckpt, taken_up_by_peft]))
@pytest.mark.slow
def test_a_run_with_an_adapter_taken_up_goes_on(tmp_path, take_up):
    fit(adalora(), tmp_path / "first")
    whole = fit(take_up(tmp_path / "first", tiny_llama()), tmp_path / "whole", epochs=4)
    with pytest.raises(TrainingInterrupted):
        runner = runner_that_in_a_step(lambda: os.kill(os.getpid(), signal.SIGINT), 7)
        fit(take_up(tmp_path / "first", tiny_llama()), tmp_path / "broken", epochs=4, runner=runner)
    model = take_up(tmp_path / "first", tiny_llama())
    assert fit(model, tmp_path / "broken", epochs=4, resume=True)[LOSSES].equals(whole[LOSSES])


@pytest.mark.parametrize("then, now", first(1, [(False, True), (True, False)]))
def test_adamw_steps_as_this_run_is_to_and_not_as_that_of_the_state(tmp_path, then, now):
    """A captured step wants AdamW as one kernel, and a plain one has it as it was made."""
    fused = []
    told = SimpleNamespace(on_train_epoch_end=lambda model: fused.append(model.optimizer.param_groups[0]["fused"]))
    stopped(tmp_path, fast=then)
    fit(lora(), tmp_path, resume=True, fast=now, callbacks=[told])
    assert set(fused) == {True if now else None}


@pytest.mark.parametrize("make", first(1, [lora, adalora]))
@pytest.mark.slow
def test_a_trained_model_with_a_new_optimizer_is_asked_for(tmp_path, make):
    """Not only the optimizer knows that a model was trained: anew is from its beginning, with LoRA as well."""
    model = make()
    first = fit(model, tmp_path, epochs=10)
    with pytest.raises(ChatmagicError, match="trained already.*resume=False"):
        fit(model, tmp_path, epochs=10)
    again = fit(model, tmp_path, epochs=10, resume=False)
    columns = ["train_loss", "val_loss", "grad_norm"]
    assert again[columns].equals(first[columns])
