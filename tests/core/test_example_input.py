"""An example input is found without disturbing the training that follows."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress.core.example_input import find_example_input, inputs_for


class Numbers(Dataset):
    """Samples made by ``make``, 5 of them."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return self.make(index)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.found = None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x)

    def setup(self, stage: str) -> None:
        states = torch.get_rng_state()
        self.found = find_example_input(self.trainer, self)
        assert torch.equal(torch.get_rng_state(), states)

    def training_step(self, batch, batch_idx):
        return self.net.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, tmp_path, *args, **kwargs):
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.fit(module, *args, **kwargs)
    return module.found


def test_example_input_array_comes_first(tmp_path):
    module = Module()
    module.example_input_array = torch.arange(8.0).reshape(2, 4)
    found = fit(module, tmp_path, DataLoader(Numbers(lambda i: torch.zeros(4))))
    assert torch.equal(found, torch.tensor([[0.0, 1, 2, 3]]))
    module.example_input_array = {"x": torch.zeros(2, 4), "scale": torch.tensor(3.0)}
    found = fit(module, tmp_path, DataLoader(Numbers(lambda i: torch.zeros(4))))
    assert found["x"].shape == (1, 4)
    assert found["scale"] == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda i: torch.full((4,), 7.0),
        lambda i: (torch.full((4,), 7.0), i),
        lambda i: {"image": torch.full((4,), 7.0), "label": i},
        lambda i: ("name", {"deep": [torch.full((4,), 7.0)]}),
    ],
    ids=["tensor", "pair", "dict", "nested"],
)
def test_first_tensor_of_the_first_batch(tmp_path, make):
    found = fit(Module(), tmp_path, DataLoader(Numbers(make), batch_size=3))
    assert torch.equal(found, torch.full((1, 4), 7.0))


def test_collections_of_loaders_and_generators(tmp_path):
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()

    class Checked(Module):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            assert torch.equal(generator.get_state(), before)

    data = Numbers(lambda i: torch.rand(4) + i)
    loaders = {"a": [DataLoader(data, shuffle=True, generator=generator)], "b": DataLoader(data)}
    assert fit(Checked(), tmp_path, loaders).shape == (1, 4)


def test_transfer_hooks_of_the_datamodule(tmp_path):
    class Bytes(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Numbers(lambda i: torch.full((4,), 255, dtype=torch.uint8)))

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch.float() / 255

    assert torch.equal(fit(Module(), tmp_path, datamodule=Bytes()), torch.ones(1, 4))


def test_nothing_to_be_found(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"first training batch, a list, has no tensor\. Set"):
        fit(Module(), tmp_path, DataLoader(Numbers(lambda i: "text")))
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"Module has no `example_input_array`.*Set `self"):
        find_example_input(trainer, Module())


def test_inputs_take_the_modules_dtype():
    args, kwargs = inputs_for(nn.Linear(4, 2).double(), {"input": torch.zeros(1, 4), "ids": torch.tensor([1])})
    assert args == ()
    assert (kwargs["input"].dtype, kwargs["ids"].dtype) == (torch.float64, torch.int64)
