"""`GPT`, the families, their layers, and checkpoints in and out."""
