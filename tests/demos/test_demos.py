"""Every endpoint of the demos through gradio_client: results, bad input, cancelling; importing starts nothing."""

import json
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'gated-vision-suite[demo]'")
import httpx  # noqa: E402  it comes with gradio, as does its client
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from demos import fields  # noqa: E402
from demos.background_work import Stopped, Worker, stop_all  # noqa: E402
from tests.demos.served_page import served  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "demos" / "pictures"
VIG, DIGITS = "vig_nano_patch4_28.openmoji", "vig_nano_patch4_28.mnist5k"
SWAT = "gated_swin_rmt_nano_swat.openmoji"
ALL = ["gates", "receptive field", "decay"]
DONE = "CPU thread"
SECOND = 1.0
SLACK = 3.0  # seconds, for a machine that is busy with other work


@pytest.fixture(scope="module")
def address():
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def size(path):
    with Image.open(path) as image:
        return image.size


def call(client, name, arguments):
    """What an endpoint returns; the first value, the line about the work, says that it is done."""
    status, *results = client.predict(*arguments, api_name=f"/{name}")
    assert DONE in status, status
    return status, results


@pytest.mark.parametrize(
    ("file", "model", "best", "maps"),
    [("seven.png", DIGITS, "7", 5), ("apple.png", SWAT, "Food & Drink", 3), ("bicycle.png", VIG, "Travel & Places", 5)],
)
def test_classify(client, file, model, best, maps):
    _, (classes, gallery) = call(client, "classify", (handle_file(PICTURES / file), model, ALL, 50, 50))
    assert classes["label"] == best
    assert len(classes["confidences"]) == 5
    assert [size(item["image"]) for item in gallery] == [(280, 280)] * maps
    assert any("decay" in item["caption"] for item in gallery)


@pytest.mark.parametrize("overlays", [[], ["decay"], ["gates"]], ids=str)
def test_classify_shows_only_the_overlays_asked_for(client, overlays):
    _, (_, gallery) = call(client, "classify", (handle_file(PICTURES / "dog.png"), VIG, overlays, 0, 100))
    assert len(gallery) == {(): 0, ("decay",): 1, ("gates",): 3}[tuple(overlays)]


def test_draw_is_the_same_for_a_seed_whatever_the_number_of_images(client):
    _, (both, animation, seeds) = call(client, "draw", ("a red circle", "shapes", 7, 3.0, 4, 2))
    _, (second, _, _) = call(client, "draw", ("a red circle", "shapes", 8, 3.0, 4, 1))
    assert seeds == "7, 8"
    assert Path(both[1]["image"]).read_bytes() == Path(second[0]["image"]).read_bytes()
    assert both[0]["caption"] == "seed 7"
    with Image.open(animation) as steps:
        assert steps.format == "GIF"
        assert steps.n_frames == 4


def painting(background, layer):
    return {"background": handle_file(background), "layers": [handle_file(layer)], "composite": None, "id": None}


def test_paint_changes_what_is_painted_and_nothing_else(client, tmp_path):
    Image.new("RGB", (64, 64), (200, 220, 240)).save(tmp_path / "background.png")
    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 0, 0, 255), (32, 0, 64, 64))
    layer.save(tmp_path / "layer.png")
    given = painting(tmp_path / "background.png", tmp_path / "layer.png")
    _, (gallery, _, _) = call(client, "paint", (given, "a red circle", "shapes", 7, 3.0, 4, 1))
    with Image.open(gallery[0]["image"]) as drawn:
        left, right = (drawn.convert("RGB").crop((x, 0, x + 128, 256)).getextrema() for x in (0, 128))
    assert all(abs(extreme - sent) <= 1 for band, sent in zip(left, (200, 220, 240), strict=True) for extreme in band)
    assert any(high - low > 30 for low, high in right)


def test_draw_spiking(client):
    _, (digits, raster, rates, energy, table, seeds) = call(client, "draw_spiking", ("any", 7, 1.3, 3, 2, 4))
    assert size(digits) == (114, 114)  # 2 x 2 images of 8 x 8, with lines between, six times as large
    assert all(min(size(plot)) > 200 for plot in (raster, rates, energy))
    assert seeds == "7 to 10"
    assert "T = 3" in table
    assert "ANN twin" in table


