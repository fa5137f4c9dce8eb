"""huggingface_hub's errors in one line, without tokens and signed addresses, with the state that a failed step leaves behind."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import logging as hub_logging


QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")  # of an address, which may be its signature


class HubError(OSError):
    """A step of a publication failed; the message says why and what the state is."""


@contextmanager
def hub_step(doing: str, state: str, api: HfApi) -> Iterator[None]:
    """Turn an error inside into a `HubError`, and an interrupt into a `KeyboardInterrupt` with a message.

    Args:
        doing: The current step, such as "creating the repository", for the message.
        state: What is on the Hub if the step fails, and what to do then.
        api: Hub client, whose token is kept out of the message.
    """
    verbosity = hub_logging.get_verbosity()
    # Its warnings name addresses that are signed, which makes them secrets.
    hub_logging.set_verbosity_error()
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted while {doing}. {state}") from None
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        # Its upload threads wrap what happened, whose reason is the cause.
        reason: BaseException = error
        while isinstance(reason, RuntimeError) and reason.__cause__ is not None:
            reason = reason.__cause__
        text = " ".join(str(reason).split()) or type(reason).__name__
        # No chain: the errors below carry requests with their headers.
        raise HubError(f"{without_secrets(text, api)} (while {doing}). {state}") from None
    finally:
        hub_logging.set_verbosity(verbosity)


def without_secrets(text: str, api: HfApi) -> str:
    """The text with any token of this user replaced by stars, and addresses without their query string."""
    for token in (api.token, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "***")
    return QUERY.sub(r"\1", text)
