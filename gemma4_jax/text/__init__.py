"""Text: the tokenizer and the chat format."""
