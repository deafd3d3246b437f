"""chatmagic: change who a chat model says it is, and talk to it with `%%chat`.

Public names are imported on first use, so that `import chatmagic` loads neither torch nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "ChatmagicError": "errors",
    "build_messages": "messages",
    "validate_messages": "messages",
    "build_prompt": "templates",
    "get_template": "templates",
    "build_inputs_labels": "labels",
    "encode_prompt": "labels",
    "show_labels": "picture",
    "DataCollator": "dataset",
    "read_jsonl": "dataset",
    "snapshot_download": "download",
    "load_model": "load",
    "ChatLLM": "llm",
    "connect": "server",
    "adalora_config": "train",
    "find_all_linear_names": "train",
    "KerasModel": "train",
    "StepRunner": "train",
    "merge_adapter": "merge",
    "adalora_to_lora": "merge",
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
    from .magic import load_ipython_extension

    load_ipython_extension(ipython)


def unload_ipython_extension(ipython) -> None:
    """`%unload_ext chatmagic`, and the first half of `%reload_ext chatmagic`."""
    from .magic import unload_ipython_extension

    unload_ipython_extension(ipython)
