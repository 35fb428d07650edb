"""What clients may send: OpenAI's requests with vLLM's extensions, checked by pydantic, and the `Sampling` they mean.

Fields that OpenAI has and that change nothing here (`user`, `store`, `metadata`, ...) are accepted and ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt

from pagoda.common import PagodaError
from pagoda.engine.options import MOST_ANSWERS, MOST_LOGPROBS, Guided, Sampling

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Token = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Prompts = str | list[str] | list[Token] | list[list[Token]]


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = None


class Generation(BaseModel):
    """What completions and chats have in common."""

    model: str | None = Field(None, description="a name that /v1/models lists; without it the served model")
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_ANSWERS)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id to what is added to its score"
    )
    # vLLM's extensions
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 or -1: all tokens")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    min_tokens: Count | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: list[Token] | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=MOST_ANSWERS)] | None = None
    use_beam_search: StrictBool | None = None
    beam_width: Annotated[StrictInt, Field(ge=1, le=MOST_ANSWERS)] | None = None
    length_penalty: Annotated[Number, Field(ge=-10, le=10)] | None = None
    priority: Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)] | None = Field(None, description="lower goes first")
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = Field(None, description="in Lark's notation, beginning at `start`")
    guided_choice: list[str] | None = None

    def sampling(self, defaults: dict[str, Any], room: int, guided: Guided | None = None, **more: Any) -> Sampling:
        """How to sample. defaults: what the model's generation_config.json says; room: tokens left in the context.

        guided: what a tool choice or a response format asks for.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        names += ("frequency_penalty", "seed", "n", "best_of", "length_penalty", "ignore_eos", "stop", "stop_token_ids")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        options = {"temperature": 1.0, **defaults, **given, "guided": self.guided(guided), **more}
        options["top_k"] = max(options.get("top_k", 0), 0)
        options["logit_bias"] = {token_id(token): bias for token, bias in (self.logit_bias or {}).items()}
        options["max_new_tokens"] = max(min(options["max_new_tokens"], room), 1)
        options["min_new_tokens"] = min(self.min_tokens or 0, options["max_new_tokens"])
        if self.use_beam_search or self.beam_width:
            options["beam_width"] = self.beam_width or self.best_of or self.n or 1
            options.pop("best_of", None)
        return Sampling(**options)

    def guided(self, other: Guided | None) -> Guided | None:
        """What the answer must be, by whichever field says so."""
        fields = {name: getattr(self, f"guided_{name}") for name in ("json", "regex", "grammar", "choice")}
        given = {name: value for name, value in fields.items() if value is not None}
        if not given:
            return other
        if other is not None:
            raise PagodaError(f"guided_{next(iter(given))} goes with neither response_format nor a forced tool_choice")
        return Guided(**given)


class CompletionRequest(Generation):
    prompt: Prompts
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Part(BaseModel):
    """A piece of a message's content. Only text is understood."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As templates want it: text for content, objects for the arguments of tool calls."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        message |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
            for call in message["tool_calls"]:
                try:
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
                except (ValueError, RecursionError):
                    raise PagodaError("the arguments of tool_calls in messages must be JSON") from None
        return message


class Function(BaseModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class ChosenName(BaseModel):
    name: str


class Chosen(BaseModel):
    type: Literal["function"] = "function"
    function: ChosenName


class JSONSchema(BaseModel):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def guided(self) -> Guided | None:
        if self.type == "json_schema":
            if self.json_schema is None:
                raise PagodaError("response_format of type json_schema needs a json_schema")
            return Guided(json=self.json_schema.schema_)
        return Guided(any_json=True) if self.type == "json_object" else None


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the template, such as enable_thinking")


class EmbeddingRequest(BaseModel):
    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] = "mean"


class TokenizeRequest(BaseModel):
    """A prompt, or the messages of a chat."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: StrictBool = True


class DetokenizeRequest(BaseModel):
    tokens: list[Token]


class LoadAdapterRequest(BaseModel):
    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadAdapterRequest(BaseModel):
    lora_name: str


def token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise PagodaError(f"logit_bias: '{text[:20]}' is no token id")
    return int(text)
