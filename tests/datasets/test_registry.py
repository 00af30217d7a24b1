"""Test the dataset registry: facts known before reading, and a new dataset by one entry only."""

import inspect
import subprocess
import sys

import pytest

from datasets.registry import DATASETS
from helpers.run_main import ROOT


@pytest.mark.parametrize("name", DATASETS)
def test_an_entry_names_the_function_that_reads_its_dataset(name):
    dataset = DATASETS[name]
    parameters = list(inspect.signature(dataset.import_loader()).parameters)
    of_kind = {
        (True, False): ["root", "size", "num_workers", "on_bad_image", "warn", "options"],
        (False, True): ["num_images", "num_classes", "size", "seed", "channels"],
        (False, False): ["root"],
    }
    assert parameters == of_kind[dataset.is_image_folder, dataset.is_generated]
    assert dataset.fixed_size in (None, dataset.image_size)
    assert (dataset.fixed_size is None) == (dataset.is_image_folder or dataset.is_generated)


@pytest.mark.parametrize("name", DATASETS)
def test_images_stay_in_files_above_64_pixels_with_the_statistics_of_imagenet(name):
    dataset = DATASETS[name]
    assert not dataset.is_read_from_disk(64) and dataset.statistics_at(64) == dataset.statistics
    assert dataset.is_read_from_disk(65) == (name in ("imagenet", "folder"))
    mean, std = dataset.statistics_at(65) or (None, None)
    if dataset.is_read_from_disk(65):
        assert mean == pytest.approx([123.675, 116.28, 103.53])
        assert std == pytest.approx([58.395, 57.12, 57.375])
    else:
        assert dataset.statistics_at(65) == dataset.statistics


NEW = """
import sys, types
from datasets import registry
registry.DATASETS["letters"] = registry.Dataset(
    "letters", "letters:letters", image_size=28, num_classes=2, flip=False, augment=False,
    valid_size=3, num_epochs=7,
)
import opts
from cli import network_settings
try:
    opts.parse(["--dataset", "letters", "--imageSize", "32", "--nImages", "9"])
except opts.UsageError as error:
    print(error.report())
opt = opts.parse(["--dataset", "letters", "--nGPU", "0"])
print(opt.imageSize, opt.augment, opt.validSize, opt.nEpochs, network_settings.run_name(opt))

import torch
import datasets.factory
from datasets.memory_loader import ImageTensors, InMemoryDataset

def letters(root):
    pixels = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 28, 28, 3)
    images = ImageTensors(pixels, torch.arange(12) % 2)
    return InMemoryDataset(images, images, ["a", "b"])

sys.modules["datasets.letters"] = types.SimpleNamespace(letters=letters)
data = datasets.factory.create(opt, torch.device("cpu"), print)
print(data.metadata["train"], data.metadata["val"], data.metadata["test"], data.classes)
"""


def test_a_new_dataset_is_a_module_and_an_entry():
    command = [sys.executable, "-c", NEW]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *errors, settings, counts = done.stdout.splitlines()
    assert any("imageSize: images of letters have 28 pixels, not 32" in line for line in errors)
    assert any("nImages has no effect on letters" in line for line in errors)
    assert settings == "28 False 3 7 letters-densenet-BC-L100-k12-seed0"
    assert counts == "9 3 12 ['a', 'b']"
