"""What every lesson begins with."""

import torch
from IPython.display import Markdown, display

import kvlib
from kvlib.core.support import kv_heads
from kvlib.lab.plotting import use_style


def setup(model_name: str, device: str = "cpu", *, written_for: str = "smollm2"):
    """Load a model, draw in the common style, and compute without gradients from here on.

    A banner says so if the prose of the lesson describes another model.

    Args:
        model_name: as for `kvlib.load`.
        written_for: the model whose numbers stand in the prose.

    Returns:
        (model, tokenizer)
    """
    use_style()
    torch.set_grad_enabled(False)
    model, tokenizer = kvlib.load(model_name)
    model.to(device)
    config = model.config.get_text_config()
    if model_name != written_for:
        display(Markdown(BANNER.format(model_name=model_name, written_for=written_for)))
    print(f"{model_name}: {model.num_parameters() / 1e6:.1f} million parameters in {model.dtype}, on {device}")
    print(
        f"{config.num_hidden_layers} layers of {config.num_attention_heads} query heads on {kv_heads(model)} KV heads"
    )
    return model, tokenizer


BANNER = """> **This run is on `{model_name}`.** Questions and formulas hold for any model; the numbers in the prose,
> and what it says about them, are those of `{written_for}`."""
