"""chatmagic: change who a chat model says it is, and talk to it with `%%chat`.

Public names are imported on first use, so that `import chatmagic` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from .backends.server import connect
    from .conversation.llm import ChatLLM
    from .conversation.messages import build_messages, validate_messages
    from .course.download import snapshot_download
    from .data.dataset import ConversationFile, DataCollator, Examples, encode_example, read_jsonl, write_jsonl
    from .data.readers import read_conversations
    from .errors import ChatmagicError
    from .models.checkpoint import open_weights
    from .models.load import load_model
    from .models.merge import merge_adapter
    from .models.plain_lora import adalora_to_lora
    from .prompts.labels import build_inputs_labels, encode_prompt, note_thinking
    from .prompts.picture import show_labels
    from .prompts.templates import build_prompt, get_template
    from .training import KerasModel, StepRunner, adalora_config, adapter_config, find_all_linear_names, prepare
    from .training.plots import plot_importance, plot_ranks

__version__ = "0.1.0"

_HOME = {
    "ChatmagicError": "errors",
    "build_messages": "conversation.messages",
    "validate_messages": "conversation.messages",
    "build_prompt": "prompts.templates",
    "get_template": "prompts.templates",
    "build_inputs_labels": "prompts.labels",
    "encode_prompt": "prompts.labels",
    "note_thinking": "prompts.labels",
    "show_labels": "prompts.picture",
    "DataCollator": "data.dataset",
    "encode_example": "data.dataset",
    "ConversationFile": "data.dataset",
    "Examples": "data.dataset",
    "read_conversations": "data.readers",
    "read_jsonl": "data.dataset",
    "write_jsonl": "data.dataset",
    "snapshot_download": "course.download",
    "load_model": "models.load",
    "open_weights": "models.checkpoint",
    "ChatLLM": "conversation.llm",
    "connect": "backends.server",
    "adalora_config": "training",
    "adapter_config": "training",
    "find_all_linear_names": "training",
    "prepare": "training",
    "KerasModel": "training",
    "StepRunner": "training",
    "plot_importance": "training.plots",
    "plot_ranks": "training.plots",
    "merge_adapter": "models.merge",
    "adalora_to_lora": "models.plain_lora",
}
__all__ = [
    "ChatLLM",
    "ChatmagicError",
    "ConversationFile",
    "DataCollator",
    "Examples",
    "KerasModel",
    "StepRunner",
    "adalora_config",
    "adalora_to_lora",
    "adapter_config",
    "build_inputs_labels",
    "build_messages",
    "build_prompt",
    "connect",
    "encode_example",
    "encode_prompt",
    "find_all_linear_names",
    "get_template",
    "load_model",
    "merge_adapter",
    "note_thinking",
    "open_weights",
    "plot_importance",
    "plot_ranks",
    "prepare",
    "read_conversations",
    "read_jsonl",
    "show_labels",
    "snapshot_download",
    "validate_messages",
    "write_jsonl",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(ipython: "InteractiveShell") -> None:
    """`%load_ext chatmagic`: register `%%chat` and its line magics."""
    from .notebook.magic import load_ipython_extension

    load_ipython_extension(ipython)


def unload_ipython_extension(ipython: "InteractiveShell") -> None:
    """`%unload_ext chatmagic`, and the first half of `%reload_ext chatmagic`."""
    from .notebook.magic import unload_ipython_extension

    unload_ipython_extension(ipython)