def test_look(client):
    _, pictures = call(client, "look", (40, 35, 0.9, 32))
    assert [size(picture) for picture in pictures] == [(32, 32)] * 3
    _, others = call(client, "look", (220, 35, 0.9, 32))
    assert Path(pictures[0]).read_bytes() != Path(others[0]).read_bytes()


def test_fly(client):
    import cv2

    _, (*pictures, video) = call(client, "fly", ("spiral", 3, 32))
    assert [size(picture) for picture in pictures] == [(32, 32)] * 3
    frames = cv2.VideoCapture(video["video"] if isinstance(video, dict) else video)
    shapes = []
    while (read := frames.read())[0]:
        shapes.append(read[1].shape)
    assert shapes == [(32, 96, 3)] * 3


@pytest.fixture(scope="module")
def scene(client):
    picture, questions, question = client.predict(3, api_name="/draw_scene")
    assert size(picture) == (192, 192)
    assert [question] in questions["samples"]
    return picture, question


@pytest.mark.parametrize("gate", ["auto", "always", "never"])
def test_ask(client, scene, gate):
    picture, question = scene
    status, (plain, closer, looked, facts) = call(client, "ask", (handle_file(picture), question, gate))
    assert isinstance(plain, str)
    assert isinstance(closer, str)
    assert min(size(looked)) >= 480
    assert "visual tokens of the closer look" in facts
    if gate == "never":
        assert plain == closer
        assert "without a closer look" in status


@pytest.mark.parametrize(
    ("question", "answer", "opened"),
    [
        ("What is the code at green?", "green 27", True),  # in small print
        ("What is the code at blue?", "blue 72", False),  # in large print
        ("What shape is orange?", "orange ring", False),
    ],
)
def test_the_gate_opens_for_small_print_alone(client, scene, question, answer, opened):
    status, (plain, closer, _, _) = call(client, "ask", (handle_file(scene[0]), question, "auto"))
    assert closer == answer
    assert ("Looked closer" in status) == opened
    assert (plain == answer) != opened


