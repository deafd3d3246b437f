"""Talking: messages, and a conversation with a chat model, wherever that runs. Standard library only."""
