"""AdaLoRA's schedule, ranks and penalty against PEFT's own; the step; fit, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny_runs import LAYERS, PROJECTIONS, adalora, fit, loader, rows, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chatmagic import ChatmagicError
from chatmagic.train import KerasModel, StepRunner, adalora_config, find_all_linear_names, runtime
from chatmagic.train.adalora import importance_table, rank_allocator, rank_table
from chatmagic.train.captured import CapturedStep, why_not
from chatmagic.train.fast import drop, fast_layers, gathered
from chatmagic.train.runtime import best_precision, prepare, trainable


def lora():
    return get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=PROJECTIONS))


# --- the schedule


def test_schedule_fits_the_run():
    config = adalora_config(120, PROJECTIONS)
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (12, 36, 3, 120)
    assert (config.init_r, config.target_r) == (12, 8)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"total_steps": 9}, "too few"),
        ({"total_steps": 100, "init_r": 8, "target_r": 8}, "LoraConfig"),
        ({"total_steps": 100, "target_r": 0}, "0 < target_r"),
        ({"total_steps": 100, "tinit": 60, "tfinal": 40}, "leaves 0 for shrinking"),
        ({"total_steps": 100, "tfinal": 0}, "tfinal >= 1"),
        ({"total_steps": 100, "deltaT": 0}, "deltaT >= 1"),
        ({"total_steps": 100, "r": 32}, "init_r"),
    ],
)
def test_impossible_schedules_are_refused(settings, words):
    with pytest.raises(ChatmagicError, match=words):
        adalora_config(target_modules=PROJECTIONS, **settings)


def test_linear_names():
    assert find_all_linear_names(tiny_llama()) == PROJECTIONS
    with pytest.raises(ChatmagicError, match="already carries an adapter"):
        find_all_linear_names(lora())


# --- ranks and penalty, PEFT's own as the reference


def peft_losses(model, batch, steps, lr=1e-2):
    """The loop of PEFT's documentation: the loss of each step, penalty included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([param for _, param in trainable(model)], 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_run_is_pefts_own(tmp_path):
    """Losses with penalty, budget and kept triplets of 40 steps are those of PEFT's eager loop."""
    ours, theirs = adalora(), adalora()
    data = loader(rows(8), batch_size=8)
    history = fit(ours, tmp_path, epochs=40, train=data)
    expected = peft_losses(theirs, next(iter(data)), 40)
    assert expected[-1] < expected[0] - 0.5
    torch.testing.assert_close(
        (history.train_loss + history.train_penalty).tolist(), expected, rtol=1e-4, atol=1e-4
    )
    pattern = theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].rank_pattern == pattern
    assert history.rank_budget.iloc[0] == 6 * LAYERS
    assert history.rank_budget.iloc[-1] == 3 * LAYERS == sum(map(sum, pattern.values()))


def test_ranks_and_importance_can_be_read(tmp_path):
    model = adalora()
    fit(model, tmp_path)
    ranks = rank_table(model.peft_config["default"])
    assert list(ranks.index) == [0, 1] and sorted(ranks.columns) == PROJECTIONS
    assert ranks.to_numpy().sum() == 3 * LAYERS
    kept = model.base_model.model.model.layers[1].self_attn.o_proj.lora_E["default"].count_nonzero()
    assert ranks.loc[1, "o_proj"] == kept
    importance = importance_table(model)
    assert list(importance.index) == list(range(5, 29))  # after tinit=4, to total_step - tfinal
    assert set(importance.columns) == {f"{layer}.{name}" for layer in (0, 1) for name in PROJECTIONS}
    assert (importance > 0).all(axis=None)


