import subprocess
import sys
import warnings

import pytest

from chatmagic import (
    ChatLLM,
    build_inputs_labels,
    build_messages,
    build_prompt,
    encode_prompt,
    get_template,
    load_model,
)
from chatmagic.course.evaluate import ask
from chatmagic.prompts.templates import TemplateError
from golden import golden
from talk import build

ASKED = build_messages("二", [("一", "壹")])


@pytest.fixture(scope="module")
def fastchat():
    return golden("fastchat")["templates"]


def test_every_working_template_of_fastchat_is_reproduced_byte_for_byte(fastchat):
    assert len(fastchat) == 77
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrong = [
            (name, case)
            for name, row in fastchat.items()
            for case, prompt in row["prompts"].items()
            if build_prompt(golden("fastchat")["messages"][case], name) != prompt
        ]
    # The one exception: InternLM's publisher dropped <eoh>, the inner <s> and the default system text.
    assert {name for name, _ in wrong} == {"internlm-chat"}


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


@pytest.mark.parametrize("loaded", [True, False])
def test_a_family_known_by_its_folder_is_the_same_for_whoever_asks(tmp_path, loaded):
    """By load_model it goes with the tokenizer, to the disk and back; by ChatLLM, where model and tokenizer come from
    elsewhere."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = build(None, eos_token="</s>", bos_token="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    folder = tmp_path / "Llama-2-7b-chat-hf"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(folder)
    if loaded:
        tokenizer.save_pretrained(tmp_path / "moved")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moved")
    else:
        tokenizer = build(None, eos_token="</s>", bos_token="<s>")
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=2)
    messages = build_messages("一")
    assert llm.backend.template is get_template(tokenizer=tokenizer) is get_template("llama-2")
    assert llm("一").stats.tokens_in == len(encode_prompt(messages, tokenizer))
    assert encode_prompt(messages, tokenizer) == encode_prompt(messages, tokenizer, "llama-2")
    assert ask(model, tokenizer, [messages], max_new_tokens=2)
    row = [*messages, {"role": "assistant", "content": "二"}]
    assert build_inputs_labels(row, tokenizer) == llm.build_inputs_labels(row)
