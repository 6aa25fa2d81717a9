"""The page over HTTP, as a browser speaks to it: one request, fifty at once, and files that are refused."""

import json
import threading
import urllib.request
import uuid
from pathlib import Path

import pytest

from ride_timm import InputError
from ride_timm.inference.demo.opinions import load_demo

pytest.importorskip("gradio", reason="needs the extra demo")

from ride_timm.inference.demo.page import launch


@pytest.fixture(scope="module")
def url(run):
    page, url = launch(load_demo(str(run), "cpu"), prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def post(url, body, kind):
    return json.load(urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=60))


def upload(url, path):
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    return post(f"{url}gradio_api/upload", body, f"multipart/form-data; boundary={boundary}")[0]


def predict(url, path, setting=2):
    """HTML of decision, setting and classes."""
    image = path and dict(path=upload(url, path), orig_name=path.name, meta=dict(_type="gradio.FileData"))
    call = f"{url}gradio_api/call/predict"
    event = post(call, json.dumps(dict(data=[image, setting])).encode(), "application/json")["event_id"]
    lines = urllib.request.urlopen(f"{call}/{event}", timeout=60).read().decode().splitlines()
    assert "event: complete" in lines, lines
    return json.loads(lines[-2 if not lines[-1] else -1].removeprefix("data: "))


def test_an_image(url, photo):
    decision, setting, classes = predict(url, photo)
    assert "3 experts" in decision and "44.0" in setting and "Expert 3" in classes


SETTINGS = [(1, "40.0"), (3, "45.5"), (-5, "40.0"), (99, "45.5"), (2.8, "45.5"), (None, "44.0")]


@pytest.mark.parametrize(("setting", "accuracy"), SETTINGS)
def test_the_slider(url, setting, accuracy):
    decision, about, classes = predict(url, None, setting)
    assert "Drop an image" in decision and accuracy in about and classes == ""


def test_a_file_that_is_no_image(url, tmp_path):
    path = tmp_path / "words.png"
    path.write_text("hello")
    decision, setting, classes = predict(url, path)
    assert 'role="alert"' in decision and "words.png cannot be read as an image" in decision
    assert "gradio/" not in decision and "44.0" in setting and classes == ""


def test_files_of_the_server_stay_there(url, run):
    image = dict(path=str(Path(run) / "config.json"), meta=dict(_type="gradio.FileData"))
    call = f"{url}gradio_api/call/predict"
    event = post(call, json.dumps(dict(data=[image, 1])).encode(), "application/json")["event_id"]
    assert "event: error" in urllib.request.urlopen(f"{call}/{event}", timeout=60).read().decode()


def test_fifty_at_once(url, photo):
    found = []
    expected = predict(url, photo)
    threads = [threading.Thread(target=lambda: found.append(predict(url, photo))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 50


def test_a_port_that_is_taken(url, run):
    with pytest.raises(InputError, match=r"port=\d+: no free port .*: choose another --port"):
        launch(load_demo(str(run), "cpu"), int(url.rsplit(":", 1)[1].strip("/")), prevent_thread_lock=True, quiet=True)
