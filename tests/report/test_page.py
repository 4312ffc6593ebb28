"""The HTML page: one file that asks for nothing, escapes everything and never calls a missing value a pass."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_samples import CELL_ERROR, LPIPS_REASON, PROMPTS, gate, measurement, sample_record

from exporter.report.page import render_html
from exporter.report.record import CellRecord, ImageRecord, RunRecord

VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'>{{ 7*7 }}"


class Page(HTMLParser):
    """Collects tags, attributes and text, and complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", ""))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.stack:
            return
        self.text += data
        if self.rows and "tr" in self.stack:
            self.rows[-1] = (self.rows[-1][0], self.rows[-1][1] + data)

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.found for key, value in attributes.items() if key == name]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def record(root: Path) -> RunRecord:
    return sample_record(root)


@pytest.fixture(scope="module")
def html(record: RunRecord, root: Path) -> str:
    return render_html(record, root)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def empty(**changes: object) -> RunRecord:
    record = sample_record(Path(), images=False)
    nothing: dict[str, object] = {"states": [], "targets": [], "cells": [], "gates": [], "notes": []}
    return record.model_copy(update=nothing | changes)


def one_cell(**changes: object) -> RunRecord:
    cell = CellRecord.model_validate({"state": "0-dense", "target": "openvino", "status": "ok"} | changes)
    return empty(cells=[cell])


def test_verdict_comes_first_and_names_what_failed(page: Page) -> None:
    head = page.text[: page.text.index("Every state on every target")]
    assert "Failed: 1 cell failed, 1 gate missed" in head
    assert "exit code 5: some targets failed" in head
    assert CELL_ERROR in head
    assert "got 0.63" in head


def test_page_asks_for_nothing_from_outside(html: str, page: Page) -> None:
    sources = page.attributes("src")
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(
        link.startswith(("#", "./", "data:")) for link in [*page.attributes("href"), *page.attributes("xlink:href")]
    )
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert {tag for tag, _ in page.found} & {"script", "iframe", "object", "embed", "form"} == set()
    policy = next(
        attributes for _, attributes in page.found if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(policy["content"]).startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_has_its_id(html: str, page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    referred = {link[1:] for link in page.attributes("href") if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)", html)
    )
    assert referred <= set(ids)


def test_every_state_and_target_has_its_row_and_numbers(page: Page) -> None:
    text = re.sub(r"\s+", " ", page.text)
    for shown in (
        "61.60 dB",
        "unet, timestep 349",
        "0.940",
        "[0.880, 0.980]",
        "0.61 × 0-dense[0.59, 0.62]",
        "38.7 MiB",
    ):
        assert shown in text
    assert "vae_decoder 7.70 ms" in text


def test_red_marks_missed_gates_and_failures_only(page: Page) -> None:
    red = [
        attributes
        for tag, attributes in page.found
        if tag in ("td", "tr") and "missed" in str(attributes.get("class")).split()
    ]
    failed = [
        attributes for tag, attributes in page.found if tag == "tr" and "failed" in str(attributes.get("class")).split()
    ]
    assert [attributes.get("data-label") for attributes in red] == ["Right prompt", None]
    assert len(failed) == 1


def test_what_was_not_measured_is_never_shown_as_passed(page: Page) -> None:
    rows = [text for _, text in page.rows if "lpips" in text and LPIPS_REASON in text]
    assert rows
    assert all("not measured" in row and "✓" not in row and "passed" not in row for row in rows)
    assert f"fidelity.image.lpips: {LPIPS_REASON}" in page.text


def test_missing_value_without_a_reason_still_says_not_measured(tmp_path: Path) -> None:
    page = Page(render_html(one_cell(measurements=[measurement("latency.median_ms", None, "ms")]), tmp_path))
    assert page.text.count("the run recorded no value and no reason") == 6
    assert "Nothing proven" not in page.text


@pytest.mark.parametrize("status", ["missed", "not measured", "passed"])
def test_gate_status_reaches_the_cell(status: str, tmp_path: Path) -> None:
    record = one_cell(measurements=[measurement("fidelity.teacher_forced.psnr_db", 31.0, "dB")])
    page = Page(render_html(record.model_copy(update={"gates": [gate(status)]}), tmp_path))
    row = next(text for _, text in page.rows if "31.00 dB" in text)
    assert {"missed": "✗ missed ≥ 28.00", "not measured": "○ untested ≥ 28.00", "passed": "✓ ≥ 28.00"}[status] in row


def test_untrusted_text_is_escaped_everywhere(root: Path) -> None:
    record = sample_record(root, images=False)
    cell = CellRecord(
        state=ATTACK,
        target=ATTACK,
        status="ok",
        measurements=[measurement(ATTACK, 1.0, ATTACK, component=ATTACK, note=ATTACK, state=ATTACK, target=ATTACK)],
        images=[ImageRecord(prompt=ATTACK, seed=1, path="x.png", reference=f"{ATTACK}.png", problems=[ATTACK])],
        evidence={ATTACK: {"runtime": ATTACK, "layers": [{"name": ATTACK, "precision": ATTACK}], "notes": [ATTACK]}},
        engine=ATTACK,
    )
    failed = CellRecord(state=ATTACK, target="b", status="failed", error=ATTACK)
    states = [
        state.model_copy(update={"id": ATTACK, "digest": ATTACK, "facts": {ATTACK: ATTACK}}) for state in record.states
    ]
    targets = [
        target.model_copy(update={"name": ATTACK, "device": ATTACK, "problem": ATTACK}) for target in record.targets
    ]
    attacked = record.model_copy(
        update={
            "name": ATTACK,
            "recipe": {ATTACK: ATTACK},
            "environment": {ATTACK: [ATTACK]},
            "notes": [ATTACK],
            "stopped": ATTACK,
            "cells": [cell, failed],
            "states": states,
            "targets": targets,
            "gates": [gate("missed", message=ATTACK, gate={"metric": ATTACK, "min": ATTACK}, metric=ATTACK)],
        }
    )
    html = render_html(attacked, root)
    page = Page(html)
    assert "<script" not in html
    assert "<img src=x" not in html
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert ATTACK in page.text
    assert page.text.count("{{ 7*7 }}") > 10


def test_unicode_prompts_and_control_characters_are_kept_readable(tmp_path: Path) -> None:
    prompt = "ein großer Kreis, 赤い丸, 🟥, \x1b[31mred\x00\ud800"
    image = ImageRecord(prompt=prompt, seed=2**31, path="a.png", reference="b.png")
    html = render_html(one_cell(images=[image]), tmp_path)
    assert "ein großer Kreis, 赤い丸, 🟥, \ufffd[31mred\ufffd\ufffd" in html
    html.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", html)


def test_missing_damaged_and_foreign_images_are_said_in_their_place(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8), "red").save(root / "dense.png")
    Image.new("RGB", (4, 8), "red").save(root / "narrow.png")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    paths = [
        "gone.png",
        "broken.png",
        "../secret.png",
        "link.png",
        str(tmp_path / "secret.png"),
        "narrow.png",
        "a\0b.png",
    ]
    images = [
        ImageRecord(prompt=str(index), seed=0, path=path, reference="dense.png") for index, path in enumerate(paths)
    ]
    page = Page(render_html(one_cell(images=images), root))
    text = page.text
    assert "file is missing: gone.png" in text
    assert "cannot be read: broken.png" in text
    assert text.count("not inside the report's folder") == 4
    assert "no difference: sizes 4 x 8 and 8 x 8" in text
    assert len(page.attributes("src")) == len(paths) + 1


