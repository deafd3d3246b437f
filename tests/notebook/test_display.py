"""Markdown in a notebook: what the page makes of it, and what it must not do; formulas stay formulas."""

import re
from types import SimpleNamespace

import pytest
from IPython.core.displaypub import CapturingDisplayPublisher

from chatmagic import ChatLLM
from chatmagic.conversation.pieces import AllThought, Thought
from chatmagic.notebook.display import harmless_markdown, render_markdown
from fake_model import FakeModel


@pytest.mark.parametrize(
    "text, html",
    [
        ("**a** `b<c>`", "<p><strong>a</strong> <code>b&lt;c&gt;</code></p>\n"),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>\n"),
        ("a <img src=x onerror=alert(1)>", "<p>a &lt;img src=x onerror=alert(1)&gt;</p>\n"),
        ("![pixel](http://evil/?q=1)", '<p><a href="http://evil/?q=1">pixel</a></p>\n'),
        (
            '![](http://evil/"onload="x)',
            '<p><a href="http://evil/%22onload=%22x">http://evil/%22onload=%22x</a></p>\n',
        ),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>\n"),
        ("![x](javascript:alert(1))", "<p>![x](javascript:alert(1))</p>\n"),
        ("<javascript:alert(1)>", "<p>&lt;javascript:alert(1)&gt;</p>\n"),
        (
            '```py"><script>\nif a < b: pass\n```',
            '<pre><code class="language-py&quot;&gt;&lt;script&gt;">if a &lt; b: pass\n</code></pre>\n',
        ),
        (
            "|a|\n|-|\n|<b>|",
            "<table>\n<thead>\n<tr>\n<th>a</th>\n</tr>\n</thead>\n"
            + "<tbody>\n<tr>\n<td>&lt;b&gt;</td>\n</tr>\n</tbody>\n</table>\n",
        ),
    ],
)
def test_markdown_cannot_run_or_fetch(text, html):
    assert render_markdown(text) == html


ALIGNED = r"""\begin{aligned}
a &= b + c_1 \\
  &= d_1 < e * f * g \\[2pt]
- x &= {y}
\end{aligned}"""


FORMULAS = [
    "$x_1 + y_2$",
    r"$\{a, b\}$",
    "$a*b*c$",
    "$|x|$",
    r"\(a_1 * b_1 \{c\}\)",
    r"\[ \frac{a}{b} \]",
    "$$\n" + ALIGNED + "\n$$",
    "\\[\n" + ALIGNED + "\n\\]",
    r"\begin{align*}" + "\na &= b \\\\\n+ c &= d\n" + r"\end{align*}",
    "$$a < b & c$$",
    "$x$",
    r"$\$5$",
]
AROUND = ["{}", "其中{}是", "* a {} b\n* c", "| a | b |\n|---|---|\n| {} | 1 |", "> {}", "**{}**, `$a$`", "# {}"]
FITTING = [
    (formula, around) for formula in FORMULAS for around in AROUND if "\n" not in formula or around[0] not in "|#>"
]


@pytest.mark.parametrize("formula, around", FITTING)
def test_formulas_survive(formula, around):
    """As MathJax is to see them: in one text, no Markdown in them."""
    html = render_markdown(around.replace("{}", formula))
    text = re.sub(r"&(\w+);", lambda found: {"lt": "<", "gt": ">", "amp": "&", "quot": '"'}[found[1]], html)
    assert text.count(formula) == 1
    for tag in re.findall(r"</?(\w+)", html):
        assert tag in {
            "p",
            "li",
            "ul",
            "table",
            "tr",
            "td",
            "th",
            "thead",
            "tbody",
            "blockquote",
            "strong",
            "code",
            "h1",
        }


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 and $6.",
        "$5 or $6, `$HOME`",
        "US$5, CA$6",
        "`$HOME` and `$PATH`",
        "```sh\necho $A $B\n```",
        "from $5-$6",
        "5$ or 6$",
        r"\$a\$",
        "a $ b $ c",
        "$a\n\nb$",
    ],
)
def test_prices_and_code_are_no_formulas(text):
    """In a text of the page outside of code, no two dollars stand in one text node."""
    outside = re.sub(r"<code.*?</code>", "", render_markdown(text), flags=re.DOTALL)
    assert all(part.count("$") <= 1 for part in re.split(r"<[^>]*>", outside)) and "\ufdd0" not in outside


@pytest.mark.parametrize(
    "text", ["\ufdd00\ufdd0", "$a$ \ufdd05\ufdd0", "[a]($b$)", '![$a$]($b$ "$c$")', '$"><script>$']
)
def test_marks_cannot_be_forged(text):
    html = render_markdown(text)
    assert "<script" not in html and not re.search("\ufdd0", html)


