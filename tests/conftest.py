"""Settings of the whole suite: no network, quiet libraries, one thread a process is enough."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("flexmoe", deadline=None, max_examples=60)
settings.load_profile("flexmoe")

torch.set_num_threads(1)  # the suite runs in one process a core


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
