import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def other_weights(make_local_model):
    """The folder of a model of the same tokenizer and other weights."""
    folder = make_local_model("qwen3")
    path, made = folder / "model.safetensors", torch.Generator().manual_seed(3)
    weights = {
        n: w + 0.04 * torch.randn(w.shape, generator=made) if w.ndim == 2 else w for n, w in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder
