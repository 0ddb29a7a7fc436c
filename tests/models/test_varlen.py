import pytest
import torch
from torch.library import Library
from torch.nn.attention import _registry, restore_flash_attention_impl
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.models import varlen
from posttrain.models.varlen import EFFICIENT, FLASH, Sequences, flash_package_for, kernel_for, paged_attention

CPU = torch.device("cpu")


def _by_mask(query, key, value, sequences, scale):
    """Plain attention, sequence by sequence, with the mask written out; and its log-sum-exp."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outs, lses = [], []
    parts = (tensor.split(lengths) for tensor, lengths in (
        (query, sequences.lengths_q), (key, sequences.lengths_k), (value, sequences.lengths_k),
    ))  # fmt: skip
    for q, k, v in zip(*parts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        age = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None]
        hidden = torch.zeros_like(age, dtype=torch.bool)
        if sequences.causal:
            hidden |= age < 0
        if sequences.window is not None:
            hidden |= age >= sequences.window
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.fixture
def efficient_on_cpu():
    """The memory-efficient operator has no CPU kernel either: here is one, from the mask, in the operator's own shapes."""
    library = Library("aten", "IMPL")

    def sequences_of(cu_q, cu_k, mask_type, window):
        lengths = (tuple(cu.diff().tolist()) for cu in (cu_q, cu_k))
        return Sequences(*lengths, mask_type == 2, window, CPU)

    def forward(
        query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, wants_lse, *, scale, window_size=None
    ):
        out, lse = _by_mask(query[0], key[0], value[0], sequences_of(cu_q, cu_k, mask_type, window_size), scale)
        padded = lse.new_full((len(cu_q) - 1, lse.shape[0], -(-max_q // 32) * 32), torch.inf)
        for number, part in enumerate(lse.split(cu_q.diff().tolist(), 1)):
            padded[number, :, : part.shape[1]] = part
        zero = torch.zeros((), dtype=torch.int64)
        return out[None], padded, zero, zero, max_q, max_k

    def backward(
        grad, query, key, value, bias, out, cu_q, cu_k, max_q, max_k, padded, dropout, seed, offset, mask_type,
        bias_grad, *, scale, window_size=None,
    ):  # fmt: skip
        """Flash's own formula, which reads output and log-sum-exp as they are given, and not as it would find them."""
        lengths = cu_q.diff().tolist()
        lse = torch.cat([padded[number, :, :length] for number, length in enumerate(lengths)], 1)
        args = (grad[0], query[0], key[0], value[0], out[0], lse)
        grads = FLASH.backward(*args, sequences_of(cu_q, cu_k, mask_type, window_size), scale)
        return *(tensor[None] for tensor in grads), torch.empty(0)

    library.impl("_efficient_attention_forward", forward, "CPU")
    library.impl("_efficient_attention_backward", backward, "CPU")
    yield
    library._destroy()


CASES = {
    "causal": Sequences((5, 1, 9), (5, 1, 9), True, None, CPU),
    "fewer queries than keys": Sequences((2, 1, 4), (7, 1, 4), True, None, CPU),
    "across": Sequences((6, 3), (2, 9), False, None, CPU),
    "window": Sequences((8, 3), (8, 6), True, 3, CPU),
}


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=["flash", "efficient"])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_equals_attention_with_the_mask_written_out(case, kernel, efficient_on_cpu):
    sequences, scale = CASES[case], 0.3
    torch.manual_seed(0)
    num_q, num_k = sum(sequences.lengths_q), sum(sequences.lengths_k)
    query, key, value = (torch.randn(n, heads, 16) for n, heads in ((num_q, 4), (num_k, 2), (num_k, 2)))
    kernel_for(query)  # registers the flash operator's CPU kernel
    out, lse = kernel.forward(query, key, value, sequences, scale)
    leaves = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    expected, expected_lse = _by_mask(*leaves, sequences, scale)
    torch.testing.assert_close(out.double(), expected, atol=5e-7, rtol=5e-7)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=0)
    grad_out = torch.randn_like(out)
    expected.backward(grad_out.double())
    grads = kernel.backward(grad_out, query, key, value, out, lse, sequences, scale)
    for ours, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(ours.double(), leaf.grad, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype, kernel", [(torch.bfloat16, FLASH), (torch.float32, EFFICIENT)])
def test_a_half_precision_takes_the_flash_kernel_of_a_gpu_and_float32_the_memory_efficient_one(dtype, kernel):
    assert kernel_for(torch.empty(4, 2, 64, dtype=dtype, device="meta")) is kernel


def test_heads_wider_than_flash_knows_take_the_memory_efficient_kernel():
    assert kernel_for(torch.empty(4, 2, 512, dtype=torch.bfloat16, device="meta")) is EFFICIENT


@pytest.mark.parametrize(
    ("major", "there", "taken"),
    [
        (8, {"flash_attn_interface", "flash_attn.cute"}, None),
        (9, {"flash_attn_interface", "flash_attn.cute"}, "FA3"),
        (9, {"flash_attn.cute"}, None),
        (10, {"flash_attn_interface", "flash_attn.cute"}, "FA4"),
        (10, {"flash_attn_interface"}, None),
        (9, set(), None),
    ],
)
def test_a_flash_attention_that_is_made_for_the_card_is_taken_where_it_is_installed(major, there, taken):
    assert flash_package_for(major, there.__contains__) == taken


@pytest.fixture
def fa3(monkeypatch):
    """FA3 is installed; `fa3(register)` says what its registration does."""

    def installed(register):
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
        monkeypatch.setattr(varlen, "_is_installed", lambda module: module == "flash_attn_interface")
        varlen._activate.cache_clear()

    yield installed
    restore_flash_attention_impl(_raise_warn=False)
    varlen._activate.cache_clear()


class _Handle:
    def remove(self):
        pass


def test_it_is_activated_once_and_what_the_user_activated_stays(fa3, monkeypatch):
    calls = []
    fa3(lambda: (calls.append(1), _Handle())[1])
    varlen._activate(9)
    varlen._activate(9)
    assert (len(calls), varlen.active_flash()) == (1, "FA3")
    restore_flash_attention_impl()
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", ("another", _Handle()))
    varlen._activate.cache_clear()
    varlen._activate(9)
    assert (len(calls), varlen.active_flash()) == (1, "another")


def test_one_that_is_built_for_another_torch_is_named_and_left(fa3, caplog):
    def register():
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    fa3(register)
    varlen._activate(9)
    assert varlen.active_flash() is None
    assert "FA3 is installed and could not be activated (undefined symbol: _ZN3c10); torch's own" in caplog.text


class _Arguments(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_flash_attention_forward"):
            self.cu_k = args[4]
        return func(*args, **(kwargs or {}))


def test_packages_that_read_pages_are_given_no_lengths_of_keys_beside(fa3):
    tensors = torch.randn(2, 4, 16), torch.randn(3, 8, 2, 16), torch.randn(3, 8, 2, 16)
    cu_q, used = torch.arange(3, dtype=torch.int32), torch.tensor([11, 5], dtype=torch.int32)
    table = torch.tensor([[2, 1], [0, 0]], dtype=torch.int32)
    found = []
    for active in (False, True):
        if active:
            fa3(_Handle)
            varlen._activate(9)
        with _Arguments() as arguments:
            out = paged_attention(*tensors, cu_q, used, table, 0.25, None)
        found.append((out, arguments.cu_k))
    (plain, lengths), (packaged, none) = found
    assert none is None and lengths.tolist() == [0, 16, 32]
    assert torch.equal(plain, packaged)
