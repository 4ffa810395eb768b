"""Rewards over HTTP, with real sockets on this machine: what a client gets is what `score` returns, and no client can
stop the others, read a file or see a traceback."""
import base64
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import evaluate
import train
from conftest import small_backbone
from data import synthetic
from evaluate import Config, RequestHandler, RewardServer, main, score_jobs
from model import IMAGE_TOKEN, RewardModel, to_messages

SECONDS = 60  # after which a test fails that waits for an answer


@pytest.fixture(scope="module")
def reward_model(backbones):
    torch.manual_seed(0)
    return RewardModel.from_backbone(backbones()).eval()


@pytest.fixture(scope="module")
def text_folder(backbones, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served") / "text"
    RewardModel.from_backbone(backbones("qwen3")).save_pretrained(folder)
    return folder


class Worker:
    """A server, and the loop of `serve` in a thread: `batches` has how many comparisons were scored together."""

    def __init__(self, model):
        self.server = RewardServer(("127.0.0.1", 0), RequestHandler)
        self.model, self.batches, self.ended = model, [], False
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in (self.server.serve_forever, self.work)]
        for thread in self.threads:
            thread.start()

    def work(self):
        while not self.ended:
            jobs = self.server.take_jobs()
            if jobs:
                self.batches.append(len(jobs))
            score_jobs(self.model, jobs, None)

    def close(self):
        self.ended = True
        self.server.shutdown()
        self.server.server_close()
        for thread in self.threads:
            thread.join(SECONDS)

    def connect(self):
        return http.client.HTTPConnection(*self.server.server_address, timeout=SECONDS)

    def post(self, path, body):
        """Status and JSON of the answer; a body of bytes is sent as it is."""
        connection = self.connect()
        try:
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def error(self, path, body):
        """Status and the one line of an error."""
        status, answer = self.post(path, body)
        assert list(answer) == ["error"] and "\n" not in answer["error"] and "Traceback" not in answer["error"], answer
        return status, answer["error"]


@pytest.fixture(scope="module")
def worker(reward_model):
    worker = Worker(reward_model)
    yield worker
    worker.close()


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(file, "PNG")
    return file.getvalue()


def base64_of(image):
    """Of a picture, or of the bytes of a file."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return base64.b64encode(image).decode()


def templated(model, prompt, images=()):
    """What a trainer's policy reads: messages to which its chat template was applied, with its tokens of images."""
    text = model.processor.tokenizer.apply_chat_template(to_messages(prompt, images), tokenize=False,
                                                         add_generation_prompt=True)
    return text.replace("<image>", f"<|vision_start|>{IMAGE_TOKEN * 4}<|vision_end|>")


# Rewards


