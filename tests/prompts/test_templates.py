import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from chatmagic import build_messages, build_prompt, get_template
from chatmagic.prompts.templates import TemplateError

ASKED = build_messages("二", [("一", "壹")])


@pytest.fixture(scope="module")
def fastchat(shared):
    templates = json.loads((shared / "vectors" / "fastchat_prompts.json").read_text("utf-8"))
    return {name: row for name, row in templates.items() if "prompt" in row["cases"]["one user turn"]}


def test_every_working_template_of_fastchat_is_reproduced_byte_for_byte(fastchat):
    assert len(fastchat) == 77
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrong = [
            (name, case)
            for name, row in fastchat.items()
            for case, expected in row["cases"].items()
            if build_prompt(expected["messages"], name) != expected["prompt"]
        ]
    # The one exception: InternLM's publisher dropped <eoh>, the inner <s> and the default system text.
    assert {name for name, _ in wrong} == {"internlm-chat"}


def test_the_docs_name_them_all(fastchat):
    docs = (Path(__file__).parents[2] / "docs" / "templates.md").read_text("utf-8")
    assert [name for name in fastchat if f"`{name}`" not in docs] == []


def test_nothing_here_imports_torch_or_transformers():
    code = (
        "import sys, chatmagic.prompts.labels, chatmagic.data.dataset, chatmagic.prompts.picture; print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "transformers", "tokenizers", "IPython"} & set(modules.split())


def test_fastchat_stops(fastchat):
    for name, row in fastchat.items():
        stop = row["stop_str"] or []
        assert list(get_template(name).stop_strings) == ([stop] if isinstance(stop, str) else stop), name
        if name != "internlm-chat":
            assert list(get_template(name).stop_ids) == (row["stop_token_ids"] or []), name


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("internlm-chat", "<|System|>:S\n<|User|>:一\n<|Bot|>:壹<eoa>\n<|User|>:二\n<|Bot|>:"),
        ("baichuan2-chat", "S<reserved_106>一<reserved_107>壹<reserved_106>二<reserved_107>"),
        ("llama-2", "[INST] <<SYS>>\nS\n<</SYS>>\n\n一 [/INST] 壹 </s><s>[INST] 二 [/INST]"),
        (
            "smollm2",
            (
                "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n壹<|im_end|>\n"
                "<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
    ],
)
def test_publishers_prompts(name, prompt):
    assert build_prompt(build_messages("二", [("一", "壹")], "S"), name) == prompt


def test_default_system_texts():
    assert build_prompt(ASKED, "smollm2").startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )
    assert build_prompt(build_messages("一", system=""), "qwen-7b-chat").startswith("<|im_start|>system\n<|im_end|>")
    assert build_prompt(build_messages("一", system=""), "internlm-chat").startswith("<|User|>:一")


def test_without_a_generation_prompt():
    assert build_prompt(ASKED, "vicuna_v1.1", add_generation_prompt=False).endswith("壹</s>USER: 二 ")
    assert build_prompt(ASKED, "chatglm2", add_generation_prompt=False).endswith("\n\n[Round 2]\n\n问：二\n\n")


def test_braces_and_slots_in_messages_are_text():
    assert build_prompt(build_messages("{} {round} {0}"), "chatglm2") == "[Round 1]\n\n问：{} {round} {0}\n\n答："


def test_a_system_text_the_model_does_not_know_is_warned_about():
    with pytest.warns(UserWarning, match="chatglm2 knows no system text"):
        build_prompt(build_messages("一", system="S"), "chatglm2")


def test_an_unknown_name_gets_the_three_nearest():
    with pytest.raises(TemplateError, match="'baichuan2'; did you mean 'baichuan2-chat' or 'baichuan-chat' or 'yuan2'"):
        get_template("baichuan2")
    with pytest.raises(TemplateError, match="did you mean 'qwen-7b-chat' or"):
        get_template("Qwen-7B-Chat")
    with pytest.raises(TemplateError, match="did you mean '.+' or '.+' or '.+'"):
        get_template("")


def test_nothing_known_and_no_chat_template():
    class Tokenizer:
        chat_template = None
        name_or_path = "somewhere/mystery-7b"

        def convert_tokens_to_ids(self, token):
            return 0

    with pytest.raises(TemplateError, match="Pass the name of a template"):
        get_template(tokenizer=Tokenizer())
    Tokenizer.name_or_path = "meta-llama/Llama-2-7b-chat-hf"
    assert get_template(tokenizer=Tokenizer()).name == "llama-2"
