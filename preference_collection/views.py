"""The labeling page: a problem next to two solutions, their tests, and the keys to choose one."""

import difflib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from omegaconf import DictConfig

from preference_collection.exchange.export import export_dataset
from preference_collection.generation.sources import PULL, Source, Writing, as_pair, write_again, write_pair
from preference_collection.generation.replies import extract_code
from preference_collection.sandbox.running import TestRun, TestRunner
from preference_collection.store.store import (
    FILTERS,
    ORDERS,
    Generation,
    Judgment,
    Pair,
    Problem,
    Query,
    Store,
    new_id,
    side_shown_left,
)
from preference_training.core.errors import UserError

PAGE_SIZE = 15
POLL_SECONDS = 0.4

# A key clicks the button whose container has this class, except in text fields and with modifier keys.
KEYS = {"1": "left", "2": "right", "=": "tie", "s": "skip", "u": "undo", "g": "ask", "n": "next"}
KEY_SCRIPT = """<script>
const keys = %s;
const page = window.parent === window ? document : window.parent.document;
page.defaultView.collectKeys && page.removeEventListener("keydown", page.defaultView.collectKeys);
page.defaultView.collectKeys = (event) => {
    const at = event.target;
    const writes = at.isContentEditable || at.tagName === "TEXTAREA" || at.tagName === "SELECT" ||
        (at.tagName === "INPUT" && !["checkbox", "radio", "range"].includes(at.type));
    if (writes || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !(event.key in keys)) return;
    const button = page.querySelector(".st-key-" + keys[event.key] + " button");
    if (button && !button.disabled) { event.preventDefault(); button.click(); }
};
page.addEventListener("keydown", page.defaultView.collectKeys);
</script>"""

# Two solutions next to a problem need the full width.
STYLE = """<style>
[data-testid=stMainBlockContainer] {padding: 2.5rem 1.5rem 3rem}
[class*=st-key-side_] pre code {font-size: 0.8rem}
</style>"""

BADGES = {
    "passed": ("green", "✓"),
    "failed": ("red", "✗"),
    "error": ("orange", "!"),
    "timed out": ("violet", ":material/timer:"),
}


@dataclass(frozen=True)
class Shared:
    """What all labelers share."""

    settings: DictConfig
    store: Store
    runner: TestRunner
    sources: dict[str, Source]


def page(shared: Shared, labeler: str) -> None:
    """The page of a signed-in labeler."""
    state = st.session_state
    st.html(STYLE)
    query = sidebar(shared, labeler)
    problem = shared.store.problem(state.problem) if state.get("problem") else None
    if problem is None:
        st.info("No problem matches the filters on the left. Change them, or import problems.")
        return
    text, solutions = st.columns([1, 2.6], gap="medium")
    with text:
        show_problem(problem)
    with solutions:
        writings = state.get("writings", {}).get(problem.id)
        pairs = shared.store.pairs_of(problem.id)
        if writings:
            show_writings(shared, problem, writings)
        elif pairs:
            show_pair(shared, labeler, query, problem, pairs)
        else:
            st.info("This problem has no solutions yet.")
        ask_for_solutions(shared, problem, bool(writings))
        back, on, _ = st.columns([1.4, 1, 2.6])
        with back:
            show_undo(shared, labeler)
        if on.button("n · next", key="next", width="stretch", help="the next problem without a judgment of yours"):
            open_next(shared.store, query, problem.id)
            st.rerun()
    keys()


def keys() -> None:
    """Install the keyboard shortcuts."""
    st.html(KEY_SCRIPT % json.dumps(KEYS), unsafe_allow_javascript=True)


# ---- the list of problems ---------------------------------------------------------------------------------------------------


def sidebar(shared: Shared, labeler: str) -> Query:
    """Draw progress, filters and the list; sets `problem` in the session state. Returns the filters."""
    with st.sidebar:
        st.caption(f"Signed in as **{labeler}**.")
        show_progress(shared.store, labeler)
        only = st.segmented_control("Show", FILTERS, default="all", key="only", required=True)
        order = st.selectbox("Order", ORDERS, key="order", help="uncertain: where the last scored policy is least sure first")
        difficulty = st.selectbox("Difficulty", ["", *shared.store.difficulties()], format_func=lambda name: name or "any")
        search = st.text_input("Title", placeholder="part of a title")
        query = Query(labeler, only or "all", order, difficulty, search)
        show_list(shared.store, query)
        show_export(shared)
        st.caption(shared.runner.sandbox.isolation.line())
        if not shared.runner.enabled:
            st.warning("Tests are disabled: this machine cannot isolate code. Set `run_unisolated=true` to run them anyway.")
    return query