def test_two_hundred_requests_of_eight_clients_get_the_rewards_of_score_and_are_packed_together(worker, reward_model):
    """With and without images, as text and messages, alone and as lists; requests that arrive together share packs."""
    comparisons = synthetic(200, seed=5)
    want = reward_model.score_many(comparisons)
    bodies = []
    for comparison in comparisons:
        images = [base64_of(image) for image in comparison.images]
        bodies.append({"prompt": comparison.prompt, "responses": list(comparison.responses), "images": images})
    for body in bodies[::3]:
        body["images"] = ["data:image/png;base64," + image for image in body["images"]]
    for body in bodies[::4]:
        body["prompt"] = to_messages(body["prompt"], body["images"])
    assert sum(map(bool, (body["images"] for body in bodies))) > 50

    worker.batches.clear()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda body: worker.post("/score", body), bodies))
    assert [status for status, _ in answers] == [200] * 200
    for (_, answer), rewards in zip(answers, want, strict=True):
        assert list(answer) == ["rewards"] and answer["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert sum(worker.batches) == 200 and max(worker.batches) <= 8

    status, answer = worker.post("/score", bodies[:100])  # a list: 64 at a time
    assert status == 200 and worker.batches[-1] < worker.batches[-2] == 64
    for item, rewards in zip(answer, want[:100], strict=True):
        assert item["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert worker.post("/score", []) == (200, [])


def test_requests_that_arrive_while_others_are_scored_are_scored_together(worker, reward_model, monkeypatch):
    """The model is busy with the first request when seven more arrive."""
    real, is_busy, may_go_on = reward_model.score_encoded, threading.Event(), threading.Event()

    def score_when_told(requests, pack_tokens):
        is_busy.set()
        assert may_go_on.wait(SECONDS)
        return real(requests, pack_tokens)

    monkeypatch.setattr(reward_model, "score_encoded", score_when_told)
    worker.batches.clear()
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(worker.post, "/score", ONE)]
        assert is_busy.wait(SECONDS)
        answers += [clients.submit(worker.post, "/score", ONE) for _ in range(7)]
        deadline = time.monotonic() + SECONDS
        while worker.server.jobs.qsize() < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        may_go_on.set()
        assert {answer.result(SECONDS)[0] for answer in answers} == {200}
    assert worker.batches == [1, 7]


def test_openrlhf_gets_a_list_of_numbers_for_its_texts_and_an_empty_list_for_none(worker, reward_model):
    """As openrlhf/utils/agent.py of 2026-08-13 sends it: one sample, decoded with special tokens; with several servers
    the others get empty lists. The template is undone, so the reward is that of `score`."""
    prompt = templated(reward_model, "What colour is the circle?")
    assert prompt.endswith("<|im_start|>assistant\n")
    body = {"query": [prompt + "red<|im_end|>"], "prompts": [prompt], "labels": ["red"]}
    status, answer = worker.post("/get_reward", body)
    want = reward_model.score("What colour is the circle?", ["red", "blue"])
    assert status == 200 and answer["rewards"] == pytest.approx(want[:1], abs=1e-5)
    assert torch.tensor([answer["rewards"]]).shape == (1, 1)  # what it makes of the answer
    assert worker.post("/get_reward", {"query": [], "prompts": [], "labels": []}) == (200, {"rewards": []})

    body = {"query": [prompt + "red", prompt + "blue<|im_end|><|endoftext|>"], "prompts": [prompt] * 2}  # one was cut
    assert worker.post("/get_reward", body)[1]["rewards"] == pytest.approx(want, abs=1e-5)
    plain = {"query": ["What colour is the circle?red"], "prompts": ["What colour is the circle?"], "labels": [None]}
    assert worker.post("/get_reward", plain)[1]["rewards"] == pytest.approx(want[:1], abs=1e-5)


def test_openrlhf_with_images_a_system_message_earlier_turns_and_a_prompt_cut_at_its_start(worker, reward_model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": "A circle."}, {"role": "user", "content": "Its colour?"}]
    (want,) = reward_model.score(messages, ["red"], [png()])
    prompt = templated(reward_model, messages, [png()])
    body = {"query": [prompt + "red<|im_end|>"], "prompts": [prompt], "labels": [""], "images": [[base64_of(png())]]}
    assert worker.post("/get_reward", body)[1]["rewards"] == pytest.approx([want], abs=1e-5)
    one_token = prompt.replace(IMAGE_TOKEN * 4, IMAGE_TOKEN)  # before the policy's processor repeated it
    assert worker.post("/get_reward", body | {"prompts": [one_token]})[1]["rewards"] == pytest.approx([want], abs=1e-5)
    assert worker.error("/get_reward", body | {"images": [None]}) == (
        400, "the prompt has 1 <image> marks but there are 0 images; one mark for each")

    cut = "brief.<|im_end|>\n" + prompt.partition("brief.<|im_end|>\n")[2] + "red<|im_end|>"
    (want,) = reward_model.score(messages[1:], ["red"], [png()])
    assert worker.post("/get_reward", body | {"query": [cut]})[1]["rewards"] == pytest.approx([want], abs=1e-5)


def test_a_response_of_openrlhf_cannot_end_its_turn(worker, reward_model):
    """A policy that learns to write the tokens of a new turn is scored for all that it wrote; with an image too, whose
    tokens the query repeats and the prompt has once."""
    written = "red<|im_end|>\n<|im_start|>user\nRight!<|im_end|>\n<|im_start|>assistant\nblue"
    for images in ([], [png()]):
        prompt = templated(reward_model, "What colour?", images)
        body = {"query": [prompt + written + "<|im_end|>"], "prompts": [prompt.replace(IMAGE_TOKEN * 4, IMAGE_TOKEN)],
                "labels": [""], "images": [[base64_of(image) for image in images]]}
        want = reward_model.score("What colour?", [written], images)
        assert worker.post("/get_reward", body)[1]["rewards"] == pytest.approx(want, abs=1e-5)


def test_verl_reads_the_reward_where_vllm_has_its_probability(worker, reward_model):
    """As verl/experimental/reward_loop of 2026-08-22 posts it: the whole chat under a template, without activation."""
    messages = to_messages("What colour is the circle?")
    text = reward_model.processor.tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "red"}], tokenize=False)
    want = reward_model.score("What colour is the circle?", ["red", "blue"])
    status, answer = worker.post("/classify", {"model": "m", "input": text, "use_activation": False})
    assert status == 200 and answer["data"][-1]["probs"][-1] == pytest.approx(want[0], abs=1e-5)
    assert answer["object"] == "list" and answer["model"] == "m"

    thought = text.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")  # Qwen3's template
    answer = worker.post("/classify", {"input": [thought, text.replace("red", "blue")]})[1]
    assert [result["index"] for result in answer["data"]] == [0, 1]
    assert [result["probs"] for result in answer["data"]] == [pytest.approx([r], abs=1e-5) for r in want]
    assert worker.error("/classify", {"input": text, "use_activation": True})[0] == 400


