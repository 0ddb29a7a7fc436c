import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.models.attention import ragged_attention
from posttrain.models.batch import Layout, Tree
from posttrain.models.capped import block_mask, capped_attention
from posttrain.models.tree_attention import Window

LAYOUT = Layout(
    (Tree(0, 150), Tree(150, 240, (300, 300, 420)), Tree(420, 421), Tree(421, 460, (520, 530, 561, 590), (0, 1, 1, 0)))
)


@pytest.mark.parametrize("window", [None, Window(40), Window(64, chunked=True)])
def test_flex_attention_equals_the_masked_path(window, monkeypatch):
    """Its backward has no CPU kernel of its own but runs when it is not asked for one."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, 590, 16) for heads in (4, 2, 2)]
    ours, theirs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    out = capped_attention(*ours, LAYOUT, 0.25, window, 5.0).transpose(1, 2)
    module = torch.nn.Module()
    options = {"sliding_window": window.size} if window and not window.chunked else {}
    if window and window.chunked:
        module.config = type("Config", (), {"attention_chunk_size": window.size, "layer_types": None})()
    expected, _ = ragged_attention(module, *theirs, None, scaling=0.25, layout=LAYOUT, softcap=5.0, **options)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(out)
    out.backward(weights)
    expected.backward(weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=1e-5)


def test_blocks_that_nobody_sees_are_left_out_and_no_mask_of_tokens_is_built():
    """Two documents of 1,280 tokens, ten blocks each: the triangle of each, 55 blocks, of 400."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        blocks = block_mask.__wrapped__(Layout((Tree(0, 1280), Tree(1280, 2560))), None, torch.device("cpu"))
    assert int(blocks.kv_num_blocks.sum()) == 110
    assert max(sizes) <= 2560
