"""What a Modelfile says. That Go's text/template makes of these templates what is compared here was tried by hand, with
Go 1.19 and every family below."""

import pytest

from chatmagic import load_model
from chatmagic.conversation.messages import build_messages
from chatmagic.models.gguf import ExportError
from chatmagic.models.ollama import find_pieces, write_modelfile
from chatmagic.prompts.templates import get_template
from published import MODELS
from quick import first

QWEN = """\
FROM ./x.gguf
TEMPLATE \"\"\"{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}<|im_start|>system
{{ $m.Content }}<|im_end|>
<|im_start|>user
{{ else if eq $m.Role "user" }}{{ if eq $i 0 }}<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
{{ end }}{{ $m.Content }}<|im_end|>
<|im_start|>assistant
{{ else }}{{ $m.Content }}<|im_end|>
<|im_start|>user
{{ end }}{{ end }}\"\"\"
SYSTEM \"\"\"You are a helpful assistant.\"\"\"
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER stop "<|im_start|>"
PARAMETER repeat_penalty 1.1
PARAMETER temperature 1.0
PARAMETER top_p 0.8
PARAMETER top_k 0
"""
LLAMA = (
    '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}[INST] <<SYS>>\n{{ $m.Content }}\n<</SYS>>\n\n'
    '{{ else if eq $m.Role "user" }}{{ if eq $i 0 }}[INST] {{ end }}{{ $m.Content }}'
    "{{ if eq (len (slice $.Messages $i)) 1 }} [/INST]{{ else }} [/INST] {{ end }}"
    "{{ else }}{{ $m.Content }} </s><s>[INST] {{ end }}{{ end }}"
)


def tokenizer_of(tiny_models, name):
    return load_model(tiny_models / name)[1]


def test_a_modelfile_has_template_stops_system_text_and_sampling(tiny_models):
    published = {"do_sample": True, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.1}
    assert write_modelfile("x.gguf", tokenizer_of(tiny_models, "qwen-7b-chat"), published) == QWEN


def test_without_sampling_ollama_answers_greedily(tiny_models):
    said = write_modelfile("x.gguf", tokenizer_of(tiny_models, "internlm-chat-7b"), {})
    assert said.endswith("PARAMETER repeat_penalty 1.0\nPARAMETER temperature 0\n")
    assert 'PARAMETER stop "<eoa>"\nPARAMETER stop "</s>"\nPARAMETER stop "<|User|>"\n' in said and "SYSTEM" not in said


def test_the_last_question_may_be_asked_in_another_way(tiny_models):
    assert find_pieces(tokenizer_of(tiny_models, "llama-2-13b-chat")).go() == LLAMA


@pytest.mark.parametrize("name", first(2, [name for name in MODELS if name != "chatglm2-6b"]))
def test_the_pieces_make_the_prompts_that_are_sent(tiny_models, name):
    tokenizer = tokenizer_of(tiny_models, name)
    pieces, template = find_pieces(tokenizer), get_template(None, tokenizer)
    for messages in [
        build_messages("你好"),
        build_messages("x", [("a b", "c"), ("d\ne", "f")]),
        build_messages("x", [("a", "b")] * 3, "Be brief."),
    ]:
        assert pieces.render(messages) == "".join(span.text for span in template.render(messages))


def test_what_a_template_of_pieces_cannot_write_is_refused(tiny_models):
    with pytest.raises(ExportError, match="cannot write chatglm2, the format of this model: export it with --to gguf"):
        find_pieces(tokenizer_of(tiny_models, "chatglm2-6b"))


def test_a_model_that_was_trained_not_to_think_is_asked_so(tokenizer):
    """Its prompt ends with an empty thought, which its history has not."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    tokenizer.chat_thinking = False
    pieces = find_pieces(tokenizer)
    assert pieces.ask.endswith("assistant\n<think>\n\n</think>\n\n") and pieces.answer.endswith("assistant\n")
