"""chatmagic: change who a chat model says it is, and talk to it with `%%chat`.

Public names are imported on first use, so that `import chatmagic` loads neither torch nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "ChatmagicError": "errors",
    "build_messages": "conversation.messages",
    "validate_messages": "conversation.messages",
    "build_prompt": "prompts.templates",
    "get_template": "prompts.templates",
    "build_inputs_labels": "prompts.labels",
    "encode_prompt": "prompts.labels",
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
    "find_all_linear_names": "training",
    "prepare": "training",
    "KerasModel": "training",
    "StepRunner": "training",
    "plot_importance": "training.plots",
    "plot_ranks": "training.plots",
    "merge_adapter": "models.merge",
    "adalora_to_lora": "models.merge",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(ipython) -> None:
    """`%load_ext chatmagic`: register `%%chat` and its line magics."""
    from .notebook.magic import load_ipython_extension

    load_ipython_extension(ipython)


def unload_ipython_extension(ipython) -> None:
    """`%unload_ext chatmagic`, and the first half of `%reload_ext chatmagic`."""
    from .notebook.magic import unload_ipython_extension

    unload_ipython_extension(ipython)
