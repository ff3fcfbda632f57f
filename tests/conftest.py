"""Settings of the whole suite: no network, quiet libraries, one thread a process is enough."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

from flexmoe.methods import FROM_FILES, METHODS, all_methods
from flexmoe.statistics import STATISTICS

logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("flexmoe", deadline=None, max_examples=60)
settings.load_profile("flexmoe")

torch.set_num_threads(1)  # the suite runs in one process a core


OWN = {*all_methods(), *STATISTICS}


@pytest.fixture(autouse=True)
def only_own_methods():
    """Methods and statistics that a test has read from a file are forgotten after it."""
    yield
    FROM_FILES.clear()
    for declared in (METHODS, STATISTICS):
        for name in declared.keys() - OWN:
            del declared[name]
