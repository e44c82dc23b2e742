"""Text in, batches of token ids out. Nothing here knows of ranks or imports torch."""