def test_markdown_that_is_exported_loads_nothing_either():
    text = "![a](http://evil/x.png) `![a](b)` <img src=x> a < b\n```html\n<img> ![](x)\n```\n[l](u) $![x]$"
    assert harmless_markdown(text) == (
        "\\![a](http://evil/x.png) `![a](b)` \\<img src=x> a < b\n```html\n<img> ![](x)\n```\n[l](u) $\\![x]$"
    )


@pytest.fixture
def published(run, monkeypatch):
    """What a kernel would send to the page: the bundles, each with the output that it makes or replaces."""
    monkeypatch.setattr(run.ip, "kernel", SimpleNamespace(_allow_stdin=True), raising=False)
    publisher = CapturingDisplayPublisher()
    monkeypatch.setattr(run.ip, "display_pub", publisher)
    return publisher.outputs


def test_only_the_replys_own_output_is_replaced(run, llm, fake, published):
    fake.delay, fake.reply = 0.005, lambda turn, question: "**bold** $x_1$ " * 4
    assert (
        run("print('before')\nget_ipython().run_cell_magic('chat', '--format markdown', 'hi')\nprint('after')")
        == "before\nafter\n"
    )
    first, *updates = published
    assert not first["update"] and len(updates) > 2 and all(each["update"] for each in updates)
    assert len({each["transient"]["display_id"] for each in published}) == 1
    assert all(llm.history[-1][1].startswith(each["data"]["text/plain"]) for each in published)
    last = published[-1]["data"]
    assert last["text/markdown"] == last["text/plain"] == llm.history[-1][1]
    assert last["text/html"].count("<strong>bold</strong> $x_1$") == 4


def test_what_there_was_stays_after_a_failure(run, llm, fake, published):
    fake.failure = KeyboardInterrupt()
    assert not run.ip.run_cell("%%chat --format markdown\nhi").success
    assert published[-1]["data"] == {"text/plain": "1: "}


@pytest.mark.parametrize("quiet", ["--no-stream", "executed"])
def test_it_is_sent_once_where_nobody_watches(run, llm, published, quiet):
    run.ip.kernel._allow_stdin = quiet != "executed"
    run(f"%%chat --format markdown {quiet.replace('executed', '')}\nhi")
    assert [set(each["data"]) for each in published] == [{"text/html", "text/markdown", "text/plain"}]


def page(published):
    """What stands in the outputs of the page in the end, from above, each as its kinds of data."""
    outputs = {}
    for number, each in enumerate(published):
        outputs[(each["transient"] or {}).get("display_id", number)] = each["data"]
    return list(outputs.values())


@pytest.mark.parametrize("way", ["", "--no-stream", "executed", "stopped"])
@pytest.mark.parametrize(
    "thought", [[Thought("Hm, "), Thought("<b>.")], ["Hm, ", "<b>.", AllThought()]], ids=["told", "known by its end"]
)
def test_a_thought_stands_folded_above_its_reply(run, llm, fake, published, monkeypatch, way, thought):
    """However long it took, and whether or not its first words were shown as the reply's."""
    monkeypatch.setattr("chatmagic.notebook.display.PAUSE", 0)
    run.ip.kernel._allow_stdin = way != "executed"

    def stream(messages, stats, **options):
        yield from [*thought, "**y", "es**"]
        if way == "stopped":
            raise KeyboardInterrupt

    fake.stream = stream
    run.ip.run_cell(f"%%chat --format markdown {way if way.startswith('--') else ''}\nhi")
    folded, said = page(published)
    assert folded["text/html"].startswith("<details><summary>thought, 8 characters")
    assert "Hm, &lt;b&gt;." in folded["text/html"]
    assert said["text/plain"] == "**yes**" and ("text/html" in said) == (way != "stopped")
    assert (published[0]["data"].keys() == {"text/plain"}) == (
        way in ("", "stopped") and AllThought in map(type, thought)
    )


@pytest.mark.slow
def test_a_long_reply_is_not_sent_again_and_again(run, published):
    model = FakeModel()
    model.reply = lambda turn, question: "x" * 100_000
    run.ip.push({"long": ChatLLM(model, name="long", max_new_tokens=10**6)})
    run("%%chat -m long --format markdown\nhi")
    # Whole replies that were sent: a hundred at most, and not one a piece; how many hangs on how busy the machine is.
    assert sum(len(each["data"]["text/plain"]) for each in published) < 100 * 100_000