# --- the step


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("linear", [torch.nn.Linear, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt])
def test_the_fast_forward_is_pefts(linear, precision, tolerance):
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"layer": linear(64, 64, bias=True)})
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = "4bit" in linear.__name__, "8bit" in linear.__name__
    model = get_peft_model(base, AdaLoraConfig(target_modules=["layer"], init_r=6, target_r=3, total_step=10))
    layer = model.base_model.model["layer"]
    torch.nn.init.normal_(layer.lora_E["default"])
    model.to("cpu").train()  # which quantises bitsandbytes' layers
    x = torch.randn(2, 5, 64, requires_grad=True)

    def outputs():
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            y = layer(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.lora_A.values(), *layer.lora_E.values()])

    expected = outputs()
    with fast_layers(model):
        assert layer.forward.func.__module__ == "chatmagic.train.fast"
        found = outputs()
        with gathered(model, precision):
            assert [factor.shape for factor in layer.gathered] == [(8, 64), (64, 8), (8,)]
            once = outputs()
        with model.disable_adapter():
            assert torch.equal(layer(x), layer.base_layer(x))
    assert not {"forward", "update_scale", "gathered"} & vars(layer).keys()
    for ours, too, theirs in zip(found, once, expected):
        assert (ours - theirs).norm() < tolerance * theirs.norm()
        assert (too - theirs).norm() < tolerance * theirs.norm()


def test_dropout_by_bytes():
    x = torch.full((100, 1001), 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = drop(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 2 / 0.75])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad * 2, y)
    assert not torch.equal(drop(x, 0.25), y)


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


def uneven_rows(n):
    """Samples that differ in how many of their tokens are trained."""
    samples = rows(n)
    for index, sample in enumerate(samples):
        sample["labels"][: 4 + index] = -100
    return samples


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Every label token of the global batch weighs the same, however the batch is cut."""
    whole = fit(adalora(), tmp_path, epochs=20, train=loader(uneven_rows(8), batch_size=4))
    pieces = fit(
        adalora(), tmp_path, epochs=20, train=loader(uneven_rows(8), 1), gradient_accumulation_steps=4
    )
    columns = ["train_loss", "val_loss", "grad_norm"]
    torch.testing.assert_close(pieces[columns].values, whole[columns].values, rtol=1e-4, atol=0)


def test_gradients_are_clipped(tmp_path):
    model = lora()
    before = {name: param.clone() for name, param in trainable(model)}
    keras_model = KerasModel(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    keras_model.StepRunner = type("Clipped", (StepRunner,), {"max_grad_norm": 0.01})
    history = keras_model.fit(
        loader(rows(8), 8), monitor="train_loss", epochs=1, ckpt_path=tmp_path, plot=False
    )
    moved = torch.stack([(param - before[name]).norm() for name, param in trainable(model)]).norm().item()
    assert history.grad_norm[0] > 0.02
    assert moved == pytest.approx(0.01, rel=1e-4)


def test_the_schedule_moves_once_an_optimizer_step(tmp_path):
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40)

    history = fit(
        adalora(), tmp_path, train=loader(rows(8), 1), scheduler=one_cycle, gradient_accumulation_steps=2
    )
    scheduler = one_cycle(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    rates = []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert history.lr.tolist() == rates[3::4]
    assert history.lr.idxmax() == 2 and history.lr.iloc[-1] < 1e-6


# --- the captured step


class Replayed(CapturedStep):
    """Computes each replay anew, from the graph's inputs, where there is no GPU to record on."""

    def capture(self, inputs):
        inputs, numbers = {name: tensor.clone() for name, tensor in inputs.items()}, torch.zeros(6)
        return SimpleNamespace(replay=lambda: numbers.copy_(self.step(inputs))), inputs, numbers, None


def forty_steps(batches, captured=None):
    """The log of each step, and the model."""
    model, logs = adalora(), []
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=40)
    runner = StepRunner(model, None, accelerator, "train", {}, accelerator.prepare(optimizer), scheduler)
    if captured:
        runner.captured = captured(model, optimizer, accelerator, StepRunner.max_grad_norm)
    with fast_layers(model):
        for step in range(40):
            runner.sums = [0.0, 0.0]
            logs.append(runner(batches[step % len(batches)])[1])
    return logs, model, runner