def test_a_chat_of_vllm_holds_its_images_as_data_uris(worker, reward_model):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64_of(png())}}
    user = {"role": "user", "content": [picture, {"type": "text", "text": "What colour?"}]}
    response = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    answer = worker.post("/classify", {"messages": [user, response], "use_activation": False})[1]
    want = reward_model.score("What colour?", ["red"], [png()])
    assert answer["data"][-1]["probs"] == pytest.approx(want, abs=1e-5)
    answer = worker.post("/score", {"prompt": [user], "responses": ["red"]})[1]
    assert answer["rewards"] == pytest.approx(want, abs=1e-5)
    drawn = {"role": "assistant", "content": [picture]}
    assert "the response holds an image" in worker.error("/classify", {"messages": [user, drawn]})[1]


# Wrong requests

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
ONE = {"prompt": "?", "responses": ["a"]}


@pytest.mark.parametrize("path, body, words", [
    ("/score", b"{", "Expecting property name"), ("/score", b"\xff\xfe\x00", "decode"),
    ("/score", b"", "Expecting value"),
    ("/score", b"[" * 100_000, "recursion"), ("/score", 7, "found a int, want an object"),
    ("/score", {"prompt": "?"}, "no responses"), ("/score", [ONE, {}], "no prompt"),
    ("/score", ONE | {"image": "x"}, "unknown keys ['image']"), ("/score", ONE | {"responses": "a"}, "want a list"),
    ("/score", ONE | {"responses": []}, "one text or more"), ("/score", ONE | {"responses": [None]}, "a NoneType"),
    ("/score", ONE | {"responses": ["\ud83d"]}, "cut apart"), ("/score", ONE | {"prompt": None}, "a NoneType"),
    ("/score", ONE | {"prompt": []}, "end with a message of the user"), ("/score", ONE | {"prompt": [7]}, "no role"),
    ("/score", ONE | {"prompt": "x " * 9000}, "the model reads at most 8,192"),
    ("/score", ONE | {"images": "abcd"}, "want a list"), ("/score", ONE | {"images": [["abcd"]]}, "is a list"),
    ("/score", ONE | {"images": ["abcd"]}, "image of 3 bytes cannot be used"),
    ("/score", ONE | {"images": [""]}, "image of 0 bytes"),
    ("/score", ONE | {"images": ["http://x/y.png"]}, "nor a data"),
    ("/score", ONE | {"prompt": "<image><image>", "images": [base64_of(png())]}, "2 <image> marks but there are 1"),
    ("/get_reward", {"query": ["a"]}, "no prompts"),
    ("/get_reward", {"query": "a", "prompts": "a"}, "lists of one length"),
    ("/get_reward", {"query": ["a"], "prompts": []}, "lists of one length"),
    ("/get_reward", {"query": [1], "prompts": [1]}, "a query is a int"),
    ("/get_reward", {"query": ["x"], "prompts": [CHAT]}, "ends with the response"),
    ("/get_reward", {"query": ["<|eot_id|>x"], "prompts": ["<|eot_id|>"]}, "holds <|eot_id|> and is no ChatML"),
    ("/classify", {"model": "m"}, "want input"), ("/classify", {"input": [1, 2]}, "input is a int"),
    ("/classify", {"input": "<|im_start|>user\nHi<|im_end|>"}, "ends with the response"),
    ("/classify", {"messages": [{"role": "assistant", "content": "a"}]}, "end with a message of the user"),
    ("/classify", {"messages": "text"}, "ends with the response")])
