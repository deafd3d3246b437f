"""`chatmagic web`: a page to talk on, over an OpenAI-compatible address; two models answer side by side.

Streamlit runs this file anew for every visitor and every click; what is to last stands in `st.session_state`.
"""

import os
import secrets
import sys
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from chatmagic.backends.server import connect, models_at
from chatmagic.conversation.messages import Message, build_messages
from chatmagic.conversation.pieces import Notice, Thought
from chatmagic.errors import ChatmagicError
from chatmagic.serving.reach import is_asked_here

CHINESE = {"Models": "模型", "System text": "系统提示", "New conversation": "新对话", "Say something": "说点什么"}


def translated(words: str) -> str:
    """The words in the visitor's language."""
    return CHINESE.get(words, words) if (st.context.locale or "zh").startswith("zh") else words


def admit() -> None:
    """Stop here for who does not know CHATMAGIC_KEY, or, where there is none, comes from another machine."""
    if key := os.environ.get("CHATMAGIC_KEY"):
        if not st.session_state.get("admitted"):
            if not secrets.compare_digest(st.text_input("CHATMAGIC_KEY", type="password").encode(), key.encode()):
                st.stop()
            st.session_state.admitted = True
            st.rerun()
    elif not is_asked_here(st.context.headers.get("Host", "")):
        st.error("Only localhost is answered; for others start this with CHATMAGIC_KEY set.")
        st.stop()


def answer_into(address: str, name: str, messages: list[Message], reply: dict[str, Any], place: DeltaGenerator) -> None:
    """Write the reply there as it comes, and into `reply`, which keeps it however this ends."""
    place.markdown("▌")

    def write(piece: str) -> None:
        kind = "notices" if isinstance(piece, Notice) else "thought" if isinstance(piece, Thought) else "said"
        reply[kind] += piece
        (place.markdown if reply["said"] else place.caption)((reply["said"] or reply["thought"]) + " ▌")

    try:
        connect(address, name).chat(messages, write)
    except ChatmagicError as error:
        reply["notices"] += str(error)


def show(reply: dict[str, Any], place: DeltaGenerator) -> None:
    """What there is of a reply."""
    with place.container():
        if reply["thought"]:
            st.expander("💭").markdown(reply["thought"])
        st.markdown(reply["said"])
        st.caption(reply["notices"])


def page(address: str) -> None:
    """The page."""
    st.set_page_config("chatmagic", "💬", layout="wide")
    admit()
    rounds = st.session_state.setdefault("rounds", [])
    try:
        names = models_at(address)
    except ChatmagicError as error:
        st.error(str(error))
        return
    chosen = st.sidebar.multiselect(translated("Models"), names, names[:2], max_selections=2)
    system = st.sidebar.text_area(translated("System text"))
    if st.sidebar.button(translated("New conversation"), width="stretch"):
        rounds.clear()
    if query := st.chat_input(translated("Say something"), submit_mode="stop", disabled=not chosen):
        rounds.append({"query": query, "replies": {}})
    histories: dict[str, list[tuple[str, str]]] = {name: [] for name in chosen}
    for each in rounds:
        st.chat_message("user").markdown(each["query"])
        places = {}
        for name, column in zip(chosen, st.columns(max(1, len(chosen)))):
            message = column.chat_message("assistant")
            message.caption(name)
            places[name] = message.empty()
        for name, place in places.items():
            if query and each is rounds[-1]:
                reply = each["replies"][name] = {"thought": "", "said": "", "notices": ""}
                answer_into(address, name, build_messages(query, histories[name], system or None), reply, place)
            if reply := each["replies"].get(name):
                show(reply, place)
                histories[name] += [(each["query"], reply["said"])] * bool(reply["said"].strip())


if __name__ == "__main__":
    page(sys.argv[1])
