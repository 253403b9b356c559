"""A running server that is asked in JSON, and what goes wrong then in one sentence with the fix."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from typing import Any, NamedTuple

# How servers say that a prompt does not fit: SGLang, vLLM, OpenAI, llama.cpp.
_TOO_LONG = re.compile(
    r"context.?(length|window|size)|context_length_exceeded|max_model_len|maximum allowed length|too (long|large)", re.I
)


class ServerError(RuntimeError):
    """A server did not answer, or not with what was asked for; the message is one sentence with the fix."""


class PromptTooLong(ServerError):
    """The server refuses a prompt for its length."""


class Advice(NamedTuple):
    """What a command's user can change.

    Attributes:
        kind: what the server must be.
        shorter: how a prompt gets shorter.
        fewer: how requests get fewer.
        request: what may be wrong with a request.
        option: the one that has the server's address.
    """

    kind: str
    shorter: str
    fewer: str
    request: str
    option: str = "--base-url"


class JsonServer:
    """A server at an address.

    Args:
        base_url: with or without /v1.
        api_key: sent as a bearer token.
        timeout_s: per request.
        advice: for the sentences.

    Attributes:
        url: without /v1.
    """

    def __init__(self, base_url: str, api_key: str, timeout_s: float, advice: Advice) -> None:
        url = base_url.rstrip("/").removesuffix("/v1")
        self.url = url if "://" in url else f"http://{url}"
        self.advice = advice
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
        self._timeout_s = timeout_s

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers to a body as JSON, or to a GET without one. Raises ServerError."""
        url, advice = self.url + path, self.advice
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, data, self._headers)
            with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(url, error.code, error.read().decode(errors="replace")) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise ServerError(
                    f"no answer from {url} within {self._timeout_s:g} s: pass a longer --timeout or {advice.shorter}"
                ) from error
            raise ServerError(
                f"no server answers at {url} ({reason}): start one (`make serve`), or pass its address with "
                f"{advice.option}"
            ) from error
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServerError(f"{url} did not answer with JSON: {advice.option} must be {advice.kind}") from error

    def _refusal(self, url: str, status: int, text: str) -> ServerError:
        """The error for a reply with a 4xx or 5xx status."""
        advice = self.advice
        try:
            body = json.loads(text)
            inner = body.get("error", body)
            message = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
        except (ValueError, AttributeError):
            message = text
        message = " ".join(message.split())[:400].rstrip(".") or "no reason given"
        if status in (400, 413, 422) and _TOO_LONG.search(message):
            return PromptTooLong(f"the server refused a prompt for its length ({message}): pass {advice.shorter}")
        if status in (401, 403):
            return ServerError(f"{url} refused the key ({message}): pass one with --api-key")
        if status == 404:
            return ServerError(
                f"{url} was not found ({message}): {advice.option} must be {advice.kind}; check {advice.request}"
            )
        if status == 429:
            return ServerError(f"{url} wants fewer requests ({message}): wait, or {advice.fewer}")
        fix = "its log says why" if status >= 500 else f"check {advice.request}"
        return ServerError(f"{url} refused a request with status {status} ({message}): {fix}")