def show_export(shared: Shared) -> None:
    """Export the judgments as a data set, to the directory in the settings."""
    with st.expander("Export"):
        target = Path(shared.settings.export).absolute()
        st.caption(f"Write a data set for training to `{target}`.")
        if st.button("Export", key="export"):
            try:
                counts = export_dataset(shared.store, target)
            except UserError as error:
                st.error(str(error))
            else:
                st.success(f"{', '.join(f'{count} {kind}' for kind, count in counts.items())}. Train on it:")
                st.code(
                    f"python train.py loss=dpo 'datasets=[{{name: lc, data_dir: {target}}}]'", language="bash", wrap_lines=True
                )


def show_progress(store: Store, labeler: str) -> None:
    """Draw the progress, and the agreement between labelers."""
    progress, agreement = store.progress(labeler), store.agreement()
    st.progress(progress.judged_pairs / max(1, progress.pairs), f"{progress.judged_pairs} of {progress.pairs} pairs judged")
    line = f"Your judgments: {progress.mine} of {progress.judgments}. Labelers: {progress.labelers}."
    if agreement.comparisons:
        share = agreement.agreed / agreement.comparisons
        alpha = "" if agreement.alpha is None else f", alpha {agreement.alpha:.2f}"
        line += f" Agreement on {agreement.pairs} pairs with several labelers: {share:.0%}{alpha}."
    st.caption(line)


def show_list(store: Store, query: Query) -> None:
    """Draw a page of the list of problems. The open problem stays open even if it no longer matches the filters."""
    state = st.session_state
    if state.get("listed") != query:
        state.listed, state.start = query, 0
    rows, total = store.browse(query, state.start, PAGE_SIZE)
    if not rows and state.start:
        state.start = 0
        rows, total = store.browse(query, 0, PAGE_SIZE)
    if rows and not state.get("problem"):
        state.problem = rows[0].id
    shown = {row.id: row for row in rows}
    # A new widget for each page and choice, so that the list always highlights the open problem.
    at = list(shown).index(state.problem) if state.get("problem") in shown else None
    chosen = st.radio(
        "Problems", list(shown), index=at, key=f"list {query} {state.start} {state.get('problem')}",
        format_func=lambda id: label_of(shown[id]), label_visibility="collapsed",
    )  # fmt: skip
    if chosen and chosen != state.problem:
        open_problem(chosen)
        st.rerun()
    before, place, after = st.columns([1, 2, 1])
    if before.button("←", key="page_before", disabled=not state.start, help="previous page"):
        turn_page(-PAGE_SIZE)
    place.caption(f"{min(state.start + 1, total)}-{state.start + len(rows)} of {total}")
    if after.button("→", key="page_after", disabled=state.start + PAGE_SIZE >= total, help="next page"):
        turn_page(PAGE_SIZE)


def label_of(row) -> str:
    """The label of a problem in the list."""
    marks = "✓ " * row.mine + "≠ " * row.disagreement
    margin = "" if row.margin is None else f" ({row.margin:+.1f})"
    title = row.title.replace("[", "\\[").replace("$", "\\$").replace("`", "\\`").replace("*", "\\*").replace(":", "\\:")
    return f"{marks}{title}{margin}"


def turn_page(by: int) -> None:
    """Show another page of the list."""
    st.session_state.start += by
    st.rerun()


def open_problem(problem: str) -> None:
    """Switch to another problem."""
    st.session_state.problem = problem
    st.session_state.pop("shown", None)


def open_next(store: Store, query: Query, after: str) -> None:
    """Switch to the next problem in the list that this labeler has not judged."""
    rows, _ = store.browse(Query(query.labeler, "unlabeled", query.order, query.difficulty, query.search), 0, 2)
    others = [row.id for row in rows if row.id != after]
    if others:
        open_problem(others[0])


# ---- the problem and its pair -----------------------------------------------------------------------------------------------


def show_problem(problem: Problem) -> None:
    """Draw title and description. Markdown is rendered; HTML is not."""
    st.subheader(problem.title, anchor=False)
    if problem.difficulty:
        st.badge(problem.difficulty, color={"easy": "green", "medium": "orange", "hard": "red"}.get(problem.difficulty, "gray"))
    st.markdown(problem.description)
    if problem.tests:
        with st.expander(f"{len(problem.tests)} tests"):
            lines = [f"{problem.function_name}{tuple(test['args'])!r} → {test['expected']!r}" for test in problem.tests]
            st.code("\n".join(lines).replace(",)", ")"), language="python", wrap_lines=True)


