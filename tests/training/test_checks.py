"""What fit refuses before the first step, one test a check, and what only the first step can tell."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import Adafactor, get_cosine_schedule_with_warmup

from chatmagic import ChatmagicError
from chatmagic.training import KerasModel, StepRunner, checks
from quick import first
from tiny_runs import adalora, fit, loader, lora, rows, tiny_llama


def frozen():
    model = adalora()
    model.requires_grad_(False)
    return model


def repacked():
    """A model with a layer as bitsandbytes leaves it that has answered on the CPU."""
    base = tiny_llama()
    model = adalora(base=base)
    weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    base.packed = bitsandbytes.nn.Linear4bit(2, 2)
    base.packed.weight = weight
    return model


class Short(torch.optim.lr_scheduler.OneCycleLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, 1e-2, total_steps=20)


class OfOthers(torch.optim.AdamW):
    """Of parameters of its own, whatever it is given."""

    def __init__(self, params, **settings):
        super().__init__([torch.nn.Parameter(torch.zeros(1))], **settings)


def twice():
    return get_peft_model(adalora(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def over_another():
    base = tiny_llama()
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    return adalora(base=base)


def with_one_more():
    """A parameter of the base is trainable by mistake."""
    model = adalora()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def of_another(optimizer):
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    return torch.optim.lr_scheduler.StepLR(other, 1)


def lbfgs(params, lr):
    return torch.optim.LBFGS([param for param in params if param.requires_grad], lr)


def short_cosine(optimizer):
    return get_cosine_schedule_with_warmup(optimizer, 2, 20)


def sparse(params, lr):
    return torch.optim.SparseAdam([param for param in params if param.requires_grad], lr)


def relative(params, lr):
    """It finds its rate by itself."""
    return Adafactor(params)


def over_float16():
    """PEFT makes its factors float32, and a copy of a layer what that was."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(tiny_llama().half(), config)


def never_saved():
    return get_peft_model(tiny_llama(), VeraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows(8))


