"""Parts of a model that text does not reach: towers for images and sounds, and what projects their outputs to embeddings.

A conditional model of transformers (Gemma 3 from 4B on) computes text by one of its parts, its decoder. What lies beside that
is frozen: it would have no gradient.
"""

from torch import Tensor, nn

from preference_training.modeling.value_head import output_head


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that text does not reach, by name; none in a model of text alone."""
    if model.config.get_text_config() is model.config:
        return {}
    decoder = model.get_decoder()
    reached = [decoder, model.get_input_embeddings(), output_head(model)]
    if decoder is model or any(module is decoder for module in (model.base_model, getattr(model, "model", None))):
        return {}
    return dict(_beside(model, "", {id(module) for part in reached if part is not None for module in part.modules()}))


def _beside(module: nn.Module, prefix: str, reached: set[int]):
    """The children with weights that contain none of the modules `reached`, and the same of the others, outermost first."""
    for name, child in module.named_children():
        if id(child) in reached or not any(True for _ in child.parameters()):
            continue
        if any(id(inner) in reached for inner in child.modules()):
            yield from _beside(child, f"{prefix}{name}.", reached)
        else:
            yield f"{prefix}{name}", child


def tower_weights(model: nn.Module) -> set[Tensor]:
    """The weights that text does not reach."""
    return {weight for tower in towers(model).values() for weight in tower.parameters()}


def is_in(name: str, parts: dict[str, nn.Module]) -> bool:
    """Whether a module or weight of this name lies in one of the parts."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def freeze_towers(model: nn.Module) -> None:
    """Freeze what text does not reach."""
    for weight in tower_weights(model):
        weight.requires_grad_(False)


def describe_towers(model: nn.Module) -> list[str]:
    """A line for the user: what of a model stays as it is, whatever is trained."""
    names = ", ".join(towers(model))
    return [f"model: text does not reach {names} of {type(model).__name__}, which stay frozen"] if names else []
