"""The ninth floor: the engine behind OpenAI's HTTP API, and a page to chat on. Nothing heavy is imported here."""
