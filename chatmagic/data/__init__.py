"""From files of conversations to batches."""
