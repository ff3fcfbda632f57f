"""Settings of the whole suite: no network, quiet libraries, one thread a process is enough."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

from flexmoe.methods import METHODS

logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("flexmoe", deadline=None, max_examples=60)
settings.load_profile("flexmoe")

torch.set_num_threads(1)  # the suite runs in one process a core


@pytest.fixture(autouse=True)
def forget_the_example():
    """The method of docs/my_method.py, which tests read, is none of those other tests count."""
    yield
    METHODS.pop("reach", None)
