"""Report and episode viewer in a real browser: filters, side by side, mask and tokens, keys."""

import pytest
from builders import make_step, make_task, make_trajectory
from rich.console import Console
from run_folders import small_config, write_small_run

from step_ray.report.episodes import Group, write_episodes
from step_ray.stages.summary import write_run_report, write_whole_report
from step_ray.types import StepKind

HOSTILE = '</script><script>alert(1)</script><!--<img src=x onerror="alert(1)">\u2028\u202e'


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_small_run(small_config(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def report(config):
    return write_run_report(config, Console(quiet=True))


@pytest.fixture
def viewer(open_page, report):
    """The viewer, opened in a state; waits until it can be used."""

    def open_viewer(state=""):
        page = open_page(report.with_name("episodes.html"), state)
        page.wait_for_selector("body[data-ready]")
        return page

    return open_viewer


def listed(page):
    return page.locator("#list .id").all_inner_texts()


def opened(page):
    """Headings of the opened episodes."""
    page.wait_for_selector("#panes[data-opened]")
    return [text.split()[0] for text in page.locator("#panes h2").all_inner_texts()]


def test_the_report_leads_to_the_episodes_of_an_arm(open_page, report):
    page = open_page(report)
    page.get_by_role("link", name="step", exact=True).click()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("[name=agent]").input_value() == "evaluate/step"
    assert listed(page) == ["a/1", "b/2", "c/3"]


def test_one_file_holds_report_and_episodes(open_page, config, tmp_path):
    from playwright.sync_api import expect

    write_whole_report(config, tmp_path / "whole.html", Console(quiet=True))
    page = open_page(tmp_path / "whole.html")
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#report h2").first.inner_text() == "Results"
    assert page.locator("#status").inner_text() == "8 of 8 episodes match"
    page.locator("#report").get_by_role("link", name="step", exact=True).click()
    expect(page.locator("[name=agent]")).to_have_value("evaluate/step")
    expect(page.locator("#filters")).to_be_in_viewport()
    assert listed(page) == ["a/1", "b/2", "c/3"]
    page.locator("#list button").first.click()
    assert opened(page) == ["step"]


def test_filters_narrow_the_list(viewer):
    page = viewer()
    assert page.locator("#status").inner_text() == "8 of 8 episodes match"
    page.select_option("[name=outcome]", "error")
    assert listed(page) == ["c/3"]
    page.select_option("[name=outcome]", "stop max_steps")
    assert listed(page) == ["a/1", "x/2"]
    page.select_option("[name=type]", "a")
    assert page.locator("#status").inner_text() == "1 of 8 episodes match"
    page.get_by_role("button", name="Clear").click()
    page.select_option("[name=has]", "correction")
    assert listed(page) == ["x/1", "x/2"]
    page.fill("[name=text]", "X/2")
    assert listed(page) == ["x/2"]


def test_two_agents_stand_side_by_side_on_the_same_task(viewer):
    page = viewer("#agent=evaluate/step&beside=evaluate/base")
    page.select_option("[name=both]", "first")
    assert listed(page) == ["a/1"]
    page.locator("#list button").click()
    assert opened(page) == ["step", "base"]
    first, second = page.locator("#panes article").all()
    assert "you take" in first.inner_text()
    assert "you take" not in second.inner_text()
    assert first.locator(".differs + .step").inner_text().endswith("Action: take")


def test_an_agent_that_lacks_the_task_is_said_to(viewer):
    page = viewer("#agent=trajectories/collect&beside=evaluate/base")
    page.locator("#list button").first.click()
    assert opened(page) == ["collection"]
    assert "no other episode of this task" in page.locator("#panes article").nth(1).inner_text()


def test_an_error_line_and_the_stop_reason_are_shown(viewer):
    page = viewer("#open=evaluate/step/c/3%23student%230")
    assert opened(page) == ["step"]
    assert page.locator(".error-line").inner_text() == "HTTP 500"
    assert "llm_error" in page.locator(".facts").inner_text()


def test_error_verdict_reflection_and_correction_are_marked(viewer):
    page = viewer("#open=trajectories/collect/x/1%23self_reflected%230")
    opened(page)
    assert page.locator(".step.error .who").inner_text().startswith("0 error by student")
    assert page.locator(".why").inner_text().startswith("teacher: error, no_op")
    assert page.locator(".step.correction .reflection").inner_text() == "No mug."


def test_the_mask_view_shows_what_each_arm_trains(viewer):
    page = viewer("#open=trajectories/collect/x/1%23self_reflected%230&view=mask&arm=step")
    opened(page)
    assert page.locator("#panes .masked").all_inner_texts() == ["Action: take mug"]
    assert page.locator("#panes .trained").count() == 4
    page.select_option("[name=arm]", "step_no_mask")
    page.wait_for_selector("#panes .masked", state="detached")
    page.select_option("[name=arm]", "replace")
    page.wait_for_selector("#panes .step.removed")
    assert "the training set is not built" in page.locator("#panes .none").inner_text()


def test_the_token_view_shows_each_token_and_its_mark(viewer):
    page = viewer("#open=trajectories/collect/x/1%23self_reflected%230&view=tokens&arm=step")
    opened(page)
    tokens = page.locator(".token")
    assert tokens.all_text_contents() == ["a", " look", "<end>", "\ufffd", "\ufffd", "<end>"]
    assert page.locator(".token.masked").all_text_contents() == [" look", "<end>"]
    assert tokens.nth(1).get_attribute("title") == "token 1, id 1"
    counts = "6 tokens: 3 trained, 2 masked error, 1 context."
    assert page.locator("#panes .note").first.inner_text().startswith(counts)


def test_keys_open_episodes_change_the_view_and_reach_the_search(viewer):
    page = viewer("#agent=trajectories/collect")
    page.keyboard.press("j")
    page.wait_for_selector("#panes[data-opened='6']")
    page.keyboard.press("j")
    page.wait_for_selector("#panes[data-opened='7']")
    page.keyboard.press("k")
    page.wait_for_selector("#panes[data-opened='6']")
    page.keyboard.press("v")
    page.wait_for_selector("#panes .masked")
    page.keyboard.press("/")
    page.keyboard.type("jkv")
    assert page.locator("[name=text]").input_value() == "jkv"
    assert listed(page) == []


def test_the_list_can_be_walked_with_the_keyboard(viewer):
    page = viewer("#agent=evaluate/base")
    page.locator("#list button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    opened(page)
    assert page.locator("[aria-current]").inner_text().find("b/2") >= 0


def test_the_address_leads_back_to_what_is_shown(viewer):
    page = viewer("#agent=evaluate/step&beside=evaluate/base&text=b")
    page.locator("#list button").click()
    opened(page)
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    assert opened(page) == ["step", "base"]
    assert listed(page) == ["b/2"]
    assert page.url == address


def test_an_address_of_an_episode_that_is_not_here_says_so(viewer):
    page = viewer("#open=evaluate/step/d/4%23student%230")
    assert page.inner_text("#panes") == "evaluate/step/d/4#student#0 is not in this file."
    assert len(listed(page)) == 8


def test_hostile_text_is_shown_and_does_nothing(open_page, tmp_path):
    task = make_task(HOSTILE, goal=HOSTILE, task_type=HOSTILE)
    step = make_step(HOSTILE, HOSTILE, StepKind.ERROR, reflection=HOSTILE)
    episode = make_trajectory(step, name=HOSTILE, task=task, error=HOSTILE)
    path = tmp_path / "episodes.html"
    write_episodes(
        path,
        run=HOSTILE,
        run_dir=HOSTILE,
        groups=[
            Group(
                folder="x",
                kind=HOSTILE,
                label=HOSTILE,
                episodes=[episode],
                num_shown=1,
                num_total=2,
            )
        ],
        vocabulary=lambda: {},
    )
    page = open_page(path)
    page.wait_for_selector("body[data-ready]")
    page.locator("#list button").click()
    page.wait_for_selector("#panes[data-opened]")
    assert page.locator("#panes .context").last.text_content() == f"observation{HOSTILE}"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 4
    assert "1 of 2 episodes of the run are in this file" in page.inner_text("#left-out")


def test_the_policy_stops_what_the_script_does_not_do(chromium, report):
    page = chromium.new_page()
    page.goto(report.with_name("episodes.html").resolve().as_uri())
    page.wait_for_selector("body[data-ready]")
    insert = "document.body.innerHTML = '<img src=x>'"
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate(insert)
    page.close()


def test_a_browser_without_the_means_says_so(chromium, report):
    page = chromium.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(report.with_name("episodes.html").resolve().as_uri())
    page.wait_for_selector("#status.warn")
    assert "DecompressionStream" in page.locator("#status").inner_text()
    page.close()


def test_without_scripts_the_report_reads_and_the_viewer_says_where_to_look(chromium, report):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    assert "8 episodes" in page.inner_text("header")
    page.goto(report.with_name("episodes.html").resolve().as_uri())
    assert "step-ray show" in page.inner_text("noscript")
    context.close()
