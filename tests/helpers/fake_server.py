"""An OpenAI-compatible server of many moods, on this machine."""

import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    """Answers a question by the server's next mood, or the last again; `/v1/models` lists `server.models`."""

    def do_GET(self):
        models = [{"id": name, "object": "model"} for name in self.server.models]
        found = self.path == f"{self.server.prefix}/models"
        self.answer(200 if found else 404, {"object": "list", "data": models} if found else {"detail": "Not Found"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != f"{self.server.prefix}/chat/completions":
            return self.answer(404, {"detail": "Not Found"})
        self.server.requests.append(request)
        self.server.headers.append(dict(self.headers))
        moods = self.server.moods
        (moods.pop(0) if len(moods) > 1 else moods[0])(self, request)

    def answer(self, status, data, **headers):
        self.send_response(status)
        text = data if isinstance(data, str) else json.dumps(data)
        kind = "text/html" if text.startswith("<") else "application/json"
        for name, value in ({"Content-Type": kind} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def refuses(status, words, **headers):
    """A mood: an error as OpenAI writes it, or `words` as they are if they are no text."""
    body = {"error": {"message": words}} if isinstance(words, str) and not words.startswith("<") else words
    return lambda handler, request: handler.answer(status, body, **headers)


def sends(*lines, delay=0.0, length=None):
    """A mood: a stream of these lines, each followed by an empty one; what is no text is an event's object."""

    def mood(handler, request):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        if length:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        for line in lines:
            text = line if isinstance(line, str) else f"data: {json.dumps(line)}"
            handler.wfile.write(f"{text}\n\n".encode())
            if delay:
                time.sleep(delay)

    return mood


def delta(content=None, finish_reason=None, **fields):
    """An event with one piece of a reply."""
    return {"choices": [{"index": 0, "delta": {"content": content, **fields}, "finish_reason": finish_reason}]}


def usage(tokens_in, tokens_out, **details):
    """The event that counts."""
    counts = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "completion_tokens_details": details}
    return {"choices": [], "usage": counts}


def says(text="你好!", finish_reason="stop", tokens_in=9, delay=0.0):
    """A mood: the text, a character a piece, as vLLM streams it."""
    pieces = [delta(character) for character in text]
    return sends(*pieces, delta("", finish_reason), usage(tokens_in, len(text)), "data: [DONE]", delay=delay)


class FakeServer(ThreadingHTTPServer):
    """`moods` are what it answers with, `requests` and `headers` what it was asked with."""

    prefix = "/v1"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods, self.requests, self.headers, self.models = [says()], [], [], ["parrot"]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}{self.prefix}"

    def handle_error(self, *_):  # who interrupts hangs up
        pass


@contextmanager
def running():
    """A fake server, and its end."""
    server = FakeServer()
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
