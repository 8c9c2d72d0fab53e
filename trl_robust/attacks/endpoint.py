"""Calls to an endpoint with OpenAI's chat completions: a local server or a hosted one."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

AT_ONCE = 4
"""Calls at a time."""

T = TypeVar("T")
S = TypeVar("S")


class EndpointError(Exception):
    """A call to an endpoint failed; the message is the reason, and `again` says whether another try may help."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """
    A model behind an address.

    A call that fails (no connection, timeout, status 408, 409, 429 or 5xx, a reply that does not hold what is read)
    is tried again.

    Args:
        url (`str`):
            Base URL, such as `http://localhost:8000/v1`.
        model (`str`):
            Name of the model there.
        key_variable (`str`, *optional*):
            Environment variable that holds the API key. The key is never written anywhere.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one call.
        retries (`int`, *optional*, defaults to `3`):
            Further tries.
        pause (`float`, *optional*, defaults to `1.0`):
            Seconds before the second try; twice as long before each further one.

    Raises:
        `ValueError`: no such URL, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        pause: float = 1.0,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            # The address may hold a password, so the message does not repeat it.
            raise ValueError("`url` is no address of an endpoint; give one such as http://localhost:8000/v1.")
        if key_variable is not None and not os.environ.get(key_variable):
            # What was given may be the key itself, so the message does not repeat it.
            raise ValueError(
                "`key_variable` names no environment variable that is set. Give the name of the variable that holds "
                "the key, not the key."
            )
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.key_variable = model, key_variable
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self._opener = urllib.request.build_opener(_NoRedirect())

    def settings(self) -> dict[str, Any]:
        """Host and model. What stands before and behind the host could be a secret."""
        parts = urllib.parse.urlsplit(self.url)
        host = parts.hostname or ""
        return {"host": f"{host}:{parts.port}" if parts.port else host, "model": self.model}

    def ask(self, messages: Sequence[dict[str, str]], read: Callable[[bytes], T], **settings: Any) -> T:
        """
        One chat completion.

        Args:
            messages (sequence of `dict`):
                The conversation.
            read (`Callable`):
                From the body of the reply to what is wanted of it; raises [`EndpointError`] where it is not there.
            **settings:
                Further keys of the request, such as `max_tokens`.

        Returns:
            What `read` gives.

        Raises:
            [`EndpointError`]: the last try failed. The message does not hold the key.
        """
        body = {"model": self.model, "messages": list(messages), **settings}
        for attempt in range(self.retries + 1):
            try:
                return read(self._post(body))
            except EndpointError as error:
                if not error.again or attempt == self.retries:
                    raise EndpointError(self._without_key(str(error)), again=error.again) from None
            time.sleep(self.pause * 2**attempt)
        raise ValueError(f"retries={self.retries} must be at least 0.")

    def at_once(self, call: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """What `call` gives for every item, in their order, a few at a time."""
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            return list(pool.map(call, items))

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", data=json.dumps(body).encode(), headers=headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode("utf-8", "replace").split())
            again = error.code in (408, 409, 429) or error.code >= 500
            raise EndpointError(f"HTTP {error.code} {said}".strip(), again=again) from error
        except (OSError, http.client.HTTPException) as error:  # no connection, cut off, or a timeout
            raise EndpointError(f"{type(error).__name__}: {error}", again=True) from error

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.key_variable or "")
        return text.replace(key, "[key]") if key else text


def text_of(content: bytes) -> str:
    """
    What a chat completion says.

    Args:
        content (`bytes`):
            Body of the reply.

    Returns:
        `str`.

    Raises:
        [`EndpointError`]: it holds no text.
    """
    shown = content[:200].decode("utf-8", "replace")
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EndpointError(f"the reply holds no text: {shown}", again=True) from error
    if not isinstance(text, str):  # null where a server puts the reply elsewhere
        raise EndpointError(f"the reply holds no text: {shown}", again=True)
    # Half a surrogate pair, which JSON can hold, could not be written to a file.
    return text.encode("utf-8", "replace").decode("utf-8")
