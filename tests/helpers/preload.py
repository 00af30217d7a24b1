"""Import for a forked run all that `main.py` imports at some point."""

# ruff: noqa: F401

import sklearn.datasets
import tensorboard.plugins.hparams.metadata
import torch.utils.serialization.config
import torch.utils.tensorboard
import tqdm
import yaml
from PIL import Image

import checkpoints
import datasets.factory
import datasets.image_folder
import datasets.synthetic
import distributed.rendezvous
import engine.device
import engine.memory
import experiment.log
import experiment.resume
import main
import models.densenet
import models.factory
import train
from faults import sabotage

Image.init()