def test_a_wrong_request_gets_400_and_one_line_that_says_why(path, body, words, worker, capfd):
    status, error = worker.error(path, body)
    assert status == 400 and words in error and len(error) < 500
    assert capfd.readouterr().err == ""
    assert worker.post("/score", ONE)[0] == 200


@pytest.mark.parametrize("place", ["images", "image", "image_url", "url", "path", "video", "get_reward"])
def test_no_file_of_this_machine_is_opened_for_a_client(place, worker, tmp_path, monkeypatch):
    """A picture that is really there, by its path, by a file: address, and by paths that look like base64."""
    (tmp_path / "there.png").write_bytes(png())
    (tmp_path / "abcd").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there.png"
    for source in (str(there), there.as_uri(), "there.png", "abcd", ".", "/dev/zero"):
        body = ONE | {"images": [source]}
        if place == "get_reward":
            body = {"query": [CHAT + "a"], "prompts": [CHAT], "labels": [""], "images": [[source]]}
        elif place != "images":
            typed_part = {"type": "image", place: source if place != "image_url" else {"url": source}}
            body = {"prompt": [{"role": "user", "content": [typed_part]}], "responses": ["a"]}
        path = "/get_reward" if place == "get_reward" else "/score"
        status, error = worker.error(path, body)
        assert status == 400 and str(tmp_path) not in error.replace(source[:40], "")


def test_what_is_too_large_gets_413_and_a_body_is_not_read_for_it(worker, monkeypatch):
    assert worker.error("/score", ONE | {"responses": ["a"] * 1025})[0] == 413
    assert worker.error("/score", ONE | {"prompt": "x" * 1_000_001})[0] == 413
    monkeypatch.setattr(evaluate, "MAX_BODY_BYTES", 20_000_000)  # more than sockets buffer
    assert worker.error("/score", b"x" * 20_000_001) == (413, "a body of 20,000,001 bytes: at most 20,000,000 are read")
    connection = worker.connect()
    connection.putrequest("POST", "/score")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()  # and no body: the answer does not wait for it
    assert connection.getresponse().status == 413
    connection.close()
    assert worker.post("/score", ONE)[0] == 200


def test_another_path_gets_404_and_a_body_without_its_length_400(worker):
    assert worker.error("/", ONE)[0] == worker.error("/../etc/passwd", ONE)[0] == 404
    connection = worker.connect()
    connection.request("GET", "/score")
    response = connection.getresponse()
    assert response.status == 404 and "POST /score" in json.loads(response.read())["error"]
    connection.close()
    connection = worker.connect()
    connection.request("POST", "/score", iter([b"{}"]))  # in chunks
    response = connection.getresponse()
    assert response.status == 400 and "Content-Length" in json.loads(response.read())["error"]
    connection.close()


def test_clients_that_are_slow_or_hang_up_cost_the_others_nothing(worker, capfd):
    """Some send half of a body and wait, others hang up: in the middle of a body, and before the answer."""
    body = json.dumps(ONE).encode()
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    address = worker.server.server_address
    slow = [socket.create_connection(address, SECONDS) for _ in range(20)]
    for client in slow:
        client.sendall(head + body[:5])
    for sent in (b"", b"POST", head + body[:5], head + body):
        for linger in (b"\0" * 8, b"\1" + b"\0" * 7):  # the second: with a reset, as a killed process
            with socket.create_connection(address, SECONDS) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.sendall(sent)
    start = time.monotonic()
    for _ in range(5):
        assert worker.post("/score", ONE)[0] == 200
    assert time.monotonic() - start < SECONDS / 4
    for client in slow:
        client.sendall(body[5:])
        assert b'{"rewards": [' in client.makefile("rb").read()
        client.close()
    deadline = time.monotonic() + SECONDS
    while worker.server.open_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker.server.open_requests and capfd.readouterr().err == ""


