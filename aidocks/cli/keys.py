"""`aidocks keys`, `aidocks audit`: who may use the service, and what was done with it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aidocks.cli.options import Json, Url, connect
from aidocks.cli.output import manner, out, print_json, print_text, remark

if TYPE_CHECKING:
    from aidocks.access.keys import ApiKey

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.", rich_markup_mode="rich")

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


@app.command("create")
def create_key(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Whose it is, or what for.", show_default=False)
    ],
    scope: Annotated[
        str, typer.Option(metavar="SCOPE", help="read; submit, which includes it; or admin: everything.")
    ] = "submit",
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="Refused after that time: 90d, 12h, 30m.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=0, help="Requests a minute; 0: any number.")
    ] = None,
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Unfinished jobs at the same time.")] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """Make an API key and print it. It cannot be printed again."""
    expires_in_s = None if expires is None else _seconds(expires)
    with connect(url) as client:
        made = client.create_key(
            name,
            (scope,),
            expires_in_s=expires_in_s,
            requests_per_minute=requests_per_minute,
            max_jobs=max_jobs,
        )
    if manner.json:
        print_json(made.model_dump(mode="json"))
        return
    print_text(made.key)
    remark(
        f"Key {made.id} of {made.name}. Keep it now: only a hash of it is stored. Its holder sets AIDOCKS_API_KEY."
    )


@app.command("list")
def list_keys(json: Json = False, url: Url = None) -> None:
    """List the API keys, newest first, also those that are refused."""
    with connect(url) as client:
        listed = client.keys()
    if manner.json:
        print_json([key.model_dump(mode="json") for key in listed])
    elif not listed:
        remark("There are no keys. `aidocks keys create NAME` makes one.")
    else:
        from aidocks.cli.render import table_of

        out().print(table_of([_row(key) for key in listed]), soft_wrap=True)


@app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="Id of the key.", show_default=False)],
    json: Json = False,
    url: Url = None,
) -> None:
    """Let an API key be refused from now on. Its jobs go on."""
    with connect(url) as client:
        client.revoke_key(key)
    print_json({"revoked": key}) if manner.json else print_text(f"{key} revoked")


def audit(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Entries to show.")] = 50,
    before: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Only entries before the one of this number.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="ID", help="Only what was done with the key of this id.")
    ] = None,
    json: Json = False,
    url: Url = None,
) -> None:
    """List who changed what through the service, newest first."""
    with connect(url) as client:
        entries = client.audit(limit, before, key)
    if manner.json:
        print_json([entry.model_dump(mode="json") for entry in entries])
    elif not entries:
        remark("Nothing was done yet.")
    else:
        from aidocks.cli.render import table_of

        rows = [entry.model_dump(mode="json", exclude={"request_id"}) for entry in entries]
        out().print(table_of([_with_time(row) for row in rows]), soft_wrap=True)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text.strip().lower())
    if found is None or not int(found[1]):
        raise typer.BadParameter(f"{text!r} is no time: such as 90d, 12h or 30m.", param_hint="--expires")
    return int(found[1]) * _UNITS[found[2]]


def _row(key: ApiKey) -> dict[str, Any]:
    state = "valid" if key.is_valid() else "revoked" if key.revoked_at else "expired"
    return {
        "id": key.id,
        "name": key.name,
        "scopes": ", ".join(key.scopes),
        "state": state,
        **key.limits.model_dump(exclude_none=True),
        **{
            name: f"{moment.astimezone():%Y-%m-%d %H:%M}"
            for name in ("expires", "last_used")
            if (moment := getattr(key, f"{name}_at")) is not None
        },
    }


def _with_time(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": str(row.pop("number")), "done_at": row.pop("time")} | row
