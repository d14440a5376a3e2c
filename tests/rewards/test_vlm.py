import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import assert_close
from PIL import Image
from test_cli import fails

from diffrl.errors import DiffRLError
from diffrl.rewards.vlm import VLM, read_mark
from diffrl.types import Context, to_pixels


class Server(ThreadingHTTPServer):
    """Keeps what it is asked; `reply(body, count)` returns a status and an answer, or bytes as they are."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.headers, self.paths = [], [], []
        self.lock = threading.Lock()
        self.reply = lambda body, count: (200, "5")
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(self.headers)
            self.server.paths.append(self.path)
            count = len(self.server.bodies)
        status, answer = self.server.reply(body, count)
        if not isinstance(answer, bytes):
            answer = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def reward(server, **settings):
    settings = {"backoff": 0.0, "model": "looker"} | settings
    return VLM(base_url=f"http://127.0.0.1:{server.server_port}/v1", **settings)


def context(*prompts):
    return Context(prompts, torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 0))


def pictures(count=1):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def asked(body):
    text, image = body["messages"][0]["content"]
    return text["text"], image["image_url"]["url"]


def test_the_request_holds_model_question_and_the_picture_as_png(server, monkeypatch):
    monkeypatch.setenv("LOOKER_KEY", "secret")
    images = pictures()
    settings = {"question": "Is it {prompt}? 0 to 10.", "key_variable": "LOOKER_KEY"}
    assert_close(reward(server, **settings)(images, context("a {cat}")), [5.0], atol=0)
    (body,), (headers,) = server.bodies, server.headers
    assert server.paths == ["/v1/chat/completions"]
    assert (body["model"], body["temperature"]) == ("looker", 0.0)
    assert headers["Authorization"] == "Bearer secret"
    question, url = asked(body)
    assert question == "Is it a {cat}? 0 to 10."
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.tolist() == to_pixels(images)[0].tolist()


def test_a_key_follows_no_redirect(server, monkeypatch):
    monkeypatch.setenv("LOOKER_KEY", "secret")
    server.reply = lambda body, count: (302, "moved")
    with pytest.raises(DiffRLError, match=r"in 1 attempt\(s\): HTTP 302"):
        reward(server, key_variable="LOOKER_KEY")(pictures(), context("cat"))
    assert server.paths == ["/v1/chat/completions"]


def test_without_a_key_variable_none_is_sent_and_a_named_one_must_be_set(server, monkeypatch):
    reward(server, temperature=None)(pictures(), context("cat"))
    assert "Authorization" not in server.headers[0]
    assert "temperature" not in server.bodies[0]
    monkeypatch.delenv("LOOKER_KEY", raising=False)
    with pytest.raises(DiffRLError, match="key_variable=LOOKER_KEY: no such environment variable"):
        reward(server, key_variable="LOOKER_KEY")(pictures(), context("cat"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(server, status):
    server.reply = lambda body, count: (status, b"busy") if count < 3 else (200, "7")
    assert_close(reward(server)(pictures(), context("cat")), [7.0], atol=0)
    assert len(server.bodies) == 3


def test_waits_double_from_one_attempt_to_the_next(server, monkeypatch):
    waits = []
    monkeypatch.setattr("diffrl.rewards.vlm.time.sleep", waits.append)
    server.reply = lambda body, count: (500, b"")
    with pytest.raises(DiffRLError):
        reward(server, backoff=0.5, attempts=4)(pictures(), context("cat"))
    assert waits == [0.5, 1.0, 2.0]


def test_a_request_that_is_wrong_is_not_repeated(server):
    server.reply = lambda body, count: (404, b'{"error": "no model\n looker"}')
    with pytest.raises(DiffRLError) as caught:
        reward(server)(pictures(), context("cat"))
    expected = (
        """picture 0 ('cat') from http://127.0.0.1:{}/v1/chat/completions in 1 attempt(s): HTTP 404: """
    )
    assert expected.format(server.server_port) + '{"error": "no model looker"}' in str(caught.value)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("answer", ["It is lovely.", "6 or 7", "11", None, b"not json", b"{}"])
