"""What the Tab key offers where a chat magic is typed: its options, their values, and `{names` with `--vars`."""

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion

COMMAND = re.compile(r"\s*(?:[^%]*=\s*)?(?:%\w+ .*?)?%?%(chat\w*)\s")


def complete(
    context: CompletionContext,
    parsers: Mapping[str, ArgumentParser],
    values: Mapping[str, Iterable[str]],
    variables: Iterable[str],
) -> dict[str, Any]:
    """IPython's answer for the cursor's place. `values`: what an option, by its `dest`, takes."""
    first, before = context.full_text.split("\n", 1)[0], context.text_until_cursor
    below = context.cursor_line > 0 and re.match(r"\s*%%chat\b", first)  # in the text of a question
    asking = COMMAND.match(first + " " if below else before)
    if not asking or asking[1] not in parsers:
        return {"completions": []}
    actions = {option: action for action in parsers[asking[1]]._actions for option in action.option_strings}
    if "--vars" in (first if below else before) and (found := re.search(r"\{(\w*)$", before)):
        words = variables
    elif below:
        return {"completions": []}
    elif (
        (found := re.search(r"(-[\w-]+)[\s=]+(\S*)$", before))
        and (action := actions.get(found[1]))
        and action.nargs != 0
    ):
        words, found = values.get(action.dest, action.choices or ()), re.search(r"([^\s=]*)$", before)
        if not words:
            return {"completions": []}  # a number, or a file, which IPython knows to complete
    else:
        found, words = re.search(r"\s(-\S*)$", before), actions
    if not found:
        return {"completions": []}
    fragment = found[1]
    return {
        "completions": [SimpleCompletion(word, type="param") for word in sorted(words) if word.startswith(fragment)],
        "matched_fragment": fragment,
        "suppress": True,
    }
