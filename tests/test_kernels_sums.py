"""Column sums of attention by the kernels against the blocked pass: in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import peak_memory
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvlib
from kvlib.core import attention, packed

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from kvlib.kernels import column_sums as kernel
from kvlib.kernels.column_sums import Tiling

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def bfloat16_dot():
    """The interpreter multiplies the bits of bfloat16 as if they were integers: they become float32 first."""
    dot = interpreter.InterpreterBuilder.create_dot

    def single(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self, a, b, *more):
        return dot(self, single(a), single(b), *more)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield


def poisoned(*shape, **more):
    """Memory in which what is not written shows."""
    return torch.full(shape, torch.nan, **more)


class Case:
    """Random queries and keys, `new` tokens after `old` ones, and where they are, as the core lays them out.

    hiding: rows begin with padding, and heads have evicted tokens, whose empty slots come last. Then what nobody may
    look at is not a number.
    """

    def __init__(self, batch, kv_heads, group, old, new, dim, dtype=torch.float32, hiding=False):
        torch.manual_seed(old + 7 * new + dim)
        slots, self.places = old + new, ()
        # as a model makes them: tokens before heads
        self.query = (2 * torch.randn(batch, new, kv_heads * group, dim)).to(dtype).transpose(1, 2)
        self.key = (2 * torch.randn(batch, kv_heads, slots, dim)).to(dtype)
        if hiding:
            queries = torch.arange(old, slots).expand(batch, new).clone()
            queries[-1, : new // 3] = -1
            keys = torch.arange(slots).expand(batch, kv_heads, slots).clone()
            keys[0, -1, old // 3 : old] += 2
            keys[-1, :, : slots // 4] = -1
            self.query.mT[queries[:, None, None].expand_as(self.query.mT) < 0] = torch.nan
            self.key[keys < 0] = torch.nan
            self.places = queries, keys

    def expected(self, scaling=None):
        """Sums `(batch, kv_heads, group, slots)`, and log-sum-exps `(batch, query_heads, new)`, in float64."""
        query, key = (x.double().nan_to_num() for x in (self.query, self.key))
        sums = attention.column_sums(query, key, *self.places, scaling=scaling)
        scaling = key.shape[-1] ** -0.5 if scaling is None else scaling
        places = self.places or (None, None)
        logits = torch.cat([x.logsumexp(-1) for x in attention.blocks(query, key, *places, scaling, None)], dim=3)
        return sums, logits.flatten(1, 2)

    def on_device(self):
        return [x.to(DEVICE) for x in (self.query, self.key, *self.places)]

    def check(self, tiling=None, scaling=None, programs=kernel.PROGRAMS):
        """programs: into so many the first pass is split, if it can be."""
        sums, norms = self.expected(scaling)
        with mock.patch("torch.empty", poisoned), mock.patch.object(kernel, "PROGRAMS", programs):
            lse = kernel.log_sum_exps(*self.on_device(), scaling=scaling, tiling=tiling)
            got = kernel.column_sums(*self.on_device(), scaling=scaling, lse=lse, tiling=tiling)
        assert lse.dtype == got.dtype == torch.float32
        torch.testing.assert_close(lse.double().cpu(), norms, **CLOSE)
        torch.testing.assert_close(got.double().cpu(), sums, **CLOSE)


DTYPES = torch.float32, torch.float16, torch.bfloat16


@settings(max_examples=7)
@given(
    batch=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3]),
    old=st.one_of(st.just(0), st.integers(0, 80)),
    new=st.one_of(st.sampled_from([2, 32, 64]), st.integers(2, 80)),
    dim=st.sampled_from([8, 24, 32]),
    dtype=st.sampled_from(DTYPES),
    hiding=st.booleans(),
    kept=st.sampled_from([32, 64]),
    block=st.sampled_from([32, 64]),
    scaling=st.sampled_from([None, 0.3]),
    programs=st.sampled_from([1, 20, 1000]),
)
def test_any_shapes_and_tilings(batch, kv_heads, group, old, new, dim, dtype, hiding, kept, block, scaling, programs):
    Case(batch, kv_heads, group, old, new, dim, dtype, hiding).check(Tiling(kept, block, 4, 2), scaling, programs)


@pytest.mark.parametrize(
    "dim, dtype, hiding",
    [(64, torch.bfloat16, True), (80, torch.float16, False), (128, torch.bfloat16, False)],
)
def test_dimensions_of_heads_with_the_tiling_that_is_used(dim, dtype, hiding):
    Case(1, 1, 2, 100, 170, dim, dtype, hiding).check()


@pytest.mark.parametrize("old", [14, 15, 16])
def test_where_masks_begin_and_end(old):
    for new in (31, 32, 33):
        Case(1, 1, 1, old, new, 8).check(Tiling(16, 16, 4, 2), programs=1)


def test_blocks_of_which_nothing_is_seen():
    Case(1, 1, 1, 60, 50, 8, hiding=True).check(Tiling(16, 16, 4, 2), programs=1)


def test_many_keys_of_few_queries_are_split():
    case = Case(1, 1, 2, 500, 20, 16)
    programs = []
    with mock.patch.object(kernel, "_norms", Launches(kernel._norms, programs)):
        case.check(Tiling(64, 64, 4, 2))
    assert programs == [(2, 1, 9)]


class Launches:
    """A kernel that notes its grids."""

    def __init__(self, function, grids):
        self.function, self.grids = function, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.function[grid]


def test_a_query_that_sees_nothing_counts_nowhere_whoever_has_found_that():
    case = Case(1, 2, 1, 0, 40, 16)
    case.places = torch.arange(40)[None], torch.arange(40).expand(1, 2, 40).where(torch.arange(40) > 9, -1)
    lse = kernel.log_sum_exps(*case.on_device())
    assert (lse[..., :10] == -torch.inf).all() and (lse[..., 10:] > -torch.inf).all()
    for nothing in (-torch.inf, torch.inf):
        got = kernel.column_sums(*case.on_device(), lse=lse.masked_fill(lse == -torch.inf, nothing))
        torch.testing.assert_close(got.sum(-1), torch.full((1, 2, 1), 30.0, device=DEVICE))


def test_a_given_lse_is_believed():
    case = Case(1, 1, 2, 30, 40, 16)
    sums, lse = case.expected()
    got = kernel.column_sums(*case.on_device(), lse=(lse - 2).float().to(DEVICE))
    torch.testing.assert_close(got.double().cpu(), sums * torch.e**2, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(GPU, reason="counts what is allocated on a CPU")
def test_memory_is_linear_in_tokens():
    query, key = Case(1, 1, 1, 0, 256, 8).on_device()
    inputs = query.nbytes + key.nbytes  # the interpreter copies them
    matrix = 256 * 256 * 4
    assert inputs < peak_memory(lambda: kernel.column_sums(query, key, tiling=Tiling(128, 128, 4, 2))) < matrix / 8


@on_gpu
def test_memory_on_a_gpu_is_linear_in_tokens():
    """And queries are not copied, whose heads come behind their tokens."""
    query, key = Case(1, 8, 4, 0, 8192, 128, torch.bfloat16).on_device()
    kernel.column_sums(query, key)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel.column_sums(query, key)
    assert torch.cuda.max_memory_allocated() - before < 5 * 32 * 8192 * 4


@pytest.mark.deep
def test_the_compiler_takes_them_and_nothing_is_spilled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"] * 12


# Where log-sum-exps come from


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("group", [1, 3])
def test_sdpa_does_what_it_always_does_and_tells_its_log_sum_exps(mode, group):
    case = Case(2, 2, group, 0, 70, 16)
    value = torch.randn_like(case.key)

    def sdpa():
        more = {"is_causal": True, "enable_gqa": group > 1}
        return torch.nn.functional.scaled_dot_product_attention(case.query, case.key, value, **more)

    with mode():
        with packed.LogSumExps() as kept:
            output = sdpa()
        assert torch.equal(output, sdpa())
        torch.testing.assert_close(kept.found.double(), case.expected()[1], **CLOSE)
        with sdpa_kernel(SDPBackend.MATH), packed.LogSumExps() as kept:
            sdpa()
        assert kept.found is None


@on_gpu
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, None])
@pytest.mark.parametrize("group, new, dim", [(1, 100, 64), (4, 1000, 128), (3, 333, 80)])
def test_the_gpu_s_kernels_tell_log_sum_exps_and_give_the_same_output(backend, group, new, dim):
    case = Case(2, 2, group, 0, new, dim, torch.bfloat16)
    query, key = case.on_device()
    value = torch.randn_like(key)

    def sdpa():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)

    with torch.no_grad(), sdpa_kernel(backend or [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        expected = sdpa()
        with packed.LogSumExps() as kept:
            assert torch.equal(sdpa(), expected)
    torch.testing.assert_close(kept.found, kernel.log_sum_exps(query, key), rtol=1e-5, atol=1e-4)


@dataclass(frozen=True)
class Summing(kvlib.Evictor):
    """Asks for sums of all kinds, after attention whose log-sum-exps are known as they are on a GPU."""

    window = 4

    def attend(self, view):
        with packed.LogSumExps() as kept:
            output = super().attend(view)
        view.lse = kept.found if view.lse is None else view.lse
        return output

    def observe(self, view):
        self.ask(view)

    def ask(self, view):
        view.column_sums()


@pytest.fixture
def asked(monkeypatch):
    """Shapes of the log-sum-exps that come with calls for column sums, which are made by the kernel."""
    shapes, blocked = [], attention.column_sums

    def column_sums(query, key, *more, lse=None):
        shapes.append(None if lse is None else tuple(lse.shape))
        got = kernel.column_sums(query, key, *more, lse=lse)
        torch.testing.assert_close(got, blocked(query, key, *more), rtol=1e-4, atol=1e-4)
        return got

    monkeypatch.setattr(attention, "column_sums", column_sums)
    return shapes


def read(method, *prompts, **more):
    model = tiny.build("llama-gqa", torch.float32).to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in tiny.pad(list(prompts)))
    with method(model) as run:
        run.read(input_ids=ids, attention_mask=mask, **more)


@pytest.mark.skipif(GPU, reason="a CPU's SDPA tells them for float32, a GPU's does not")
def test_what_attention_has_found_is_used_for_sums_of_the_same_queries_and_keys(asked):
    class Asking(Summing):
        def ask(self, view):
            view.column_sums()
            view.column_sums(last=3)
            view.replaced(query=view.query.flip(-1)).column_sums()
            view.replaced(key=view.key.flip(-1)).column_sums()
            if view.layer_idx == 1:
                view.other(0).column_sums()

    read(Asking(), tiny.tokens(20))
    each = [(1, 4, 20), (1, 4, 3), None, None]
    assert asked == [*each, *each, None]


@pytest.mark.skipif(GPU, reason="a CPU's SDPA tells them for float32, a GPU's does not")
def test_with_padding_it_is_not_used_and_in_chunks_each_has_its_own(asked):
    read(Summing(), tiny.tokens(20), tiny.tokens(13, seed=1))
    assert asked == [None, None]
    asked.clear()
    read(Summing(), tiny.tokens(20), prefill_chunk_size=12)
    assert asked == [(1, 4, 12)] * 2 + [(1, 4, 8)] * 2


@on_gpu
@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_methods_on_a_gpu_sum_in_one_pass(name, monkeypatch):
    found, sums = [], attention.column_sums
    monkeypatch.setattr(attention, "column_sums", lambda *a, lse=None: found.append(lse) or sums(*a, lse=lse))
    model = tiny.build("llama-gqa", torch.bfloat16).cuda()
    with kvlib.method(name, budget=0.5)(model) as run:
        run.read(input_ids=tiny.tokens(1, 50).cuda())
    assert len(found) == 2 and all(lse is not None for lse in found)
