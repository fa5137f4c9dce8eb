"""A checkpoint's card as the Hub's page shows it: under its id there, with examples, and with ways to run it."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_visual_perceiver.modeling import VisualPerceiverConfig


# Pictures in this folder of a checkpoint are the examples of the Hub's widget.
EXAMPLES = "examples"
PICTURES = {".png", ".jpg", ".jpeg"}
SECTION = "On the Hub"
REQUIRED = ("pipeline_tag", "library_name", "license")


def read_card(path: Path) -> ModelCard:
    """A card whose metadata say what the Hub's page needs.

    Raises:
        ValueError: If there is no card, huggingface_hub cannot read its metadata, or they lack something.
    """
    if not path.is_file():
        raise ValueError(
            f"Expected a model card at {path}; `visual-perceiver evaluate --model {path.parent} --write-card` writes one."
        )
    try:
        # Line ends stay as they are.
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


def hub_card(
    card: ModelCard, folder: Path, config: VisualPerceiverConfig, repo_id: str, url: str, space: str | None = None
) -> str:
    """The text of the card for the repository `repo_id`.

    In its code the folder's name becomes the repository's, pictures in `examples/` become the widget's examples unless the
    card has some, and a section says what the model does by default, and how to run it where there is no widget.

    Args:
        card: The folder's card. Its text may already have that section, from an earlier publication.
        folder: The checkpoint.
        config: The config to be published.
        repo_id: On the Hub.
        url: Address of the repository's page.
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
    if config.operating_point() != (config.num_queries, None):
        full = f"full = model(**inputs, num_active_queries={config.num_queries}, dqs_threshold=1).logits"
        text = text.replace("full = model(**inputs).logits", full)
    text = re.sub(rf"^## {SECTION}\n.*?(?=^## |\Z)", "", text, flags=re.M | re.S)
    section = _section(config, url, space)
    where = re.search(r"^## Training$", text, flags=re.M)
    at = where.start() if where else len(text)
    text = f"{text[:at].rstrip()}\n\n{section}\n\n{text[at:]}".rstrip() + "\n"
    return f"---\n{card.data.to_yaml()}\n---\n\n{text.lstrip()}"


def describe_point(config: VisualPerceiverConfig) -> str:
    """The operating point that a config carries, in words.

    Example:
        >>> describe_point(VisualPerceiverConfig(num_active_queries=16, dqs_threshold=0.8))
        'the first 16 of 64 queries, less those that selection drops at t = 0.8'
    """
    K, t = config.operating_point()
    queries = f"all {K} queries" if config.num_queries == K else f"the first {K} of {config.num_queries} queries"
    return queries if t is None else f"{queries}, less those that selection drops at t = {t:g}"


def _section(config: VisualPerceiverConfig, url: str, space: str | None) -> str:
    host = "/".join(url.split("/")[:3])
    shown = (
        f"The Space [{space}]({host}/spaces/{space}) shows this one, with the budget on a slider.\n" if space else ""
    )
    Q = config.num_queries
    whole = (
        ""
        if config.operating_point() == (Q, None)
        else f"\n`num_active_queries={Q}, dqs_threshold=1` is the whole network."
    )
    parameters = f'{{"num_active_queries": {max(1, Q // 4)}, "dqs_threshold": 0.8}}'
    return f"""## {SECTION}

Unless told otherwise, this model uses {describe_point(config)} (`num_active_queries` and `dqs_threshold` in config.json).{whole}

The Hub's hosted widget does not run models that bring their own code, and has no place for a budget.
{shown}As an Inference Endpoint the model is served by `handler.py`, which takes the budget with each request:

```bash
curl "$ENDPOINT_URL" -H "Authorization: Bearer $HF_TOKEN" -H "Content-Type: application/json" \\
  -d '{{"inputs": "AN IMAGE IN BASE64", "parameters": {parameters}}}'
```

It answers `[{{"label": ..., "score": ..., "queries_used": ...}}, ...]`."""


def _title(path: Path) -> str:
    """`003_airplane.png` is an airplane."""
    return re.sub(r"^\d+[_-]", "", path.stem).replace("_", " ")
