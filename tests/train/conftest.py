"""One compiled trainer for the whole folder."""

import mini_train
import pytest


@pytest.fixture(scope="session")
def trainer():
    """The mini trainer on one device; its state is made by ``trainer.init()``."""
    return mini_train.mini_trainer()
