"""From messages to what a model is sent and trained on: templates, ids and labels, and a picture of them."""
