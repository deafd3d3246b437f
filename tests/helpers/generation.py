"""What tests of generated replies share: those of plain generate to compare with, changes of the weights, and Stop."""

import os
import signal

from chatmagic import ChatLLM, build_messages, encode_prompt


def plain(model, ids, **options):
    """What transformers' own generate says to these ids, the new ones only."""
    import torch

    ids = torch.tensor([ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def new_ids(llm, reply):
    """The ids of a reply, of which the kept keys and values lack the last."""
    return llm.backend._kept_ids[reply.stats.tokens_in :]


def twelve_turns(model, tokenizer, tokens):
    """Ask twelve greedy questions; each reply's text and the ids of plain generate for the same messages."""
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=tokens)
    for turn in range(12):
        query = f"Question {turn}: 你好, what is {turn} + {turn}?"
        messages = build_messages(query, llm.history)
        reply = llm(query, greedy=True)
        ids = plain(model, encode_prompt(messages, tokenizer), do_sample=False, max_new_tokens=tokens)
        yield llm, reply, ids


def adapter(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def trained(model):
    import torch

    weight = next(model.parameters())
    optimizer = torch.optim.SGD([weight], 0.5)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


def trained_by_bitsandbytes(model):
    """Its optimizers write by pointer."""
    import bitsandbytes
    import torch

    weight = model.model.layers[0].self_attn.q_proj.weight
    optimizer = bitsandbytes.optim.AdamW([weight], 0.05)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


def written_through_data(model):
    model.model.layers[0].mlp.down_proj.weight.data[5, 7] += 3.0


def column_written_through_data(model):
    model.model.layers[0].mlp.down_proj.weight.data[:, 7] = 0.5


def rows_swapped_through_data(model):
    weight = model.model.embed_tokens.weight.data
    weight[[104, 105]] = weight[[105, 104]]  # h and i


def written_through_numpy(model):
    model.model.layers[0].input_layernorm.weight.detach().numpy()[3] *= -2


def interrupt_after(seconds):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
