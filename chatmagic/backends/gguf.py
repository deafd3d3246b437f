"""A GGUF file as a chat model: llama.cpp's own engine, from the wheel xllamacpp, on this machine."""

from pathlib import Path
from secrets import token_hex
from typing import Any

from ..conversation.llm import ChatLLM
from ..errors import ChatmagicError
from .connection import Connection
from .server import ServerModel


class GGUFModel(ServerModel):
    """The chat model protocol of `llm.py` over a GGUF file; its template is the one in the file. The engine listens on
    this machine alone, under a key that nobody else has, until this is let go."""

    def __init__(self, path: Path, context: int = 4096) -> None:
        try:
            from xllamacpp import CommonParams, Server
        except ImportError as error:
            raise ChatmagicError(f"{error}. Type: pip install 'chatmagic[gguf]'") from None
        key, params = token_hex(16), CommonParams()
        params.model.path, params.n_ctx, params.port, params.api_keys = str(path), context, 0, [key]
        params.verbosity, params.ui = -1, False
        try:
            self._engine = Server(params)
        except (RuntimeError, ValueError) as error:
            raise ChatmagicError(f"llama.cpp cannot load {path}: {error}") from None
        address = f"{self._engine.listening_address}/v1"
        super().__init__(Connection(address, key, 600, None, True, False), path.stem, None, context)


def open_gguf(path: str | Path, context: int = 4096, **settings: Any) -> ChatLLM:
    """A ChatLLM over the GGUF file at `path`; `context`: tokens that prompt and reply may have together, `settings` are
    ChatLLM's own. Raises ChatmagicError for a file that is missing or that llama.cpp cannot load."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ChatmagicError(f"There is no file {path}. Make one: chatmagic export --to gguf")
    return ChatLLM(GGUFModel(path, context), **settings)
