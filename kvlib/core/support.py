"""Which models can be used, and where their parts are."""

from transformers import PreTrainedModel


def attention_modules(model) -> list:
    """The attention modules of a decoder-only transformers model, by layer.

    Raises:
        ValueError: for models whose attention does not go through transformers' attention interface in every layer.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model: pass the one inside it")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; kvlib compresses decoder-only models")
    text = decoder(model)
    found = (m for m in text.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal"))
    modules, layers = sorted(found, key=lambda m: m.layer_idx), text.config.num_hidden_layers
    kind = type(modules[0]).__name__ if modules else type(model).__name__
    if not getattr(text, "_supports_attention_backend", False):
        raise ValueError(f"{kind} does not use transformers' attention interface, which kvlib needs")
    if [m.layer_idx for m in modules] != list(range(layers)):
        raise ValueError(f"{type(model).__name__}: {len(modules)} attention modules ({kind}) in {layers} layers")
    if not all(m.is_causal for m in modules):
        raise ValueError(f"{kind} attends to later tokens too (`is_decoder` is not set?); kvlib needs a causal model")
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in text.modules()):
        raise ValueError(f"{type(model).__name__} counts positions from its padding token's id, kvlib from 0")
    return modules


def decoder(model) -> PreTrainedModel:
    """The part of a transformers model that has the text's layers: without the head, and without towers for images.

    Its configuration, and no other, says which attention function these layers call.
    """
    text = model.get_decoder()
    if not isinstance(text, PreTrainedModel):
        raise ValueError(f"{type(model).__name__}: its decoder, {type(text).__name__}, is no transformers model")
    return text


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