CASES = {
    "setting_of_another_kind": (lora, {"epochs": -1}, "epochs=-1: there is nothing to train on"),
    "no_loader": (lora, {"train": rows(8)}, "train_data is a list; expected a DataLoader"),
    "scheduler_of_others": (lora, {"scheduler": of_another}, "moves the rate of another optimizer"),
    "optimizer_that_asks": (lora, {"optimizer": lbfgs}, "LBFGS asks for the loss again"),
    "adapter_on_an_adapter": (twice, {}, "had an adapter already.*get_peft_model once"),
    "not_saved": (with_one_more, {}, "1 trainable parameters would not be in the saved adapter.*norm.weight.*Freeze"),
    "nothing_to_validate_on": (adalora, {"val": loader([])}, "val_data is empty.*monitor='train_loss'"),
    "nothing_to_know_by_heart": (lora, {"learnt": loader([])}, "learnt is empty.*leave it out"),
    "too_coarse_to_train": (over_float16, {}, "1 trainable parameters are float16.*lm_head.*p.data.float()"),
    "unknown_mode": (adalora, {"mode": "mim"}, "mode='mim' is neither 'min' nor 'max'; did you mean 'min'"),
    "unknown_monitor": (lora, {"monitor": "val_los"}, "monitor='val_los' is nothing.*did you mean 'val_loss'"),
    "rows_beyond_the_context": (
        adalora,
        {"train": loader(rows(3) + rows(2, length=2049))},
        "2 rows of train_data are longer than the model's context of 2048.*row 3, of 2049",
    ),
    "tracker_not_there": (lora, {"log_with": "wamdb"}, "log_with='wamdb': there is no such tracker.*pip install"),
    "no_adapter": (tiny_llama, {}, "no adapter on any layer"),
    "nothing_trainable": (frozen, {}, "No parameter is trainable"),
    "optimizer_of_others": (adalora, {"optimizer": OfOthers}, "optimizer holds no trainable parameter"),
    "no_learning_rate": (adalora, {"lr": 0.0}, "learning rate is 0"),
    "repacked_weights": (repacked, {}, "Load it again"),
    "no_steps": (adalora, {"epochs": 0}, "nothing to train on"),
    "monitor_without_validation": (adalora, {"val": False}, "needs val_data"),
    "ranks_never_final": (adalora, {"epochs": 7}, "final only after 28.*total_steps=28"),
    "schedule_too_short": (adalora, {"scheduler": Short}, "ends after 20 of 40"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_before_anything_is_written(tmp_path, name):
    model, settings, words = CASES[name]
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path / "adapter", **settings)
    assert not (tmp_path / "adapter").exists()


OTHER_CASES = [
    (lora, {"epochs": 1.5}, "epochs=1.5: there is nothing to train on so. Give a whole number"),
    (lora, {"patience": 0}, "patience=0: give the epochs"),
    (lora, {"patience": "5"}, "patience='5': give the epochs"),
    (lora, {"save_every": 0}, "save_every=0: .* whole number"),
    (lora, {"save_every": "2"}, "save_every='2': .* whole number"),
    (lora, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: .* whole number"),
    (lora, {"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps=2.5: .* whole number"),
    (lora, {"mixed_precision": "bf61"}, "mixed_precision='bf61' is none of auto, no, bf16, fp16"),
    (lora, {"monitor": None}, "monitor=None is no name"),
    (lora, {"mode": None}, "mode=None is no name"),
    (lora, {"callbacks": print}, "callbacks is a builtin_function_or_method; expected a list"),
    (lora, {"about": ["mine"]}, "about is nothing that run.json could hold.*give a dict"),
    (lora, {"about": {"rows": {(1, 2): 3}}}, "about is nothing that run.json could hold.*not tuple"),
    (lora, {"optimizer": sparse}, "SparseAdam is for sparse gradients.*Use AdamW"),
    (lora, {"optimizer": relative}, r"Adafactor has no learning rate \(lr=None\)"),
    (lora, {"scheduler": short_cosine}, "ends after 20 of 40 optimizer steps: give it num_training_steps=40"),
    (never_saved, {}, "PEFT cannot save this adapter.*trained and lost"),
    (lora, {"val": rows(4)}, "val_data is a list; expected a DataLoader"),
    (lora, {"learnt": rows(4)}, "learnt is a list; expected a DataLoader"),
    (lora, {"train": loader(Endless())}, "train_data has no length"),
    (lora, {"train": loader(rows(8), None)}, "train_data makes no batches"),
    (lora, {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau moves by a measurement"),
    (lora, {"val": loader([{**row, "labels": [-100] * 12} for row in rows(2)])}, "Has val_data any label"),
    (lora, {"learnt": loader([{**row, "labels": [-100] * 12} for row in rows(2)])}, "learnt has no label"),
    (over_another, {}, "had an adapter already"),
    (adalora, {"train": loader(rows(3), 4, drop_last=True)}, "3 rows are fewer than a batch of 4.*drop_last=False"),
    (adalora, {"val": loader(rows(3), 4, drop_last=True)}, "val_data is fewer than a batch.*3 rows"),
    (adalora, {"train": loader([])}, "10 epochs of 0 batches: there is nothing to train on"),
    (lora, {"monitor": "rank_budget"}, "monitor='rank_budget' is nothing"),  # a column of AdaLoRA's alone
    (adalora, {"val": loader(rows(2, length=2049))}, "2 rows of val_data are longer"),
]


@pytest.mark.parametrize("model, settings, words", OTHER_CASES)
def test_other_ways_to_the_same(tmp_path, model, settings, words):
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path / "adapter", **settings)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("path", [None, 3])
def test_a_path_that_is_none(path):
    with pytest.raises(ChatmagicError, match=f"ckpt_path={path} is no folder"):
        fit(lora(), path)


def test_fit_ddp_is_not_inherited():
    with pytest.raises(ChatmagicError, match="accelerate launch"):
        KerasModel(lora(), optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).fit_ddp(2, None)


@pytest.mark.parametrize(
    "settings",
    first(1, [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "lora_only"}, {"use_rslora": True}]),
)
def test_whatever_peft_saves_is_trained_kept_and_given_back(tmp_path, settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"], **settings)
    model = get_peft_model(tiny_llama(), config)
    history = fit(model, tmp_path, epochs=3)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.005
    ids = torch.arange(40)[None]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    again = fit(PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True), tmp_path / "more", epochs=2)
    assert again.train_loss[0] < history.train_loss[0] - 0.005


def test_each_check_has_its_case():
    elsewhere = {"gradients_that_nobody_adds_up"}  # of several processes: test_distributed.py
    every = checks.OF_THE_ARGUMENTS + checks.OF_THE_MODEL + checks.OF_THE_RUN
    assert {check.__name__ for check in every} == CASES.keys() | elsewhere


# --- what only a step can tell


def changed(part, value):
    """Eight rows, the last with another value in the place of its fifth."""
    samples = rows(8)
    samples[-1][part][4] = value
    return loader(samples)


def masked(mask, name="attention_mask", **more):
    more = {part: torch.tensor(value) for part, value in more.items()}
    return loader([row | {name: torch.tensor(mask)} | more for row in rows(8)])


def lists(samples):
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return batch | {"attention_mask": [[1] * 12] * len(samples)}


class Promising(torch.utils.data.IterableDataset):
    """Rows that are fewer than its length says."""

    def __init__(self, samples):
        self.rows = samples

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(self.rows)


def kept(*parts):
    return loader([{part: row[part] for part in parts} for row in rows(8)])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"train": changed("input_ids", 64)}, "Batch 4 of the train data has the token 64, .* from 0 to 63. .*resize"),
        ({"train": changed("input_ids", -5)}, "Batch 4 of the train data has the token -5"),
        ({"train": changed("labels", 9999)}, "has the token 9999"),
        ({"val": changed("input_ids", 64)}, "Batch 4 of the val data has the token 64"),
        ({"train": kept("input_ids")}, "must be a dict with input_ids and labels; found input_ids"),
        ({"train": kept("labels")}, "must be a dict with input_ids and labels; found labels"),
        ({"train": loader([tuple(row.values()) for row in rows(8)])}, "input_ids and labels; found a list"),
        ({"train": loader(rows(8, length=0))}, r"of shapes \(2, 0\) and \(2, 0\)"),
        ({"learnt": kept("input_ids")}, "must be a dict with input_ids and labels; found input_ids"),
        ({"train": changed("labels", -1)}, "Batch 4 of the train data has the label -1"),
        ({"train": masked([1] * 5)}, r"attention_mask is a tensor of shape \(2, 5\); expected .* \(2, 12\)"),
        ({"train": masked([1] * 8 + [0] * 4)}, "Batch 1 of the train data has 8 labels where its attention_mask is 0"),
        ({"train": masked([0] * 12, labels=[-100] * 12)}, "has no token but such as its attention_mask is 0"),
        ({"val": masked([1] * 8 + [0] * 4)}, "Batch 1 of the val data has 8 labels where"),
        ({"train": masked([0] * 5, "replayed")}, r"replayed is a tensor of shape \(2, 5\)"),
        ({"train": masked([0] * 12, "replayed")}, "replayed is of torch.int64; expected torch.bool"),
        ({"train": loader(rows(8), collate_fn=lists)}, "attention_mask is a list; expected a tensor"),
        ({"train": loader(rows(3) + rows(3, length=9))}, "different lengths, .*collate_fn=DataCollator"),
        ({"train": loader(Promising(rows(4)))}, "ended after 2 of 4 batches"),
        ({"val": loader(Promising([]))}, "ended after 0 of 4 batches"),
        ({"learnt": loader(Promising(rows(4)))}, "ended after 2 of 4 batches"),
        (
            {"train": loader([{name: ids.float() for name, ids in row.items()} for row in rows(8)])},
            "must be tensors of torch.int64",
        ),
    ],
)
def test_a_batch_that_the_model_cannot_take_is_told_in_words(tmp_path, settings, words):
    """An id beyond the vocabulary is an index error on a CPU, and on a GPU the end of the process."""
    with pytest.raises(ChatmagicError, match=words):
        fit(lora(), tmp_path / "adapter", epochs=2, **settings)


