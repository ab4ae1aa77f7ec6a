"""The server as the official client sees it: answers, limits, disconnects; nothing leaks."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import jax.numpy as jnp
import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from dsv3_jax.data.tokenizers import ByteTokenizer  # noqa: E402
from dsv3_jax.generation import Generator, SamplingParams  # noqa: E402
from dsv3_jax.generation.engine import Engine  # noqa: E402
from dsv3_jax.generation.requests import Limits  # noqa: E402
from dsv3_jax.generation.weights import prepare  # noqa: E402
from dsv3_jax.model import Transformer  # noqa: E402
from dsv3_jax.serving.app import Server  # noqa: E402
from tests.model.test_transformer import changed, make_variables  # noqa: E402

MODEL = changed(vocab_size=264, n_layers=1, moe={"n_dense_layers": 1}, mtp={"depth": 1}, max_seq_len=96)
LIMITS = Limits(slots=8, max_tokens=96, page_size=16, queue=200, chunk=64)
CONCURRENT = 200


class Running:
    """A server in a thread, on a port of its own."""

    def __init__(self):
        self.variables = make_variables(Transformer(MODEL))
        weights = prepare(self.variables, MODEL, jnp.float32)
        self.engine = Engine(MODEL, weights, ByteTokenizer(), LIMITS, cache_dtype="fp32", drafts=1)
        self.engine.warm_up()
        app = Server(self.engine, ByteTokenizer(), "tiny").app
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def idle(self):
        """Waits until nothing is under way, and says how many pages are in use."""
        deadline = time.monotonic() + 20
        while (self.engine.running or self.engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.engine.pages.count - self.engine.pages.free


@pytest.fixture(scope="module")
def running():
    server = Running()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def offline(running):
    generator = Generator(MODEL, running.variables, ByteTokenizer())

    def answer(prompts, n):
        params = SamplingParams(max_new_tokens=n, temperature=0.0)
        return [found.text for found in generator.generate(prompts, params)]

    return answer


def test_completions(running, client, offline):
    made = client.completions.create(
        model="tiny", prompt=["def f", "ab"], max_tokens=9, temperature=0, logprobs=1
    )
    assert [choice.text for choice in made.choices] == offline(["def f", "ab"], 9)
    assert made.usage.prompt_tokens == 7 and made.usage.completion_tokens == 18
    assert len(made.choices[0].logprobs.token_logprobs) == 9
    assert made.choices[0].finish_reason == "length"
    # The same seed, the same text; choices differ.
    sampled = [
        client.completions.create(model="tiny", prompt="x", n=3, seed=5, max_tokens=12) for _ in range(2)
    ]
    texts = [[choice.text for choice in one.choices] for one in sampled]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert running.idle() == 0


def test_chat_and_models(running, client, offline):
    messages = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Say"}]
    expected = offline(["Hm.\n\nUser: Say\n\nAssistant:"] * 2, 9)[0]
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 9}
    made = client.chat.completions.create(**options)
    assert made.choices[0].message.content == expected
    parts = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].usage.completion_tokens == 9 and parts[-2].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_many_streams_at_once(running, offline):
    """Every fifth client leaves after its first piece; all others get what they would get alone."""
    prompts = [f"{i} {'ab' * (i % 20)}" for i in range(CONCURRENT)]
    before = running.engine.counters.cancelled

    async def ask(client, number):
        stream = await client.completions.create(
            model="tiny", prompt=prompts[number], max_tokens=20, temperature=0, stream=True
        )
        text = ""
        async for part in stream:
            text += part.choices[0].text
            if number % 5 == 0:
                await stream.close()
                return None
        return text

    async def everybody():
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(CONCURRENT)))

    found = asyncio.run(everybody())
    kept = [number for number in range(CONCURRENT) if number % 5]
    expected = []
    for i in range(0, len(kept), 2):
        expected += offline([prompts[number] for number in kept[i : i + 2]], 20)
    assert [found[number] for number in kept] == expected
    assert running.idle() == 0
    assert running.engine.counters.cancelled > before


def post(running, body, path="/v1/completions"):
    request = urllib.request.Request(running.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{not json", 400, "not JSON"),
        (b"[" * 100000, 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        ({"prompt": "x", "model": "other"}, 404, "'tiny'"),
        ({}, 400, "prompt must be"),
        ({"prompt": [[]]}, 400, "empty"),
        ({"prompt": [5, 999]}, 400, "token 999"),
        ({"prompt": "x" * 96}, 400, "max_seq_len is 96"),
        ({"prompt": "x", "max_tokens": 96}, 400, "exceed the 96"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature is 'hot'"),
        ({"prompt": "x", "top_p": 3}, 400, "top_p is 3"),
        ({"prompt": "x", "n": 99}, 400, "at most 32"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "logprobs": 5}, 400, "logprobs"),
        (b" " * (9 << 20), 413, "larger"),
    ],
)
def test_bad_requests(running, body, status, message):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer = post(running, raw)
    assert found == status and message in answer["error"]["message"]
    assert running.idle() == 0


def test_bad_messages(running):
    for messages in ([], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}], "x"):
        body = json.dumps({"messages": messages}).encode()
        status, answer = post(running, body, "/v1/chat/completions")
        assert status == 400 and "messages" in answer["error"]["message"]


def test_a_full_queue(running):
    """Requests beyond the queue are refused at once; one that is accepted by half leaves nothing."""
    room = running.engine.limits.queue
    fillers = []
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(running.engine._lock)  # Nothing joins meanwhile.
        assert lock
        for _ in range(room):
            fillers.append(running.engine.submit([1], SamplingParams(max_new_tokens=1), lambda piece: None))
        with pytest.raises(Exception, match="waiting"):
            running.engine.submit([1], SamplingParams(max_new_tokens=1), lambda piece: None)
    full = running.engine.limits
    running.engine.limits = type(full)(**{**vars(full), "queue": 0})
    try:
        status, answer = post(running, json.dumps({"prompt": ["x", "y"]}).encode())
    finally:
        running.engine.limits = full
    assert status == 429 and answer["error"]["code"] == "queue_full"
    assert running.idle() == 0


def test_a_client_that_leaves_before_the_answer(running):
    before = running.engine.counters.cancelled
    body = json.dumps({"prompt": "x", "max_tokens": 90, "ignore_eos": True, "n": 8}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(running.socket.getsockname()) as connection:
        connection.sendall(head + body)
        while not running.engine.running:
            time.sleep(0.001)
    assert running.idle() == 0
    assert running.engine.counters.cancelled > before


def test_health_and_metrics(running, client):
    # Of some hundred drafts of an untrained model a few are right; greedy, so always the same ones.
    prompts = [f"{i} {'ab' * i}" for i in range(16)]
    client.completions.create(model="tiny", prompt=prompts, max_tokens=20, temperature=0)
    assert running.idle() == 0
    with urllib.request.urlopen(running.url + "/health") as response:
        assert json.load(response) == {"status": "ok"}
    with urllib.request.urlopen(running.url + "/metrics") as response:
        text = response.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    counters, pages = running.engine.counters, running.engine.pages.count
    assert float(values['dsv3_requests_total{outcome="completed"}']) == counters.completed > 0
    assert float(values["dsv3_cache_pages_free"]) == float(values["dsv3_cache_pages"]) == pages
    assert 0 < counters.accepted[0] < counters.drafts