def show_pair(shared: Shared, labeler: str, query: Query, problem: Problem, pairs: list[Pair]) -> None:
    """Draw two solutions, their tests, and the buttons to judge them."""
    state = st.session_state
    pair = pairs[0]
    if len(pairs) > 1:
        names = {p.id: f"pair {len(pairs) - index}" for index, p in enumerate(pairs)}
        id = st.segmented_control(
            "Pairs", list(names), default=pair.id, format_func=names.get, key=f"pairs {problem.id} {pair.id}"
        )
        pair = next((p for p in pairs if p.id == id), pair)
    if state.get("shown", (None,))[0] != pair.id:
        state.shown = (pair.id, time.monotonic())
    left = side_shown_left(labeler, pair.id)
    sides = (pair.first, pair.second) if left == "first" else (pair.second, pair.first)
    view = st.segmented_control("View", ["side by side", "difference"], default="side by side", key="view", required=True)
    if view == "difference":
        show_difference(*sides)
    runs = [shared.runner.start_tests(generation, problem) for generation in sides]
    polled = any(run and not run.over for run in runs)
    show = st.fragment(show_sides, run_every=POLL_SECONDS if polled else None)
    show(problem, sides, runs, view != "difference", polled)
    show_judging(shared, labeler, query, problem, pair, left)


def show_difference(left: Generation, right: Generation) -> None:
    """Draw the diff from the left to the right solution."""
    lines = difflib.unified_diff(
        shown_code(left).splitlines(), shown_code(right).splitlines(), "left", "right", lineterm="", n=99
    )
    st.code("\n".join(lines) or "The solutions are identical.", language="diff", wrap_lines=True)


def shown_code(generation: Generation) -> str:
    """The code, or the whole reply if it contains none."""
    return generation.code or generation.text


def show_sides(problem: Problem, sides: tuple, runs: list[TestRun | None], with_code: bool, polled: bool) -> None:
    """Draw both solutions with their tests, updating until all tests have finished."""
    if polled and all(run is None or run.over for run in runs):
        st.rerun()
    for column, name, generation, run in zip(st.columns(2), ("Left", "Right"), sides, runs, strict=True):
        with column, st.container(key=f"side_{name.lower()}"):
            show_tests(name, run)
            if with_code:
                fault = extract_code(generation.text, problem.function_name).fault
                if fault:
                    st.warning(f"This reply {fault}.")
                kind = "python" if generation.code else None
                st.code(shown_code(generation), language=kind, line_numbers=True, wrap_lines=True)
            if generation.code and generation.code != generation.text.strip():
                with st.expander("Full reply"):
                    st.code(generation.text, language="markdown", wrap_lines=True)


def show_tests(name: str, run: TestRun | None) -> None:
    """Draw a badge for each test, and the details of failures."""
    if run is None:
        st.markdown(f"**{name}** — no tests run")
        return
    badges = " ".join(f":{BADGES[r['status']][0]}-badge[{BADGES[r['status']][1]} {n}]" for n, r in enumerate(run.results, 1))
    waiting = " ".join(f":gray-badge[… {n}]" for n in range(len(run.results) + 1, run.total + 1)) if not run.over else ""
    st.markdown(f"**{name}** — {run.passed} of {run.total} passed {badges} {waiting}")
    wrong = [result for result in run.results if result["status"] != "passed"]
    if wrong:
        with st.expander("Failures"):
            st.code("\n".join(map(line_of, wrong)), language=None, wrap_lines=True)


def line_of(result: dict) -> str:
    """The details of a failed test."""
    return f"{result['call']}\n    {result['status']}: " + (
        result["message"] or f"got {result['got']}, expected {result['expected']}"
    )


def show_judging(shared: Shared, labeler: str, query: Query, problem: Problem, pair: Pair, left: str) -> None:
    """Draw the buttons, and the optional reasons and comment."""
    standing = {judgment.labeler: judgment for judgment in shared.store.standing(pair.id)}
    own = standing.get(labeler)
    if own:
        sides = {"first": "left" if left == "first" else "right", "second": "right" if left == "first" else "left"}
        st.caption(f"Your choice: {sides.get(own.choice, own.choice)}. Choosing again replaces it.")
    reasons = st.pills("Reasons (optional)", list(shared.settings.reasons), selection_mode="multi", key=f"reasons {pair.id}")
    comment = st.text_input("Comment (optional)", key=f"comment {pair.id}", max_chars=2000)
    other = "second" if left == "first" else "first"
    choices = {"left": ("1 · left is better", left), "tie": ("= · tie", "tie"), "skip": ("s · skip", "skip"),
               "right": ("2 · right is better", other)}  # fmt: skip
    for column, (key, (label, choice)) in zip(st.columns([3, 1.4, 1.4, 3]), choices.items(), strict=True):
        kind = "primary" if key in ("left", "right") else "secondary"
        if column.button(label, key=key, type=kind, width="stretch", disabled=shared.store.read_only):
            seconds = time.monotonic() - st.session_state.shown[1]
            shared.store.judge(
                Judgment(new_id(), pair.id, left, choice, labeler, round(seconds, 2), tuple(reasons or ()), comment)
            )
            st.toast(f"Saved: {label.partition('· ')[2]}. Press u to undo.")
            open_next(shared.store, query, problem.id)
            st.rerun()


