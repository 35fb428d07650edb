"""Tokens: tokenizers, chat templates, and later corpora, packing and loaders."""