def test_run_without_any_cell_renders(tmp_path: Path) -> None:
    page = Page(render_html(empty(complete=True, exit_code=0), tmp_path))
    assert "Nothing was measured" in page.text
    assert "No state was made" in page.text


def test_interrupted_run_says_so(tmp_path: Path) -> None:
    record = one_cell().model_copy(update={"complete": False, "exit_code": 130, "stopped": "Ctrl-C after 0-dense"})
    page = Page(render_html(record, tmp_path))
    assert "Interrupted" in page.text
    assert "Ctrl-C after 0-dense" in page.text
    assert "did not come to its end" in page.text


def test_equal_records_give_equal_pages(html: str, tmp_path: Path) -> None:
    assert render_html(sample_record(tmp_path), tmp_path) == html


def test_charts_take_their_colours_from_the_page(html: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        assert "var(--series-" in chart
        colours = {
            colour for style in re.findall(r'style="([^"]*)"', chart) for colour in re.findall(r"#[0-9a-f]{6}", style)
        }
        assert colours == set()
        assert "<title>" in chart
    assert 'aria-label="Fidelity per timestep on openvino"' in html
    assert "prefers-color-scheme: dark" in html


def test_prompts_are_bounded_and_findings_come_first(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = [
        ImageRecord(
            prompt=f"p{index}", seed=0, path="a.png", reference="a.png", problems=["black"] if index == 30 else []
        )
        for index in range(32)
    ]
    page = Page(render_html(one_cell(images=images), tmp_path))
    assert "8 of 32 prompts" in page.text
    assert page.text.index("p30") < page.text.index("p0")


def test_image_grid_keeps_prompt_seed_and_amplification(page: Page) -> None:
    assert all(prompt in page.text for prompt in PROMPTS)
    assert "amplified × 4" in page.text
    assert "saturated" in page.text


def test_evidence_of_an_untouched_component_appears_once(page: Page) -> None:
    assert page.text.count("0-dense, 1-pruned, 2-tuned · asked for f32 · 96 layers") == 1
    assert "the first 300 of 420" in page.text
