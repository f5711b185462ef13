"""One small bundle with a tokenizer, every weight away from its initial value, for all tests of this folder."""

import pytest
from small_models import randomize

import gemma4_jax as g4

KINDS = ("sliding_attention", "full_attention")


@pytest.fixture(scope="session")
def bundle():
    """Two layers, window 8, 512 entries, a drafter of one layer of each kind."""
    sizes = {"num_hidden_layers": 2, "layer_types": KINDS, "vision": None, "audio": None, "hidden_size": 32}
    made = g4.init("tiny", seed=1, config_overrides={**sizes, "intermediate_size": 48})
    made.model, made.drafter = randomize(made.model, 2), randomize(made.drafter, 3)
    return made


@pytest.fixture(scope="session")
def log_probabilities(bundle):
    """Function: the log-softmax of ``g4.logits`` of one row, for the tokens behind each position."""
    import numpy as np
    import scipy.special

    def of(row):
        logits = np.asarray(g4.logits(bundle, [row])[0], np.float64)
        return scipy.special.log_softmax(logits, axis=-1)[np.arange(len(row) - 1), np.asarray(row[1:])]

    return of