def test_a_model_that_fails_costs_the_request_that_it_fails_for_and_shows_no_traceback(worker, reward_model,
                                                                                       monkeypatch, capfd):
    """A comparison that does not fit into the memory, beside one that does; then rewards that are not finite."""
    real = reward_model.score_encoded

    def score_or_fail(requests, pack_tokens=None):
        if any(len(request.comparison.responses) == 3 for request in requests):
            raise MemoryError("of /home/somebody\nsecond line")
        return real(requests, pack_tokens)

    monkeypatch.setattr(reward_model, "score_encoded", score_or_fail)
    three = ONE | {"responses": ["a", "b", "c"]}
    jobs = [evaluate.Job(evaluate.read_comparison("?", body["responses"])) for body in (ONE, three, ONE)]
    score_jobs(reward_model, jobs, None)
    assert jobs[0].rewards.result() == jobs[2].rewards.result()
    assert isinstance(jobs[1].rewards.exception(), evaluate.ModelError)

    assert worker.error("/score", three) == (500, "the model failed; the reason is on the server's standard error")
    error = capfd.readouterr().err
    assert error.startswith("evaluate.py: ") and error.count("\n") == 1 and "MemoryError: of /home/somebody" in error
    monkeypatch.setattr(reward_model, "score_encoded", lambda requests, _: [evaluate.Score([float("nan")])])
    assert worker.error("/score", ONE)[0] == 500 and "nan" in capfd.readouterr().err


def test_a_judge_compares_responses_and_says_that_one_is_none(tmp_path):
    torch.manual_seed(0)
    small_backbone(tmp_path, vocabulary_head=True)
    judge = RewardModel.from_backbone(tmp_path, paradigm="direct").eval()
    worker = Worker(judge)
    try:
        want = judge.score("What colour?", ["red", "blue", "red"])
        answer = worker.post("/score", {"prompt": "What colour?", "responses": ["red", "blue", "red"]})[1]
        assert answer["rewards"] == pytest.approx(want, abs=1e-5)
        assert worker.error("/score", ONE) == (400, "a judge compares responses and was given 1; want 2 or more")
    finally:
        worker.close()


# The command


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_serves_until_a_signal_answers_what_it_has_begun_and_ends(number, status, text_folder, monkeypatch,
                                                                            capsys):
    """In this process: the signal arrives while a request is scored, of which more waits; its client gets it all."""
    servers, answers, signals, real = [], [], [], RewardModel.score_encoded
    deadline = time.monotonic() + SECONDS

    class Recorded(RewardServer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.append(self)

        def take_jobs(self):
            assert time.monotonic() < deadline, "it does not end"
            return super().take_jobs()

    def score_then_signal(self, requests, pack_tokens):
        if not signals:
            signals.append(os.kill(os.getpid(), number))
        return real(self, requests, pack_tokens)

    def client():
        while not servers and time.monotonic() < deadline:
            time.sleep(0.01)
        connection = http.client.HTTPConnection(*servers[0].server_address, timeout=SECONDS)
        connection.request("POST", "/score", json.dumps([ONE] * 3))
        answers.append(json.loads(connection.getresponse().read()))

    monkeypatch.setattr(evaluate, "RewardServer", Recorded)
    monkeypatch.setattr(evaluate, "MAX_COMPARISONS", 1)
    monkeypatch.setattr(RewardModel, "score_encoded", score_then_signal)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(text_folder), "--serve", "0"])
    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as end:
        train.command_line(main, Config, "evaluate.py")
    thread.join(SECONDS)
    host, port = servers[0].server_address
    printed = capsys.readouterr()
    assert end.value.code == status and len(answers[0]) == 3 and printed.err == ""
    assert host == "127.0.0.1" and f"{text_folder} answers at http://127.0.0.1:{port}: POST /score, " in printed.out
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), SECONDS)


@pytest.mark.parametrize("settings, words", [
    (dict(serve=70_000), "want a port from 0 to 65535"), (dict(serve=0, data=["d"]), "give one --model and no --data"),
    (dict(serve=0, host="256.0.0.1"), "take another port or address"), (dict(serve=-1), "want a port from 0")])
def test_what_cannot_be_served_is_one_line(settings, words, text_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", None)  # it is refused before
    with pytest.raises(ValueError, match=words):
        main(Config(model=[str(text_folder)], **settings))


def test_a_port_that_is_taken_an_ensemble_and_several_ranks_are_refused(worker, text_folder, backbones, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", None)  # they are refused before
    port = worker.server.server_address[1]
    with pytest.raises(ValueError, match=f"--serve {port} .*take another port"):
        main(Config(model=[str(text_folder)], serve=port))
    RewardModel.from_backbone(backbones("qwen3")).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="with one model: give one --model"):
        main(Config(model=[str(text_folder), str(tmp_path / "other")], serve=0))
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="--serve runs in one process"):
        main(Config(model=[str(text_folder)], serve=0))
