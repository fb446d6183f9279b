"""Completions and replies, whole and streamed."""

import json
from typing import Any

import httpx
import pytest

from lorary.errors import BaseModelError


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which ends as OpenAI's clients expect."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_goes_on_with_a_text(asker: Any) -> None:
    response = asker.post("/v1/completions", model="lib", prompt="june? ", max_tokens=100)
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": " june says: Name the colour of the sky", "logprobs": None, "finish_reason": "stop"}
    ]
    num_prompt = len(asker.engine.jobs[0].ids)
    assert body["usage"]["prompt_tokens"] == num_prompt
    assert body["usage"]["total_tokens"] == num_prompt + body["usage"]["completion_tokens"]
    assert "lorary" not in body or body["lorary"] is None
    assert response.headers["x-lorary-router"] == "auto"
    assert response.headers["x-lorary-experts"] == "june=1.000"
    assert float(response.headers["x-lorary-confidence"]) == 2.0
    assert response.headers["x-request-id"] == body["id"]


def test_sixteen_tokens_are_made_where_a_completion_does_not_say(asker: Any) -> None:
    body = asker.post("/v1/completions", model="base", prompt="x").json()
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (16, "length")


def test_a_reply_has_no_white_space_before_its_first_word(asker: Any) -> None:
    messages = [{"role": "user", "content": "which june?"}]
    body = asker.post("/v1/chat/completions", model="lib", messages=messages).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "june says: Name the colour of the sky"}
    # The experts were trained with the plain template, and a question alone is written as they know it.
    assert asker.engine.tokenizer.decode(asker.engine.jobs[0].ids) == "which june?"


@pytest.mark.parametrize(
    ("model", "messages", "template", "written"),
    [
        ("lib:blue", [("user", "hi")], None, "hi"),
        ("lib:blue", [("user", "hi")], "chat", "<user>hi<assistant>"),
        ("lib", [("system", "be"), ("user", "june")], None, "<system>be<user>june<assistant>"),
        ("lib", [("user", "june"), ("assistant", "b")], "plain", "User: june\nAssistant: b\nAssistant:"),
        ("base", [("user", "hi")], None, "<user>hi<assistant>"),
        ("lib", [("user", "no name")], None, "<user>no name<assistant>"),  # no expert fits: the base in its template
    ],
)  # fmt: skip
def test_the_template_follows_experts_and_conversation(
    asker: Any, model: str, messages: list[tuple[str, str]], template: str | None, written: str
) -> None:
    turns = [{"role": role, "content": content} for role, content in messages]
    response = asker.post("/v1/chat/completions", model=model, messages=turns, template=template)
    assert response.status_code == 200, response.text
    assert asker.engine.tokenizer.decode(asker.engine.jobs[0].ids) == written


def test_the_base_answers_a_text_that_no_expert_fits_in_its_own_template(asker: Any) -> None:
    response = asker.post("/v1/completions", model="lib", prompt="nobody", trace=True)
    assert asker.engine.tokenizer.decode(asker.engine.jobs[0].ids) == "<user>nobody<assistant>"
    shown = response.json()["lorary"]
    assert (shown["is_fallback"], shown["experts"]) == (True, [])
    assert "the base answers" in shown["sentence"]


@pytest.mark.parametrize("extra", [{"prompt": [5, 6]}, {"prompt": "nobody", "echo": True}])
def test_ids_and_echoed_texts_are_taken_as_they_are(asker: Any, extra: dict[str, Any]) -> None:
    response = asker.post("/v1/completions", model="lib", max_tokens=100, **extra)
    assert response.headers["x-lorary-experts"] == "blue=0.333,june=0.333,three=0.333"
    assert response.json()["choices"][0]["text"].endswith(" blue+june+three says: Name the colour of the sky")


@pytest.mark.parametrize(("prompt", "number"), [("a", 1), ([7, 8], 1), (["a", "b"], 2), ([[7], [8, 9], [10]], 3)])
def test_every_form_of_a_prompt_is_answered(asker: Any, prompt: Any, number: int) -> None:
    body = asker.post("/v1/completions", model="base", prompt=prompt, n=2).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * number))
    assert len(asker.engine.jobs) == 2 * number


