import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner import tuning
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_largescale import compat


class Loaded(LightningModule):
    """Has a loader of its own and hooks on batches."""

    asked = 0

    def train_dataloader(self):
        self.asked += 1
        return [torch.zeros(2)]

    def training_step(self, batch, index):
        return None

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch + 1


def connected(module, **loaders):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer._data_connector.attach_data(module, **loaders)
    return trainer


def test_loaders_are_asked_once_and_then_given():
    module = Loaded()
    loop = connected(module).fit_loop
    source = compat.loader_source(loop)
    loaders = compat.request_loaders(source)
    compat.keep_loaders(loop, source, loaders)
    assert compat.request_loaders(loop._data_source) is loaders
    assert module.asked == 1
    assert loop._data_source is source
    compat.request_loaders(loop._data_source)
    assert module.asked == 2


def test_kept_loaders_can_be_dropped():
    module = Loaded()
    loop = connected(module).fit_loop
    source = compat.loader_source(loop)
    compat.keep_loaders(loop, source, compat.request_loaders(source))
    compat.drop_kept_loaders(loop)
    assert loop._data_source is source
    compat.drop_kept_loaders(loop)
    compat.request_loaders(compat.loader_source(loop))
    assert module.asked == 2


def test_kept_loaders_give_way_to_those_of_a_later_run():
    module = Loaded()
    trainer = connected(module, train_dataloaders=[1])
    source = compat.loader_source(trainer.fit_loop)
    compat.keep_loaders(trainer.fit_loop, source, compat.request_loaders(source))
    trainer._data_connector.attach_data(module, train_dataloaders=[2])
    assert compat.request_loaders(compat.loader_source(trainer.fit_loop)) == [2]


def test_no_loader_to_ask_for():
    class Bare(LightningModule):
        """Has none."""

    assert compat.loader_source(connected(Bare()).predict_loop) is None


def test_batches_are_combined_as_the_loader_combines_them():
    assert compat.combine_batches(CombinedLoader({"a": [1], "b": [2]}, "max_size"), [1, 2]) == {"a": 1, "b": 2}
    assert compat.combine_batches(CombinedLoader([[1], [2]], "sequential"), [1, 2]) == 1


def test_before_transfer():
    module = Loaded()
    connected(module)
    assert torch.equal(compat.before_transfer(module, torch.zeros(2)), torch.ones(2))


def refusals(strategy):
    """What Lightning's Tuner and BatchSizeFinder say to a run on two processes with no loader and no batch size."""
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert run._accelerator_connector.is_distributed
    said = ["", ""]
    for index, check in enumerate((tuning._check_scale_batch_size_configuration, BatchSizeFinder().setup)):
        try:
            check(*(run, BoringModel(), "fit")[: 1 + 2 * index])
        except (ValueError, MisconfigurationException) as error:
            said[index] = str(error)
    return said


def test_only_the_batch_size_finder_is_told_of_a_single_process():
    assert all("not supported with distributed" in said for said in refusals("ddp"))
    assert not any("distributed" in said for said in refusals("largescale_fsdp"))
    assert not compat.asked_by_batch_size_finder()


def test_dataset_length():
    loop = connected(Loaded()).fit_loop
    loop._combined_loader = CombinedLoader([[1, 2, 3]])
    for _ in range(2):
        compat.set_dataset_length(loop, lambda own: 5)
    assert loop._combined_loader._dataset_length() == 5


def test_searched_attribute():
    module = Loaded()
    module.batch_size = module.learning_rate = 1
    assert compat.searched_attribute(BatchSizeFinder(), module) == "batch_size"
    assert compat.searched_attribute(LearningRateFinder(), module) == "learning_rate"
    assert compat.searched_attribute(LearningRateFinder(update_attr=False), module) is None
