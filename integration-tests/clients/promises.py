"""What the clients' scripts share: each promise is a function, and a line when it is kept."""

from collections.abc import Callable
from typing import Any

PROMPT = "the river runs"
MESSAGES = [{"role": "user", "content": "what is a river?"}]


def kept(promise: Callable[..., Any], *arguments: Any) -> Any:
    """Runs one promise and says so; a failed assertion ends the script."""
    result = promise(*arguments)
    print(f"ok {promise.__name__}", flush=True)
    return result


def refused(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """Returns the error that `call` is refused with, which is of `kind` itself."""
    try:
        call()
    except kind as error:
        assert type(error) is kind, type(error)
        return error
    raise AssertionError(f"not refused with {kind.__name__}")
