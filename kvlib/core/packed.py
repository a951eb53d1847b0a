"""Attention of a decoded token straight from the packed store, where torch's would need a copy or a mask.

Segments of different lengths need a padded copy of all that is stored, lists of slots a copy of what they name, 8-bit
codes one of twice their size, room behind the tokens a mask, and weights that scores are made of a pass of their own:
`kvlib.kernels.decode` reads them where they are. `kvlib.core.attention` is the reference, and serves everything else;
what it finds of a prompt's logits on a GPU is kept for sums over queries.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvlib import kernels
from kvlib.core import attention

DTYPES = torch.float32, torch.float16, torch.bfloat16
CODED = torch.float32, torch.bfloat16  # in float16 a small weight times a scale would be 0
UNIFORM = False  # should it serve equal segments without gaps whatever is asked? SDPA reads them as they are
WIDEST = 512  # bytes of a key; blocks of wider ones do not fit into a GPU's shared memory


def attend(view) -> torch.Tensor:
    """`kvlib.core.attention.attend(view)`, by the kernel where it serves: `(batch, new, query_heads, head_dim)`.

    On a GPU `view.lse` gets what it finds and sums over the queries need.
    """
    if serves(view):
        return attended(view, scoring=view.run.method.weighs).output[:, None]
    if not (view.summing and view.query.is_cuda and view.uniform and view.query.shape[2] == view.key.shape[2]):
        return attention.attend(view)
    with LogSumExps() as kept:
        output = attention.attend(view)
    view.lse = kept.found
    return output


def weights(view) -> torch.Tensor:
    """`view.weights` where the kernel serves. Asked for before `attend`, they cost no pass of their own."""
    from kvlib.kernels import decode

    return decode.weights(attended(view, scoring=True)).unflatten(1, (-1, view.groups))


def serves(view) -> bool:
    """Does the kernel serve this view?"""
    if view.dropout or not (kernels.decodes(view.device) and attends(view)):
        return False
    key, value = (view.layer.tail.fields.get(name) for name in ("key", "value"))
    if key is None or value is None:
        return False
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (view.query, key, value))
    alike = key.dtype == value.dtype and view.query.shape[-1:] == key.shape[1:] == value.shape[1:]
    width = key.shape[1] * view.query.element_size()
    if coded(view):  # blocks of twice as many keys
        known, width = key.dtype == torch.int8 and view.query.dtype in CODED, 2 * width
    else:
        known = view.query.dtype == key.dtype and key.dtype in DTYPES
    return alike and known and width <= WIDEST and view.layer.tail.width * key.shape[1] < 2**31 and not learning


def coded(view) -> bool:
    """Is what the layer stores 8-bit codes with a scale for each slot (`Method.scaled`)?"""
    return view.run.method.scaled and "key_scale" in view.layer.tail.fields


def attends(view) -> bool:
    """Does a decoded token attend to what is stored as it is, and does SDPA need a copy or a mask for it, or may it not
    be used because it does not tell the weights that scores are made of?"""
    if not (view.stored and view.step.decoding):
        return False
    if view.uniform and not (UNIFORM or view.weighing or coded(view)):
        return False
    if view.layer.body is not None or (view.run.method.hooks("decode") and not coded(view)):
        return False
    return not any(x.copied for x in (view, view.whole) if x is not None)  # methods may write to what they look at


def attended(view, scoring: bool):
    """What the kernel says of the view's query (`kvlib.kernels.decode.Attended`), once."""
    from kvlib.kernels import decode  # Triton is there with CUDA builds of torch only

    if view.attended is None or (scoring and view.attended.logits is None):
        tail = view.layer.tail
        scales = (tail.fields["key_scale"], tail.fields["value_scale"]) if coded(view) else None
        view.attended = decode.attend(
            view.query[:, :, 0],
            *(tail.fields["key"], tail.fields["value"], tail.starts, tail.ends, tail.width),
            slots=view.slots,
            positions=tail.positions if tail.vacant else None,
            scales=scales,
            scaling=view.scaling,
            scoring=scoring,
            tiling=decode.CODED if scales else decode.TILING,
        )
    return view.attended


class LogSumExps(TorchDispatchMode):
    """Inside the block: keep in `found` what SDPA's kernels know of each query's logits, and SDPA does not tell.

    `found` is the log-sum-exp `(batch, query_heads, new)` in float32, natural, where a flash kernel or cuDNN's runs;
    else None. SDPA does what it always does; only cuDNN's is asked to write it.
    """

    found: torch.Tensor | None = None

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.ops.aten.scaled_dot_product_attention.default:  # in inference mode it comes as a whole
            with self:
                return function.decompose(*arguments, **options)
        if function is torch.ops.aten._scaled_dot_product_cudnn_attention.default:
            arguments = (*arguments[:4], True, *arguments[5:])  # compute_log_sumexp
        output = function(*arguments, **options)
        returns = function._schema.returns
        if len(returns) > 1 and returns[1].name == "logsumexp":
            self.found = output[1].view(arguments[0].shape[:3])
        return output
