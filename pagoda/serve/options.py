"""What a user can ask of the server. Free of torch, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagoda.common import PagodaError, demand, one_of

TOOL_PARSERS = ("auto", "hermes", "llama3", "mistral")


@dataclass
class Serving:
    """How the server answers.

    Args:
        host: the address to listen on; the default can be reached from this machine only, 0.0.0.0 from everywhere.
        port: the port to listen on (0: any that is free).
        api_key: clients must send it as `Authorization: Bearer KEY` (or set $PAGODA_API_KEY, which `ps` does not show).
        served_model_name: the model's name in the API (else as it was given, or the folder's name).
        adapters: name=PATH of an adapter that is a model name of its own (several: `--adapters a=DIR b=DIR`).
        template: a chat template in the place of the model's own: a name (chatml, alpaca, ...) or a .jinja file.
        tool_parser: how the model writes tool calls: hermes, llama3, mistral, or auto by its template.
        max_body_mb: larger requests are refused.
        cors: an origin whose pages may use the API, such as https://example.org, or * (may be given several times).
        follow: look this often, in seconds, for a newer checkpoint of a served run (0: never).
        shutdown: seconds that running requests have to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    served_model_name: str = ""
    adapters: list[str] = field(default_factory=list)
    template: str | None = None
    tool_parser: str = "auto"
    max_body_mb: float = 16.0
    cors: list[str] = field(default_factory=list)
    follow: float = 2.0
    shutdown: float = 30.0

    def __post_init__(self):
        one_of("tool_parser", self.tool_parser, TOOL_PARSERS)
        demand(
            self,
            port=(0 <= self.port < 65536, "between 0 and 65535"),
            max_body_mb=(self.max_body_mb >= 0, "0 or more"),
            follow=(self.follow >= 0, "0 or more"),
            shutdown=(self.shutdown >= 0, "0 or more"),
        )
        for pair in self.adapters:
            name, _, path = pair.partition("=")
            if not (name and path):
                raise PagodaError(f"adapters are given as name=PATH, not '{pair}'")

    @property
    def adapter_paths(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.adapters)
