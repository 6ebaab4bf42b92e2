"""`aidocks models`: the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aidocks.cli.options import Json, Local, Url, connect
from aidocks.cli.output import manner, out, print_json, print_text, remark

if TYPE_CHECKING:
    from aidocks.models.manifest import ModelInfo
    from aidocks.models.registry import Registry

app = typer.Typer(no_args_is_help=True, help="List, import and delete models.", rich_markup_mode="rich")

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Name in the registry.", show_default=False)]


@app.command("list")
def list_models(local: Local = False, json: Json = False, url: Url = None) -> None:
    """List the models of the registry."""
    if local:
        listed = _registry().list()
    else:
        with connect(url) as client:
            listed = client.models()
    if manner.json:
        print_json([info.model_dump(mode="json") for info in listed])
    elif not listed:
        remark("The registry is empty. `aidocks models import DIRECTORY NAME` puts a model there.")
    else:
        from aidocks.cli.render import table_of

        out().print(table_of([_row(info) for info in listed]), soft_wrap=True)


@app.command("show")
def show_model(model: Name, local: Local = False, json: Json = False, url: Url = None) -> None:
    """Show where a model comes from and what was measured: its manifest."""
    if local:
        manifest = _registry().manifest(model)
    else:
        with connect(url) as client:
            manifest = client.model(model)
    document = manifest.model_dump(mode="json")
    if manner.json:
        print_json(document)
        return
    from aidocks.cli.render import fact_table, result_view

    request, metrics, files, _ = (document.pop(name) for name in ("spec", "metrics", "files", "sections"))
    for part in (*result_view(metrics), "[bold]request[/]", fact_table(request)):
        out().print(part, soft_wrap=True)
    out().print("[bold]model[/]")
    for part in result_view(document | {"files": len(files)}):
        out().print(part, soft_wrap=True)


@app.command("files")
def list_files(model: Name, local: Local = False, json: Json = False, url: Url = None) -> None:
    """List a model's files."""
    if local:
        root = _registry().path(model)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        rows = [{"path": str(path.relative_to(root)), "bytes": path.stat().st_size} for path in paths]
    else:
        with connect(url) as client:
            rows = [file.model_dump(mode="json", include={"path", "bytes"}) for file in client.files(model)]
    if manner.json:
        print_json(rows)
        return
    from aidocks.cli.render import table_of

    out().print(table_of(rows), soft_wrap=True)


@app.command("path")
def print_path(model: Name) -> None:
    """Print the directory of a model in this machine's registry, for other programs."""
    print_text(str(_registry().path(model)))


@app.command("import")
def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A directory in Hugging Face layout, that of a LoRA adapter, or a .gguf file.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name for the model.", show_default=False)],
    json: Json = False,
) -> None:
    """Copy a model of this machine into its registry."""
    from aidocks.cli.importing import import_into
    from aidocks.settings import Settings

    info = import_into(_registry(), name, source, code=name in Settings().remote_code_models)
    if manner.json:
        print_json(info.model_dump(mode="json"))
    else:
        print_text(f"{info.name} {info.path}")


@app.command("download")
def download_model(
    model: Name,
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where the model's directory is to appear.")
    ] = Path("."),
    json: Json = False,
    url: Url = None,
) -> None:
    """Copy a model from the service; a broken download goes on where it was."""
    with connect(url) as client:
        path = client.download(model, directory)
    print_json({"model": model, "path": str(path)}) if manner.json else print_text(str(path))


@app.command("delete")
def delete_model(model: Name, local: Local = False, json: Json = False, url: Url = None) -> None:
    """Delete a model from the registry."""
    if local:
        _registry().delete(model)
    else:
        with connect(url) as client:
            client.delete_model(model)
    print_json({"deleted": model}) if manner.json else print_text(f"{model} deleted")


def _row(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "operation": info.operation,
        "architecture": (info.architecture or "").removesuffix("ForCausalLM"),
        "parameters": info.parameters,
        "bytes": info.bytes,
        "created": f"{info.created_at.astimezone():%m-%d %H:%M}",
    }


def _registry() -> Registry:
    from aidocks.models.registry import Registry
    from aidocks.settings import Settings

    return Registry(Settings().models_dir)
