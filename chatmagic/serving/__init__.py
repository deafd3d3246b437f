"""Others ask: an address that speaks OpenAI's protocol, and a page on it."""
