"""huggingface_hub's errors in one line, without tokens and signed URLs, with the state that a failed step leaves."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import logging as hub_logging


QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")  # the query string of a URL may be its signature


class HubError(OSError):
    """A step of a publication failed; the message says why and what the state is."""


@contextmanager
def hub_step(doing: str, state: str, api: HfApi) -> Iterator[None]:
    """Turn errors in the body into a `HubError`, and an interrupt into a `KeyboardInterrupt` with a message.

    Args:
        doing: The current step, such as "creating the repository", for the message.
        state: The state of the Hub if the step fails, and what to do then, for the message.
        api: Hub client, whose token is kept out of the message.
    """
    verbosity = hub_logging.get_verbosity()
    # huggingface_hub's warnings contain signed URLs, which are secrets.
    hub_logging.set_verbosity_error()
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted while {doing}. {state}") from None
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        # huggingface_hub's upload threads wrap the original error, which is the cause.
        reason: BaseException = error
        while isinstance(reason, RuntimeError) and reason.__cause__ is not None:
            reason = reason.__cause__
        text = " ".join(str(reason).split()) or type(reason).__name__
        # Not chained: the original errors carry requests with their headers.
        raise HubError(f"{without_secrets(text, api)} (while {doing}). {state}") from None
    finally:
        hub_logging.set_verbosity(verbosity)


def without_secrets(text: str, api: HfApi) -> str:
    """Replace any token of this user by stars, and remove the query strings of URLs."""
    for token in (api.token, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "***")
    return QUERY.sub(r"\1", text)
