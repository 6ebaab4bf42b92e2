"""The model hub: downloading a model's safe files, uploading a model that was made here.

The token comes from the environment (``HF_TOKEN``) or from the hub library's own store, on the machine that
talks to the hub, at the moment it does: it is never part of a spec, a unit, an event or a log line.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import UNFINISHED
from aidocks.checkpoints.layout import CONFIG_FILE, read_json_object, weights_present
from aidocks.errors import HubRefused, HubUnavailable, UnknownModel, UnsafeCheckpoint
from aidocks.models.manifest import MANIFEST_FILE
from aidocks.models.resolve import HUB_DUPLICATES, HUB_FILES, HUB_TASKS, parse_hub_id
from aidocks.plan import PlanContext, Stage, Unit, UnitContext

#: What a repository of the hub is.
HubKind = Literal["model", "data set"]
#: Welcome, but a model is complete without them.
_PAPERS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_WITHOUT_HUB = {
    "model": "import a directory: aidocks models import.",
    "data set": "add a file that is here: aidocks datasets add.",
}
_GET_ACCESS = "Create a token in your account's settings on the hub, and set HF_TOKEN where the service runs."


class FetchedModel(BaseModel):
    """A hub model that is on this machine now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    path: Path
    revision: str = Field(description="Commit that was downloaded.")


class PublishedModel(BaseModel):
    """A model that was uploaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo_id: str
    url: str


class FetchModel(Unit[FetchedModel]):
    """Download one hub model into the hub library's cache, which all workers of this machine share."""

    result_type: ClassVar[type[BaseModel]] = FetchedModel

    reference: str = Field(description="org/name[@revision]")
    code: bool = Field(
        False, description="An admin allows it to bring Python code, which is downloaded, too."
    )

    @property
    def label(self) -> str:
        return self.reference

    def run(self, context: UnitContext) -> FetchedModel:
        path = fetch(self.reference, find_token(), code=self.code)
        return FetchedModel(reference=self.reference, path=path, revision=path.name)


def fetch_missing(
    references: Mapping[str, str], context: PlanContext
) -> Generator[Stage, list[FetchedModel], bool]:
    """Yield the stage that downloads what is only on the hub; return whether that was anything.

    Args:
        references: Field of the request -> model reference.
        context: Of the plan.
    """
    needs_download = context.resolver.needs_download
    missing = sorted({name for field, name in references.items() if needs_download(name, field=field)})
    if missing:
        units = (FetchModel(reference=name, code=name in context.remote_code) for name in missing)
        yield Stage("fetch", tuple(units))
    return bool(missing)


class PublishToHub(Unit[PublishedModel]):
    """Upload one model directory. Running it again uploads only what differs."""

    result_type: ClassVar[type[BaseModel]] = PublishedModel

    directory: Path = Field(description="Directory of the model, such as the registry's.")
    repo_id: str = Field(description="{trainer}/{name}")
    private: bool = Field(True, description="Make the repository private if it does not exist yet.")

    @property
    def label(self) -> str:
        return self.repo_id

    def run(self, context: UnitContext) -> PublishedModel:
        token = require_token()
        return publish(self.directory, self.repo_id, token=token, private=self.private)


def find_token() -> str | None:
    """Return the token of this machine, if it has one."""
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def require_token() -> str:
    """Return the token of this machine.

    Raises:
        HubRefused: There is none; says how to provide one.
    """
    token = find_token()
    if token is None:
        raise HubRefused(
            "Uploading to the model hub needs a token, and there is none.", field="publish", hint=_GET_ACCESS
        )
    return token


def fetch(reference: str, token: str | None, *, code: bool = False) -> Path:
    """Download a model's weights (safetensors only), configuration and tokenizer; return its directory.

    Args:
        reference: ``org/name[@revision]``.
        token: For private and gated models.
        code: Download its Python files, too; they are run only where an admin allows it.

    Raises:
        HubRefused: The hub does not give it, or cannot be reached; says what to do.
        UnsafeCheckpoint: It has no safetensors weights.
    """
    from huggingface_hub import snapshot_download

    repo, revision = parse_hub_id(reference)
    with explaining(repo, "download"):

        def download(*patterns: str, ignored: Sequence[str] = ()) -> Path:
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    token=token or False,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(ignored),
                )
            )

        # First: a model whose weights are there is taken for complete, whenever this process may end.
        told = download(CONFIG_FILE)
        revision = told.name
        if _may_have_tasks(told):
            download(*HUB_TASKS)
        path = download(*HUB_FILES, *_PAPERS, *(["*.py"] if code else []), ignored=HUB_DUPLICATES)
    if not weights_present(path):
        raise UnsafeCheckpoint(
            f"{reference} has no weights in safetensors format on the hub.",
            value=reference,
            hint="Other formats can run code; take a revision or a copy that has model.safetensors.",
        )
    return path


