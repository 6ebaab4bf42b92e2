from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.errors import InvalidSpec
from aidocks.evaluate.causal_lm import CausalLM, load
from aidocks.evaluate.objectives import PARTS, ObjectiveSource, resolve_objective, size_objective
from aidocks.evaluate.questions import Message, Preference, Question
from aidocks.evaluate.scoring import Batch, Task, context_length, load_task, plain_forward
from aidocks.evaluate.texts import TextSource
from aidocks.evaluate.tokens import Encoded, EncodedSpan, answer_tokens, beginning, encode, preference_tokens
from aidocks.specs.objective import Objective


class Letters:
    """A tokenizer whose tokens are letters, spaces and one merge: " a" is a token of its own."""

    bos_token_id = 1
    chat_template = None

    def __init__(self, *, begins: bool = False) -> None:
        self.begins = begins

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, Any]:
        ids = [2 if letter == "\0" else ord(letter) for letter in text.replace(" a", "\0")]
        return {"input_ids": [1, *ids] if self.begins and add_special_tokens else ids}


class Chatty(Letters):
    """The same with a chat template."""

    chat_template = "something"

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError

        if messages[0]["role"] == "system":
            raise TemplateError("no system role")
        text = "".join(f"<{m['role']}>{m['content']}." for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


@pytest.fixture(scope="module")
def model(stories260k: Path) -> CausalLM:
    return load(stories260k, "float32", "cpu")


def source_of(stories260k: Path, metric: str, data: str, *roots: Path, **more: Any) -> ObjectiveSource:
    source = resolve_objective(Objective(metric=metric, data=data), roots, **more)
    return size_objective(source, stories260k)


@torch.inference_mode()
def losses(task: Task, network: Any) -> dict[int, float]:
    """Loss of each item by its position."""
    forward = plain_forward(network)
    return {
        item.position: loss
        for batch in task.batches
        for item, loss in zip(batch.items, task.losses(batch, forward).tolist(), strict=True)
    }


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_answers_follow_one_space_and_take_what_merges_with_it() -> None:
    plain = Letters()
    assert answer_tokens("is", "bee", plain) == (ids("is bee"), 2)
    assert answer_tokens("is", " bee ", plain) == (ids("is bee"), 2)
    assert answer_tokens("is", "ant", plain) == ((*ids("is"), 2, *ids("nt")), 2)
    # White space at the end of the prompt belongs to the answer, as it does in the model's own texts.
    assert answer_tokens("is ", "ant", plain) == ((*ids("is"), 2, *ids("nt")), 2)
    assert answer_tokens("is\n", "bee", plain) == (ids("is\nbee"), 2)


def test_a_beginning_is_added_where_the_tokenizer_adds_it() -> None:
    assert beginning(Letters()) == ()
    assert beginning(Letters(begins=True)) == (1,)
    assert answer_tokens("is", "bee", Letters(begins=True)) == ((1, *ids("is bee")), 3)


def test_messages_go_through_the_chat_template_where_there_is_one() -> None:
    asked = (Message("user", "Hi"),)
    said = Preference(asked, (Message("assistant", "Yes"),), "No")
    whole, prompt = preference_tokens(said, said.chosen, Chatty(begins=True))
    assert (whole, prompt) == (ids("<user>Hi.<assistant>Yes."), len("<user>Hi.<assistant>"))
    whole, prompt = preference_tokens(said, said.rejected, Chatty())
    assert whole[prompt:] == ids("No.")
    assert preference_tokens(said, said.chosen, Letters()) == (ids("Hi\n\nYes"), 2)
    assert preference_tokens(Preference("Hi", "Yes", "No"), "Yes", Chatty()) == (ids("Hi Yes"), 2)
    with pytest.raises(InvalidSpec, match="no system role"):
        preference_tokens(Preference((Message("system", "Be good."), *asked), "a", "b"), "a", Chatty())


def test_answers_of_one_token_share_a_row() -> None:
    question = Question("is", ("a", "bee", "be", "a"), 1)
    encoded = encode(7, question, "accuracy", Letters(), 100)
    assert encoded.rows == (ids("is be"),)
    assert encoded.spans == (
        EncodedSpan(0, 1, (2,)),
        EncodedSpan(0, 1, ids(" bee")),
        EncodedSpan(0, 1, ids(" be")),
        EncodedSpan(0, 1, (2,)),
    )
    assert (encoded.position, encoded.gold) == (7, 1)
    assert len(encode(7, question, "log_likelihood", Letters(), 100).spans) == 1


def test_of_long_records_the_beginning_is_left_out() -> None:
    encoded = encode(0, Question("x" * 50, ("bee",), 0), "accuracy", Letters(), 10)
    assert encoded.rows == (ids("xxxxxxx be"),)
    assert encoded.spans == (EncodedSpan(0, 6, ids(" bee")),)
    encoded = encode(0, Question("x", ("y" * 50,), 0), "accuracy", Letters(), 10)
    assert encoded.rows == (ids("y" * 10),)
    assert encoded.spans == (EncodedSpan(0, 0, ids("y" * 10)),)


def test_perplexity_is_that_of_the_plain_measurement(model: CausalLM, stories260k: Path) -> None:
    source = source_of(stories260k, "perplexity", "prose", seq_length=64)
    found = losses(load_task(source, "search", model.tokenizer), model.network)
    expected = model.measure(source.text, "search", 64, source.sizes["search"])
    assert sorted(found) == list(expected.positions)
    assert expected.losses is not None
    for position, loss in zip(expected.positions, expected.losses, strict=True):
        assert found[position] == pytest.approx(loss, rel=1e-5)


@torch.inference_mode()
def test_batches_and_padding_make_no_difference(model: CausalLM, stories260k: Path, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    prompts = [
        "Once upon a time, there was a " + "very " * (i % 7) + f"big cat number {i}" for i in range(40)
    ]
    file.write_text("".join(json.dumps({"prompt": p, "attribute": "named Tom"}) + "\n" for p in prompts))
    source = source_of(stories260k, "log_likelihood", str(file), tmp_path)
    task = load_task(source, "search", model.tokenizer)
    assert any(not bool(batch.mask_BT.all()) for batch in task.batches)
    begin = beginning(model.tokenizer)
    for position, loss in losses(task, model.network).items():
        whole = model.tokenizer(f"{prompts[position]} named Tom", add_special_tokens=False)["input_ids"]
        known = model.tokenizer(prompts[position], add_special_tokens=False)["input_ids"]
        row = torch.tensor([[*begin, *whole]])
        log_p = model.network(row).logits[0, :-1].log_softmax(-1)
        answer = len(begin) + len(known)
        expected = -sum(float(log_p[i - 1, row[0, i]]) for i in range(answer, row.shape[1]))
        assert loss == pytest.approx(expected, rel=1e-4)


def test_looks_are_at_samples_and_no_batch_goes_beyond_one(model: CausalLM, stories260k: Path) -> None:
    for metric, data in (("perplexity", "prose"), ("accuracy", "capitals")):
        source = source_of(stories260k, metric, data, seq_length=64)
        task = load_task(source, "search", model.tokenizer)
        assert task.looks[-1] == task.size == source.sizes["search"]
        ends = [sum(len(b.items) for b in batches) for batches in task.segments]
        assert tuple(torch.tensor(ends).cumsum(0).tolist()) == task.looks
        assert [batch.number for batch in task.batches] == list(range(len(task.batches)))
        assert all(batch.ids_BT.numel() <= 1024 for batch in task.batches)
        smaller = source.model_copy(update={"sizes": source.sizes | {"search": task.looks[0]}})
        if metric == "perplexity":
            first = load_task(smaller, "search", model.tokenizer)
            positions = [item.position for batch in task.batches for item in batch.items]
            assert positions[: task.looks[0]] == [i.position for b in first.batches for i in b.items]


def task_of(metric: Any, *spans: tuple[int, ...], gold: int = 0) -> tuple[Task, Batch]:
    """One item whose answers follow the token 0, each in a row of its own."""
    rows = tuple((0, *targets[:-1]) for targets in spans)
    encoded = Encoded(5, rows, tuple(EncodedSpan(r, 0, targets) for r, targets in enumerate(spans)), gold)
    task = Task(metric, [encoded], whole=False)
    return task, task.batches[0]


def scores(logits: list[list[float]], rows: int = 1) -> Any:
    """A forward whose logits are the same in every row, position by position."""
    return lambda ids_BT, mask_BT, positions_K: torch.tensor([logits] * rows)[:, positions_K]


def test_a_choice_is_right_when_it_is_more_probable_than_every_other() -> None:
    forward = scores([[0.0, 2.0, 1.0, 2.0]], rows=2)
    assert task_loss("accuracy", forward, (1,), (2,)) == 0
    assert task_loss("accuracy", forward, (1,), (2,), gold=1) == 1
    assert task_loss("accuracy", forward, (1,), (3,)) == 1  # a tie is wrong
    for broken in (math.nan, math.inf):
        assert math.isnan(task_loss("accuracy", scores([[0.0, broken, 1.0]], rows=2), (1,), (2,)))


def task_loss(metric: str, forward: Any, *spans: tuple[int, ...], gold: int = 0) -> float:
    task, batch = task_of(metric, *spans, gold=gold)
    return float(task.losses(batch, forward)[0])


def test_a_completion_is_right_when_every_token_is_the_most_probable() -> None:
    logits = [[0.0, 2.0, 1.0], [0.0, 1.0, 3.0]]
    assert task_loss("accuracy", scores(logits), (1, 2)) == 0
    assert task_loss("accuracy", scores(logits), (1, 1)) == 1
    assert task_loss("accuracy", scores([[0.0, 2.0, 2.0]]), (1,)) == 1  # a tie is wrong
    assert math.isnan(task_loss("accuracy", scores([[0.0, 2.0, math.nan]]), (1,)))
    assert math.isnan(task_loss("accuracy", scores([[0.0, math.inf, 1.0]]), (1,)))


def test_log_likelihoods_and_margins_are_sums_of_logarithms() -> None:
    logits = [[0.0, 2.0, 1.0], [0.0, 1.0, 3.0]]
    log_p = torch.tensor(logits).log_softmax(-1)
    answer = float(log_p[0, 1] + log_p[1, 2])
    assert task_loss("log_likelihood", scores(logits), (1, 2)) == pytest.approx(-answer)
    margin = float(log_p[0, 1] - log_p[0, 2])
    assert task_loss("preference", scores(logits, rows=2), (1,), (2,)) == pytest.approx(-margin)
    assert task_loss("preference", scores(logits, rows=2), (2,), (1,)) == pytest.approx(margin)


@pytest.mark.parametrize(
    ("metric", "spans", "expected"),
    [
        ("accuracy", ((1,), (2,)), math.log(1 + math.exp(-1))),
        ("accuracy", ((1,),), math.log(1 + math.exp(-1) + math.exp(-2))),
        ("log_likelihood", ((1,),), math.log(1 + math.exp(-1) + math.exp(-2))),
        ("preference", ((1,), (2,)), math.log(1 + math.exp(-1))),
    ],
)
def test_surrogates_are_differentiable_losses(
    metric: str, spans: tuple[tuple[int, ...], ...], expected: float
) -> None:
    task, batch = task_of(metric, *spans)
    logits_BKV = torch.tensor([[[0.0, 2.0, 1.0]]] * len(batch.ids_BT), requires_grad=True)
    loss = task.surrogate(batch, lambda *_: logits_BKV)
    assert loss.tolist() == pytest.approx([expected])
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logits_BKV.grad is not None
    assert float(logits_BKV.grad[0, 0, 1]) < 0


def test_gradients_reach_the_weights(model: CausalLM, stories260k: Path) -> None:
    for metric, data in (("perplexity", "prose"), ("accuracy", "capitals")):
        task = load_task(source_of(stories260k, metric, data), "calibration", model.tokenizer)
        model.network.zero_grad()
        task.surrogate(task.batches[0], plain_forward(model.network)).sum().backward()
        gradient = model.network.model.layers[0].mlp.up_proj.weight.grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0
    model.network.zero_grad()


def test_chunks_longer_than_the_context_are_refused(model: CausalLM, stories260k: Path) -> None:
    context = context_length(model.network)
    assert context is not None
    source = source_of(stories260k, "perplexity", "prose", seq_length=32)
    long = source.model_copy(update={"seq_length": context + 1})
    with pytest.raises(InvalidSpec, match="context"):
        load_task(long, "search", model.tokenizer, longest=context)


def test_parts_of_a_text_of_many_records_share_none(model: CausalLM, stories260k: Path) -> None:
    records = tuple(f"{i} {i} {i} apples and {i} pears were in the basket of number {i}." for i in range(900))
    text = TextSource(name="apples", records=records)
    source = size_objective(
        ObjectiveSource(metric="perplexity", text=text, seq_length=32), stories260k, chunks=100
    )
    seen: list[set[str]] = []
    for part in PARTS:
        task = load_task(source, part, model.tokenizer)
        assert task.size == source.sizes[part]
        read = [model.tokenizer.decode(row) for batch in task.batches for row in batch.ids_BT.tolist()]
        seen.append({n for said in read for n in re.findall(r"basket of number (\d+)\.", said)})
    assert min(map(len, seen)) > 20
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_a_part_is_tokenised_once_for_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("An apple a day. " * 500)

    class Counting(Letters):
        calls = 0

        def __call__(self, text: str, *rest: Any, **named: Any) -> dict[str, Any]:
            self.calls += 1
            return super().__call__(text, *rest, **named)

    source = resolve_objective(
        Objective(metric="perplexity", data=str(file)), [tmp_path], seq_length=16
    ).model_copy(update={"sizes": dict.fromkeys(PARTS, 20)})
    one, other = Counting(), Counting()
    assert load_task(source, "search", one) is load_task(source, "search", one)
    assert one.calls == 1
    assert load_task(source, "search", other) is not load_task(source, "search", one)
    assert other.calls == 1
    load_task(source.model_copy(update={"seq_length": 8}), "search", one)
    assert one.calls == 2
    file.write_text("A pear a day. " * 500)
    with pytest.raises(InvalidSpec, match="has changed since") as caught:
        load_task(source, "report", one)
    assert caught.value.field is None


def test_a_set_that_changed_is_refused(model: CausalLM, stories260k: Path) -> None:
    source = source_of(stories260k, "accuracy", "capitals")
    other = source.model_copy(update={"sizes": source.sizes | {"search": 3}})
    with pytest.raises(InvalidSpec, match="has changed") as caught:
        load_task(other, "search", model.tokenizer)
    assert caught.value.field is None