def test_an_answer_without_one_mark_is_asked_for_again_then_named(server, answer):
    server.reply = lambda body, count: (200, answer)
    with pytest.raises(DiffRLError, match=r"no mark of picture 0 \('cat'\) .* in 2 attempt\(s\)"):
        reward(server, attempts=2)(pictures(), context("cat"))
    assert len(server.bodies) == 2


def test_after_an_answer_that_is_no_mark_it_is_asked_for_the_number_alone(server):
    """A server at temperature 0, which says the same whenever it is asked the same."""
    server.reply = lambda body, count: (200, "7" if len(body["messages"]) == 3 else "7: I see 2 cats.")
    assert_close(reward(server, attempts=2)(pictures(), context("cat")), [7.0], atol=0)
    first, second = server.bodies
    question, answer, again = second["messages"]
    assert [question] == first["messages"]
    assert answer == {"role": "assistant", "content": "7: I see 2 cats."}
    assert (again["role"], "number alone" in again["content"]) == ("user", True)


def test_the_picture_that_fails_is_named_among_others(server):
    server.reply = lambda body, count: (400, b"") if "'dog'" in asked(body)[0] else (200, "5")
    with pytest.raises(DiffRLError, match=r"picture 2 \('dog'\)"):
        reward(server)(pictures(4), context("cat", "cat", "dog", "cat"))


def test_a_silent_server_is_given_up(server):
    release = threading.Event()
    server.reply = lambda body, count: (release.wait(10), (200, "5"))[1]
    try:
        with pytest.raises(DiffRLError, match=r"in 2 attempt\(s\): TimeoutError"):
            reward(server, timeout=0.1, attempts=2)(pictures(), context("cat"))
    finally:
        release.set()


def test_no_server_is_named(server):
    port = server.server_port
    server.server_close()
    with pytest.raises(DiffRLError, match=rf"127\.0\.0\.1:{port}/v1/chat/completions in 2 .*refused"):
        reward(server, attempts=2)(pictures(), context("cat"))


def test_as_many_pictures_as_allowed_are_asked_about_at_once_and_order_is_kept(server):
    """Each answer waits until three are under way, and a moment for a fourth, that must not come."""
    together, running, fourth = threading.Barrier(3), [0], threading.Event()

    def reply(body, count):
        with server.lock:
            running[0] += 1
            if running[0] > 3:
                fourth.set()
        together.wait(10)
        fourth.wait(0.1)
        with server.lock:
            running[0] -= 1
        return 200, asked(body)[0].split("'")[1]

    server.reply = reply
    marks = reward(server, concurrency=3)(pictures(9), context(*"123456789"))
    assert_close(marks, range(1, 10), atol=0)
    assert not fourth.is_set()


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("7", 7.0),
        (" 7.5\n", 7.5),
        ("Score: 8/10.", 8.0),
        ("**9** out of 10", 9.0),
        ("0", 0.0),
        ("10", 10.0),
    ],
)
def test_marks_that_are_read(answer, mark):
    assert_close(read_mark(answer), mark, atol=0)


@pytest.mark.parametrize("answer", ["", "-1", "10.5", "3, no: 4", "seven"])
def test_marks_that_are_not(answer):
    with pytest.raises(ValueError, match="one number from 0 to 10"):
        read_mark(answer)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("reward.model=null", "reward.model=null: give the name"),
        ("reward.base_url=file:///etc", "must start with http"),
        ("reward.question=good?", "must have {prompt}"),
        ("reward.attempts=0", "reward.attempts=0: must be 1 or more"),
        ("reward.timeout=0", "reward.timeout=0.0: must be 0.001 or more"),
    ],
)
def test_impossible_settings_are_refused(capsys, word, message):
    assert message in fails(capsys, "train", "algo=ddpo", "reward=vlm", "reward.model=looker", word)
