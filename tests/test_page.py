"""Pages: what is written is text and stays text, one file holds all of it, and a real browser shows
every picture and every table, on a desk and on a phone.
"""

import base64
import re
import struct
import zlib

import pytest
from browser import browser

from classroom.page import Page, words


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height=40):
    """A grey picture, by the rules of PNG."""
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SVG = '<svg viewBox="0 0 900 30" width="900"><rect width="900" height="30"/></svg>'


def example():
    page = Page("A title & <b>", "With `code` in it.")
    page.section("One < two")
    page.text("a < b", "see [the report](https://arxiv.org/abs/2604.12374)")
    page.figure(png(2000), 'a "wide" picture', "from 1 to 2")
    page.figure(SVG, "a drawing")
    page.table(("what", *"abcdefghij"), [("row " * 9, *range(10**9, 10**9 + 10))], "caption")
    page.section("Two")
    page.shell("python train.py --name " + "x" * 300)
    page.fold("more", "a </pre><script>document.title = 'taken over'</script>")
    return page


def test_text_stays_text():
    text = example().html()
    assert "A title &amp; &lt;b&gt;" in text and "a &lt; b" in text
    assert "<script>document" not in text and "a &lt;/pre&gt;" in text
    assert words("`a<b`") == "<code>a&lt;b</code>"
    assert words("`a  --b`") == "<code><span>a</span>  <span>--b</span></code>"
    assert words("[x](javascript:alert)") == "[x](javascript:alert)"
    assert words('[x](https://a/"b)') == '<a href="https://a/&quot;b">x</a>'


def test_one_file_holds_all_of_it(tmp_path):
    example().write(tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
    (coded,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert base64.b64decode(coded) == png(2000)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#|https://arxiv)", text)


def test_columns_of_numbers_stand_to_the_right():
    page = Page("t")
    page.table(("a", "b", "c"), [(1234567, "12 %", "1.69"), (8, "-0.5", "none")])
    text = page.html()
    assert (
        '<td class="number">1,234,567</td>' in text
        and '<td class="number">12\N{NO-BREAK SPACE}%</td>' in text
    )
    assert '<td class="number">-0.5</td>' in text and "<td>1.69</td><td" not in text
    assert "<td>1.69</td>" in text and "<td>none</td>" in text


def test_what_cannot_be_shown_is_refused():
    page = Page("t")
    with pytest.raises(ValueError, match="a row of 1 cells under a head of 2"):
        page.table(("a", "b"), [(1,)])
    page.section("Data: text")
    with pytest.raises(ValueError, match="second section"):
        page.section("Data, text")
    with pytest.raises(ValueError, match="script"):
        page.script("x = '</script>'")


@pytest.mark.parametrize("width, mobile", [(1200, False), (390, True)])
def test_a_browser_shows_every_picture_and_table(tmp_path, width, mobile):
    example().write(tmp_path / "p.html")
    with browser(tmp_path / "b", width, mobile=mobile) as b:
        b.open(tmp_path / "p.html")
        seen = b.look()
        assert b.run("return document.title") == "A title & <b>"
    assert [(alt, natural) for alt, natural, _ in seen["pictures"]] == [('a "wide" picture', 2000)]
    assert seen["tables"] == [[2, 11]] and seen["sections"] == ["One < two", "Two"]
    assert seen["window"] == width >= seen["wide"] and not seen["fetched"]
    for wide in [*seen["drawings"], seen["pictures"][0][2]]:  # on a phone within a frame
        assert 500 < wide <= 17 * 48


def test_a_page_has_its_own_style_and_script(tmp_path):
    page = example()
    page.raw('<p id="mine">before</p>')
    page.style("#mine { color: rgb(1, 2, 3) }")
    page.script(
        "mine.onmouseover = () => mine.textContent = getComputedStyle(mine).color;"
        "fetch('https://example.org').catch(() => mine.title = 'refused')"
    )
    page.write(tmp_path / "p.html")
    with browser(tmp_path / "b") as b:
        b.open(tmp_path / "p.html")
        assert b.run("return mine.textContent") == "before"
        b.hover("#mine")
        assert b.run("return mine.textContent") == "rgb(1, 2, 3)"
        assert b.run("return mine.title") == "refused"


def test_this_file_can_fail(tmp_path, monkeypatch):
    """Pictures that are cut off, and pictures that do not shrink, are seen."""
    monkeypatch.setattr("classroom.page.STYLE", "")
    page = Page("t")
    page.figure(png(2000)[:30], "broken")
    page.figure(png(2000), "too wide")
    page.write(tmp_path / "p.html")
    with browser(tmp_path / "b", 390, mobile=True) as b:
        b.open(tmp_path / "p.html")
        seen = b.look()
    assert [natural for _, natural, _ in seen["pictures"]] == [0, 2000]
    assert seen["wide"] > 390
