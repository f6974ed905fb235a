"""Which server `rounds.sampler` names, whether it can do what is asked of it, and the sampler that it becomes."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preference_training.configuration.checks.evaluation import EVALUATION_REQUIREMENTS
from preference_training.configuration.model_names import ADAPTER_CONFIG
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import LOCAL_SAMPLER
from preference_training.core.errors import UserError, nearest
from preference_training.generation.servers import ChatServer, OpenAIServer, ServerError
from preference_training.rounds.loop import Loop
from preference_training.rounds.served.asking import Rows, ServedSampler
from preference_training.rounds.served.protocols import ChatProtocol, TokenProtocol, server_at
from preference_training.rounds.served.weights import LOAD_ADAPTER, RELOAD, Vllm
from preference_training.tracking.run_files import json_object

if TYPE_CHECKING:
    from preference_training.rounds.sampling import Policy


def is_served(config: RunConfig) -> bool:
    """Whether a server samples."""
    return config.rounds.sampler != LOCAL_SAMPLER


def is_policy_served(config: RunConfig) -> bool:
    """Whether a server samples with the weights of the policy."""
    return is_served(config) and config.rounds.sampler_weights == "policy"


def check_sampler(config: RunConfig) -> list[str]:
    """Raise UserError where the server that samples is not there, or cannot do it. Returns what is to be said."""
    if not is_served(config):
        return []
    if find_spec("tenacity") is None:
        raise UserError(f"rounds.sampler: a server needs the package tenacity. Run: {EVALUATION_REQUIREMENTS}")
    if is_policy_served(config) and config.model.lora.modules_to_save is not None:
        raise UserError(
            f"model.lora.modules_to_save: found {config.model.lora.modules_to_save}, and vLLM serves adapters without modules "
            "that are trained beside them. Expected null, or rounds.sampler=local."
        )
    server, _ = find_server(config)
    if not is_policy_served(config):
        return [f"rounds.sampler: {server.model} of {server.base} writes the responses of all rounds, not the policy"]
    path, started = RELOAD, "VLLM_SERVER_DEV_MODE=1 in its environment"
    if config.model.lora.r is not None:
        path, started = LOAD_ADAPTER, "--enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
    if not isinstance(server, OpenAIServer) or not Vllm(server, config.rounds.sampler_timeout).has(path):
        raise UserError(
            f"rounds.sampler: {config.rounds.sampler} cannot take the weights of the policy each round: it has no {path}. "
            f"Expected a vLLM with {started}. With rounds.sampler_weights=fixed its own model writes the responses."
        )
    return [f"rounds.sampler: {server.model} of {server.base} gets the weights of the policy each round"]


def find_server(config: RunConfig) -> tuple[ChatServer, dict[str, Any]]:
    """The server, and what it lists of its models. Raises UserError where it does not answer, or lacks the model."""
    server = server_at(config.rounds, config.rounds.sampler_model or "")
    try:
        found = server.models()
        names = server.listed(found)
    except ServerError as error:
        remedy = f"Expected a server that accepts the key{server.key_hint()}" if error.is_rejection else "Start it first"
        raise UserError(f"rounds.sampler: {server.base}{server.models_path}: {error.reason}. {remedy}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"rounds.sampler: {server.base}{server.models_path}: no list of models. Expected OpenAI's protocol, or Ollama's "
            "at an address that ends in /api."
        ) from error
    if not server.model:
        own = [name for name in names if not _of(found, name).get("parent")]
        if len(own) != 1:
            raise UserError(f"rounds.sampler_model: {server.base} has {', '.join(own) or 'no model'}. Name one of them.")
        server.model = own[0]
    elif not server.has(names):
        raise UserError(f"rounds.sampler_model: {server.base} has no such model; {nearest(server.model, names)}")
    return server, found


def _of(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What a list of models in OpenAI's protocol says of one; empty in others."""
    return next((each for each in found.get("data", []) if each.get("id") == name), {})


def served_source(loop: Loop, number: int, policy: "Policy") -> tuple[Rows, dict[str, Any]]:
    """A server as the sampler of a round, with the weights that it is to have; facts for sampling.json. Raises UserError."""
    config, name = policy.config, loop.round(number).name
    server, found = find_server(config)
    if not is_policy_served(config):
        return ServedSampler(ChatProtocol(server, policy, server.served(found)), config).rows, {"server": server.model}
    assert isinstance(server, OpenAIServer)
    vllm, listed = Vllm(server, config.rounds.sampler_timeout), _of(found, server.model)
    tried = put_weights(vllm, policy, listed.get("root"))
    protocol = TokenProtocol(server, policy, listed.get("max_model_len"))
    difference, probed = _check(protocol, vllm, loop, number, tried)
    print(f"{name}: {server.base} has the policy ({tried}): log-probs differ by {difference:.2g} nats per token", flush=True)
    return ServedSampler(protocol, config).rows, {"server": server.model, "probe": probed, "difference": difference}


def put_weights(vllm: Vllm, policy: "Policy", root: Any) -> str:
    """Bring the weights of a policy into a server; how, in words. root: what the server was started with."""
    model = policy.config.model
    archive = model.archive and Path(model.archive)
    if archive and (archive / ADAPTER_CONFIG).is_file():
        vllm.server.model = vllm.load_adapter(archive.resolve(), policy.identity)
        return "its adapter was loaded"
    source = Path(archive or model.name_or_path)
    # A path that it cannot load would be its end. A name of the hub it has loaded before, if it was started with it.
    can_load = any(source.glob("*.safetensors")) or model.name_or_path == root
    if model.lora.r is not None or not can_load:
        return f"as the server was started, with {root}"
    vllm.reload(source.resolve() if source.is_dir() else str(source))
    return "its weights were reloaded"


def _check(protocol: TokenProtocol, vllm: Vllm, loop: Loop, number: int, tried: str) -> tuple[float, list]:
    # torch.
    from preference_training.rounds.served.probe import PROMPTS, check_has_changed, check_same_model, computed_here, probe

    policy, prompts = protocol.policy, loop.prompts[:PROMPTS]
    probed = probe(protocol, prompts)
    here = computed_here(policy, prompts, probed.tokens)
    ours = str(policy.model.dtype).removeprefix("torch.")
    difference = check_same_model(protocol, probed, here, (vllm.dtype(), ours), tried)
    if number > 1:
        check_has_changed(protocol, probed, json_object(loop.round(number - 1).sampling))
    return difference, [list(probed.tokens), list(probed.logps)]
