"""What a forked run finds imported already: all that `main.py` imports at some point."""

# ruff: noqa: F401

import sklearn.datasets
import torch.utils.tensorboard
import tqdm
import yaml

import checkpoints
import datasets.factory
import datasets.image_folder
import distributed.rendezvous
import engine.device
import experiment.log
import experiment.resume
import main
import models.factory
import train
from faults import sabotage
