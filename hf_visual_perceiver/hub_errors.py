"""What went wrong on the way to the Hub, in one line that says what to do and in which state things are."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging


class HubError(OSError):
    """A step of a publication failed; the message says why and what the state is."""


@contextmanager
def hub_step(doing: str, state: str, api: HfApi) -> Iterator[None]:
    """Turn what fails inside into a `HubError`, or, for an interrupt, into a `KeyboardInterrupt` with a message.

    Args:
        doing: What is being done, as in "while creating the repository".
        state: How things are if it fails, and what to do then.
        api: Its token is kept out of the message.
    """
    verbosity = hub_logging.get_verbosity()
    # Its warnings name addresses that are signed, which makes them secrets.
    hub_logging.set_verbosity_error()
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted while {doing}. {state}") from None
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        message = f"{explain(error, api.endpoint)}, while {doing}. {state}"
        # No chain: the errors below carry requests with their headers.
        raise HubError(without_token(message, api)) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def explain(error: BaseException, endpoint: str) -> str:
    """Why a request failed, without addresses and headers.

    Example:
        >>> explain(OSError(errno.ENOSPC, "No space left on device"), "https://huggingface.co")
        'no space left on this disk'
    """
    # huggingface_hub wraps what happens in its upload threads.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in: run `hf auth login`, or set HF_TOKEN to a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub cannot be reached"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error)
    if isinstance(error, HTTPError):
        return f"the connection to {endpoint} failed ({type(error).__name__})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on this disk"
    if isinstance(error, (KeyError, TypeError)):
        return f"the Hub's answer is not understood ({error!r})"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _explain_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:200]
    reason = f" ({status}{f': {said}' if said else ''})"
    if status == 401:
        return f"the Hub does not accept the token{reason}: run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token has no right to do this{reason}: it needs to be one that may write there"
    if status == 404:
        return f"there is no such repository, or the token may not see it{reason}"
    if status in (409, 412):
        return f"something else is there already{reason}"
    if status == 429:
        return f"too many requests{reason}: wait a few minutes"
    if status >= 500:
        return f"the Hub failed{reason}: try again later"
    return f"the Hub refused the request{reason}"


def without_token(text: str, api: HfApi) -> str:
    """The text with any token of this user replaced by stars."""
    for token in (api.token, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "***")
    return text
