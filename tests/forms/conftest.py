import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def relative_of(model_dir, tmp_path_factory):
    """`relative_of("qwen3", 2)`: another fine-tune of the same base: its weights moved by a seed, half of the entries only."""
    made = {}

    def make(architecture, seed, **changes):
        key = (architecture, seed, str(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp("relatives") / f"{architecture}-{seed}"
            shutil.copytree(model_dir(architecture, **changes), folder)
            generator = torch.Generator().manual_seed(seed)
            tensors = load_file(folder / "model.safetensors")
            for name, tensor in tensors.items():
                step = torch.randn(tensor.shape, generator=generator) * 0.05
                tensors[name] = tensor + step * (torch.rand(tensor.shape, generator=generator) < 0.5)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            made[key] = folder
        return made[key]

    return make
