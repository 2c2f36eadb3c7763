"""The model side: configuration, weights, tokenizer and the decoder."""
