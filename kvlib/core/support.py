"""Which models can be used, and where their parts are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function


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


def kv_heads(model) -> int:
    """KV heads of each layer; as many as query heads in a model without grouped heads."""
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


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


@contextmanager
def weights_in_place(modules) -> Iterator[None]:
    """Within the block modules have their weights, where they compute with them.

    Outside a module's own forward pass `accelerate` has weights on no device that it keeps in host memory or on a disk.
    """
    with ExitStack() as stack:
        for part in (part for module in modules for part in module.modules()):
            stack.enter_context(align_module_device(part))
        yield


def attention_chunk(module) -> int | None:
    """Tokens that attend to each other in a layer whose attention is cut into chunks; else None."""
    layers = getattr(module.config, "layer_types", None)
    chunked = bool(layers) and layers[module.layer_idx] == "chunked_attention"
    return module.config.attention_chunk_size if chunked else None


def refuse(module, arguments: dict, tokens: int, chunk: int | None) -> None:
    """Raise ValueError for attention that kvlib does not reproduce.

    That is soft-capping, learned sinks, position biases, and a sliding window or a chunk shorter than the tokens seen.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if arguments.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses `{name}`, which kvlib does not support")
    window, kind = arguments.get("sliding_window"), "sliding window"
    if window is None and chunk is not None:
        window, kind = chunk, "attention chunk"
    if window is not None and tokens > window:
        raise ValueError(f"{tokens} tokens exceed the {kind} of {window} in layer {module.layer_idx}")


def short_rotation(model) -> int | None:
    """Tokens from which a model turns all keys by other angles (longrope), those of earlier tokens too; else None."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def refuse_images(model, arguments: dict) -> None:
    """Raise ValueError for images in a model that gives them positions of several dimensions."""
    images = [name for name, x in arguments.items() if name.startswith("pixel_values") and x is not None]
    if images and hasattr(model.base_model, "get_rope_index"):
        raise ValueError(f"{type(model).__name__} with {images[0]}: positions of several dimensions are not supported")


def refuse_future(
    batch_size: int, q_length: int, q_offset: int, mask_function=causal_mask_function, device=None, **others
) -> None:
    """A mask function for transformers that builds no mask: padding is known from the step, and is never stored.

    Raises:
        ValueError: if a token is to see the next one, as images do in some models, and all tokens in an encoder.
    """
    if q_length == 1 or mask_function is causal_mask_function:
        return
    query = torch.arange(q_offset, q_offset + q_length - 1, device=device)
    rows = torch.arange(batch_size, device=device)[:, None]
    if bool(mask_function(rows, torch.zeros_like(rows), query, query + 1).any()):
        raise ValueError("some tokens of this input are to attend to later ones, which kvlib does not support")
