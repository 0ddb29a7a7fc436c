"""The pages in headless Chromium: curves, keyboard, dark mode, 400 px, acts, chat. Skipped where no browser is."""

import re
import time
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs Playwright and a browser: make setup-browser")

pytest.importorskip("openai", reason="the server of the tests needs the openai client")

from tests.serve.conftest import in_thread

from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.pages.run import run_pages
from posttrain.cli.pages.site import Site
from posttrain.serve.options import ServeOptions
from posttrain.serve.setup import ServedNames, make_router

TOKEN = "the-token-of-the-page"
PATHS = ("/", "/run?run=runs/first", "/run?run=runs/waiting", "/compare?run=runs/first&run=runs/waiting", "/data?run=runs/first", "/registry", "/version?ref=words@1", "/configure?kind=grpo", "/start", "/acts", "/chat")  # fmt: skip


@pytest.fixture(scope="module")
def browser(chromium_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def serve(folder, monkeypatch):
    """`serve(allow_acts=True)`: the address of a real server, with its token."""
    monkeypatch.chdir(folder)
    opened = []

    def start(*, allow_acts=False, chat=()):
        options = ServeOptions(port=0, token=TOKEN, drain_s=2.0)
        make_chat = (lambda: make_router(ServedNames(list(chat), Path("registry")), options)) if chat else None

        def make_site(names):
            return Site(ServedFolder(folder), TOKEN, registry="registry", allow_acts=allow_acts, chat_models=names)

        server = in_thread(lambda ready: run_pages(options, make_site, make_chat, ready))
        opened.append(server)
        return server.__enter__().address

    yield start
    for server in opened:
        server.__exit__(None, None, None)


@pytest.fixture
def visit(browser):
    """`visit(address)`: a tab that has come in; what its console complained of is an error at the end."""
    complaints = []

    def open_tab(address, **options):
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"a script of the records ran: {dialog.message}"))
        page.goto(f"{address}/?token={TOKEN}")
        return page

    open_tab.complaints = complaints
    yield open_tab
    for context in browser.contexts:
        context.close()
    assert complaints == []


def until(page, expression, within_s=60):
    """`wait_for_function` evaluates text inside the page, which the page's policy forbids."""
    end = time.monotonic() + within_s
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def drawn(page):
    page.wait_for_selector(".curves[data-drawn]")
    return page.locator(".curves figure:not([hidden]) > svg")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 400)])
def test_every_page_fits_its_screen_and_runs_no_script_of_the_records(serve, visit, scheme, width):
    address = serve(allow_acts=True)
    page = visit(address, color_scheme=scheme, viewport={"width": width, "height": 800})
    for path in PATHS:
        page.goto(address + path)
        if "run=" in path and not path.startswith("/data"):
            drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(23, 23, 26)")  # fmt: skip
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input:not([type=hidden]),select,textarea,button,a')].filter(one => !(one.labels?.length"
            " || one.getAttribute('aria-label') || one.textContent.trim())).length"
        )
        assert unnamed == 0, path


def test_curves_zoom_by_mouse_and_keys_smooth_and_say_their_values(serve, visit):
    address = serve()
    page = visit(address)
    page.goto(f"{address}/run?run=runs/first")
    plots = drawn(page)
    assert plots.count() >= 3
    first = plots.first
    assert "Reward, steps 1 to 30: reward from 0.0333 to 1" in first.get_attribute("aria-label").replace(
        "0.03333", "0.0333"
    )
    box = first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 50)
    page.mouse.up()
    until(page, "document.querySelector('.tools [role=status]').textContent.includes('steps 1')")
    low, high = map(
        int, re.search(r"steps (\d+) to (\d+)", page.locator(".tools [role=status]").text_content()).groups()
    )
    assert 10 < low < high < 28
    first.focus()
    page.keyboard.press("0")
    until(page, "!document.querySelector('.tools [role=status]').textContent.includes('steps 1')")
    page.keyboard.press("+")
    until(page, "document.querySelector('.tools [role=status]').textContent.includes(', steps')")
    page.locator("#smoothing").fill("0.9")
    assert page.locator(".curves path.raw").count() > 0
    page.get_by_text("Values of Reward", exact=True).click()
    until(page, "document.querySelectorAll('.curves table tr').length > 5")  # the event of an opened part comes later
    assert "not finite" in page.locator(".curves").text_content()
    page.select_option("[aria-label='Draw another metric']", "num_tokens")
    until(page, "document.querySelector('.curves').textContent.includes('num_tokens')")


def test_each_reward_is_a_curve_of_its_panel(serve, visit, folder, run_in):
    run = run_in(folder / "runs" / "two", "two", steps=1)
    rows = "".join(f'{{"step": {n}, "rewards/a/share": 0.3, "rewards/b/share": 0.7}}\n' for n in (1, 2))
    (run / "stages" / "01-grpo" / "metrics.jsonl").write_text(rows)
    address = serve()
    page = visit(address)
    page.goto(f"{address}/run?run=runs/two")
    assert drawn(page).count() == 1
    label = drawn(page).get_attribute("aria-label")
    assert "Who decides" in label and "rewards/a/share" in label and "rewards/b/share" in label