def _may_have_tasks(path: Path) -> bool:
    """Tell whether a model is of a kind that comes with adapters for tasks, each in a sub-directory."""
    config = path / CONFIG_FILE
    return config.is_file() and read_json_object(config).get("model_type") == "jina_embeddings_v3"


def publish(directory: Path, repo_id: str, *, token: str, private: bool) -> PublishedModel:
    """Create a model repository if there is none, and upload a model directory.

    The manifest stays here: it names this installation's paths. The card carries the provenance.

    Raises:
        HubRefused: The hub does not take it, or cannot be reached; says what to do.
    """
    from huggingface_hub import HfApi

    parse_hub_id(repo_id, "trainer")
    api = HfApi(token=token)
    with explaining(repo_id, "upload"):
        url = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=directory,
            commit_message="Upload with AIDocks",
            ignore_patterns=[MANIFEST_FILE, f"*{UNFINISHED}*", ".*"],
        )
    return PublishedModel(repo_id=repo_id, url=str(url))


@contextmanager
def explaining(repo: str, verb: str, what: HubKind = "model", *, field: str | None = None) -> Iterator[None]:
    """Turn what the hub library raises into one sentence and what to do.

    Args:
        repo: org/name
        verb: What is done with it: ``download`` or ``upload``.
        what: It is.
        field: Spec field to blame.

    Raises:
        HubRefused: The hub does not give or take it, or this machine does not ask hubs (HF_HUB_OFFLINE).
        HubUnavailable: It cannot be reached, limits requests, or failed.
        UnknownModel: It has no such revision.
    """
    import httpx
    from huggingface_hub import constants, errors

    page = _page(repo, what)

    def refused(message: str, hint: str, kind: type[HubRefused] = HubRefused) -> HubRefused:
        return kind(message, field=field, value=repo, hint=hint)

    def unreachable(offline: bool = False) -> HubRefused:
        # What the machine's owner has switched off does not come back by itself.
        kind = HubRefused if offline else HubUnavailable
        hint = f"Check the network and HF_HUB_OFFLINE, or {_WITHOUT_HUB[what]}"
        return refused(f"The hub cannot be reached for the {what} {repo}.", hint, kind)

    try:
        yield
    except errors.GatedRepoError as error:
        raise refused(
            f"{repo} is gated: its licence must be accepted before anyone may {verb} it.",
            f"Accept it at {page}, and set HF_TOKEN to a token of that account.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UnknownModel(
            f"The {what} {repo} has no such revision on the hub.",
            field=field,
            value=repo,
            hint=f"See {page}.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise refused(
            f"The hub shows no {what} {repo} to this account: it does not exist, or it is private.",
            f"Check the name; for a private {what} set HF_TOKEN. {page}",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # Raised for whatever went wrong when there is nothing in the cache to fall back on.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise refused(*_refusal(repo, verb, error.__cause__)) from error
        raise unreachable(constants.is_offline_mode()) from error
    except errors.HfHubHTTPError as error:
        raise refused(*_refusal(repo, verb, error)) from error
    except errors.OfflineModeIsEnabled as error:  # a ConnectionError, too
        raise unreachable(offline=True) from error
    except (httpx.TransportError, ConnectionError, TimeoutError) as error:
        raise unreachable() from error


def _refusal(repo: str, verb: str, error: Any) -> tuple[str, str, type[HubRefused]]:
    """Return what the hub's answer means, what to do, and whether it may pass."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"The hub does not accept the token (401) to {verb} {repo}.", _GET_ACCESS, HubRefused
    if status == 403:
        return (
            f"The token's account may not {verb} {repo} (403).",
            "Use a token with write access to that user or organisation."
            if verb == "upload"
            else "Ask its owner for access, and use a token of the account that has it.",
            HubRefused,
        )
    if status == 429:
        return (
            f"The hub limits requests (429) for {repo}.",
            "Wait a few minutes; a token raises the limit.",
            HubUnavailable,
        )
    passes = status is None or status >= 500 or status == 408
    return (
        f"The hub answered {status or 'with an error'} to the {verb} of {repo}.",
        "Try again later.",
        HubUnavailable if passes else HubRefused,
    )


def _page(repo: str, what: HubKind) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if what == 'data set' else ''}{repo}"
