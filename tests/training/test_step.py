"""The step: what it reports, and what it does with replayed labels, accumulation, clipping and the scheduler."""

import pytest
import torch
from accelerate import Accelerator

from chatmagic.accel.allocator import rank_allocator
from chatmagic.accel.attention import ROWS, attending_by
from chatmagic.models.parts import trainable
from chatmagic.training import KerasModel, StepRunner
from tiny_runs import adalora, fit, loader, lora, rows, uneven_rows


def test_validation_reports_cross_entropy_alone(tmp_path):
    model = adalora()
    history = fit(model, tmp_path)
    with_penalty = model(**next(iter(loader(rows(4, seed=1), batch_size=4)))).loss.item()
    penalty = rank_allocator(model).penalty(add_gradients=False).item()
    assert penalty > 0.01
    assert history.val_loss[7:].min() == pytest.approx(with_penalty - penalty, abs=1e-5)


def test_replayed_labels_hold_the_model_to_its_base():
    model, batch = adalora(), next(iter(loader(rows(4), batch_size=4)))
    for name, param in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(param)
    batch["replayed"] = torch.zeros(4, 12, dtype=bool)
    batch["replayed"][1:3, 6:] = True  # rows without any, and a row's first answer, are learnt as ever
    runner = StepRunner(model, None, Accelerator(cpu=True), "val")
    with torch.no_grad():
        ours, labels = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
        with model.disable_adapter():
            base = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        drift = (base.exp() * (base - ours)).sum(-1)
        surprise = -ours.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        expected = torch.where(batch["replayed"][:, 1:], drift, surprise)[labels != -100].mean()
        loss = runner(batch)[1]["val_loss"]
    assert drift.mean() > 0.01
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_without_its_padding_is_the_same_step():
    """Loss and gradients are those of the padded batch."""
    rows, columns = torch.arange(4)[:, None], torch.arange(12)
    there = columns < torch.tensor([[5], [12], [8], [9]])
    batch = next(iter(loader(uneven_rows(4), batch_size=4)))
    batch = {
        "input_ids": batch["input_ids"] * there,
        "labels": batch["labels"].where(there, -100),
        "attention_mask": there.long(),
        "replayed": there & (columns > 6) & (rows != 3),
    }
    seen, results = [], []
    for flatten in (True, False):
        model = adalora()
        for name, param in model.named_parameters():
            if "lora_E" in name:
                torch.nn.init.constant_(param, 0.5)
        model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
        optimizer = torch.optim.SGD([param for _, param in trainable(model)], lr=1.0)
        accelerator = Accelerator(cpu=True)
        runner = StepRunner(model, None, accelerator, "train", {}, accelerator.prepare(optimizer))
        with attending_by(ROWS if flatten else "sdpa", model):
            log = runner(batch)[1]
        results.append([torch.tensor([log["train_loss"], log["grad_norm"]]), *(param for _, param in trainable(model))])
    # the base reads the two rows with replays alone, up to the last one
    assert seen == [(1, 34), (1, 19), (4, 12), (2, 11)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Every label token of the global batch weighs the same, however the batch is cut."""
    whole = fit(adalora(), tmp_path, epochs=20, train=loader(uneven_rows(8), batch_size=4))
    pieces = fit(adalora(), tmp_path, epochs=20, train=loader(uneven_rows(8), 1), gradient_accumulation_steps=4)
    columns = ["train_loss", "val_loss", "grad_norm"]
    torch.testing.assert_close(pieces[columns].values, whole[columns].values, rtol=1e-4, atol=0)


def test_gradients_are_clipped(tmp_path):
    model = lora()
    before = {name: param.clone() for name, param in trainable(model)}
    keras_model = KerasModel(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    keras_model.StepRunner = type("Clipped", (StepRunner,), {"max_grad_norm": 0.01})
    history = keras_model.fit(loader(rows(8), 8), monitor="train_loss", epochs=1, ckpt_path=tmp_path, plot=False)
    moved = torch.stack([(param - before[name]).norm() for name, param in trainable(model)]).norm().item()
    assert history.grad_norm[0] > 0.02
    assert moved == pytest.approx(0.01, rel=1e-4)


def test_the_schedule_moves_once_an_optimizer_step(tmp_path):
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40)

    history = fit(adalora(), tmp_path, train=loader(rows(8), 1), scheduler=one_cycle, gradient_accumulation_steps=2)
    scheduler = one_cycle(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    rates = []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert history.lr.tolist() == rates[3::4]
    assert history.lr.idxmax() == 2 and history.lr.iloc[-1] < 1e-6
