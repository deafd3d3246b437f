"""What a local model thinks: apart from what it says, counted, bounded, and no part of the conversation."""

import pytest
import torch

from chatmagic import ChatLLM, ChatmagicError, build_messages
from chatmagic.conversation.pieces import Thought
from talk import build

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n"
FREE = PARTS + ASKS + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
OPENED = PARTS + ASKS + "<think>\n{% endif %}"
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content %}<|start|>assistant<|channel|>"
    "analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}<|return|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SAYS = {
    FREE: "<think>\nHm, yes.\n</think>\n\nHi",
    OPENED: "Hm, yes.\n</think>\n\nHi",
    CHANNELS: "<|channel|>analysis<|message|>Hm, yes.<|end|><|start|>assistant<|channel|>final<|message|>Hi",
}
CLOSES = {FREE: "</think>", OPENED: "</think>", CHANNELS: "<|end|>"}


def scripted(template, said=None, then="Hi", **settings):
    """A ChatLLM over a tiny model that says `said`, or, once what closes its thought was written for it, `then`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    more = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"] * (template == CHANNELS)
    named = {"eos_token": "<|return|>"} if more else {}
    tokenizer = build(template, more=more, **named)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, eos_token_id=tokenizer.eos_token_id))
    llm = ChatLLM(model, tokenizer, stream=False, **settings)

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False)

    rest = [*ids(SAYS[template] if said is None else said), tokenizer.eos_token_id]
    written, closes = [], ids(CLOSES[template])

    def forward(model, input_ids):
        nonlocal rest
        if input_ids.shape[1] == 1:
            written.append(input_ids.item())
            if written[-1] == rest[0]:
                rest = rest[1:]
            elif written[-len(closes) :] == closes:
                rest = [*ids(ending.partition(CLOSES[template])[2] + then), tokenizer.eos_token_id]
        return torch.nn.functional.one_hot(torch.tensor([rest[0]]), len(tokenizer)).float() * 100

    parting = llm.backend.template.parting(None)
    ending = parting.ending if parting else ""
    llm.backend._forward = forward
    return llm


@pytest.mark.parametrize("template", SAYS, ids=["free", "opened", "channels"])
def test_a_thought_is_apart_and_not_remembered(template):
    llm = scripted(template)
    pieces = []
    reply = llm("hi", stream=pieces.append, greedy=True)
    assert (reply, reply.thinking) == ("Hi", "Hm, yes.") and llm.history == [("hi", "Hi")]
    thought = [piece for piece in pieces if isinstance(piece, Thought)]
    assert len(thought) > 3 and "".join(thought) == "Hm, yes." and pieces[len(thought) :] == ["H", "i"]
    assert len("Hm, yes.") <= reply.stats.tokens_thought < reply.stats.tokens_out - 2
    assert f"({reply.stats.tokens_thought} of them thought)" in str(reply.stats)


def test_without_a_thought():
    llm = scripted(FREE, "Hi")
    reply = llm("hi", greedy=True)
    assert (reply, reply.thinking, reply.stats.tokens_thought) == ("Hi", "", None)
    llm = scripted(FREE, "Hi")
    assert llm("hi", greedy=True, thinking=False) == "Hi"


def test_a_thought_that_takes_all_tokens_is_not_remembered(capsys):
    llm = scripted(OPENED)
    reply = llm("hi", greedy=True, max_new_tokens=5, stream=True)
    assert reply == "" and reply.thinking == "Hm, y" and llm.history == []
    said = "nothing was said, all went into the thought after 5 tokens; not remembered. --max-new-tokens"
    assert reply.notices[0].startswith(said) and capsys.readouterr().out.startswith(f"> Hm, y\n[{said}")


@pytest.mark.parametrize("budget", [0, 1, 4])
@pytest.mark.parametrize("template", SAYS, ids=["free", "opened", "channels"])
def test_a_budget_ends_a_thought_and_the_model_goes_on_from_there(template, budget):
    llm = scripted(template, then="So.")
    reply = llm("hi", greedy=True, thinking_budget=budget)
    newline = template == FREE  # that the model writes after its tag is the first token of the thought
    assert (reply, reply.thinking) == ("So.", "Hm, yes."[: max(budget - newline, 0)].strip())
    assert llm.history == [("hi", "So.")]


def test_a_budget_that_is_not_used_up_changes_nothing():
    reply = scripted(OPENED)("hi", greedy=True, thinking_budget=100)
    assert (reply, reply.thinking) == ("Hi", "Hm, yes.")


def test_a_budget_without_thoughts():
    with pytest.raises(ChatmagicError, match="knows no thoughts: leave thinking_budget .--thinking-budget. out"):
        ChatLLM(*tiny(TURNS + ASKS + "{% endif %}"), stream=False)("hi", thinking_budget=3)


def test_a_thought_is_a_quotation_in_a_terminal(capsys):
    scripted(FREE, "<think>\nHm,\n\nyes.\n</think>\n\nHi")("hi", greedy=True, stream=True)
    assert capsys.readouterr().out == "> Hm,\n> \n> yes.\n\nHi\n"


def tiny(template):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build(template)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval(), tokenizer


def test_a_family_without_a_system_slot_has_it_in_the_first_question():
    """As its trainer puts it there: `system="merge"` of encode_example."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = refuses + TURNS + ASKS + "{% endif %}"
    llm = ChatLLM(*tiny(template), stream=False, system="Be brief.", max_new_tokens=3)
    plain = ChatLLM(*tiny(template), stream=False, max_new_tokens=3)
    reply, merged = llm("hi"), plain("Be brief.\n\nhi")
    assert reply.stats.tokens_in == merged.stats.tokens_in and llm.history[0][0] == "hi"
    assert llm.build_prompt(build_messages("hi", system="s")) == plain.build_prompt(build_messages("s\n\nhi"))