def test_a_run_that_goes_on_grows_on_the_page(serve, visit, folder, run_in):
    run = run_in(folder / "runs" / "live", "live", status="running", steps=5)
    address = serve()
    page = visit(address)
    page.goto(f"{address}/run?run=runs/live")
    drawn(page)
    with (run / "stages" / "01-grpo" / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "reward": 9.0}\n')
    state = run / "pipeline.json"
    state.write_text(state.read_text().replace('"running"', '"passed"'))
    until(page, "document.querySelector('.curves .names').textContent.includes('9 at 6')")
    until(page, "document.querySelector('#state').textContent.includes('passed')")


@pytest.mark.parametrize("values", [(0.1, 0.1 + 1.4e-17), (1.7e18, 1.7e18 + 256), (-1e299, 1e299), (5.0, 1e308)])
def test_values_that_lie_as_close_or_as_far_as_numbers_can_are_drawn(serve, visit, folder, run_in, values):
    run = run_in(folder / "runs" / "edge", "edge", steps=1)
    rows = [f'{{"step": {2**62 + 4096 * place}, "reward": {value!r}}}\n' for place, value in enumerate(values)]
    (run / "stages" / "01-grpo" / "metrics.jsonl").write_text("".join(rows))
    address = serve()
    page = visit(address)
    page.goto(f"{address}/run?run=runs/edge")
    assert "Reward, steps" in drawn(page).first.get_attribute("aria-label")


def test_one_step_is_a_dot_and_long_names_fit_a_small_screen(serve, visit, folder, run_in):
    run = run_in(folder / "runs" / "one", "a" * 80, steps=1, status="b" * 80)
    (run / "stages" / "01-grpo").rename(run / "stages" / ("01-" + "c" * 80))
    state = run / "pipeline.json"
    state.write_text(state.read_text().replace("01-grpo", "01-" + "c" * 80))
    address = serve()
    page = visit(address, viewport={"width": 400, "height": 800})
    for path in ("/run?run=runs/one", "/compare?run=runs/one&run=runs/first"):
        page.goto(address + path)
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    page.goto(address + "/run?run=runs/one")
    assert drawn(page).first.locator("path.dot").count() == 1


def test_a_page_says_that_what_it_shows_is_gone(serve, visit, folder, run_in):
    run = run_in(folder / "runs" / "live", "live", status="running", steps=5)
    address = serve()
    page = visit(address)
    page.goto(f"{address}/run?run=runs/live")
    drawn(page)
    run.rename(folder / "gone")
    until(page, "document.querySelector('#stale').textContent.includes('is not a run folder')")
    assert page.get_by_role("alert").count() == 1 and "grpo" in page.locator("#state").text_content()
    (folder / "gone").rename(run)
    until(page, "document.querySelector('#stale').hidden")
    assert all("400" in said for said in visit.complaints)  # the browser's own word for the answers
    visit.complaints.clear()


def test_runs_are_ticked_and_laid_over_each_other(serve, visit):
    page = visit(serve())
    for box in page.locator("input[name=run]").all():
        box.check()
    page.get_by_role("button", name="Compare the ticked runs").click()
    drawn(page)
    names = page.locator(".curves .names").first.text_content()
    assert "A reward" in names and "B reward" in names


def test_the_keyboard_reaches_the_content_and_decides(serve, visit):
    address = serve(allow_acts=True)
    page = visit(address)
    page.goto(f"{address}/run?run=runs/waiting")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_label("accept").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.type("it reads well")
    page.keyboard.press("Tab")
    page.keyboard.type("me")
    page.keyboard.press("Enter")
    page.wait_for_selector("#command")
    assert "gate decide --accept --by=me" in page.locator("#command").text_content()
    page.get_by_role("button", name="Run it").press("Enter")
    until(page, "document.querySelector('#acts-live').textContent.includes('exit code 0')")


def test_a_form_finds_a_key_and_shows_the_yaml(serve, visit):
    address = serve()
    page = visit(address)
    page.goto(f"{address}/configure?kind=sft")
    page.get_by_text("All other keys").click()
    page.locator("#key-filter").fill("warmup")
    shown = page.locator(".more .key:visible")
    assert 0 < shown.count() < 20
    page.get_by_label("base_model").fill("Qwen/Qwen3-0.6B")
    page.get_by_role("button", name="Check and show the YAML").click()
    page.wait_for_selector("#yaml")
    assert "base_model: Qwen/Qwen3-0.6B" in page.locator("#yaml").text_content()
    assert "datasets" in page.get_by_role("alert").text_content()


def test_two_models_answer_side_by_side(serve, visit, model_dir):
    address = serve(chat=[str(model_dir("qwen3")), str(model_dir("llama"))])
    page = visit(address)
    page.goto(f"{address}/chat")
    page.get_by_label("Most tokens").fill("8")
    page.get_by_label("Message").fill("What is 1 plus 2?")
    page.get_by_label("Message").press("Enter")
    until(page, "document.querySelector('[data-chat-stop]').disabled && document.querySelectorAll('.turns .assistant').length == 2")  # fmt: skip
    answers = page.locator(".turns .assistant").all_text_contents()
    assert all(one and "Error" not in one and one != "…" for one in answers) and len(answers) == 2
    chosen = page.locator("[data-chat] select").evaluate_all("all => all.map(one => one.value)")
    assert sorted(chosen) == ["llama", "qwen3"]