@pytest.mark.parametrize("replayed", [False, True])
def test_the_captured_step_is_the_eager_one(replayed):
    """Losses, penalties, gradient norms, rates, ranks and factors of forty steps on batches of two shapes."""
    batches = [next(iter(loader(uneven_rows(4), 4))), next(iter(loader(rows(4, 1, 70), 4)))]
    batches[0]["attention_mask"] = torch.ones(4, 12, dtype=int)
    batches[0]["attention_mask"][:2, 10:] = 0
    batches[0]["labels"][:2, 10:] = -100
    for batch in batches if replayed else ():
        batch["replayed"] = torch.zeros_like(batch["labels"], dtype=bool)
        batch["replayed"][1:3, 6:9] = True
    expected, plain, _ = forty_steps(batches)
    found, model, runner = forty_steps(batches, Replayed)
    assert [shape[:2] for shape, graph in runner.captured.graphs.items() if graph] == [(4, 128), (4, 64)]
    assert found[-2]["train_loss"] < found[0]["train_loss"] - 0.1
    for name in ("train_loss", "train_penalty", "grad_norm", "lr", "rank_budget"):
        assert [log[name] for log in found] == pytest.approx([log[name] for log in expected], rel=1e-3), name
    assert model.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern
    for (_, param), (_, other) in zip(trainable(model), trainable(plain)):
        torch.testing.assert_close(param, other, rtol=1e-2, atol=1e-4)


def test_a_replay_is_seen_as_a_step():
    """ChatLLM keeps what it has computed for as long as the parameters' versions stay."""
    batch = next(iter(loader(rows(4), 4)))
    *_, runner = forty_steps([batch], Replayed)
    runner.captured.graphs = {shape: (SimpleNamespace(replay=int), *rest) for shape, (_, *rest) in runner.captured.graphs.items()}
    versions = [param._version for param in runner.params]
    runner.captured(batch)
    assert all(param._version > before for param, before in zip(runner.params, versions))


def test_a_failed_capture_is_told_and_training_goes_on(capsys):
    batch = next(iter(loader(rows(4), 4)))
    expected, *_ = forty_steps([batch])
    found, _, runner = forty_steps([batch], CapturedStep)  # torch without CUDA has no graphs
    assert "without CUDA graphs: " in capsys.readouterr().out and runner.captured.off
    assert found[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-4)


def test_batches_that_only_the_eager_step_knows():
    batch = next(iter(loader(rows(4), 4)))
    *_, runner = forty_steps([batch], Replayed)
    assert runner.captured(batch | {"position_ids": torch.arange(12)[None]}) is None
    assert runner.captured(batch | {"labels": torch.full((4, 12), -100)}) is None


def int8():
    base = tiny_llama()
    base.extra = bitsandbytes.nn.Linear8bitLt(2, 2)
    return adalora(base=base)


def checkpointing():
    base = tiny_llama()
    base.gradient_checkpointing_enable()
    return adalora(base=base)


def hooked():
    model = adalora()
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "model, settings, optimizer, reason",
    [
        (adalora, {}, torch.optim.AdamW, None),
        (lora, {}, torch.optim.AdamW, None),
        (adalora, {"device": torch.device("cpu")}, torch.optim.AdamW, "no CUDA device"),
        (adalora, {"num_processes": 2}, torch.optim.AdamW, "several processes"),
        (adalora, {"gradient_accumulation_steps": 2}, torch.optim.AdamW, "accumulated"),
        (adalora, {"scaler": object()}, torch.optim.AdamW, "fp16"),
        (adalora, {}, torch.optim.SGD, "the optimizer is SGD"),
        (checkpointing, {}, torch.optim.AdamW, "recomputed"),
        (int8, {}, torch.optim.AdamW, "8-bit"),
        (hooked, {}, torch.optim.AdamW, "embed_tokens has hooks"),
    ],
)
def test_why_a_step_is_not_captured(model, settings, optimizer, reason):
    normal = {"device": torch.device("cuda"), "num_processes": 1, "gradient_accumulation_steps": 1, "scaler": None}
    model = model()
    found = why_not(model, optimizer(model.parameters(), lr=1e-2), SimpleNamespace(**normal | settings))
    assert found is reason is None or reason in found


def test_fit_says_why_not(tmp_path, capsys):
    fit(adalora(), tmp_path)
    assert "not captured as a CUDA graph: there is no CUDA device." in capsys.readouterr().out


