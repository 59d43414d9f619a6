"""From text to batches: corpora, tokenizer, token store, order and pipeline."""