def untaught():
    samples = rows(8)
    for sample in samples:
        sample["labels"].fill_(-100)
    return loader(samples)


def silent():
    """A model whose logits do not depend on its layers."""
    model = adalora()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


@pytest.mark.parametrize(
    "model, settings, words",
    [
        (adalora, {"train": untaught()}, "All labels of this batch are -100"),
        (adalora, {"val": untaught()}, "val_loss is not a number"),
        (adalora, {"lr": float("inf")}, "loss is nan"),
        (silent, {}, "All gradients of the first step are zero"),
    ],
)
def test_runs_that_train_nothing_are_stopped(tmp_path, model, settings, words):
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path, **settings)
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_monitor_that_a_runner_of_ones_own_does_not_report(tmp_path):
    class Runner(StepRunner):
        pass

    with pytest.raises(ChatmagicError, match="nothing that Runner reports, which is .*did you mean 'val_loss'"):
        fit(lora(), tmp_path, runner=Runner, monitor="val_los")


def test_a_missing_gradient_is_named(tmp_path):
    base = tiny_llama()
    base.unused = torch.nn.Linear(2, 2)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "unused"]))
    with pytest.raises(ChatmagicError, match="2 trainable parameters get no gradient.*unused"):
        fit(model, tmp_path)


class Made(torch.utils.data.Dataset):
    """Rows that are made as they are asked for: how long they are, only the step sees."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return rows(1, index, 2049 if index == 3 else 2049 // 8)[0]


def test_a_row_beyond_the_context_is_refused_by_the_step(tmp_path):
    with pytest.raises(ChatmagicError, match="Row 0 of batch 4 has 2049 tokens.*context ends at 2048"):
        fit(lora(), tmp_path, epochs=1, train=loader(Made(), 1))
