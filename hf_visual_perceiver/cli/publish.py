"""`visual-perceiver publish`."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_visual_perceiver.cli.options import ModelOption, chosen_model, required_model
from hf_visual_perceiver.utils.tables import terminal_table


if TYPE_CHECKING:
    from hf_visual_perceiver.hub.publish import Plan, Published
    from hf_visual_perceiver.hub.space.repository import PublishedSpace


def _two_places(context: typer.Context, value: Any) -> Any:  # typer takes no list[str] here on Python 3.10
    if len(value) > 2:
        raise typer.BadParameter(f"Expected a checkpoint and a repository, got {len(value)} arguments.", context)
    required_model(context, value[0] if len(value) == 2 else None)
    return value


def publish_command(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] REPO_ID",
            callback=_two_places,
            help="The checkpoint's folder (or give it with --model), and the Hub repository to publish to, namespace/name. "
            "The folder is not changed.",
        ),
    ],
    model: ModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to commit to; created if it does not exist.")] = "main",
    tag: Annotated[
        str | None, typer.Option(help="Tag for the commit; by default the next free one of v1, v2, ...")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help='Default budget of the published model, such as "K=16", "t=0.8", "K=32, t=0.8" or "full".'),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="namespace/name of a Space to create as a demo; the model's card links to it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the files, without contacting the Hub.")
    ] = False,
) -> None:
    """Publish a checkpoint on the Hub in one commit with a tag, after checking that transformers and timm load it.

    The check runs the folder's own code in a separate process, without this package, an access token or the Hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    from hf_visual_perceiver.hub.page import read_card
    from hf_visual_perceiver.hub.publish import prepare, upload
    from hf_visual_perceiver.hub.space.repository import check_space, space_files, upload_space

    *checkpoint, repo_id = places
    folder = Path(chosen_model(checkpoint[0] if checkpoint else None, model))
    # A fixed width where there is no terminal to take it from.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="hf_visual_perceiver")
    try:
        with tempfile.TemporaryDirectory(prefix="visual-perceiver-publish-") as scratch:
            stage = Path(scratch, "repository")
            stage.mkdir()
            plan = prepare(folder, repo_id, stage, budget=budget, space=space, endpoint=api.endpoint)
            _show_plan(console, plan)
            _show_files(console, repo_id, plan.sizes)
            if space:
                _show_files(console, f"the Space {space}", _by_folder(space_files(repo_id, revision)))
            if dry_run:
                console.print("Dry run: nothing was sent.")
                return
            if space:
                check_space(space, private, api)
            published = upload(plan, repo_id, private=private, revision=revision, tag=tag, api=api)
            _show_published(console, published)
            if space:
                state = f"{repo_id} is published; its card points to the Space. Run the same command to continue."
                license = str(read_card(plan.stage / "README.md").data.to_dict()["license"])
                files = space_files(repo_id, published.commit, license)
                _show_space(
                    console, upload_space(files, space, f"Show {published.tag}", state, private=private, api=api)
                )
    except KeyboardInterrupt as interrupt:
        # The message names the interrupted step and what is left to do.
        print(f"error: {str(interrupt) or 'interrupted. Run the same command to try again.'}", file=sys.stderr)
        raise typer.Exit(130) from None


def _show_plan(console: Console, plan: "Plan") -> None:
    ways = ", ".join(f"{way} ({difference:.1g})" for way, difference in plan.differences.items())
    console.print(f"Largest logit difference between the ways of loading: {ways}.", highlight=False)
    console.print(f"Default budget: {plan.config.default_budget.short(plan.config.knobs)}.", highlight=False)


def _show_files(console: Console, where: str, sizes: dict[str, int]) -> None:
    rows = [[name, _bytes(size)] for name, size in [*sizes.items(), ("all", sum(sizes.values()))]]
    console.print(terminal_table(f"to {where}", ["file", "size"], rows, ends=[len(sizes) - 1]))


def _show_published(console: Console, published: "Published") -> None:
    done = "Published" if published.changed else "Nothing changed since"
    seen = ", private" if published.private else ""
    lines = f"""{done} {published.tag} (commit {published.commit[:7]}{seen}): {published.url}

    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(
        "{published.repo_id}", revision="{published.tag}", trust_remote_code=True
    )

    import hf_visual_perceiver, timm
    model = timm.create_model("hf-hub:{published.repo_id}@{published.tag}", pretrained=True)"""
    console.print(lines, markup=False, highlight=False, soft_wrap=True)


def _show_space(console: Console, space: "PublishedSpace") -> None:
    done = "Published the Space" if space.changed else "Nothing changed in the Space"
    token = (
        "The Space is private: to read a private model, it needs a token in its secret HF_TOKEN."
        if space.private
        else ""
    )
    console.print(
        f"{done} (commit {space.commit[:7]}): {space.url}", token, markup=False, highlight=False, soft_wrap=True
    )


def _by_folder(files: dict[str, bytes]) -> dict[str, int]:
    """Sizes of the files at the top, and of each folder as a whole."""
    sizes: dict[str, int] = {}
    for name, data in files.items():
        top, slash, _ = name.partition("/")
        sizes[top + slash] = sizes.get(top + slash, 0) + len(data)
    return sizes


def _bytes(size: int) -> str:
    if size < 1_000:
        return f"{size} B"
    return f"{size / 1e3:,.1f} kB" if size < 1_000_000 else f"{size / 1e6:,.2f} MB"
