"""The seed's own cells, taken from its text, run against its own model in miniature with only their import lines
changed."""

import re
import sys

import pytest
from IPython.testing.globalipapp import start_ipython

IMPORTS = {
    "from torchkeras.chat import ChatLLM": "from chatmagic import ChatLLM",
    "from torchkeras import KerasModel": "from chatmagic.training import KerasModel",
}
LOADING = """
from chatmagic import load_model
model, tokenizer = load_model(model_name_or_path, quantize="nf4")
"""
# PEFT has come to demand the schedule that the seed's AdaLoraConfig cell lacks.
CONFIG = """
from peft import get_peft_model
from chatmagic import adalora_config
peft_model = get_peft_model(model, adalora_config(10, lora_modules, lora_alpha=16, lora_dropout=0.08))
"""


@pytest.fixture(scope="module")
def cells(shared):
    text = next((shared / "seed").glob("*.md")).read_text(encoding="utf-8")
    cells = re.findall(r"```Python\n(.*?)```", text, re.S)
    for old, new in IMPORTS.items():
        cells = [cell.replace(old, new) for cell in cells]
    return cells


@pytest.fixture(scope="module")
def notebook(cells, golden_models):
    """Runs the seed's cell that holds a text (the first of those after the last one run), and returns its result."""
    shell = start_ipython() or sys.modules["IPython"].get_ipython()
    shell.reset()
    position = 0

    def run(part, **changes):
        nonlocal position
        position = next(index for index in range(position, len(cells)) if part in cells[index]) + 1
        cell = cells[position - 1]
        for old, new in changes.values():
            assert old in cell
            cell = cell.replace(old, new)
        return code(cell)

    def code(cell):
        result = shell.run_cell(cell)
        result.raise_error()
        return result.result

    run.code, run.variables = code, shell.user_ns
    shell.user_ns["model_name_or_path"] = str(golden_models / "baichuan2-7b-chat")
    code(LOADING)
    yield run
    shell.reset()


@pytest.mark.slow
def test_the_seeds_cells_run(notebook, capsys, tmp_path, monkeypatch):
    from chatmagic.training import KerasModel

    monkeypatch.chdir(tmp_path)  # the seed saves to a relative path
    for patched in ("StepRunner", "save_ckpt", "load_ckpt"):  # by the seed, on the class: put back after the test
        monkeypatch.setattr(KerasModel, patched, getattr(KerasModel, patched))
    get = notebook.variables
    notebook("llm = ChatLLM(model,tokenizer,model_type='baichuan2-chat',stream=False)")
    notebook.code("llm.max_new_tokens = 8")  # random weights would go on and on
    reply = notebook("llm.chat(messages=llm.build_messages(query=")
    assert isinstance(reply, str)
    capsys.readouterr()
    notebook("%%chat\n世界上最高的山峰是什么")
    said, cut, _ = capsys.readouterr().out.partition("[cut after 8 tokens: ")
    assert cut and said.strip() == get["llm"].history[-1][1].strip()

    notebook("conversation = [(who_are_you,i_am)")
    notebook("def get_messages(conversation)")
    assert [message["role"] for message in notebook("get_messages(conversation)")] == ["user", "assistant"] * 3
    notebook("class MyDataset(Dataset)")
    notebook("ds_train = ds_val = MyDataset")
    sample = get["ds_train"][0]
    trained = [label for label in sample["labels"] if label != -100]
    assert len(sample["input_ids"]) == len(sample["labels"])
    assert "我叫梦中情炉" in get["tokenizer"].decode(trained)
    notebook("def data_collator(examples: list)")
    notebook("dl_train = torch.utils.data.DataLoader")
    notebook.code(LOADING)  # as at the seed's restart; a 4-bit model that has answered is packed for inference
    notebook("out = model(**batch)", all=("out = model", "for batch in dl_train: break\nout = model"))

    notebook("def find_all_linear_names(model)")
    notebook("lora_modules = find_all_linear_names(model)")
    assert sorted(get["lora_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    notebook.code(LOADING)
    notebook.code(CONFIG)
    notebook("class StepRunner:")
    before = {name: param.clone() for name, param in get["peft_model"].named_parameters() if param.requires_grad}
    notebook.code("optimizer = torch.optim.AdamW(peft_model.parameters(), lr=1e-3)")  # paged AdamW wants a GPU
    notebook.code("keras_model = KerasModel(peft_model, loss_fn=None, optimizer=optimizer); ckpt_path = 'seed'")
    notebook("keras_model.from_scratch=False")
    notebook.code("dl_train.dataset.size = dl_val.dataset.size = 2")  # one step an epoch instead of four
    notebook("keras_model.fit(", epochs=("epochs=30", "epochs=10, plot=False"))
    after = dict(get["peft_model"].named_parameters())
    assert any(not param.equal(after[name]) for name, param in before.items())
    assert (tmp_path / "seed/adapter_model.safetensors").exists()
