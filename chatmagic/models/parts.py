"""What of a model is trained, and what memory a step of that wants and finds."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

# Their activations are beyond what float16 can hold (huggingface/transformers#36822).
BEYOND_FLOAT16 = ("gemma3", "gemma3_text")


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The (name, parameter) pairs of a model that are trained."""
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has made a step; some, as Adagrad, have a state from their beginning."""
    return any(float(state.get("step", 1)) for state in optimizer.state.values() if state)


def experts(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights of the experts of a mixture, of all of a layer in one tensor, by their names; {} where there is none.

    bitsandbytes quantises no such tensor, and AdaLoRA knows none: they stay as they are.
    """
    return {name: param for name, param in model.named_parameters() if ".experts." in name}


def activations(model: PreTrainedModel) -> int:
    """Bytes that the activations of a training step of 1024 tokens take, kept from forward to backward, roughly."""
    config = model.config.get_text_config()
    return 1024 * config.num_hidden_layers * config.hidden_size * 60


def free_memory(model: torch.nn.Module) -> int:
    """Bytes that torch can still have on the GPU that the model is on; 0 if it is on none."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
