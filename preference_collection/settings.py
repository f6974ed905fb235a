"""The settings of the app: the defaults in config/collect.yaml with overrides from the command line, validated."""

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from preference_collection.store.model import ORDERS
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.sandbox.sandbox import Limits

DEFAULTS = Path(__file__).parent.parent / "config" / "collect.yaml"

# Environment variable with the shared password.
PASSWORD = "COLLECT_PASSWORD"

TRUTHS = ("read_only", "run_unisolated")
# Numbers: minimum, maximum, and whether only integers are allowed.
NUMBERS = {
    "port": (1, 65535, True), "overlap": (1, 1000, True), "lease_minutes": (0.1, 1440, False), "fold_lines": (0, 10**6, True),
    "temperature": (0, 10, False), "max_tokens": (1, 10**6, True), "slow_seconds": (0, 10**6, False),
    "ahead": (0, 1000, True), "answers": (2, 5, True),
    "silence_seconds": (1, 10**6, False), "limits.cpu_seconds": (1, 3600, True), "limits.wall_seconds": (0.1, 3600, False),
    "limits.memory_mb": (64, 2**20, True), "limits.files_mb": (1, 2**20, True), "limits.output_kb": (1, 2**20, True),
}  # fmt: skip
TEXTS = ("store", "export", "address")
ONE_OF = {"order": ORDERS}
# Texts for people and models, taken as they are written.
PROSE = ("guidelines", "instruction")
LISTS = ("checkpoints", "reasons", "text_reasons")


def load_settings(overrides: Sequence[str] = ()) -> DictConfig:
    """The settings, with overrides such as `store=my.duckdb` or `limits.memory_mb=256`.

    Raises UserError for an unknown key or an invalid value.
    """
    settings = OmegaConf.load(DEFAULTS)
    known = [key for key in _keys(settings)]
    for text in overrides:
        key = text.partition("=")[0]
        if "=" not in text or key not in known:
            raise UserError(f"{text!r} overrides no setting; {nearest(key, known)} Expected KEY=VALUE.")
        value = text.partition("=")[2]
        if key in PROSE and value not in ("", "null"):
            # Not YAML: a heading of markdown would be a comment there.
            settings[key] = value
            continue
        try:
            settings.merge_with_dotlist([text])
        except OmegaConfBaseException as error:
            raise UserError(f"{text!r}: {first_line(error)}. Expected KEY=VALUE.") from error
    for key in known:
        value = OmegaConf.select(settings, key)
        if fault := _fault(key, value):
            raise UserError(f"{key}: found {'nothing' if value is None else repr(value)}, expected {fault}.")
    if settings.samples is None:
        settings.samples = settings.store == OmegaConf.load(DEFAULTS).store
    return settings


def limits_of(settings: DictConfig) -> Limits:
    """The resource limits of one test."""
    return Limits(**settings.limits)


def check_access(settings: DictConfig, password: str | None) -> None:
    """Raise UserError if other machines could reach the page and no password is set."""
    address = settings.address
    try:
        own = address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        own = False
    if not own and not password:
        raise UserError(f"address: {address} admits other machines, but {PASSWORD} is not set. Set it to a password.")


def guidelines_text(settings: DictConfig) -> str:
    """The guidelines in markdown; "" for none. Raises UserError if there are two, or their file cannot be read."""
    text, file = settings.guidelines, settings.guidelines_file
    if text and file:
        raise UserError("guidelines, guidelines_file: both are set. Set one of them to null.")
    if not file:
        return text or ""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"guidelines_file: {file} cannot be read: {reason}. Expected a file with markdown.") from error


def _keys(settings: DictConfig, prefix: str = ""):
    for key, value in settings.items():
        if isinstance(value, DictConfig):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _fault(key: str, value) -> str | None:
    """What was expected as the value of a key, or None if it is valid."""
    if key == "samples":
        return None if value is None or isinstance(value, bool) else "true, false or null"
    if key in TRUTHS:
        return None if isinstance(value, bool) else "true or false"
    if key in NUMBERS:
        least, most, whole = NUMBERS[key]
        kinds = int if whole else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
        return None if fits else f"{'an integer' if whole else 'a number'} from {least} to {most}"
    if key in LISTS:
        fits = OmegaConf.is_list(value) and all(isinstance(item, str) and item for item in value)
        return None if fits else "a list of non-empty strings"
    if key in ONE_OF:
        return None if value in ONE_OF[key] else f"one of {', '.join(ONE_OF[key])}"
    if value is None and key not in TEXTS:
        return None
    return None if isinstance(value, str) and value.strip() else "a non-empty string"
