"""A griffe extension for `make docs`: sections that are called "Example:" are examples, as those called "Examples:" are."""

import re
from typing import Any

from griffe import Extension, Object


class ExamplesSection(Extension):
    """Renames the heading, for the parser of Google's style knows the plural alone."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
