"""Floor 5: LoRA and the other adapters, all as wrappers that any model can wear. Start in adapter.py."""
