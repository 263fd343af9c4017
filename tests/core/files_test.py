"""What is kept in files: arrays of work that was done, and nothing of work that was not."""

import numpy as np
import pytest

from musicrl_jax.core.files import kept


def test_work_is_done_once_and_anew_for_other_settings(tmp_path):
    calls = []

    def make():
        calls.append(len(calls))
        return {"a": np.full((2, 3), len(calls), np.float32), "b": np.array(["words"])}

    first, again = (kept(tmp_path, "work", {"seed": 1}, make) for _ in range(2))
    assert calls == [0] and set(again) == {"a", "b"}
    for name, array in first.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    assert kept(tmp_path, "work", {"seed": 2}, make)["a"][0, 0] == 2
    assert kept(tmp_path, "other work", {"seed": 1}, make)["a"][0, 0] == 3


def test_work_that_failed_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path, "work", None, lambda: {"a": np.asarray(1 // 0)})
    assert not list(tmp_path.iterdir())
