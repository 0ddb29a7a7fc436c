import pytest
import torch

from posttrain.forms.export.compressed import COMPRESSED_FORMS, compressed_bound

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("kind", COMPRESSED_FORMS)
def test_a_bound_holds_and_is_what_the_form_rounds(kind):
    """Numbers of all sizes beside each other, down to those that the form rounds to nothing."""
    form, generator = COMPRESSED_FORMS[kind], torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 4096, generator=generator) * 10 ** (-6 * torch.rand(64, 4096, generator=generator))
    scale = tensor.abs().amax(1, keepdim=True) / form.largest
    if kind == "fp8":
        held = form.tensors(NAME, tensor / scale)[NAME].float() * scale
    else:
        held = (tensor / scale).round() * scale
    share = (held - tensor).abs() / compressed_bound(kind, NAME, tensor, torch.float32)
    assert 0.9 < share.max() <= 1


def test_embeddings_and_norms_stay_as_they_are():
    for name, tensor in (("model.embed_tokens.weight", torch.ones(3, 3)), ("model.norm.weight", torch.ones(3))):
        assert compressed_bound("fp8", name, tensor, torch.float32).max() < 1e-5
