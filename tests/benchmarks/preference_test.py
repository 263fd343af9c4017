"""The preference model's table: how well its chances are calibrated."""

import numpy as np
import pytest
from preference import calibration_error


def test_calibration_is_measured_bin_by_bin():
    chances = np.repeat([0.1, 0.5, 0.9], 100)
    came = np.concatenate([np.arange(100) < share for share in (10, 50, 90)]).astype(float)
    assert calibration_error(chances, came, bins=3) == pytest.approx(0)
    assert calibration_error(chances, 1 - came, bins=3) == pytest.approx((0.8 + 0 + 0.8) / 3)
    # On the whole right and yet uncalibrated: one bin does not see it.
    assert calibration_error(chances, np.full(300, 0.5), bins=1) == pytest.approx(0)
    assert calibration_error(chances, np.full(300, 0.5), bins=3) == pytest.approx(0.8 / 3)
    assert calibration_error(np.full(50, 0.7), np.ones(50)) == pytest.approx(0.3)
