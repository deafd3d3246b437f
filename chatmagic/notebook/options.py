"""The options of the magics that ask a model."""

from collections.abc import Callable
from typing import Any

from IPython.core.magic_arguments import argument, magic_arguments

FORMATS = ["text", "markdown", "json"]
MODEL = argument("-m", "--model", metavar="NAME", help="which of the models in %%chat_models")


ASKING = [
    MODEL,
    argument("--system", metavar="TEXT", help="system prompt, for this question"),
    argument("--temperature", type=float, metavar="T", help="sampling temperature; 0 is greedy"),
    argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this total probability"),
    argument("--max-new-tokens", type=int, metavar="N", help="most tokens in the reply"),
    argument("--seed", type=int, metavar="N", help="seed of the sampling"),
    argument("--greedy", action="store_true", help="always take the likeliest token"),
    argument("--thinking", choices=["on", "off"], help="whether the model is to think first, if it can be told so"),
    argument("--thinking-budget", type=int, metavar="N", help="most tokens of its thought"),
    argument("--no-stream", action="store_true", help="show the reply once it is complete"),
    argument("--new", action="store_true", help="forget the conversation first"),
    argument("--no-history", action="store_true", help="neither show the model the conversation nor remember this"),
    argument(
        "-o",
        "--output",
        metavar="NAME",
        help="put the reply into a variable: a string with .stats and .json()",
    ),
    argument("--format", choices=FORMATS, help="how the reply is shown"),
    argument("--stats", action="store_true", help="print token counts and times after the reply"),
    argument("--vars", action="store_true", help="fill {expressions} and {expressions:format} as an f-string does"),
    argument("--round", type=int, metavar="N", help="forget that round of %%chat_history first, and all after it"),
    argument(
        "--file", action="append", metavar="PATH", help="send a text file as well, or what a cell printed: Out[3]"
    ),
    argument("--code", action="store_true", help="put the reply's Python code into the next cell, which is not run"),
]
"""The options of all magics that ask."""


def asking(magic: Callable[..., Any]) -> Callable[..., Any]:
    """Give a magic the options of those that ask."""
    for each in reversed(ASKING):
        magic = each(magic)
    return magic_arguments()(magic)