@pytest.mark.parametrize("gib, lean", [(0, False), (7, True), (40, False)])
def test_activations_are_recomputed_where_memory_is_short(monkeypatch, capsys, gib, lean):
    """Of a model as large as Baichuan2-7B; without a GPU there is nothing to be short of."""
    model = tiny_llama()
    model.config.num_hidden_layers, model.config.hidden_size = 32, 4096
    monkeypatch.setattr(runtime, "free_memory", lambda model: gib * 2**30)
    assert prepare(model) is lean
    assert not any(param.requires_grad for param in model.parameters())
    assert all(layer.gradient_checkpointing is lean for layer in model.model.layers)
    assert ("7.0 GiB of GPU memory are free" in capsys.readouterr().out) is lean


# --- fit


class Worsening(StepRunner):
    """Validation that gets worse from the first epoch on."""

    epochs = 0.0

    def __call__(self, batch):
        result, log = super().__call__(batch)
        if self.stage == "val":
            Worsening.epochs += 1
            log["val_loss"] = Worsening.epochs
        return result, log


def test_nothing_counts_before_the_ranks_are_final(tmp_path):
    """40 steps, 4 an epoch: the ranks are final after step 29, so epoch 8 is the first that may be best or last."""
    history = fit(adalora(), tmp_path, runner=Worsening, patience=1)
    assert history.epoch.iloc[-1] == 9
    assert history.rank_budget[7] == 3 * LAYERS
    saved = (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns
    assert saved < (tmp_path / "last-000036" / "state.pt").stat().st_mtime_ns


def test_history_has_its_columns(tmp_path):
    history = fit(lora(), tmp_path, epochs=2)
    assert list(history) == [
        "epoch",
        "train_loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "peak_memory",
        "val_loss",
    ]
    history = fit(adalora(), tmp_path)
    assert {"train_penalty", "val_penalty", "rank_budget"} <= set(history)
    assert (history.tokens_per_s > 0).all() and (history.peak_memory > 0.1).all()


def test_lora_learns_too(tmp_path):
    history = fit(lora(), tmp_path, epochs=5)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.02


def test_pictures_lie_beside_the_adapter(tmp_path):
    fit(adalora(), tmp_path, plot=True)
    for name in ("history", "ranks", "importance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_chinese_label_has_its_glyphs():
    from fontTools.ttLib import TTFont

    from chatmagic.train import plots

    glyphs = TTFont(plots.FONT).getBestCmap()
    labels = {character for character in Path(plots.__file__).read_text() if ord(character) > 0x2FFF}
    assert len(labels) > 10 and labels <= {chr(code) for code in glyphs}


# --- precision


@pytest.mark.parametrize("capability, precision", [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_precision_of_a_gpu(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert best_precision() == precision


@pytest.mark.parametrize("flag, precision", [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "no")])
def test_precision_of_a_cpu(monkeypatch, flag, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert best_precision(cpu=True) == precision


def test_bf16_follows_fp32(tmp_path):
    full = fit(adalora(), tmp_path)
    half = fit(adalora(), tmp_path, mixed_precision="bf16")
    assert (full.train_loss != half.train_loss).any()
    torch.testing.assert_close(half.train_loss.tolist(), full.train_loss.tolist(), rtol=1e-2, atol=0)


def test_a_16_bit_base_keeps_its_rank_number(tmp_path):
    """PEFT makes `ranknum`, by which the update is divided, trainable there, and does not save it."""
    model = adalora(base=tiny_llama().to(torch.bfloat16))
    fit(model, tmp_path)
    numbers = [param.item() for name, param in model.named_parameters() if "ranknum" in name]
    assert numbers == [6.0] * LAYERS


def fp16_step(scale):
    """One step with the loss scaled as fp16 wants it; accelerate offers that on GPUs alone, torch everywhere."""
    model = adalora()
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    runner = StepRunner(model, None, accelerator, "train", {}, optimizer)
    _, log = runner(next(iter(loader(rows(8), batch_size=8))))
    return model, rank_allocator(model), log


def test_importance_is_of_unscaled_gradients():
    (_, small, small_log), (_, large, large_log) = fp16_step(1.0), fp16_step(1024.0)
    assert small_log["grad_norm"] == pytest.approx(large_log["grad_norm"], rel=1e-2)
    small, large = (torch.cat([a.flatten() for a in allocator.exp_avg_ipt]) for allocator in (small, large))
    assert large.norm() > 0
    torch.testing.assert_close(large.norm(), small.norm(), rtol=2e-2, atol=0)


def test_an_overflow_in_fp16_allocates_nothing():
    model, allocator, _ = fp16_step(2.0**40)
    assert allocator.step == 0 and allocator.exp_avg_ipt == []
    assert all(
        torch.equal(param, other) for (_, param), (_, other) in zip(trainable(model), trainable(adalora()))
    )


@pytest.mark.parametrize(
    "bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}]
)
def test_quantised_bases_train_on_the_cpu(tmp_path, bits):
    """As their dequantised weights do, across validations, before which bitsandbytes would repack 4-bit weights."""
    tiny_llama(size=64).save_pretrained(tmp_path / "base")  # NF4 wants blocks of 64
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **bits)
    load = AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32)
    plain = load(
        tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
    ).dequantize()
    assert find_all_linear_names(base) == PROJECTIONS
    history = fit(adalora(base=base), tmp_path / "quantised", lr=5e-2)
    expected = fit(adalora(base=plain), tmp_path / "plain", lr=5e-2)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.2
    torch.testing.assert_close(history.train_loss.tolist(), expected.train_loss.tolist(), rtol=1e-3, atol=0)
    assert (
        len([module for module in base.modules() if type(module).__name__.startswith("Linear")]) == LAYERS + 1
    )


def test_a_4_bit_model_that_has_chatted_on_the_cpu_is_refused(tmp_path):
    base = tiny_llama()
    model = adalora(base=base)
    weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    base.packed = bitsandbytes.nn.Linear4bit(2, 2)
    base.packed.weight = weight
    with pytest.raises(ChatmagicError, match="Load it again"):
        fit(model, tmp_path)


# --- settings that would train nothing


def untaught():
    samples = rows(8)
    for sample in samples:
        sample["labels"].fill_(-100)
    return loader(samples)


def frozen():
    model = adalora()
    model.requires_grad_(False)
    return model


def silent():
    """A model whose logits do not depend on its layers."""
    model = adalora()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


class Short(torch.optim.lr_scheduler.OneCycleLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, 1e-2, total_steps=20)


@pytest.mark.parametrize(
    "model, settings, words",
    [
        (tiny_llama, {}, "no adapter on any layer"),
        (frozen, {}, "No parameter is trainable"),
        (adalora, {"lr": 0.0}, "learning rate is 0"),
        (adalora, {"epochs": 0}, "nothing to train on"),
        (adalora, {"epochs": 7}, "final only after 28.*total_steps=28"),
        (adalora, {"scheduler": Short}, "ends after 20 of 40"),
        (adalora, {"train": untaught()}, "All labels of this batch are -100"),
        (adalora, {"val": untaught()}, "val_loss is not a number"),
        (adalora, {"lr": float("inf")}, "loss is nan"),
        (silent, {}, "All gradients of the first step are zero"),
    ],
)
def test_runs_that_train_nothing_are_refused(tmp_path, model, settings, words):
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path, **settings)
    assert not (tmp_path / "adapter_config.json").exists()


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    base = tiny_llama()
    optimizer = torch.optim.AdamW(base.model.norm.parameters(), lr=1e-2)
    with pytest.raises(ChatmagicError, match="optimizer holds no trainable parameter"):
        KerasModel(adalora(base=base), optimizer=optimizer).fit(
            loader(rows(8)), monitor="train_loss", plot=False
        )


def test_a_missing_gradient_is_named(tmp_path):
    model = adalora()
    model.base_model.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ChatmagicError, match="1 trainable parameters get no gradient.*unused"):
        fit(model, tmp_path)


def test_validation_needs_data(tmp_path):
    model = adalora()
    keras_model = KerasModel(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    with pytest.raises(ChatmagicError, match="needs val_data"):
        keras_model.fit(loader(rows(8)), ckpt_path=tmp_path, plot=False)