DRAW = {"prompt": "a red circle", "model": "shapes", "seed": 7, "guidance": 3.0, "steps": 1, "images": 1}
SPIKE = {"label": "7", "seed": 7, "threshold": 1.0, "time_steps": 1, "steps": 1, "images": 1}
LOOK = {"turn": 40, "height": 35, "distance": 0.9, "side": 32}
FLY = {"path": "orbit", "frames": 1, "side": 32}


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("draw", DRAW, {"prompt": ""}, "Prompt is empty"),
        ("draw", DRAW, {"prompt": " \n\t "}, "Prompt is empty"),
        ("draw", DRAW, {"prompt": None}, "Prompt is empty"),
        ("draw", DRAW, {"prompt": "a" * 10_000_000}, "Prompt has 10,000,000 letters; at most 500"),
        ("draw", DRAW, {"model": "dalle"}, "Model is 'dalle'; valid are shapes, openmoji"),
        ("draw", DRAW, {"seed": -1}, "Seed is -1; it must be a whole number from 0 to"),
        ("draw", DRAW, {"seed": 2**64}, "Seed is 18,446,744,073,709,551,616; it must be"),
        ("draw", DRAW, {"steps": 0}, "Steps is 0; it must be a whole number from 1 to 64"),
        ("draw", DRAW, {"steps": -1}, "Steps is -1; it must be a whole number from 1 to 64"),
        ("draw", DRAW, {"steps": 10**6}, "Steps is 1,000,000; it must be a whole number from 1 to 64"),
        ("draw", DRAW, {"steps": 1.5}, "Steps is 1.5; it must be a whole number"),
        ("draw", DRAW, {"steps": "all"}, "Steps is 'all'; it must be a whole number"),
        ("draw", DRAW, {"guidance": None}, "Guidance is empty, or not a number"),  # what a browser makes of NaN
        ("draw", DRAW, {"images": 1000}, "Images is 1,000; it must be a whole number from 1 to 8"),
        ("draw_spiking", SPIKE, {"label": "12"}, "Digit is '12'; valid are 0, 1"),
        ("draw_spiking", SPIKE, {"threshold": 0}, "Threshold of the neurons is 0; it must be a number from 0.5 to 2"),
        ("draw_spiking", SPIKE, {"steps": 10**6}, "Denoising steps is 1,000,000; it must be a whole number from 1 to"),
        ("look", LOOK, {"side": 7}, "Size, pixels is 7; it must be a whole number from 32 to 256"),
        ("look", LOOK, {"side": 10**6}, "Size, pixels is 1,000,000"),
        ("look", LOOK, {"distance": None}, "Distance, of the training cameras' is empty"),
        ("fly", FLY, {"frames": 0}, "Frames of the video is 0; it must be a whole number from 1 to 120"),
        ("fly", FLY, {"path": "loop"}, "Path of the video is 'loop'; valid are orbit, spiral"),
        (
            "draw_scene",
            {"scene": 3},
            {"scene": -5},
            "Scene, never trained with is -5; it must be a whole number from 0",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_values_are_named_with_what_is_valid(client, name, good, bad, words):
    with pytest.raises(AppError) as error:
        client.predict(**good | bad, api_name=f"/{name}")
    assert words in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_know(address, value):
    """gradio_client refuses to send them; another program may."""
    data = f'["a red circle", "shapes", 7, {value}, 1, 1]'
    with httpx.Client(base_url=address, timeout=20) as web:
        answer = web.post(
            "gradio_api/call/draw", content=f'{{"data": {data}}}', headers={"content-type": "application/json"}
        )
        words = answer.text
        if answer.status_code == 200:
            words = web.get(f"gradio_api/call/draw/{answer.json()['event_id']}").text
            assert "event: error" in words
            assert "Guidance is" in words
        else:
            assert 400 <= answer.status_code < 500
        assert "Traceback" not in words


def png(width, height):
    """A file whose header tells of a picture that is not in it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


FILES = {
    "bomb.png": (png(20_000, 20_000), "has far too many pixels; at most 40,000,000"),
    "large.png": (png(8000, 6000), "has 8,000 x 6,000 pixels; at most 40,000,000"),
    "cut.png": ((PICTURES / "dog.png").read_bytes()[:3000], "cut short or damaged"),
    "nothing.png": (b"", "is not an image that can be read"),
    "text.jpg": (b"this is no picture", "is not an image that can be read"),
    "vectors.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image that can be read"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("endpoint", ["classify", "ask", "paint"])
def test_bad_files_are_refused_and_the_next_request_is_fine(client, tmp_path, endpoint, name):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    file = handle_file(tmp_path / name)
    arguments = {
        "classify": (file, VIG, [], 50, 50),
        "ask": (file, "Where is red?", "never"),
        "paint": ({"background": file, "layers": [], "composite": None, "id": None}, *DRAW.values()),
    }[endpoint]
    with pytest.raises(AppError) as error:
        client.predict(*arguments, api_name=f"/{endpoint}")
    assert words in str(error.value)
    assert str(tmp_path) not in str(error.value)
    call(client, "classify", (handle_file(PICTURES / "dog.png"), VIG, [], 50, 50))


def test_missing_pictures(client, tmp_path):
    with pytest.raises(AppError, match="Picture is empty"):
        client.predict(None, VIG, [], 50, 50, api_name="/classify")
    with pytest.raises(AppError, match="Painting is empty"):
        client.predict(
            {"background": None, "layers": [], "composite": None, "id": None}, *DRAW.values(), api_name="/paint"
        )
    Image.new("RGBA", (32, 32)).save(tmp_path / "clear.png")
    given = painting(PICTURES / "dog.png", tmp_path / "clear.png")
    with pytest.raises(AppError, match="Painting has no painted part"):
        client.predict(given, *DRAW.values(), api_name="/paint")


LONG = {
    "draw": (("red apple", "openmoji", 7, 3.0, 64, 8), ("a red circle", "shapes", 7, 3.0, 1, 1)),
    "draw_spiking": (("any", 7, 1.0, 16, 100, 64), ("7", 7, 1.0, 1, 1, 1)),
    "fly": (("orbit", 120, 256), ("orbit", 1, 32)),
}


@pytest.mark.parametrize("name", LONG)
def test_cancelling_frees_the_queue_within_a_second(client, name):
    long, short = LONG[name]
    call(client, name, short)  # models are loaded
    began = time.perf_counter()
    call(client, name, short)
    usual = time.perf_counter() - began
    job = client.submit(*long, api_name=f"/{name}")
    deadline = time.perf_counter() + 30
    while not any("Drawing" in output[0] for output in job.outputs()):
        assert time.perf_counter() < deadline
        time.sleep(0.02)
    began = time.perf_counter()
    assert job.cancel()
    call(client, name, short)
    assert time.perf_counter() - began < SECOND + usual + SLACK


@pytest.mark.parametrize("stop", [lambda handler: handler.close(), lambda handler: stop_all()], ids=["handler", "all"])
def test_work_stops_when_its_handler_is_closed_or_the_server_ends(stop):
    running, stopped = threading.Event(), threading.Event()

    def endless(work):
        try:
            while True:
                work.report("Working", 0.5)
                running.set()
                time.sleep(0.01)
        except Stopped:
            stopped.set()
            raise

    handler = Worker("test").follow(endless, results=1)
    while not running.is_set():
        assert "progress" in next(handler)[0]
    began = time.perf_counter()
    stop(handler)
    assert stopped.wait(SECOND)
    assert time.perf_counter() - began < SECOND


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("steps is 0"), "steps is 0"),
        (RuntimeError("secret"), "an error that nobody expected (RuntimeError)"),
    ],
    ids=["of the input", "unexpected"],
)
def test_errors_of_work_reach_the_page_as_words(error, words):
    def failing(work):
        raise error

    handler = Worker("test").follow(failing, results=2)
    shown = []
    with pytest.raises(gradio.Error) as raised:
        shown.extend(status for status, *_ in handler)  # keeps what came before the error
    assert words in shown[-1]
    assert words in raised.value.message
    assert "secret" not in raised.value.message


def test_work_in_a_queue_waits_and_a_closed_one_never_starts():
    worker, release, ran = Worker("test"), threading.Event(), []

    def first(work):
        release.wait(10)
        return "", ()

    one, two = worker.follow(first, results=0), worker.follow(lambda work: ran.append(1) or ("", ()), results=0)
    next(one)
    assert "Waiting for its turn" in next(two)[0]
    two.close()
    release.set()
    list(one)
    assert list(worker.follow(lambda work: ("done", ()), results=0))[-1][0].count("done") == 1
    assert ran == []


def test_importing_the_demos_starts_nothing_and_loads_no_model():
    code = """
import json, sys, threading
import demos.app, demos.classify, demos.fly_through, demos.spiking, demos.text_to_image, demos.zoom_question
loaded = [m for m in ("torch", "timm", "diffusers", "transformers", "vision", "generation") if m in sys.modules]
print(json.dumps([loaded, sorted(t.name for t in threading.enumerate())]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded, threads = json.loads(done.stdout)
    assert loaded == []
    assert threads == ["MainThread"]


@pytest.mark.parametrize("demo", ["classify", "text_to_image", "spiking", "zoom_question", "fly_through"])
def test_each_demo_makes_a_page_of_its_own(demo):
    from importlib import import_module

    from demos.page import page

    module = import_module(f"demos.{demo}")
    blocks = page(module.TITLE, "", {module.TITLE: module.build})
    named = [each.api_name for each in blocks.fns.values() if each.api_visibility == "public" and each.api_name]
    assert named
    assert not blocks.analytics_enabled


def test_every_event_of_the_page_is_named_or_private_and_bounded():
    from demos.app import build

    blocks = build()
    for event in blocks.fns.values():
        if event.api_visibility == "public":
            assert event.api_name in ("classify", "draw", "paint", "draw_spiking", "ask", "look", "fly", "draw_scene")
            if event.queue:
                assert event.concurrency_limit == 1
    assert blocks._queue.max_size == 16


@pytest.mark.parametrize(("port", "words"), [("0", "from 1 to 65535"), ("70000", "from 1 to 65535")])
def test_a_bad_port_is_refused(port, words, capsys):
    from demos.page import serve

    with pytest.raises(SystemExit):
        serve("app", lambda: pytest.fail("a page was built"), ["--port", port])
    assert words in capsys.readouterr().err


def test_header_check_decodes_nothing(monkeypatch):
    """A file whose content is missing passes the check of its header; `load`, which decodes, is never called."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a picture was decoded"))
    fields.check_header("Picture", PICTURES / "dog.png")