def show_undo(shared: Shared, labeler: str) -> None:
    """Draw the undo button, which opens the problem of the undone judgment."""
    last = shared.store.last_judgment(labeler)
    if st.button("u · undo last", key="undo", width="stretch", disabled=last is None or shared.store.read_only):
        undone = shared.store.undo(labeler)
        if undone:
            open_problem(undone[1])
            st.toast("Undone.")
        st.rerun()


# ---- asking a model ---------------------------------------------------------------------------------------------------------


def ask_for_solutions(shared: Shared, problem: Problem, busy: bool) -> None:
    """Draw the choice of a model, and the button to request two solutions."""
    state = st.session_state
    with st.expander("Generate two solutions", expanded=True):
        where, which, chance, go = st.columns([1.2, 2, 1.4, 1.4], vertical_alignment="bottom")
        name = where.selectbox("Source", list(shared.sources), key="source")
        source = shared.sources[name]
        try:
            models = source.models()
        except UserError as error:
            st.error(str(error))
            models = []
        if not models and name == "Ollama":
            st.caption("No model is installed. Download one: `ollama pull qwen2.5-coder:1.5b`")
        model = which.selectbox("Model", models, key=f"model {name}", accept_new_options=True, placeholder="name of the model")
        temperature = chance.slider("Temperature", 0.0, 2.0, float(shared.settings.temperature), 0.1, key="temperature")
        if go.button("g · generate", key="ask", disabled=busy or not model or shared.store.read_only, width="stretch"):
            writings = write_pair(source, model, problem, temperature, shared.settings.max_tokens)
            state.setdefault("writings", {})[problem.id] = list(writings)
            st.rerun()


@st.fragment(run_every=POLL_SECONDS)
def show_writings(shared: Shared, problem: Problem, writings: list[Writing]) -> None:
    """Draw both replies as they stream in, and save the pair once both are complete and usable."""
    faults = [describe_problem(writing, problem) for writing in writings]
    if all(writing.over for writing in writings) and not any(faults):
        keep(shared, problem, writings)
    for number, (column, writing) in enumerate(zip(st.columns(2), writings, strict=True)):
        with column, st.container(key=f"writing_{number}"):
            show_writing(shared, writing, faults[number])
            if writing.over and faults[number] and st.button("Generate again", key=f"again_{number}"):
                writings[number] = write_again(writing)
                st.rerun(scope="fragment")
    buttons = st.columns(3)
    if not all(writing.over for writing in writings):
        if buttons[0].button("Stop", key="stop"):
            for writing in writings:
                writing.cancel()
            st.rerun(scope="fragment")
        return
    if all(writing.text for writing in writings) and buttons[0].button("Keep anyway", key="keep"):
        keep(shared, problem, writings)
    if buttons[1].button("Discard", key="discard"):
        forget(problem)


def show_writing(shared: Shared, writing: Writing, fault: str | None) -> None:
    """Draw one streaming reply."""
    quiet = writing.quiet_seconds()
    if writing.state == "failed":
        message, _, command = writing.message.partition(PULL)
        st.error(message + PULL.rstrip() if command else message)
        if command:
            st.code(command, language="bash")
    elif writing.over and fault:
        st.warning(f"Unusable: the reply {fault}.")
    elif quiet > shared.settings.slow_seconds:
        st.warning(f"No output for {quiet:.0f} s. The model may still be loading; press `Stop` to give up.")
    else:
        st.caption(f"{writing.request.model}: {writing.state}, {len(writing.text)} characters, seed {writing.request.seed}")
    st.code(writing.text or " ", language="markdown", wrap_lines=True)


def describe_problem(writing: Writing, problem: Problem) -> str | None:
    """The fault of a finished reply, as the end of a sentence, or None."""
    if not writing.over:
        return None
    if writing.state != "done":
        return "was stopped" if writing.state == "stopped" else "failed"
    return extract_code(writing.text, problem.function_name).fault


def keep(shared: Shared, problem: Problem, writings: list[Writing]) -> None:
    """Save two replies in the store, and show them as a pair."""
    shared.store.add_pairs([as_pair(problem, tuple(writings))])
    forget(problem)


def forget(problem: Problem) -> None:
    """Drop the replies, and show the newest pair, if any."""
    st.session_state.writings.pop(problem.id, None)
    st.rerun()
