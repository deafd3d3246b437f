"""An address of this package's own, over models of the test's, in a thread."""

import socket
import time
from contextlib import contextmanager
from threading import Thread

import uvicorn

from chatmagic import ChatLLM
from chatmagic.serving.app import make_app


@contextmanager
def serving(*models, key=None, longest=32):
    """The address, `http://.../v1`, that these answer at, each a ChatLLM or a ChatModel."""
    llms = [model if isinstance(model, ChatLLM) else ChatLLM(model, stream=False) for model in models]
    config = uvicorn.Config(make_app(llms, key, longest), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition, seconds=20):
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
