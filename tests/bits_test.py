"""Sampled tokens, rewards and three updates are those of an early revision."""

import json

import bits
import jax
import numpy as np
import pytest


# Slow: it compiles all parts of a system, for a regression that other tests would locate.
@pytest.mark.slow
def test_a_random_musiclm_samples_scores_and_learns_as_before(tmp_path):
    """`tests/benchmarks/bits.py --record` wrote the numbers, separately for each version of jax."""
    recorded = json.loads(bits.RECORD.read_text(encoding="utf-8")).get(jax.__version__)
    if recorded is None:
        pytest.skip(f"bits.json has no numbers of jax {jax.__version__}")
    results = bits.updates(str(bits.write_random(tmp_path)), bits.RANDOM_SECONDS)
    assert set(filter(bits.recorded, results)) == set(recorded)
    for name, numbers in recorded.items():
        if name.startswith("tokens"):
            np.testing.assert_array_equal(results[name], numbers, name)
        else:
            np.testing.assert_allclose(results[name], numbers, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(np.unique(recorded["tokens 0"])) > 3 and np.ptp(recorded["reward 0"]) > 1e-4
    assert recorded["kl 0"] == 0 < recorded["kl 2"] and max(recorded["moves"]) > 1e-3
