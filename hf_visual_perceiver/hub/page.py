"""Adapt a checkpoint's card for its page on the Hub: with its repository id, examples and ways to run it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard


# Images in this folder of a checkpoint become the examples of the Hub's widget.
EXAMPLES = "examples"
PICTURES = {".png", ".jpg", ".jpeg"}
SECTION = "On the Hub"
REQUIRED = ("pipeline_tag", "library_name", "license")


def read_card(path: Path) -> ModelCard:
    """Read a card and check that it has the metadata that the Hub's page needs.

    Raises:
        ValueError: If there is no card, or its metadata cannot be read, are incomplete or name another task.
    """
    if not path.is_file():
        raise ValueError(
            f"Expected a model card at {path}; `visual-perceiver evaluate --model {path.parent} --write-card` writes one."
        )
    try:
        # Decoded from bytes, so that line endings are kept.
        card = ModelCard(path.read_bytes().decode())
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read the metadata of {path}: {' '.join(str(error).split())}") from error
    metadata = card.data.to_dict()
    for key in REQUIRED:
        if not metadata.get(key):
            raise ValueError(
                f"Expected the metadata of {path} to have `{key}`; it has {', '.join(metadata) or 'none'}."
            )
    if metadata["pipeline_tag"] != "image-classification":
        raise ValueError(
            f"Expected `pipeline_tag` of {path} to be image-classification, got {metadata['pipeline_tag']!r}."
        )
    return card


def hub_card(card: ModelCard, folder: Path, config: Any, repo_id: str, url: str, space: str | None = None) -> str:
    """Return the text of the card for the repository `repo_id`.

    In code examples the folder's name is replaced by the repository's. Images in `examples/` become the widget's
    examples unless the card has some. A section is added on the model's default budget and on how to run it without a
    widget.

    Args:
        card: The folder's card. Its text may already have that section, from an earlier publication.
        folder: The checkpoint's folder.
        config: The config to be published.
        repo_id: Id of the repository on the Hub.
        url: URL of the repository's page.
        space: Id of a Space that shows the model, if there is one.
    """
    examples = sorted(p for p in (folder / EXAMPLES).glob("*") if p.suffix.lower() in PICTURES)
    if examples and not card.data.get("widget"):
        card.data["widget"] = [
            {"src": f"{url}/resolve/main/{EXAMPLES}/{p.name}", "example_title": _title(p)} for p in examples
        ]
    text = card.text
    for name in dict.fromkeys((card.data.get("model_name"), folder.resolve().name)):
        if name:
            text = text.replace(f'("{name}"', f'("{repo_id}"')
            text = text.replace(
                f'("local-dir:{name}", pretrained=True)  # or hf-hub:', f'("hf-hub:{repo_id}", pretrained=True)'
            )
            text = text.replace(f"`{name}` is this folder, or its id on the Hub. ", "")
    if arguments := _full_arguments(config):
        text = text.replace("full = model(**inputs).logits", f"full = model(**inputs, {arguments}).logits")
    text = re.sub(rf"^## {SECTION}\n.*?(?=^## |\Z)", "", text, flags=re.M | re.S)
    section = _section(config, url, space)
    where = re.search(r"^## Training$", text, flags=re.M)
    at = where.start() if where else len(text)
    text = f"{text[:at].rstrip()}\n\n{section}\n\n{text[at:]}".rstrip() + "\n"
    return f"---\n{card.data.to_yaml()}\n---\n\n{text.lstrip()}"


def _full_arguments(config: Any) -> str:
    """The arguments that select the full network: the knobs whose default in the config is another value."""
    stored = config.knobs_for()
    return ", ".join(f"{name}={_code(value)}" for name, value in config.resolve().items() if stored[name] != value)


def _code(value: Any) -> str:
    """The value of a knob as Python code."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_code, value))}]"
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _section(config: Any, url: str, space: str | None) -> str:
    host = "/".join(url.split("/")[:3])
    shown = (
        f"The Space [{space}]({host}/spaces/{space}) demonstrates this model, with sliders for the budget.\n"
        if space
        else ""
    )
    arguments = _full_arguments(config)
    whole = f"\n`{arguments}` selects the full network." if arguments else ""
    budgets, adaptive = config.budgets(), config.adaptive_budgets()
    some = {**budgets[2 * len(budgets) // 3].kwargs, **(adaptive[len(adaptive) // 2].kwargs if adaptive else {})}
    parameters = json.dumps(some)
    uses = f"the budget {config.default_budget.short(config.knobs)}" if arguments else "the full network"
    knobs = " and ".join(f"`{name}`" for name in config.knobs.values())
    stored = f" ({knobs} in config.json)" if knobs else ""
    takes = " and takes a budget with each request" if knobs else ""
    return f"""## {SECTION}

By default, this model uses {uses}{stored}.{whole}

The Hub's hosted widget does not run models with their own code, and cannot set a budget.
{shown}On an Inference Endpoint, `handler.py` serves the model{takes}:

```bash
curl "$ENDPOINT_URL" -H "Authorization: Bearer $HF_TOKEN" -H "Content-Type: application/json" \\
  -d '{{"inputs": "AN IMAGE IN BASE64", "parameters": {parameters}}}'
```

It answers `[{{"label": ..., "score": ..., "{config.unit}_used": ...}}, ...]`."""


def _title(path: Path) -> str:
    """The title of an example image: `003_airplane.png` becomes "airplane"."""
    return re.sub(r"^\d+[_-]", "", path.stem).replace("_", " ")
