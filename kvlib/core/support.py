"""Which models can be used, and where their parts are."""

from transformers import PreTrainedModel


def attention_modules(model) -> list:
    """The attention modules of a decoder-only transformers model, by layer.

    Raises:
        ValueError: for models whose attention does not go through transformers' attention interface in every layer.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model: pass the one inside it")
    config = model.config.get_text_config()
    modules = sorted(
        (m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")), key=lambda m: m.layer_idx
    )
    kind = type(modules[0]).__name__ if modules else type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; kvlib compresses decoder-only models")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{kind} does not use transformers' attention interface, which kvlib needs")
    if [m.layer_idx for m in modules] != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"{type(model).__name__}: {len(modules)} attention modules ({kind}) in {config.num_hidden_layers} layers"
        )
    return modules


def decoder_layers(model, modules) -> list:
    """The modules that contain the attention modules, in the same order."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    return [parents[id(module)] for module in modules]


def refuse(module, arguments: dict, tokens: int) -> None:
    """Raise ValueError for attention that kvlib does not reproduce.

    That is soft-capping, learned sinks, position biases, and a sliding window shorter than the tokens seen.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if arguments.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses `{name}`, which kvlib does not support")
    window = arguments.get("sliding_window")
    if window is not None and tokens > window:
        raise ValueError(f"{tokens} tokens exceed the sliding window of {window} in layer {module.layer_idx}")


def short_rotation(model) -> int | None:
    """Tokens from which a model turns all keys by other angles (longrope), those of earlier tokens too; else None."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def inverse_frequencies(model, head_dim: int):
    """The model's rotary frequencies `(head_dim / 2,)`, for methods that move keys to other positions.

    Raises:
        ValueError: if angles are not position x frequency over the whole head: dynamic or longrope scaling, partial
            rotation, or no rotary embedding at all.
    """
    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
    kind = getattr(rotary, "rope_type", None)
    if rotary is None or kind in ("dynamic", "longrope") or 2 * len(rotary.inv_freq) != head_dim:
        raise ValueError(
            f"keys cannot be re-rotated with rotary embedding {kind!r} over part or all of {head_dim} dimensions"
        )
    return rotary.inv_freq
