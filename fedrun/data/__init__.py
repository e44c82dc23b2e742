"""From text to batches of token ids. Nothing here knows about ranks or imports torch."""
