"""`aidocks embed` and `aidocks rerank`: vectors of texts, and passages in order."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aidocks.cli.options import Json, Url, connect
from aidocks.cli.output import manner, out, print_json, print_text, remark

if TYPE_CHECKING:
    from aidocks.specs.retrieve import EmbedAnswer, RerankAnswer

#: Of a request; a long file is several.
_TEXTS = 256

Embed = Callable[[Sequence[str]], "EmbedAnswer"]
Rerank = Callable[[Sequence[str]], "RerankAnswer"]


class Role(StrEnum):
    """Which of a model's prompts is put before a text."""

    query = "query"
    passage = "passage"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Registry name, or a directory below an allowed root.", show_default=False
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--file", metavar="FILE", help="A text of each line that is not empty; '-' reads standard input."
    ),
]
Here = Annotated[bool, typer.Option("--local", help="Compute in this process, without a service.")]


def embed(
    model: Model,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="The texts.", show_default=False)
    ] = None,
    file: File = None,
    role: Annotated[
        Role | None, typer.Option("--role", help="Which of the model's prompts is put before each text.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Another prompt, in place of the model's.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", min=1, help="Cut the vectors to so many values.")
    ] = None,
    local: Here = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """Print a vector of each text, as a line of JSON."""
    given = _given_texts(texts, file)
    count = tokens = 0
    document: dict[str, object] = {}
    with _embedder(model, role, prompt, dimensions, local, url) as ask:
        for begin in range(0, len(given), _TEXTS):
            answer = ask(given[begin : begin + _TEXTS])
            count, tokens = count + len(answer.embeddings), tokens + answer.usage.total_tokens
            if manner.json:
                known = document.get("embeddings", [])
                assert isinstance(known, list)
                document = answer.model_dump(mode="json") | {"embeddings": [*known, *answer.embeddings]}
                continue
            for vector in answer.embeddings:
                print_text(json_format.dumps(vector))
    if manner.json:
        print_json(document | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    else:
        remark(f"{count} vector{'' if count == 1 else 's'} of {answer.dimensions} values, {tokens} tokens")


def rerank(
    model: Model,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The question.", show_default=False)],
    documents: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="The passages.", show_default=False)
    ] = None,
    file: File = None,
    top_n: Annotated[int | None, typer.Option("--top-n", min=1, help="So many of the best alone.")] = None,
    raw_scores: Annotated[
        bool, typer.Option("--raw-scores", help="Scores as the model makes them, not between 0 and 1.")
    ] = False,
    local: Here = False,
    json: Json = False,
    url: Url = None,
) -> None:
    """Print passages in the order in which they answer a query: score, place in the input, text."""
    given = _given_texts(documents, file)
    with _reranker(model, query, top_n, raw_scores, local, url) as ask:
        answer = ask(given)
    if manner.json:
        print_json(answer.model_dump(mode="json", exclude_none=True))
        return
    for one in answer.results:
        out().print(
            f"{one.relevance_score:.4f}  {one.index}  {given[one.index]}", markup=False, soft_wrap=True
        )


def _given_texts(texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """Return the texts of the arguments and of a file, or of standard input where there are none of either."""
    from aidocks.errors import InvalidSpec

    given = list(texts or ())
    if file is None and not given and not sys.stdin.isatty():
        file = Path("-")
    if file is not None:
        try:
            data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            # Not all that Unicode takes for the end of a line: texts hold such characters.
            lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSpec(f"{file} cannot be read: {error}.", field="file", value=str(file)) from None
        given += [line for line in lines if line.strip()]
    if not given:
        raise InvalidSpec(
            "There is no text.", field="texts", hint="Write some, or name a file of them with --file."
        )
    return given


@contextmanager
def _embedder(
    model: str, role: Role | None, prompt: str | None, dimensions: int | None, local: bool, url: str | None
) -> Iterator[Embed]:
    if not local:
        with connect(url) as client:
            yield lambda texts: client.embed(
                model, texts, role=role.value if role else None, prompt=prompt, dimensions=dimensions
            )
        return
    from aidocks.retrieval.here import RetrievalHere
    from aidocks.specs.read import build_spec
    from aidocks.specs.retrieve import EmbedRequest

    _refuse_url(url)
    here = RetrievalHere()
    fields = {"role": role, "prompt": prompt, "dimensions": dimensions}
    given = {name: value for name, value in fields.items() if value is not None}
    yield lambda texts: here.embed(build_spec(EmbedRequest, {"model": model, "input": list(texts)} | given))


@contextmanager
def _reranker(
    model: str, query: str, top_n: int | None, raw_scores: bool, local: bool, url: str | None
) -> Iterator[Rerank]:
    if not local:
        with connect(url) as client:
            yield lambda texts: client.rerank(model, query, texts, top_n=top_n, raw_scores=raw_scores)
        return
    from aidocks.retrieval.here import RetrievalHere
    from aidocks.specs.read import build_spec
    from aidocks.specs.retrieve import RerankRequest

    _refuse_url(url)
    here = RetrievalHere()
    fields = {"model": model, "query": query, "raw_scores": raw_scores} | ({"top_n": top_n} if top_n else {})
    yield lambda texts: here.rerank(build_spec(RerankRequest, fields | {"documents": list(texts)}))


def _refuse_url(url: str | None) -> None:
    if url is not None:
        raise typer.BadParameter("--local computes here and now: --url needs a service.")
