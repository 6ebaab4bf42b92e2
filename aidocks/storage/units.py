"""What a unit needs is brought to the node that runs it; what it wrote is kept where the others find it.

Units name what they read by path, whatever node they run on. So the paths in a unit's fields say what to bring:
models, data sets, files of the job's workspace, models of the hub. What a unit wrote is what its workspace has more
than before, and what it says that it wrote elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from aidocks.plan import Unit, WritingUnit
from aidocks.storage import shared
from aidocks.storage.files import SharedFiles, files_below
from aidocks.storage.keys import is_below
from aidocks.storage.sweep import sweep_now_and_then

ResultT = TypeVar("ResultT", bound=BaseModel)
#: Of a job's result, files of this size are only brought where they are named: weights, mostly.
LARGE_BYTES = 1 << 20
#: What operations stage below a workspace; see `aidocks.plan.PlanContext`.
_RESULT = "model"
#: The field of a unit that only writes which says where.
_WRITTEN_TO = "directory"


def run_shared(unit: Unit[ResultT], workspace: Path, run: Callable[[], ResultT]) -> ResultT:
    """Run a unit between bringing what it needs and keeping what it wrote. Where nothing is shared, just run it.

    Args:
        unit: What is run.
        workspace: The job's.
        run: Runs it.

    Raises:
        CorruptCheckpoint: What it needs is damaged or gone.
        InsufficientDisk: What it needs does not fit on this node.
        ServiceUnreachable: The storage does not answer.
        Exception: Whatever the unit raised.
    """
    here = shared(workspace)
    if here is None:
        return run()
    named = list(named_paths(unit))
    with ExitStack() as held:
        held.enter_context(here.hold(workspace, together=True))
        bring_inputs(here, named, held)
        bring_workspace(here, workspace, named)
        before = _state(workspace)
        result = run()
        written = [path for path, state in _state(workspace).items() if before.get(path) != state]
        outputs = {file.path: file.sha256 for file in unit.outputs(result)}
        elsewhere = [path for path in outputs if is_below(path, here.home) and path not in before]
        here.keep({*written, *elsewhere}, outputs)
    sweep_now_and_then(here)
    return result


def named_paths(unit: Unit[Any]) -> Iterator[Path]:
    """Yield every path that a unit's fields name, at any depth, but for where a unit that only writes does so."""
    for name in type(unit).model_fields:
        if name != _WRITTEN_TO or not isinstance(unit, WritingUnit):
            yield from _paths_in(getattr(unit, name))


def bring_inputs(here: SharedFiles, named: Iterable[Path], held: ExitStack) -> None:
    """Bring the models, data sets, checkpoints and scans among paths; what is of the hub, from there.

    Args:
        here: What is shared.
        named: Paths, of which the others are passed over.
        held: Until it ends, what was brought is not removed to make room.
    """
    from aidocks.storage.datasets import bring_dataset
    from aidocks.storage.models import SharedModels

    home = here.home
    models = SharedModels(here, home / "models")
    # Many paths lie in one model: it is brought once.
    for place in dict.fromkeys(_place(path, home) for path in named):
        match place.relative_to(home).parts if is_below(place, home) else ():
            case ():
                _bring_from_hub(place)
            case ("models", name) if models.exists(name):
                held.enter_context(models.in_use(name))
                models.bring(name)
            case ("datasets", name):
                bring_dataset(here, name)
            case ("checkpoints", _, _):
                here.bring_tree(place)
            case ("cache", "scans", _):
                here.bring(here.entries(place))


def bring_workspace(here: SharedFiles, workspace: Path, named: Iterable[Path]) -> None:
    """Bring what was kept of a job's workspace: all but large files of its result that nobody names.

    Args:
        here: What is shared.
        workspace: The job's.
        named: Files, or directories with all that is in them.
    """
    inside = {path for path in named if path.is_relative_to(workspace)} - {workspace}
    result = workspace / _RESULT
    # The others of this node want the same files: one brings them, the others find them.
    with here.hold(workspace / ".bring"):
        wanted = {
            path: entry
            for path, entry in here.entries(workspace).items()
            if entry.bytes < LARGE_BYTES
            or not path.is_relative_to(result)
            or any(path.is_relative_to(one) for one in inside)
        }
        here.bring(wanted)


def _place(path: Path, home: Path) -> Path:
    """Return what is brought for a path: the model, the data set, the checkpoint or the scan that it lies in."""
    if not is_below(path, home):
        return path
    parts = path.relative_to(home).parts
    return home.joinpath(*parts[: 2 if parts[0] in ("models", "datasets") else 3])


def _paths_in(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        if value.is_absolute():
            yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _paths_in(one)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for one in value:
            yield from _paths_in(one)


def _state(workspace: Path) -> dict[Path, tuple[int, int, int]]:
    found = {}
    for path in files_below(workspace):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # removed while we looked
        found[path] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def _bring_from_hub(path: Path) -> None:
    """Download what a path in the hub library's cache means, where this node does not have it.

    Raises:
        HubRefused: The hub does not give it, or this node is not to ask it.
    """
    if path.is_file():
        return
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return
    if not is_below(path, Path(HF_HUB_CACHE)):
        return
    parts = path.relative_to(HF_HUB_CACHE).parts
    kind, _, repo = parts[0].partition("--")
    if len(parts) < 3 or parts[1] != "snapshots" or kind not in ("models", "datasets"):
        return
    from aidocks.checkpoints.layout import weights_present
    from aidocks.models.hub import explaining, fetch, find_token

    repo = repo.replace("--", "/")
    if kind == "models":
        # Of a directory that is there a part may be missing: a download that was stopped.
        if not weights_present(Path(HF_HUB_CACHE, *parts[:3])):
            fetch(f"{repo}@{parts[2]}", find_token())
    elif len(parts) > 3 and not path.exists():
        from huggingface_hub import hf_hub_download

        with explaining(repo, "download", "data set"):
            hf_hub_download(
                repo, "/".join(parts[3:]), revision=parts[2], repo_type="dataset", token=find_token() or False
            )
