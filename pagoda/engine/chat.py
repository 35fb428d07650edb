"""A conversation in the terminal: history, streaming, and a few commands that start with a slash."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pagoda.common import PagodaError
from pagoda.engine.llm import LLM
from pagoda.engine.options import Sampling

HELP = """\
/reset       forget the conversation
/save FILE   write the conversation as JSON
/help        this list
/exit        leave (or Ctrl-D)
Ctrl-C stops an answer. End a line with \\ to go on in the next one."""


class Conversation:
    """Messages so far, and how the next answer is sampled."""

    def __init__(self, llm: LLM, sampling: Sampling, system: str | None):
        self.llm, self.sampling = llm, sampling
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def ask(self, text: str) -> None:
        """Stream the answer to standard output and remember both; Ctrl-C keeps what has been said so far."""
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            for piece in self.llm.stream([*self.messages, question], self.sampling):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr)
        print()
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]
        print(self.llm.timing.summary(), file=sys.stderr)

    def command(self, line: str) -> None:
        """A line that starts with a slash."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.messages = list(self.opening)
            print("forgotten", file=sys.stderr)
        elif name == "/save":
            self.save(rest.strip())
        elif name == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise PagodaError(f"unknown command {name} (/help lists them)")

    def save(self, file: str) -> None:
        if not file:
            raise PagodaError("/save needs a file name")
        try:
            Path(file).expanduser().write_text(
                json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
        except OSError as e:
            raise PagodaError(f"cannot write {file}: {e.strerror}") from None
        print(f"saved {len(self.messages)} messages to {file}", file=sys.stderr)


def converse(llm: LLM, sampling: Sampling, system: str | None = None) -> None:
    """Read questions from standard input until it ends, or /exit. Errors of one turn do not end the conversation."""
    talk = Conversation(llm, sampling, system)
    llm.chat_ids([*talk.opening, {"role": "user", "content": ""}])  # a model without a template fails here, at once
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())

        print(f"{llm.name}: /help lists the commands, Ctrl-D leaves", file=sys.stderr)
    while (line := read_message("> " if interactive else "")) is not None:
        if line in ("/exit", "/quit"):
            break
        if not line:
            continue
        try:
            talk.command(line) if line.startswith("/") else talk.ask(line)
        except KeyboardInterrupt:  # a second Ctrl-C, behind the one that stopped the answer
            continue
        except PagodaError as e:
            if not interactive:
                raise
            print(f"pagoda: {e}", file=sys.stderr)


def read_message(prompt: str) -> str | None:
    """One message (lines that end with a backslash go on), or None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            lines.append(input(prompt if not lines else ". " if prompt else ""))
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            return ""
        if not lines[-1].endswith("\\"):
            return "\n".join(lines).strip()
        lines[-1] = lines[-1][:-1]
