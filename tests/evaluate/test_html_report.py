"""The HTML report in a real browser: one file, no request to anywhere, every part drawn and in its colour."""

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from gemma4_jax.bundle import with_token_ids
from gemma4_jax.config import get_preset
from gemma4_jax.evaluate.html_report import Sample, load_samples, sample_of, save_samples, write_report
from gemma4_jax.media import Processor
from gemma4_jax.text.pieces import AUDIO, IMAGE, Pieces
from gemma4_jax.text.tokenizer import train_tokenizer
from gemma4_jax.train import plots

TOKENIZER = train_tokenizer([], 512)


@pytest.fixture(scope="module")
def row():
    """A 96x48 picture, left half red and right half blue, and a tenth of a second of a tone."""
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:, :48, 0] = picture[:, 48:, 2] = 255
    tone = np.sin(np.arange(1600) * 0.3).astype(np.float32)
    config = with_token_ids(get_preset("tiny"), TOKENIZER)
    return Processor(TOKENIZER, config).encode(Pieces([IMAGE, AUDIO]), images=[picture], audio=[(tone, 16_000)])


@pytest.fixture(scope="module")
def page(tmp_path_factory, row):
    """The report opened in Chromium: (page, requests it made, errors it logged)."""
    folder = tmp_path_factory.mktemp("runs") / "my <run>"
    folder.mkdir()
    (folder / "config.json").write_text('{"seed": 0}')
    plots.bars(folder / "plots" / "speed.png", ["a", "b"], [1.0, 2.0], "speed")
    tokens = TOKENIZER.encode("if a < b:", bos=False)
    samples = [sample_of(TOKENIZER, TOKENIZER.encode("x = 1\n"), tokens, [i % 2 == 0 for i in range(len(tokens))])]
    save_samples(folder, samples)
    report = write_report(folder, {"val_loss": 1.25, "acceptance": [0.5, 0.25]}, [("answer: 7", row)])
    requests, errors = [], []
    with sync_playwright() as driver:
        closed = "--host-resolver-rules=MAP * ~NOTFOUND"
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", closed]
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        opened = browser.new_page()
        opened.on("request", lambda request: requests.append(request.url))
        opened.on("console", lambda message: errors.append(message.text))
        opened.goto(report.as_uri())
        yield opened, requests, errors
        browser.close()


def test_one_file_and_no_network(page):
    _, requests, errors = page
    assert [url for url in requests if not url.startswith("data:")] == [requests[0]]
    assert requests[0].startswith("file://") and errors == []


def test_numbers_and_plots(page):
    opened, _, _ = page
    assert opened.title() == "my <run>"
    assert opened.locator("#results td").all_inner_texts() == ["val_loss", "1.25", "acceptance", "0.5, 0.25"]
    assert opened.locator("figure.plot img").evaluate("image => image.naturalWidth") > 100


def test_drafted_tokens_have_a_colour_of_their_own(page):
    opened, _, _ = page
    text = opened.locator("pre.tokens").inner_text()
    assert text == "x = 1\nif a < b:"
    drafted, own = (opened.locator(f"pre.tokens .{kind}") for kind in ("drafted", "own"))
    assert "".join(drafted.all_inner_texts()) != "" and drafted.count() - own.count() in (0, 1)
    colours = {kind.first.evaluate("span => getComputedStyle(span).backgroundColor") for kind in (drafted, own)}
    assert len(colours) == 2


def test_patches_and_frames(page, row):
    opened, _, _ = page
    patches = opened.locator("svg.patches")
    assert patches.locator("rect").count() == len(row.patches)
    marks = patches.locator("text").all_text_contents()
    assert marks == [f"{x},{y}" for x, y in row.patch_positions]
    assert opened.locator("svg.frames line").count() == len(row.audio_frames) == 3
    box = patches.bounding_box()
    assert box["width"] > box["height"] > 0


def test_samples_are_kept(tmp_path):
    assert load_samples(tmp_path) == []
    samples = [Sample("a", (("b", True), ("c", False)))]
    save_samples(tmp_path, samples)
    assert load_samples(tmp_path) == samples


def test_a_token_of_several_bytes_keeps_its_flag():
    tokens = TOKENIZER.encode("é", bos=False)
    sample = sample_of(TOKENIZER, [], tokens, [True] * len(tokens))
    assert "".join(text for text, _ in sample.pieces) == "é"
