"""What a conversation talks to: a model here, or one behind a server."""
