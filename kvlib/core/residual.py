"""Hidden states that get shorter on their way through the layers."""


def shorten(run, layer_idx: int):
    """A pre-hook of a decoder layer that lets the run's method shorten the hidden states, and what goes with them."""

    def hook(layer, args, kwargs):
        if not run.active:
            return None
        step = run.step
        hidden = args[0] if args else kwargs.pop("hidden_states")
        keep = run.method.before_layer(run, layer_idx)
        if keep is not None:
            keep = keep.to(hidden.device)
            hidden = hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))
            step.positions = step.positions.gather(1, keep.to(step.positions.device))
            step.stored = step.positions.to(step.stored.dtype)
            step.counts = (step.positions >= 0).sum(1).cpu()
            step.complete = bool((step.counts == keep.shape[1]).all())
            step.columns = keep if step.columns is None else step.columns.to(keep.device).gather(1, keep)
            step.copies = {}
        if step.columns is not None:
            kwargs["position_ids"] = step.positions.clamp(min=0)
            rotary, index = kwargs["position_embeddings"], step.columns[..., None]
            kwargs["position_embeddings"] = tuple(
                x.expand(len(index), -1, -1).gather(1, index.to(x.device).expand(-1, -1, x.shape[-1])) for x in rotary
            )
        return (hidden, *args[1:]), kwargs

    return hook
