"""OpenAI's SDKs for Python and for JavaScript behind one face, so that one test holds the relay against both.

They are the real packages; here they are only told what to call, and what they gave or raised is noted down.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import openai
import pytest

_FOLDER = Path(__file__).parent / "sdk"
NODE_MODULES = _FOLDER / "node_modules"
_MESSAGES: Any = [{"role": "user", "content": "Hi"}]
Operation = Literal["chat", "stream", "complete", "respond", "embed", "transcribe", "models", "retrieve"]


@dataclass(frozen=True, slots=True)
class Call:
    """What a client is asked to do, with a new SDK client. file: a path, for `transcribe`."""

    operation: Operation
    base_url: str
    api_key: str
    model: str = "plain"
    words: str = ""
    file: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    max_retries: int = 0
    timeout_s: float = 30


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: a text, or the class of the exception (the SDKs have the same ones) and what it knows."""

    text: str = ""
    error: str = ""
    detail: str = ""
    status: int = 0
    code: str = ""
    request_id: str = ""


class Sdk(Protocol):
    """A client of one language. status_error: its class for a status that has none of its own."""

    status_error: str

    async def call(self, call: Call) -> Outcome:
        """Make a call to its end."""
        ...


class PythonSdk:
    """The `openai` package of Python."""

    status_error = "APIStatusError"

    async def call(self, call: Call) -> Outcome:
        async with openai.AsyncOpenAI(
            base_url=call.base_url,
            api_key=call.api_key,
            max_retries=call.max_retries,
            timeout=call.timeout_s,
            default_headers=call.headers,
        ) as client:
            try:
                return Outcome(text=await _in_python(client, call))
            except openai.APIError as error:
                return Outcome(
                    error=type(error).__name__,
                    detail=str(error),
                    status=getattr(error, "status_code", 0),
                    code=error.code or "",
                    request_id=getattr(error, "request_id", None) or "",
                )


async def _in_python(client: openai.AsyncOpenAI, call: Call) -> str:  # noqa: PLR0911  a table of operations
    match call.operation:
        case "chat":
            messages: Any = [{"role": "user", "content": call.words}] if call.words else _MESSAGES
            answer = await client.chat.completions.create(model=call.model, messages=messages)
            return answer.choices[0].message.content or ""
        case "stream":
            stream = await client.chat.completions.create(model=call.model, messages=_MESSAGES, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        case "complete":
            return (await client.completions.create(model=call.model, prompt="Hi")).choices[0].text
        case "respond":
            return (await client.responses.create(model=call.model, input="Hi")).output_text
        case "embed":
            vector = await client.embeddings.create(model=call.model, input="Hi", encoding_format="float")
            return " ".join(f"{number:g}" for number in vector.data[0].embedding)
        case "transcribe":
            with Path(call.file).open("rb") as file:  # noqa: ASYNC230  the SDK reads it so itself
                return (await client.audio.transcriptions.create(model=call.model, file=file)).text
        case "models":
            return " ".join([model.id async for model in client.models.list()])
        case "retrieve":
            return (await client.models.retrieve(call.model)).id


class JavaScriptSdk:
    """The `openai` package of npm, in a Node process that makes one call at a time. Close it."""

    status_error = "APIError"

    def __init__(self, node: str) -> None:
        self._process = subprocess.Popen(
            [node, str(_FOLDER / "client.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def call(self, call: Call) -> Outcome:
        return await asyncio.to_thread(self._call, call)

    def _call(self, call: Call) -> Outcome:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asdict(call)) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=20)  # the end of its input is its end


@contextmanager
def sdk_of(language: str) -> Iterator[Sdk]:
    """Give the SDK of a language, or skip the test for want of it."""
    if language == "python":
        yield PythonSdk()
        return
    javascript = JavaScriptSdk(node_with_sdk())
    yield javascript
    javascript.close()


def node_with_sdk() -> str:
    """Return the path of Node, or skip the test if Node or the SDK's package is not installed."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed (apt-get install nodejs npm), so there is no JavaScript SDK")
    if not (NODE_MODULES / "openai").is_dir():
        pytest.skip("npm's package openai is not installed: `make peers` does it, with npm and a registry at hand")
    return node
