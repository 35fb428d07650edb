"""Generation: the cache, sampling, and `LLM`."""
