"""The Streamlit page, started by `python -m preference_collection serve`: sign in, then label."""

import atexit
import hmac
import json
import os
import time

import streamlit as st

from preference_collection import views
from preference_collection.generation.sources import sources_of
from preference_collection.exchange.importing import SAMPLES, import_into
from preference_collection.sandbox.running import TestRunner
from preference_collection.sandbox.sandbox import open_sandbox
from preference_collection.settings import OVERRIDES, PASSWORD, limits_of, load_settings
from preference_collection.store.store import open_store
from preference_training.core.errors import UserError


@st.cache_resource(show_spinner="Opening the store and checking the sandbox")
def shared() -> views.Shared:
    """What all labelers share: the store, the test runner, the sources of solutions."""
    settings = load_settings(json.loads(os.environ.get(OVERRIDES, "[]")))
    store = open_store(settings.store, settings.read_only)
    atexit.register(store.close)
    if settings.samples and not store.read_only and not store.progress().problems:
        import_into(store, SAMPLES)
    runner = TestRunner(open_sandbox(limits_of(settings)), store, settings.run_unisolated)
    return views.Shared(settings, store, runner, sources_of(settings))


def entered() -> bool:
    """Whether the user has signed in; shows the form for the name, and the password if one is set, otherwise."""
    if "labeler" in st.session_state:
        return True
    password = os.environ.get(PASSWORD, "")
    st.title("Which solution is better?")
    with st.form("enter", width=420):
        name = st.text_input("Your name", max_chars=60, help="Your choices are stored under this name.")
        given = st.text_input("Password", type="password") if password else ""
        pressed = st.form_submit_button("Start", type="primary")
    if pressed:
        # Compared in constant time, with a delay of a second after a wrong one.
        right = hmac.compare_digest(given.encode(), password.encode())
        if password and not right:
            time.sleep(1)
        if not name.strip():
            st.error("Please enter your name.")
        elif not right:
            st.error("Wrong password.")
        else:
            st.session_state.labeler = name.strip()
            st.rerun()
    return False


def main() -> None:
    """Draw the page once."""
    st.set_page_config("Which solution is better?", layout="wide", initial_sidebar_state="expanded")
    if not entered():
        return
    try:
        views.page(shared(), st.session_state.labeler)
    except UserError as error:
        st.error(str(error))


main()