def test_a_stream_says_what_the_whole_answer_says(asker: Any) -> None:
    whole = asker.post("/v1/completions", model="lib", prompt="june", max_tokens=40, logprobs=2, n=2).json()
    response = asker.post(
        "/v1/completions", model="lib", prompt="june", max_tokens=40, logprobs=2, n=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        for key, values in choice["logprobs"].items():
            assert [value for piece in own for value in piece["logprobs"][key]] == values


def test_a_streamed_reply_begins_with_its_role(asker: Any) -> None:
    messages = [{"role": "user", "content": "june"}]
    response = asker.post("/v1/chat/completions", model="lib", messages=messages, stream=True, trace=True)
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert text == "june says: Name the colour of the sky"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["lorary"]["experts"] == [{"name": "june", "weight": 1.0}]
    assert "usage" not in chunks[-1]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (" colour", " june says: Name the"),
        (["zzz", "says: N"], " june "),
        ("sky", " june says: Name the colour of the "),
        ("skyline", " june says: Name the colour of the sky"),
        (" june", ""),
    ],
)
def test_an_answer_is_cut_before_a_stop_string(asker: Any, stop: Any, text: str, is_streamed: bool) -> None:
    body = {"model": "lib", "prompt": "june", "max_tokens": 100, "stop": stop, "logprobs": 1, "stream": is_streamed}
    response = asker.post("/v1/completions", **body)
    choices = [chunk["choices"][0] for chunk in events(response)] if is_streamed else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == "stop"
    # The tokens are those that have a part in the text.
    tokens = "".join(token for choice in choices for token in choice["logprobs"]["tokens"])
    assert tokens.removesuffix("<|end|>").startswith(text)
    assert asker.engine.running == 0


def test_log_probabilities_of_a_reply(asker: Any) -> None:
    messages = [{"role": "user", "content": "june"}]
    body = asker.post(
        "/v1/chat/completions", model="lib", messages=messages, logprobs=True, top_logprobs=2, max_tokens=3
    ).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in content] == [-0.25, -0.5, -0.75]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2, 2]
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert "".join(token["token"] for token in content).lstrip() == body["choices"][0]["message"]["content"]


def test_echo_tells_the_log_probabilities_of_the_prompt(asker: Any) -> None:
    ids = asker.engine.tokenizer("the sky: blue", add_special_tokens=False)["input_ids"]
    body = asker.post("/v1/completions", model="base", prompt=[ids], max_tokens=1, logprobs=1, echo=True).json()
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:3] == [-0.25, -0.5]
    assert choice["text"].startswith("the sky: blue")
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][start:].startswith(token)


def test_no_token_needs_to_be_made_to_score_a_prompt(asker: Any) -> None:
    body = asker.post("/v1/completions", model="base", prompt="the sky", max_tokens=0, logprobs=0, echo=True).json()
    assert body["choices"][0]["text"] == "the sky"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert body["choices"][0]["logprobs"]["token_logprobs"][1] == -0.25


def test_each_answer_to_one_prompt_has_a_seed_of_its_own(asker: Any) -> None:
    body = asker.post("/v1/completions", model="base", prompt=["a", "b"], temperature=0.5, seed=3, n=2, max_tokens=99)
    assert [job.seed for job in asker.engine.jobs] == [3, 4, 3, 4]
    assert body.json()["choices"][1]["text"].startswith(" base seed 4")


def test_the_likeliest_tokens_are_taken_where_nobody_asks_for_others(asker: Any) -> None:
    asker.post("/v1/completions", model="base", prompt="a")
    asker.post("/v1/completions", model="base", prompt="a", temperature=0)
    asker.post("/v1/completions", model="base", prompt="a", top_p=0.5)
    first, second, third = asker.engine.jobs
    assert first.sampling is second.sampling is None
    assert (third.sampling.temperature, third.sampling.top_p) == (1.0, 0.5)


def test_a_character_of_several_tokens_comes_whole(make_asker: Any) -> None:
    asker = make_asker(text=" 世界 {who} é")
    chunks = events(asker.post("/v1/completions", model="base", prompt="a", max_tokens=99, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " 世界 base é"
    cut = asker.post("/v1/completions", model="base", prompt="a", max_tokens=2).json()["choices"][0]["text"]
    assert cut == " \N{REPLACEMENT CHARACTER}"


def test_an_error_amid_a_stream_is_an_event(make_asker: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asker = make_asker()

    class Late(FakeFailure):
        pass

    asker.engine.failure = None
    stream_answer = type(asker.engine).answer_ids

    def answer_ids(self: Any, job: Any) -> list[int]:
        ids = stream_answer(self, job)
        return Late(ids, asker.engine)  # type: ignore[return-value]

    asker.engine.__class__ = type("Failing", (type(asker.engine),), {"answer_ids": answer_ids})
    response = asker.post("/v1/completions", model="base", prompt="a secret", max_tokens=99, stream=True)
    assert response.status_code == 200
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "secret" not in capsys.readouterr().err
    assert asker.engine.running == 0


class FakeFailure(list):  # type: ignore[type-arg]
    """Ids of which the third comes with an error."""

    def __init__(self, ids: list[int], engine: Any) -> None:
        super().__init__(ids)
        self.engine = engine

    def __iter__(self) -> Any:
        for number, token in enumerate(super().__iter__()):
            if number == 3:
                self.engine.failure = RuntimeError("about the secret")
            yield token


def test_an_error_before_the_first_token_has_a_status(make_asker: Any) -> None:
    asker = make_asker(failure=BaseModelError("logits must be finite"))
    response = asker.post("/v1/completions", model="base", prompt="a", stream=True)
    assert response.status_code == 400
    assert "finite" in response.json()["error"]["message"]
    assert asker.engine.running == 0
